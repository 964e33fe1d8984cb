//! The few parts of the NBD protocol that the light client speaks.

use std::io::{Read, Write};

use crate::Result;

/// Bytes of a request header.
pub const HEADER_BYTES: usize = 28;
/// Bytes of a simple reply without its data.
pub const REPLY_BYTES: usize = 16;

/// Commands, by their numbers in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// READ.
    Read = 0,
    /// WRITE.
    Write = 1,
    /// DISC.
    Disconnect = 2,
    /// FLUSH.
    Flush = 3,
    /// TRIM.
    Trim = 4,
}

/// Chooses an export, with simple replies; its size in bytes.
///
/// # Errors
///
/// The server speaks another protocol, or has no such export.
pub fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if greeting[..16] != *b"NBDMAGICIHAVEOPT" {
        return Err("the server's greeting is not that of NBD".into());
    }
    let mut answer = 3_u32.to_be_bytes().to_vec();
    answer.extend_from_slice(b"IHAVEOPT");
    answer.extend_from_slice(&1_u32.to_be_bytes());
    answer.extend_from_slice(&u32::try_from(export.len())?.to_be_bytes());
    answer.extend_from_slice(export.as_bytes());
    stream.write_all(&answer)?;
    let mut description = [0; 10];
    stream
        .read_exact(&mut description)
        .map_err(|error| format!("the server does not offer the export {export:?}: {error}"))?;
    let [size @ .., _, _] = description;
    Ok(u64::from_be_bytes(size))
}

/// The header of a request.
pub fn header(command: Command, cookie: u64, offset: u64, length: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The cookie of a reply that tells of success.
///
/// # Errors
///
/// It is no simple reply, or one with an error.
pub fn cookie_of(reply: &[u8; REPLY_BYTES]) -> Result<u64> {
    let [a, b, c, d, error @ .., _, _, _, _, _, _, _, _] = *reply;
    let [.., i, j, k, l, m, n, o, p] = *reply;
    if [a, b, c, d] != [0x67, 0x44, 0x66, 0x98] {
        return Err(format!("a reply begins with {:02x?}", [a, b, c, d]).into());
    }
    match u32::from_be_bytes(error) {
        0 => Ok(u64::from_be_bytes([i, j, k, l, m, n, o, p])),
        error => Err(format!("a request was answered with the error {error}").into()),
    }
}

/// Reads, with no other request in flight.
///
/// # Errors
///
/// The connection is lost, or the server answers with an error.
pub fn read(stream: &mut (impl Read + Write), offset: u64, buffer: &mut [u8]) -> Result<()> {
    let length = u32::try_from(buffer.len())?;
    stream.write_all(&header(Command::Read, offset, offset, length))?;
    let mut reply = [0; REPLY_BYTES];
    stream.read_exact(&mut reply)?;
    if cookie_of(&reply)? != offset {
        return Err("a reply is to another request".into());
    }
    stream.read_exact(buffer)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let bytes = header(Command::Write, 2, 3, 4);
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1]);
        assert_eq!((bytes[15], bytes[23], bytes[27]), (2, 3, 4));
    }

    /// Says what was prepared, and takes anything.
    struct Peer<'a>(&'a [u8]);

    impl Read for Peer<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Peer<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_read_takes_the_data_of_its_own_reply_alone() {
        let reply = [
            0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 7, 8,
        ];
        let mut buffer = [0; 2];
        read(&mut Peer(&reply), 4096, &mut buffer).unwrap();
        assert_eq!(buffer, [7, 8]);
        assert!(read(&mut Peer(&reply), 8192, &mut buffer).is_err());
        assert!(read(&mut Peer(&reply[..17]), 4096, &mut buffer).is_err());
    }

    #[test]
    fn replies_are_checked() {
        let mut reply = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2];
        assert_eq!(cookie_of(&reply).unwrap(), 0x102);
        reply[7] = 5;
        assert!(cookie_of(&reply).is_err());
        reply[7] = 0;
        reply[0] = 0;
        assert!(cookie_of(&reply).is_err());
    }
}
