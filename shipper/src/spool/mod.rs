//! Sealed epochs that wait for upload.
