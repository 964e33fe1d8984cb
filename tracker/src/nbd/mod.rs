//! The NBD protocol: what is on the wire, how a connection is negotiated, which requests are
//! valid. Nothing here touches a disk; `engine` carries out what passes `request`.

pub mod attach;
pub mod client;
pub mod handshake;
pub mod listener;
pub mod metadata;
pub mod reply;
pub mod request;
mod timed;
pub mod tls;
pub mod wire;
