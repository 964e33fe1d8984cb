//! Segments: immutable objects that hold changed blocks of one disk.
//!
//! `docs/vault-format.md` is the specification.

pub mod format;

pub mod reference;

pub mod seal;

pub mod sealed;

pub mod codec;

pub mod frame;

pub mod writer;

pub mod roll;

pub mod reader;
