//! `--background`: a program that goes on after its command has returned.
//!
//! The command starts itself once more, in a session of its own, and waits for the line by which
//! the other says that it is ready. A fork without exec would need unsafe code for the same.

use std::env;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use nix::unistd::setsid;
use tracker::error::{Error, ErrorKind, Result};

use crate::print;

const OUTSIDE: &str = "--background";
const INSIDE: &str = "--in-background";

/// Starts this command again in the background and returns when that is ready.
///
/// # Errors
///
/// It cannot be started, or ends before it is ready; it has said why on standard error.
pub fn start() -> Result<()> {
    let cannot = |error| Error::io("Cannot start the background process", error);
    let mut arguments: Vec<OsString> = env::args_os().skip(1).collect();
    for argument in &mut arguments {
        if argument == OUTSIDE {
            *argument = INSIDE.into();
        }
    }
    let mut child = Command::new(env::current_exe().map_err(cannot)?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let mut line = String::new();
    if let Some(pipe) = child.stdout.take() {
        BufReader::new(pipe).read_line(&mut line).map_err(cannot)?;
    }
    if line.starts_with("Ready") {
        return print(&line);
    }
    let status = child.wait().map_err(cannot)?;
    Err(Error::new(
        ErrorKind::State,
        format!("The background process was not ready: {status}"),
    ))
}

/// Makes this process independent of the terminal that it was started on.
///
/// # Errors
///
/// It leads a process group already, as it does when a user types the option.
pub fn settle() -> Result<()> {
    setsid().map_err(|errno| Error::io("Cannot begin a session of its own", errno))?;
    Ok(())
}
