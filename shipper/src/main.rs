//! The shipper program.

fn main() {}
