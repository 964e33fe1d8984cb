//! Moving the spool into the vault.
