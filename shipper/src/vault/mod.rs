//! Layout, manifests and generations of a vault.
