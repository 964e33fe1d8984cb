//! A device of the kernel's nbd client, as the file system shows it.

use std::fs;
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// `/dev/nbdN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    index: u32,
}

impl Device {
    /// The device of a path, which may be a link to it.
    ///
    /// # Errors
    ///
    /// The path does not name a whole nbd device.
    pub fn parse(path: &Path) -> Result<Self> {
        let resolved = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let index = resolved
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix("nbd"))
            .filter(|digits| !digits.starts_with('+'))
            .and_then(|digits| digits.parse().ok())
            // The kernel's own numbers are signed.
            .filter(|index| i32::try_from(*index).is_ok());
        let index = index.ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!(
                    "{} is no nbd device: name a whole one, such as /dev/nbd0",
                    path.display()
                ),
            )
        })?;
        Ok(Self { index })
    }

    /// Its number.
    pub fn index(self) -> u32 {
        self.index
    }

    /// Its node.
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.index))
    }

    /// Whether it is attached; then with the process that attached it, as far as it is known.
    pub fn attached_by(self) -> Option<String> {
        self.attribute("pid")
    }

    /// The identifier that it was attached with; kernels before 5.14 do not keep it.
    pub fn backend(self) -> Option<String> {
        self.attribute("backend")
    }

    /// Whether it is mounted or otherwise held exclusively.
    ///
    /// # Errors
    ///
    /// The device cannot be opened.
    pub fn is_held(self) -> Result<bool> {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
            .open(self.path());
        match opened {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == IoKind::ResourceBusy => Ok(true),
            Err(error) => Err(Error::io(format!("Cannot open {self}"), error)),
        }
    }

    fn attribute(self, name: &str) -> Option<String> {
        let path = format!("/sys/block/nbd{}/{name}", self.index);
        Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "/dev/nbd{}", self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_devices_have_numbers() {
        assert_eq!(Device::parse(Path::new("/dev/nbd7")).unwrap().index(), 7);
        assert_eq!(
            Device::parse(Path::new("nbd12")).unwrap().to_string(),
            "/dev/nbd12"
        );
        for path in [
            "/dev/sda",
            "/dev/nbd",
            "/dev/nbd0p1",
            "/dev/nbd+1",
            "/dev/nbd4294967295",
            "/",
        ] {
            let error = Device::parse(Path::new(path)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{path}");
        }
    }
}
