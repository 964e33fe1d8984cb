//! A small vault, and a model of what its recovery points are.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tempfile::TempDir;
use tracker::extent::{BLOCK_SIZE, Epoch, Extent};

use crate::error::Result;
use crate::keys::aead::Cipher;
use crate::keys::slots::{Argon2Cost, UserSecret};
use crate::keys::source::{Access, generate_key_file};
use crate::recovery::restore::{RestoreOptions, RestoreReport, restore};
use crate::recovery::verify::{VerifyOptions, VerifyReport, verify};
use crate::segment::codec::{Codec, Compressor};
use crate::segment::format::SegmentName;
use crate::segment::frame::FrameBuilder;
use crate::segment::reference::SegmentRef;
use crate::segment::seal::{Current, SegmentSeal};
use crate::segment::writer::SegmentWriter;
use crate::store::Created;
use crate::vault::manifest::{Consistency, DiskPoint, Manifest};
use crate::vault::{Protection, Vault, generation};

/// The machine of all tests.
pub const MACHINE: &str = "machine";
/// The key file of an encrypted vault.
const KEY_FILE: &str = "vault.key";
const BLOCK: usize = BLOCK_SIZE as usize;

/// What blocks become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zero, and kept without data.
    Zero,
    /// Zero, and yet kept as data.
    StoredZero,
    /// A text that compresses well.
    Text(u32),
    /// Bytes that do not compress.
    Noise(u32),
    /// A text in the one sector that the last block of a disk has; behind it are zeroes.
    Sector(u32),
}

impl Content {
    /// The bytes of one block.
    pub fn block(self, block: u64) -> Vec<u8> {
        match self {
            Self::Zero | Self::StoredZero => vec![0; BLOCK],
            Self::Text(seed) => {
                let line = format!("Block {block} of writing {seed}.\n");
                line.bytes().cycle().take(BLOCK).collect()
            }
            Self::Sector(seed) => {
                let mut bytes = Self::Text(seed).block(block);
                bytes[512..].fill(0);
                bytes
            }
            Self::Noise(seed) => {
                let mut bytes = vec![0; BLOCK];
                let mut hasher = blake3::Hasher::new();
                hasher.update(&seed.to_le_bytes());
                hasher.update(&block.to_le_bytes());
                hasher.finalize_xof().fill(&mut bytes);
                bytes
            }
        }
    }
}

/// Blocks that change, in the order of the disk.
pub type Changes = Vec<(Extent, Content)>;

/// Blocks from `first_block` on.
pub fn blocks(first_block: u64, block_count: u64) -> Extent {
    Extent {
        first_block,
        block_count,
    }
}

/// Makes the changes to a model of the disk, as far as it goes.
pub fn apply(model: &mut [u8], changes: &Changes) {
    for (extent, content) in changes {
        for block in extent.first_block..extent.end_block() {
            let from = (block as usize * BLOCK).min(model.len());
            let to = (from + BLOCK).min(model.len());
            model[from..to].copy_from_slice(&content.block(block)[..to - from]);
        }
    }
}

/// A vault in a temporary folder.
pub struct Site {
    folder: TempDir,
    pub vault: Vault,
}

