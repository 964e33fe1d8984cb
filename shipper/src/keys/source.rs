//! Where secrets come from: key files, files with a passphrase, the environment, a terminal.
//!
//! Nothing is asked or read before it is needed: a plain vault needs none of it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::hex;
use super::secret::{Secret, SecretText};
use super::slots::UserSecret;
use crate::error::{Error, ErrorKind, Result};

/// The variable of the environment that may hold the passphrase.
pub const PASSPHRASE_VARIABLE: &str = "TIDEMARK_PASSPHRASE";
/// Largest file that is read as a secret, in bytes.
const FILE_BYTES_MAX: u64 = 4096;
const KEY_BYTES: usize = 32;

/// Asks somebody for a passphrase; `None`: there is nobody to be asked.
pub type Ask = fn() -> Result<Option<SecretText>>;

/// Where the secret of a vault comes from.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// A key file.
    pub key_file: Option<PathBuf>,
    /// A file with a passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// Whom to ask where none is named.
    pub ask: Option<Ask>,
}

impl Access {
    /// The secret that is named, or that of the environment, or what is answered. `None`: there is none.
    ///
    /// # Errors
    ///
    /// A file cannot be read or is no secret, or the answer cannot be read.
    pub fn secret(&self) -> Result<Option<UserSecret>> {
        if let Some(path) = &self.key_file {
            return read_key_file(path).map(UserSecret::KeyFile).map(Some);
        }
        let passphrase = match &self.passphrase_file {
            Some(path) => Some(read_passphrase_file(path)?),
            None => match passphrase_of_environment()? {
                Some(passphrase) => Some(passphrase),
                None => self.ask.map(|ask| ask()).transpose()?.flatten(),
            },
        };
        Ok(passphrase.map(UserSecret::Passphrase))
    }
}

/// The passphrase that the environment holds.
fn passphrase_of_environment() -> Result<Option<SecretText>> {
    use std::os::unix::ffi::OsStringExt;
    match std::env::var_os(PASSPHRASE_VARIABLE) {
        None => Ok(None),
        Some(text) => checked(text.into_vec(), PASSPHRASE_VARIABLE).map(Some),
    }
}

/// Bytes as a passphrase.
///
/// # Errors
///
/// `Invalid`: they are empty, or not UTF-8.
pub fn checked(bytes: Vec<u8>, place: &str) -> Result<SecretText> {
    let text = SecretText::new(bytes);
    let invalid = |what: &str| {
        Err(Error::new(
            ErrorKind::Invalid,
            format!("The passphrase of {place} {what}"),
        ))
    };
    if text.bytes().is_empty() {
        return invalid("is empty");
    }
    if std::str::from_utf8(text.bytes()).is_err() {
        return invalid("is not UTF-8");
    }
    Ok(text)
}

/// Reads a passphrase: all of the file but one line break at its end.
///
/// # Errors
///
/// It cannot be read, is empty, or is not UTF-8.
pub fn read_passphrase_file(path: &Path) -> Result<SecretText> {
    let content = read_secret_file(path, "passphrase file")?;
    let text = content
        .strip_suffix(b"\r\n")
        .or(content.strip_suffix(b"\n"))
        .unwrap_or(&content);
    checked(text.to_vec(), &path.display().to_string())
}

/// Reads a key file: 64 hexadecimal digits and a line break.
///
/// # Errors
///
/// It cannot be read, or is none.
pub fn read_key_file(path: &Path) -> Result<Secret<KEY_BYTES>> {
    let content = read_secret_file(path, "key file")?;
    parse_key(&content).ok_or_else(|| {
        let shown = path.display();
        let what = format!("{shown} is no key file: 64 hexadecimal digits are expected, as `shipper init --generate-key-file` writes them");
        Error::new(ErrorKind::Invalid, what)
    })
}

/// The key that the content of a key file holds.
pub fn parse_key(content: &[u8]) -> Option<Secret<KEY_BYTES>> {
    let digits = content
        .strip_suffix(b"\r\n")
        .or(content.strip_suffix(b"\n"))
        .unwrap_or(content);
    if digits.len() != 2 * KEY_BYTES {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    Secret::filled(|bytes| {
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (high, low) = (digit(pair[0]).ok_or(())?, digit(pair[1]).ok_or(())?);
            *byte = (high << 4 | low) as u8;
        }
        Ok::<(), ()>(())
    })
    .ok()
}

fn read_secret_file(path: &Path, what: &str) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |error| Error::io(format!("Cannot read {what} {}", path.display()), error);
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            "Others than its owner may read {what} {0}: chmod 0600 {0}",
            path.display()
        );
    }
    // Enough from the begin: a vector that grows leaves copies behind.
    let mut content = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX as usize + 1));
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut content)
        .map_err(failed)?;
    if content.len() as u64 > FILE_BYTES_MAX {
        let shown = path.display();
        let what = format!("{shown} is too large for a {what}: {FILE_BYTES_MAX} bytes at most");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    Ok(content)
}

/// Makes a key file that only its owner can read; it is durable when this returns.
///
/// # Errors
///
/// `State`: there is a file of this name. `Io`: it cannot be written.
pub fn generate_key_file(path: &Path) -> Result<Secret<KEY_BYTES>> {
    let shown = path.display();
    let failed = |error| Error::io(format!("Cannot write key file {shown}"), error);
    let key = Secret::random()?;
    let mut options = OpenOptions::new();
    let mut file = match options.write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let what = format!(
                "There is a file {shown} already: use it without --generate, or choose another name"
            );
            return Err(Error::new(ErrorKind::State, what));
        }
        other => other.map_err(failed)?,
    };
    let text = Zeroizing::new(hex(key.bytes()));
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_folder_of(path));
    if let Err(error) = written {
        // Half a key would be in the way of the next attempt.
        let _left = fs::remove_file(path);
        return Err(failed(error));
    }
    Ok(key)
}

fn sync_folder_of(path: &Path) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_key_is_read_again_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let key = generate_key_file(&path).unwrap();
        assert_eq!(read_key_file(&path).unwrap(), key);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read(&path).unwrap().len(), 65);
        assert_eq!(
            generate_key_file(&path).unwrap_err().kind(),
            ErrorKind::State
        );
        assert_eq!(read_key_file(&path).unwrap(), key);
    }

    #[test]
    fn key_files_are_digits_and_nothing_else() {
        let digits = "00ff".repeat(16);
        for good in [
            digits.clone(),
            format!("{digits}\n"),
            format!("{digits}\r\n"),
            digits.to_uppercase(),
        ] {
            assert!(parse_key(good.as_bytes()).is_some(), "{good:?}");
        }
        for bad in [
            String::new(),
            digits[1..].to_owned(),
            format!("{digits}\n\n"),
            digits.replace('f', "g"),
            "+0".repeat(32),
        ] {
            assert!(parse_key(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn one_line_break_is_no_part_of_a_passphrase() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passphrase");
        for (content, expected) in [
            ("a b", "a b"),
            ("a b\n", "a b"),
            ("a b\r\n", "a b"),
            (" a \n\n", " a \n"),
        ] {
            fs::write(&path, content).unwrap();
            assert_eq!(
                read_passphrase_file(&path).unwrap().bytes(),
                expected.as_bytes()
            );
        }
        for bad in [&b""[..], b"\n", b"\xff\xfe", &[b'x'; 5000]] {
            fs::write(&path, bad).unwrap();
            assert_eq!(
                read_passphrase_file(&path).unwrap_err().kind(),
                ErrorKind::Invalid
            );
        }
    }
}
