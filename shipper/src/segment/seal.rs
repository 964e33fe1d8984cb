//! What makes stored bytes those of one segment: a check in a plain vault, a key of its own in an encrypted one.
//!
//! Frames are sealed by the threads that compress them, before it is known where in the segment they will stand. So
//! each takes a number from its segment's counter; the directory, which is sealed last, says which number stands where.
//!
//! A key is made of a random salt for each segment that is begun, also where one of the same name was begun before; and
//! its counter never goes back. So no key and number ever seal two texts.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{FOOTER_BYTES, Frame, SegmentName, Version};
use super::reference::segment_name;
use super::sealed::SEALED_FOOTER_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::keys::aead::{AeadKey, Domain, TAG_BYTES, Tag, nonce};
use crate::keys::derive::hkdf;
use crate::keys::secret::random;
use crate::keys::{Check, Keys};

/// Whose blocks a segment holds, and the keys of its vault.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Identity of the vault.
    pub vault_id: [u8; 16],
    /// Name of the machine.
    pub machine: String,
    /// Name of the disk.
    pub disk: String,
    /// Check of `MACHINE/DISK`.
    pub check: Check,
    /// Keys of the vault.
    pub keys: Keys,
}

impl Owner {
    /// The version of its segments.
    pub fn version(&self) -> Version {
        match self.keys.sealing() {
            None => Version::First,
            Some(_) => Version::Second,
        }
    }

    /// Bytes of the footers of its segments.
    pub fn footer_bytes(&self) -> usize {
        match self.keys.sealing() {
            None => FOOTER_BYTES,
            Some(_) => SEALED_FOOTER_BYTES,
        }
    }
}

/// What follows the identity of a segment in the associated data.
#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AssociatedTail {
    domain: u8,
    codec: u8,
    block_count: U16,
    number: U32,
}

const _: () = assert!(size_of::<AssociatedTail>() == 8);

/// The key of one sealed segment.
pub struct SegmentKey {
    key: AeadKey,
    /// What the segment is, which all associated data begin with.
    identity: String,
}

impl fmt::Debug for SegmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SegmentKey")
    }
}

impl SegmentKey {
    /// The key of the segment with this name and salt; `None`: the vault is not encrypted.
    ///
    /// # Errors
    ///
    /// The library fails.
    pub fn derive(owner: &Owner, name: &SegmentName, salt: &[u8; 32]) -> Result<Option<Self>> {
        let Some(sealing) = owner.keys.sealing() else {
            return Ok(None);
        };
        let parts = [&*owner.machine, &owner.disk, &segment_name(name)];
        let identity = sealing.identity("segment", &parts);
        let key = hkdf(sealing.segments.bytes(), salt, identity.as_bytes())?;
        let key = AeadKey::new(sealing.cipher(), &key)?;
        Ok(Some(Self { key, identity }))
    }

    fn associated(&self, tail: AssociatedTail, behind: &[u8]) -> Vec<u8> {
        [self.identity.as_bytes(), tail.as_bytes(), behind].concat()
    }

    fn of_frame(&self, number: u32, codec: u8, block_count: u16) -> Vec<u8> {
        let tail = AssociatedTail {
            domain: Domain::Frame as u8,
            codec,
            block_count: block_count.into(),
            number: number.into(),
        };
        self.associated(tail, &[])
    }

    fn of_directory(&self, footer: &[u8]) -> Vec<u8> {
        let tail = AssociatedTail {
            domain: Domain::Directory as u8,
            codec: 0,
            block_count: 0.into(),
            number: 0.into(),
        };
        self.associated(tail, footer)
    }

    /// Opens the stored bytes of a frame in place; `None`: they are damaged, or those of another one.
    pub fn open_frame(&self, frame: &Frame, stored: &mut [u8]) -> Option<()> {
        let associated = self.of_frame(frame.number, frame.codec, frame.block_count);
        let nonce = nonce(Domain::Frame, frame.number);
        self.key.open(nonce, &associated, &frame.check, stored)
    }

