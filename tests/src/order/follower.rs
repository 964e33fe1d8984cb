//! The recovery points of a vault, brought into memory one after the other.
//!
//! A manifest lists all segments of a disk, oldest first. Where it begins with those of the point before, only
//! the new ones are read and applied to the image of that point; else the image is made anew. Every
//! frame and block is checked as a restore does it. The caller proves the short cut by comparing images with
//! what `shipper restore` makes of the same point.

use shipper::error::Result;
use shipper::keys::source::Access;
use shipper::segment::format::{Directory, ExtentEntry};
use shipper::segment::frame::{checked_part, damaged, decode_frame};
use shipper::segment::reader::{check_header, decode_tail, tail_bytes};
use shipper::segment::reference::SegmentRef;
use shipper::vault::Vault;
use tracker::extent::Epoch;

use super::BLOCK_BYTES;

static ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// A disk as it was at the newest point that was taken.
#[derive(Debug)]
pub struct Mirror {
    name: String,
    segments: Vec<SegmentRef>,
    image: Vec<u8>,
    /// Blocks that this point has made different; sorted, each once.
    changed: Vec<u32>,
}

impl Mirror {
    /// Name of the disk.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bytes of the disk.
    pub fn image(&self) -> &[u8] {
        &self.image
    }

    /// Blocks that differ from those of the point before, in ascending order.
    pub fn changed(&self) -> &[u32] {
        &self.changed
    }

    fn block_mut(&mut self, block: u64) -> Option<&mut [u8]> {
        let from = usize::try_from(block).ok()?.checked_mul(BLOCK_BYTES)?;
        self.image.get_mut(from..from.checked_add(BLOCK_BYTES)?)
    }

    fn put(&mut self, block: u64, bytes: &[u8]) {
        let Some(place) = self.block_mut(block) else {
            return;
        };
        if *place != *bytes {
            place.copy_from_slice(bytes);
            self.changed.push(block as u32);
        }
    }
}

/// Reads the points of a machine in their order.
#[derive(Debug)]
pub struct Follower {
    vault: Vault,
    machine: String,
    /// The newest point that was taken.
    newest: Epoch,
    taken: Vec<Epoch>,
    disks: Vec<Mirror>,
}

impl Follower {
    /// Follows a machine from its first point on.
    ///
    /// # Errors
    ///
    /// There is no vault.
    pub fn new(url: &str, access: &Access, machine: &str, disks: &[(&str, u64)]) -> Result<Self> {
        let mirror = |(name, size): &(&str, u64)| Mirror {
            name: (*name).to_owned(),
            segments: Vec::new(),
            image: vec![0; *size as usize],
            changed: Vec::new(),
        };
        Ok(Self {
            vault: Vault::open(url, access)?,
            machine: machine.to_owned(),
            newest: Epoch::ZERO,
            taken: Vec::new(),
            disks: disks.iter().map(mirror).collect(),
        })
    }

    /// Points that were published and not taken yet, in order.
    ///
    /// # Errors
    ///
    /// The vault cannot be listed.
    pub fn waiting(&self) -> Result<Vec<Epoch>> {
        let mut points = self.vault.points(&self.machine)?;
        points.retain(|point| *point > self.newest);
        Ok(points)
    }

    /// All points that were taken.
    pub fn taken(&self) -> &[Epoch] {
        &self.taken
    }

    /// All points of the machine that are in the vault.
    ///
    /// # Errors
    ///
    /// The vault cannot be listed.
    pub fn published(&self) -> Result<Vec<Epoch>> {
        self.vault.points(&self.machine)
    }

    /// The disks at the newest point that was taken.
    pub fn disks(&self) -> &[Mirror] {
        &self.disks
    }

    /// Brings a point into memory.
    ///
    /// # Errors
    ///
    /// It is not there, or damaged.
    ///
    /// # Panics
    ///
    /// It does not have all of the disks, or not in their size.
    pub fn take(&mut self, point: Epoch) -> Result<()> {
        let manifest = self.vault.manifest(&self.machine, point)?;
        for mirror in &mut self.disks {
            let disk = manifest.disk(&mirror.name).expect("a point has all disks");
            assert_eq!(disk.size_bytes, mirror.image.len() as u64, "the size");
            mirror.changed.clear();
            let known = mirror.segments.len();
            let new = if disk.segments.starts_with(&mirror.segments) {
                &disk.segments[known..]
            } else {
                mirror.image.fill(0);
                mirror
                    .changed
                    .extend(0..(disk.size_bytes as usize / BLOCK_BYTES) as u32);
                &disk.segments[..]
            };
            for segment in new {
                apply(&self.vault, &self.machine, segment, mirror)?;
            }
            mirror.changed.sort_unstable();
            mirror.changed.dedup();
            mirror.segments.clone_from(&disk.segments);
        }
        self.newest = point;
        self.taken.push(point);
        Ok(())
    }
}

/// Makes a segment's blocks those of a disk.
fn apply(vault: &Vault, machine: &str, segment: &SegmentRef, mirror: &mut Mirror) -> Result<()> {
    let key = vault.segment_key(machine, &mirror.name, segment);
    let owner = vault.owner(machine, &mirror.name);
    let object = vault.store().read(&key, None)?;
    check_header(&object, &key, &owner)?;
    let tail_bytes = tail_bytes(segment, &owner) as usize;
    let tail = object
        .len()
        .checked_sub(tail_bytes)
        .filter(|_| object.len() as u64 == segment.bytes)
        .ok_or_else(|| damaged(&key, "it has another size"))?;
    let directory = decode_tail(&object[tail..], &key, segment, &owner)?;
    let mut frame = (usize::MAX, Vec::new());
    for entry in &directory.extents {
        let Some(number) = entry.frame_index() else {
            for block in entry.extent().first_block..entry.extent().end_block() {
                mirror.put(block, &ZERO_BLOCK);
            }
            continue;
        };
        if frame.0 != number {
            let raw = unpack(vault, &directory, number, &object);
            frame = (number, raw.map_err(|what| damaged(&key, &what))?);
        }
        put_extent(vault, &directory, entry, &frame.1, mirror)
            .map_err(|what| damaged(&key, &what))?;
    }
    Ok(())
}

fn unpack(
    vault: &Vault,
    directory: &Directory,
    number: usize,
    object: &[u8],
) -> std::result::Result<Vec<u8>, String> {
    let no_frame = || format!("it has no frame {number}");
    let frame = directory.frames.get(number).ok_or_else(no_frame)?;
    let range = frame.range();
    let stored = object.get(range.start as usize..range.end as usize);
    decode_frame(directory, frame, stored.ok_or_else(no_frame)?, vault.keys())
}

fn put_extent(
    vault: &Vault,
    directory: &Directory,
    entry: &ExtentEntry,
    raw: &[u8],
    mirror: &mut Mirror,
) -> std::result::Result<(), String> {
    let extent = entry.extent();
    let bytes = checked_part(directory, entry, extent, raw, vault.keys())?;
    for (block, bytes) in (extent.first_block..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
        mirror.put(block, bytes);
    }
    Ok(())
}