impl Site {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::make(folder, &Protection::Plain)
    }

    /// A vault that is encrypted, with a key file.
    pub fn sealed(cipher: Cipher) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = generate_key_file(&folder.path().join(KEY_FILE)).unwrap();
        let protection = Protection::Sealed {
            secret: UserSecret::KeyFile(key),
            label: "first".to_owned(),
            cost: Argon2Cost::default(),
            cipher,
        };
        Self::make(folder, &protection)
    }

    fn make(folder: TempDir, protection: &Protection) -> Self {
        let url = format!("file://{}/vault", folder.path().display());
        let vault = Vault::create(&url, protection).unwrap();
        if vault.keys().sealing().is_some() {
            assert_eq!(generation::claim(&vault, MACHINE, "here").unwrap(), 1);
        }
        Self { folder, vault }
    }

    /// What opens the vault.
    pub fn access(&self) -> Access {
        let sealed = self.vault.keys().sealing().is_some();
        Access {
            key_file: sealed.then(|| self.path(KEY_FILE)),
            ..Access::default()
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The file of an object.
    pub fn object(&self, key: &str) -> PathBuf {
        self.path("vault").join(key)
    }

    /// Files of all manifests and segments.
    pub fn objects(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        files_below(&self.object("machines"), &mut found);
        found.sort();
        found
    }

    /// Puts a segment with these changes, `frame_blocks` blocks in each frame.
    pub fn segment(
        &self,
        disk: &str,
        epoch: u64,
        number: u32,
        codec: Codec,
        frame_blocks: u64,
        changes: &Changes,
    ) -> SegmentRef {
        let name = SegmentName {
            generation: 1,
            first_epoch: Epoch(epoch),
            last_epoch: Epoch(epoch),
            number,
        };
        put_segment(
            &self.vault,
            self.folder.path(),
            disk,
            name,
            codec,
            frame_blocks,
            changes,
        )
    }

    /// Publishes a point with these disks and sizes in bytes.
    pub fn publish(&self, epoch: u64, previous: u64, disks: &[(&str, u64, &[SegmentRef])]) {
        put_manifest(&self.vault, Epoch(epoch), Epoch(previous), disks);
    }

    pub fn options(&self, point: Option<u64>, target: &str) -> RestoreOptions {
        RestoreOptions {
            machine: MACHINE.to_owned(),
            point: point.map(Epoch),
            disk: None,
            target: self.path(target),
            threads: 2,
        }
    }

    /// Restores the only disk, and returns what the target holds.
    pub fn restore(&self, point: u64) -> Result<(RestoreReport, Vec<u8>)> {
        let options = self.options(Some(point), "restored");
        let report = restore(&self.vault, &options, &|_, _| {})?;
        let bytes = fs::read(&options.target).unwrap();
        fs::remove_file(&options.target).unwrap();
        Ok((report, bytes))
    }

    /// Verifies all; returns the problems as well.
    pub fn verify(&self, data: bool) -> (VerifyReport, Vec<String>) {
        let options = VerifyOptions {
            machine: None,
            data,
            threads: 2,
        };
        let mut lines = Vec::new();
        let report = verify(&self.vault, &options, &mut |line| {
            lines.push(line.to_owned())
        })
        .unwrap();
        assert_eq!(report.problems, lines.len() as u64);
        (report, lines)
    }
}

/// Puts a segment into a vault; its file is made in `folder`.
pub fn put_segment(
    vault: &Vault,
    folder: &Path,
    disk: &str,
    name: SegmentName,
    codec: Codec,
    frame_blocks: u64,
    changes: &Changes,
) -> SegmentRef {
    let path = folder.join("segment");
    let keys = vault.keys();
    let seal = SegmentSeal::begin(name, &vault.owner(MACHINE, disk)).unwrap();
    let current = Current::new(Arc::clone(&seal));
    let mut writer = SegmentWriter::create(&path, seal).unwrap();
    let mut compressor = Compressor::new(codec).unwrap();
    let mut builder = FrameBuilder::default();
    let mut in_frame = 0;
    for (extent, content) in changes {
        if *content == Content::Zero {
            builder.push_zero(*extent);
            continue;
        }
        for block in extent.first_block..extent.end_block() {
            let data = content.block(block);
            builder.push_block(block, &data, keys.fingerprint(&data));
            in_frame += 1;
            if in_frame == frame_blocks {
                let frame = builder.finish(&mut compressor, &current).unwrap();
                writer.append(&frame).unwrap();
                in_frame = 0;
            }
        }
    }
    let frame = builder.finish(&mut compressor, &current).unwrap();
    writer.append(&frame).unwrap();
    let (segment, _) = writer.finish().unwrap();
    let content = Bytes::from(fs::read(&path).unwrap());
    assert_eq!(content.len() as u64, segment.bytes);
    fs::remove_file(&path).unwrap();
    let created = vault
        .store()
        .create(&vault.segment_key(MACHINE, disk, &segment), content);
    assert_eq!(created.unwrap(), Created::New);
    segment
}

/// Publishes a recovery point.
pub fn put_manifest(
    vault: &Vault,
    epoch: Epoch,
    previous: Epoch,
    disks: &[(&str, u64, &[SegmentRef])],
) {
    put_consistent(vault, epoch, previous, (Consistency::Crash, None), disks);
}

/// The same, and for whom it is consistent.
pub fn put_consistent(
    vault: &Vault,
    epoch: Epoch,
    previous: Epoch,
    (consistency, reason): (Consistency, Option<&str>),
    disks: &[(&str, u64, &[SegmentRef])],
) {
    let disks = disks.iter().map(|(name, size_bytes, segments)| DiskPoint {
        name: (*name).to_owned(),
        size_bytes: *size_bytes,
        block_bytes: BLOCK_SIZE,
        journal: "5a".repeat(16),
        dirty_blocks: 0,
        segments: segments.to_vec(),
    });
    let manifest = Manifest {
        vault: vault.id(),
        machine: MACHINE.to_owned(),
        generation: 1,
        epoch,
        previous,
        created: jiff::Timestamp::UNIX_EPOCH,
        consistency,
        reason: reason.map(str::to_owned),
        disks: disks.collect(),
    };
    let bytes = manifest.encode(vault.keys()).unwrap();
    let created = vault
        .store()
        .create(&vault.manifest_key(MACHINE, epoch), Bytes::from(bytes));
    assert_eq!(created.unwrap(), Created::New);
}

/// All files below a folder.
pub fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// A vault of a few KiB with two points of a disk whose last block is short, and the disk at each.
pub fn small() -> (Site, BTreeMap<u64, Vec<u8>>) {
    let site = Site::new();
    let disks = fill(&site);
    (site, disks)
}

/// Puts these points into a vault.
pub fn fill(site: &Site) -> BTreeMap<u64, Vec<u8>> {
    const SIZE: usize = 10 * BLOCK + 512;
    let first = vec![
        (blocks(0, 4), Content::Text(1)),
        (blocks(4, 3), Content::Zero),
        (blocks(9, 2), Content::Text(1)),
    ];
    let second = vec![
        (blocks(1, 1), Content::Text(2)),
        (blocks(2, 1), Content::Zero),
    ];
    let third = vec![
        (blocks(5, 1), Content::Text(3)),
        (blocks(9, 1), Content::Text(3)),
    ];
    let one = site.segment("disk", 1, 0, Codec::Zstd(1), 3, &first);
    let two = site.segment("disk", 2, 0, Codec::Lz4, 32, &second);
    let three = site.segment("disk", 2, 1, Codec::Zstd(1), 32, &third);
    site.publish(1, 0, &[("disk", SIZE as u64, std::slice::from_ref(&one))]);
    site.publish(2, 1, &[("disk", SIZE as u64, &[one, two, three])]);
    let mut model = vec![0; SIZE];
    let mut disks = BTreeMap::new();
    apply(&mut model, &first);
    disks.insert(1, model.clone());
    apply(&mut model, &second);
    apply(&mut model, &third);
    disks.insert(2, model);
    disks
}