    /// Seals compressed blocks in place as the frame that a directory describes. `None`: they are not those that were sealed for
    /// it, and the bytes are zero then: under its nonce nothing else may ever be seen.
    ///
    /// # Errors
    ///
    /// The cipher fails.
    pub fn seal_again(&self, frame: &Frame, stored: &mut [u8]) -> Result<Option<()>> {
        let associated = self.of_frame(frame.number, frame.codec, frame.block_count);
        let nonce = nonce(Domain::Frame, frame.number);
        let tag = self.key.seal(nonce, &associated, stored)?;
        if tag != frame.check {
            stored.fill(0);
            return Ok(None);
        }
        Ok(Some(()))
    }

    /// Seals the text of a directory in place, and its tag behind it.
    ///
    /// # Errors
    ///
    /// The cipher fails.
    pub(super) fn seal_directory(&self, footer: &[u8], text: &mut Vec<u8>) -> Result<Tag> {
        let tag = self.key.seal(
            nonce(Domain::Directory, 0),
            &self.of_directory(footer),
            text,
        )?;
        text.extend_from_slice(&tag);
        Ok(tag)
    }

    /// Opens a directory, of which the tag is the end.
    pub(super) fn open_directory(&self, footer: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (text, tag) = sealed.split_at(sealed.len().checked_sub(TAG_BYTES)?);
        let tag: Tag = tag.try_into().ok()?;
        let mut text = text.to_vec();
        let nonce = nonce(Domain::Directory, 0);
        self.key
            .open(nonce, &self.of_directory(footer), &tag, &mut text)?;
        Some(text)
    }
}

/// A segment that is being made: its name, and what makes bytes its own.
#[derive(Debug)]
pub struct SegmentSeal {
    name: SegmentName,
    owner: Owner,
    sealed: Option<Sealed>,
}

#[derive(Debug)]
struct Sealed {
    salt: [u8; 32],
    key: Arc<SegmentKey>,
    next: AtomicU32,
}

impl SegmentSeal {
    /// Begins a segment.
    ///
    /// # Errors
    ///
    /// The system has no random numbers.
    pub fn begin(name: SegmentName, owner: &Owner) -> Result<Arc<Self>> {
        let salt = match owner.keys.sealing() {
            Some(_) => random()?,
            None => [0; 32],
        };
        let sealed = SegmentKey::derive(owner, &name, &salt)?.map(|key| Sealed {
            salt,
            key: Arc::new(key),
            next: AtomicU32::new(0),
        });
        Ok(Arc::new(Self {
            name,
            owner: owner.clone(),
            sealed,
        }))
    }

    /// Name of the segment.
    pub fn name(&self) -> SegmentName {
        self.name
    }

    /// Whose blocks it holds.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Salt and key of a segment that is sealed.
    pub(super) fn key(&self) -> Option<(&[u8; 32], &Arc<SegmentKey>)> {
        self.sealed
            .as_ref()
            .map(|sealed| (&sealed.salt, &sealed.key))
    }

    /// Makes compressed blocks a frame of this segment, in place; returns its number, and its check or tag.
    ///
    /// # Errors
    ///
    /// The cipher fails.
    pub(super) fn seal_frame(
        &self,
        codec: u8,
        block_count: u16,
        stored: &mut [u8],
    ) -> Result<(u32, Check)> {
        let Some(Sealed { key, next, .. }) = &self.sealed else {
            return Ok((0, self.owner.keys.check(&[stored])));
        };
        let one_more = |number: u32| number.checked_add(1);
        let number = next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .map_err(|_| Error::new(ErrorKind::Invalid, "A segment has too many frames"))?;
        let associated = key.of_frame(number, codec, block_count);
        let tag = key
            .key
            .seal(nonce(Domain::Frame, number), &associated, stored)?;
        Ok((number, tag))
    }
}

/// The segment that frames are made for at the moment, for all threads that make them.
#[derive(Debug)]
pub struct Current(Mutex<Arc<SegmentSeal>>);

impl Current {
    /// It begins with this one.
    pub fn new(seal: Arc<SegmentSeal>) -> Self {
        Self(Mutex::new(seal))
    }

    /// The segment at the moment.
    pub fn get(&self) -> Arc<SegmentSeal> {
        let seal = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&seal)
    }

    /// Goes on with another one. Frames of the one before may still come.
    pub fn set(&self, seal: Arc<SegmentSeal>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = seal;
    }
}
