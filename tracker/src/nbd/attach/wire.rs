//! Messages of generic netlink, and the numbers of the kernel's nbd family. Pure.
//!
//! Source: linux/netlink.h, linux/genetlink.h and linux/nbd-netlink.h, whose names stand here. All
//! integers are in the machine's own byte order; attributes and messages are padded to 4 bytes.

/// Type of the messages to the controller of generic netlink.
pub const GENL_ID_CTRL: u16 = 0x10;
/// Type of a message that carries an error number, zero for an acknowledgement.
pub const NLMSG_ERROR: u16 = 2;
/// Version of both families' messages.
pub const FAMILY_VERSION: u8 = 1;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_F_NET_BYTEORDER: u16 = 1 << 14;
const NLA_TYPE_MASK: u16 = !(NLA_F_NESTED | NLA_F_NET_BYTEORDER);
const ALIGNMENT: usize = 4;
const HEADER_BYTES: usize = 16;
const GENERIC_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;

/// Numbers of the controller.
pub mod controller {
    /// Asks for a family by its name.
    pub const CTRL_CMD_GETFAMILY: u8 = 3;
    /// The number of a family, which is the type of its messages.
    pub const CTRL_ATTR_FAMILY_ID: u16 = 1;
    /// The name of a family.
    pub const CTRL_ATTR_FAMILY_NAME: u16 = 2;
}

/// Commands of the nbd family.
pub mod command {
    /// Makes a device of connections.
    pub const NBD_CMD_CONNECT: u8 = 1;
    /// Takes a device apart.
    pub const NBD_CMD_DISCONNECT: u8 = 2;
    /// Gives a device a connection for one that it has lost, or another size.
    pub const NBD_CMD_RECONFIGURE: u8 = 3;
}

/// Attributes of the nbd family.
pub mod attribute {
    /// Number of the device.
    pub const NBD_ATTR_INDEX: u16 = 1;
    /// Size of the device.
    pub const NBD_ATTR_SIZE_BYTES: u16 = 2;
    /// Smallest request of the device.
    pub const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
    /// Seconds that a request may take before it is sent again on another connection.
    pub const NBD_ATTR_TIMEOUT: u16 = 4;
    /// The export's transmission flags.
    pub const NBD_ATTR_SERVER_FLAGS: u16 = 5;
    /// What happens to the device at its last close.
    pub const NBD_ATTR_CLIENT_FLAGS: u16 = 6;
    /// A list of NBD_SOCK_ITEM.
    pub const NBD_ATTR_SOCKETS: u16 = 7;
    /// Seconds that requests wait for a connection when none is left.
    pub const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
    /// Text without which a device cannot be given connections; Linux 5.14.
    pub const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
    /// Inside NBD_ATTR_SOCKETS: one connection.
    pub const NBD_SOCK_ITEM: u16 = 1;
    /// Inside NBD_SOCK_ITEM: its descriptor in the calling process.
    pub const NBD_SOCK_FD: u16 = 1;
}

/// A message that is being built.
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request to a family, which the kernel is to acknowledge.
    pub fn new(family: u16, command: u8, sequence: u32) -> Self {
        let mut bytes = vec![0; ALIGNMENT];
        bytes.extend_from_slice(&family.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        // The sender's port: the kernel knows it.
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(&[command, FAMILY_VERSION, 0, 0]);
        Self { bytes }
    }

    /// Adds a number of 32 bits.
    #[must_use]
    pub fn u32(self, attribute: u16, value: u32) -> Self {
        self.attribute(attribute, &value.to_ne_bytes())
    }

    /// Adds a number of 64 bits.
    #[must_use]
    pub fn u64(self, attribute: u16, value: u64) -> Self {
        self.attribute(attribute, &value.to_ne_bytes())
    }

    /// Adds a text, which the kernel wants with a zero at its end.
    #[must_use]
    pub fn text(self, attribute: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(attribute, &bytes)
    }

    /// Adds an attribute that holds what `fill` adds.
    #[must_use]
    pub fn nest(mut self, attribute: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(&[0; ATTRIBUTE_HEADER_BYTES]);
        let mut filled = fill(self);
        let length = filled.bytes.len() - begin;
        filled.patch_attribute_header(begin, length, attribute | NLA_F_NESTED);
        filled
    }

    /// The whole message.
    pub fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }

    fn attribute(mut self, attribute: u16, value: &[u8]) -> Self {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(&[0; ATTRIBUTE_HEADER_BYTES]);
        self.bytes.extend_from_slice(value);
        let length = self.bytes.len() - begin;
        self.patch_attribute_header(begin, length, attribute);
        self.bytes.resize(aligned(self.bytes.len()), 0);
        self
    }

    fn patch_attribute_header(&mut self, begin: usize, length: usize, kind: u16) {
        // Callers send a few numbers, short texts and at most some tens of descriptors.
        let length = u16::try_from(length).unwrap_or(u16::MAX);
        self.bytes[begin..begin + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[begin + 2..begin + 4].copy_from_slice(&kind.to_ne_bytes());
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT)
}

