//! Restore and verify on small vaults, against a model; the document of the format, and old vaults.

mod document;

mod encrypted;

mod fixture;

mod plain;

mod restores;

mod site;

mod verifies;
