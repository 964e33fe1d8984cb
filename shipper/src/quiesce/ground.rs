//! On which file systems paths lie, so that nothing is frozen that the shipper or tracker stands on.
//!
//! A file system is known by the number that the kernel's table of mounts has for it. `st_dev` would not
//! do: each subvolume of btrfs has another one, and they freeze together.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::protocol::Hook;
use crate::error::{Error, ErrorKind, Result};

/// A line of the table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    id: String,
    /// Major and minor number of the file system.
    file_system: String,
    point: PathBuf,
}

const TABLE: &str = "/proc/self/mountinfo";

fn mounts() -> Result<Vec<Mount>> {
    let text = fs::read_to_string(TABLE)
        .map_err(|error| Error::io(format!("Cannot read {TABLE}"), error))?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Vec<Mount> {
    let line = |line: &str| {
        let mut fields = line.split(' ');
        Some(Mount {
            id: fields.next()?.to_owned(),
            file_system: fields.nth(1)?.to_owned(),
            point: unescape(fields.nth(1)?).into(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// Blanks and the like stand as a backslash with three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let code = behind.get(..3).filter(|_| byte == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        let code = code.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        rest = if code.is_some() { &behind[3..] } else { behind };
        out.push(code.unwrap_or(byte));
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The mount that a path leads to, whatever is mounted over what.
fn mount_of(path: &Path, mounts: &[Mount]) -> Result<Option<Mount>> {
    let failed = |error| Error::io(format!("Cannot look at {}", path.display()), error);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(failed)?;
    let info = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let text = fs::read_to_string(&info)
        .map_err(|error| Error::io(format!("Cannot read {info}"), error))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let id = id.unwrap_or_default().trim();
    Ok(mounts.iter().find(|mount| mount.id == id).cloned())
}

fn invalid(what: String) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

/// Fails unless a path is itself a mount point: freezing a folder freezes whatever it lies on, which is
/// another file system when the right one is not mounted.
///
/// # Errors
///
/// It is none, or does not exist.
pub fn check_mount_point(path: &Path) -> Result<()> {
    found_mount(path, &mounts()?).map(|_| ())
}

fn found_mount(path: &Path, mounts: &[Mount]) -> Result<Mount> {
    let real = path
        .canonicalize()
        .map_err(|error| Error::io(format!("Cannot look at {}", path.display()), error))?;
    let mount = mount_of(&real, mounts)?.filter(|mount| mount.point == real);
    mount.ok_or_else(|| {
        invalid(format!(
            "{} is no mount point: mount the file system that is to be frozen there first",
            path.display()
        ))
    })
}

/// Refuses hooks that would freeze a file system which holds one of these.
///
/// # Errors
///
/// Names the file system and what is on it.
pub fn check(hooks: &[Hook], needed: &[(&str, &Path)]) -> Result<()> {
    let frozen: Vec<&PathBuf> = hooks
        .iter()
        .filter_map(|hook| match hook {
            Hook::Fsfreeze { mount } => Some(mount),
            _ => None,
        })
        .collect();
    if frozen.is_empty() {
        return Ok(());
    }
    let mounts = mounts()?;
    let mut held = Vec::new();
    for (what, path) in needed {
        if let Some(mount) = nearest(path).and_then(|path| mount_of(&path, &mounts).transpose()) {
            held.push((*what, *path, mount?.file_system));
        }
    }
    for point in frozen {
        // What is not mounted now is looked at again when it is to be frozen.
        let Ok(mount) = found_mount(point, &mounts) else {
            continue;
        };
        let on_it = |(_, _, file_system): &&(_, _, String)| *file_system == mount.file_system;
        if let Some((what, path, _)) = held.iter().find(on_it) {
            return Err(invalid(format!(
                "The file system at {} cannot be frozen: {what} {} is on it, and whoever writes there would \
                 stand still too; move that to another file system, or take the hook out",
                point.display(),
                path.display()
            )));
        }
    }
    Ok(())
}

/// The path, or the nearest folder above it that exists.
fn nearest(path: &Path) -> Option<PathBuf> {
    path.ancestors()
        .find(|path| path.exists())
        .map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_mounts_is_read() {
        let text = "22 27 0:21 / /proc rw,relatime - proc proc rw\n\
                    42 27 7:0 / /mnt/a\\040b rw shared:1 - ext4 /dev/loop0 rw\ngarbage\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[1].file_system, "7:0");
        assert_eq!(mounts[1].point, Path::new("/mnt/a b"));
        assert_eq!(unescape("a\\04"), "a\\04");
    }

    #[test]
    fn a_folder_is_no_mount_point_and_the_root_holds_us() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_mount_point(folder.path()).unwrap_err();
        assert!(error.chain().contains("no mount point"), "{error}");
        check_mount_point(Path::new("/")).unwrap();
        let hooks = [Hook::Fsfreeze {
            mount: "/proc".into(),
        }];
        let state = Path::new("/proc/self");
        let error = check(&hooks, &[("the state folder", state)]).unwrap_err();
        assert!(
            error
                .chain()
                .contains("the state folder /proc/self is on it"),
            "{error}"
        );
        check(&hooks, &[("the state folder", folder.path())]).unwrap();
        // What does not exist yet will be made where its folder is.
        let missing = Path::new("/proc/missing/file");
        assert!(check(&hooks, &[("journal", missing)]).is_err());
    }
}