/// A message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received<'a> {
    /// [`NLMSG_ERROR`] or the number of a family.
    pub kind: u16,
    /// The sequence number of the request that it belongs to.
    pub sequence: u32,
    payload: &'a [u8],
}

impl<'a> Received<'a> {
    /// The error number of an [`NLMSG_ERROR`]: zero for an acknowledgement, else positive.
    pub fn error_number(&self) -> Option<i32> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let (number, _) = self.payload.split_first_chunk::<4>()?;
        i32::from_ne_bytes(*number).checked_neg()
    }

    /// The value of an attribute of a family's message.
    pub fn attribute(&self, wanted: u16) -> Option<&'a [u8]> {
        let mut rest = self.payload.get(GENERIC_HEADER_BYTES..)?;
        while let Some((kind, value, next)) = split_attribute(rest) {
            if kind == wanted {
                return Some(value);
            }
            rest = next;
        }
        None
    }
}

/// The first attribute's type and value, and what follows it.
fn split_attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    let (kind, _) = rest.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_ne_bytes(*length));
    let value = bytes.get(ATTRIBUTE_HEADER_BYTES..length)?;
    let next = bytes.get(aligned(length)..).unwrap_or_default();
    Some((u16::from_ne_bytes(*kind) & NLA_TYPE_MASK, value, next))
}

/// The messages of one datagram, as far as they are whole.
pub fn received(mut datagram: &[u8]) -> Vec<Received<'_>> {
    let mut messages = Vec::new();
    while let Some((message, next)) = split_message(datagram) {
        messages.push(message);
        datagram = next;
    }
    messages
}

fn split_message(bytes: &[u8]) -> Option<(Received<'_>, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (kind, rest) = rest.split_first_chunk::<2>()?;
    let (sequence, _) = rest.get(2..)?.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_ne_bytes(*length)).ok()?;
    let message = Received {
        kind: u16::from_ne_bytes(*kind),
        sequence: u32::from_ne_bytes(*sequence),
        payload: bytes.get(HEADER_BYTES..length)?,
    };
    let next = bytes.get(aligned(length)..).unwrap_or_default();
    Some((message, next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn a_message_has_the_layout_of_the_kernels_headers() {
        let bytes = Message::new(0x1f, command::NBD_CMD_CONNECT, 7)
            .u32(attribute::NBD_ATTR_INDEX, 3)
            .text(attribute::NBD_ATTR_BACKEND_IDENTIFIER, "ab")
            .nest(attribute::NBD_ATTR_SOCKETS, |sockets| {
                sockets.nest(attribute::NBD_SOCK_ITEM, |item| {
                    item.u32(attribute::NBD_SOCK_FD, 9)
                })
            })
            .finish();
        let expected = [
            52, 0, 0, 0, 0x1f, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, // struct nlmsghdr
            1, 1, 0, 0, // struct genlmsghdr
            8, 0, 1, 0, 3, 0, 0, 0, // the index
            7, 0, 10, 0, b'a', b'b', 0, 0, // the identifier, its zero and a byte of padding
            16, 0, 7, 0x80, // the sockets
            12, 0, 1, 0x80, // one of them
            8, 0, 1, 0, 9, 0, 0, 0, // its descriptor
        ];
        assert_eq!(bytes.len(), expected.len());
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_was_built_can_be_read() {
        let bytes = Message::new(30, 1, 8)
            .u64(attribute::NBD_ATTR_SIZE_BYTES, 1 << 40)
            .u32(attribute::NBD_ATTR_INDEX, 5)
            .finish();
        let twice = [bytes.clone(), bytes].concat();
        let messages = received(&twice);
        assert_eq!(messages.len(), 2);
        assert_eq!((messages[1].kind, messages[1].sequence), (30, 8));
        let index = messages[1].attribute(attribute::NBD_ATTR_INDEX);
        assert_eq!(index, Some(&5_u32.to_ne_bytes()[..]));
        assert_eq!(messages[1].attribute(attribute::NBD_ATTR_TIMEOUT), None);
        assert_eq!(messages[1].error_number(), None);
    }

    #[test]
    fn errors_are_positive_numbers() {
        let message = |number: i32| {
            let mut bytes = 20_u32.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
            bytes.extend_from_slice(&[0; 10]);
            bytes.extend_from_slice(&number.to_ne_bytes());
            bytes
        };
        assert_eq!(received(&message(-16))[0].error_number(), Some(16));
        assert_eq!(received(&message(0))[0].error_number(), Some(0));
        assert_eq!(received(&message(i32::MIN))[0].error_number(), None);
    }

    proptest! {
        #[test]
        fn no_bytes_end_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..96)) {
            for message in received(&bytes) {
                let _ = (message.error_number(), message.attribute(1));
            }
        }

        #[test]
        fn short_lengths_end_the_reader(length in 0_u32..40, inner in 0_u16..20) {
            let mut bytes = Message::new(30, 1, 8).u64(1, 2).finish();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            bytes[20..22].copy_from_slice(&inner.to_ne_bytes());
            for message in received(&bytes) {
                let _ = message.attribute(9);
            }
        }
    }
}
