//! Page-aligned buffers of a few sizes, kept for reuse so that the way of a request allocates
//! nothing once a worker is warm.

use memmap2::MmapMut;

/// Room before the data of an operation: the header of a READ's reply is written right before
/// the data, so that both leave in one piece while the data stay page-aligned.
pub const HEAD_BYTES: usize = 4096;
/// Data sizes of the classes; the last is the largest payload of a request.
const CLASS_BYTES: [usize; 6] = [4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 32 << 20];
/// Idle memory that one worker keeps: eight requests of 1 MiB, and as many small ones as are common.
const IDLE_BYTES_MAX: usize = 10 << 20;

/// A page-aligned piece of memory.
#[derive(Debug)]
pub struct Buffer {
    map: MmapMut,
    class: usize,
}

impl Buffer {
    /// All bytes, head included.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// All bytes, head included.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

/// The idle buffers of one worker.
#[derive(Debug, Default)]
pub struct BufferPool {
    idle: [Vec<Buffer>; CLASS_BYTES.len()],
    idle_bytes: usize,
}

impl BufferPool {
    /// A buffer with room for `data_bytes` after [`HEAD_BYTES`].
    ///
    /// # Errors
    ///
    /// The length exceeds the largest class, or memory is short.
    pub fn take(&mut self, data_bytes: usize) -> std::io::Result<Buffer> {
        let class = CLASS_BYTES
            .iter()
            .position(|&bytes| data_bytes <= bytes)
            .ok_or(std::io::ErrorKind::InvalidInput)?;
        if let Some(buffer) = self.idle[class].pop() {
            self.idle_bytes -= buffer.map.len();
            return Ok(buffer);
        }
        let map = MmapMut::map_anon(HEAD_BYTES + CLASS_BYTES[class])?;
        Ok(Buffer { map, class })
    }

    /// Takes a buffer back; what exceeds the idle budget goes to the system.
    pub fn put(&mut self, buffer: Buffer) {
        let bytes = buffer.map.len();
        if self.idle_bytes + bytes <= IDLE_BYTES_MAX {
            self.idle_bytes += bytes;
            self.idle[buffer.class].push(buffer);
        }
    }
}
