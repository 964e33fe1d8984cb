//! Secrets: bytes that are wiped when they are dropped, and that no message shows.
//!
//! A secret stands on the heap from its first byte on and is never moved there, so that wiping it wipes
//! all of it. What others make of it while they use it, a cipher its round keys for one, is theirs to wipe.

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

use crate::error::{Error, ErrorKind, Result};

/// A key of `N` bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<const N: usize>(Box<[u8; N]>);

impl<const N: usize> Secret<N> {
    /// Made by writing its bytes in place, which are zero before.
    ///
    /// # Errors
    ///
    /// That of `fill`.
    pub fn filled<E>(
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let mut secret = Self(Box::new([0; N]));
        fill(&mut secret.0[..])?;
        Ok(secret)
    }

    /// Of random bytes.
    ///
    /// # Errors
    ///
    /// The system has none.
    pub fn random() -> Result<Self> {
        Self::filled(fill_random)
    }

    /// A copy of these bytes, which are the caller's to wipe.
    pub fn copy_of(bytes: &[u8; N]) -> Self {
        let mut secret = Self(Box::new([0; N]));
        secret.0.copy_from_slice(bytes);
        secret
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A passphrase, or another secret of any length.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(Zeroizing<Vec<u8>>);

impl SecretText {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Fills with random bytes of the system.
///
/// # Errors
///
/// It has none.
pub fn fill_random(bytes: &mut [u8]) -> Result<()> {
    aws_lc_rs::rand::fill(bytes)
        .map_err(|_| Error::new(ErrorKind::Io, "The system gives no random numbers"))
}

/// Random bytes that are no secret: salts, nonces, identities.
///
/// # Errors
///
/// The system has none.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    fill_random(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown() {
        let secret = Secret::copy_of(&[0xab; 32]);
        assert_eq!(format!("{secret:?}"), "Secret");
        let text = SecretText::new(b"passphrase".to_vec());
        assert_eq!(format!("{text:?}"), "Secret");
    }

    #[test]
    fn random_secrets_differ() {
        assert_ne!(Secret::<32>::random().unwrap(), Secret::random().unwrap());
    }
}
