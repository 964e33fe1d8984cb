//! What the tracker and systemd tell each other: readiness, and sockets that systemd listens on.
//!
//! Sources: `sd_notify(3)` and `sd_listen_fds(3)`. Without systemd all of it is a no-op: the
//! variables `NOTIFY_SOCKET` and `LISTEN_FDS` are not set.
//!
//! A socket from systemd stays systemd's: it is neither shut down nor removed when the tracker
//! ends, so that clients that come between two trackers wait instead of being refused.

use std::env;

use listenfd::ListenFd;
use nix::sys::socket::{getsockopt, sockopt};
use sd_notify::NotifyState;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::listener::Listener;

/// Name of the control socket, by `FileDescriptorName=` of its unit.
const CONTROL: &str = "control";
/// Name of sockets for NBD.
const NBD: &str = "nbd";

/// Says that clients may connect, and in one line what is served.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Says that the end has begun.
pub fn stopping() {
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("Stopping: answering what is in flight"),
    ]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("Cannot tell the service manager: {error}");
    }
}

/// Sockets that were handed over at the start.
#[derive(Debug, Default)]
pub struct Activated {
    /// For NBD.
    pub nbd: Vec<Listener>,
    /// For control.
    pub control: Option<Listener>,
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Nbd,
    Control,
}

/// Takes the sockets that systemd has handed over. To be called once, before any thread starts.
///
/// # Errors
///
/// A descriptor is no socket that is listened on, a name is unknown, or two are for control.
pub fn activated() -> Result<Activated> {
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut sockets = ListenFd::from_env();
    let mut activated = Activated::default();
    for (place, purpose) in purposes(&names, sockets.len())?.into_iter().enumerate() {
        let listener = take(&mut sockets, place)?;
        match purpose {
            Purpose::Nbd => activated.nbd.push(listener),
            Purpose::Control => {
                if listener.unix_path().is_none() {
                    return Err(invalid(place, "is for control but no unix socket"));
                }
                activated.control = Some(listener);
            }
        }
    }
    Ok(activated)
}

/// The purposes of sockets with these names, separated by colons. Where none of the names is
/// known, the order speaks: the first is for NBD and the second for control.
fn purposes(names: &str, count: usize) -> Result<Vec<Purpose>> {
    let names: Vec<&str> = names.split(':').collect();
    let known = |name: &&str| matches!(*name, NBD | CONTROL);
    let named = names.len() == count && names.iter().any(known);
    let mut purposes = Vec::new();
    for place in 0..count {
        let purpose = match names.get(place).copied().filter(|_| named) {
            Some(NBD) => Purpose::Nbd,
            Some(CONTROL) => Purpose::Control,
            Some(_) => {
                return Err(invalid(
                    place,
                    "has a name of its unit, which must be nbd or control: set FileDescriptorName=",
                ));
            }
            None if place == 1 => Purpose::Control,
            None => Purpose::Nbd,
        };
        if purpose == Purpose::Control && purposes.contains(&purpose) {
            return Err(invalid(place, "is a second one for control"));
        }
        purposes.push(purpose);
    }
    Ok(purposes)
}

fn take(sockets: &mut ListenFd, place: usize) -> Result<Listener> {
    let listener = match sockets.take_unix_listener(place) {
        Ok(Some(socket)) => Listener::inherited_unix(socket)?,
        _ => match sockets.take_tcp_listener(place) {
            Ok(Some(socket)) => Listener::inherited_tcp(socket)?,
            _ => return Err(invalid(place, "is neither a unix nor a TCP stream socket")),
        },
    };
    if !getsockopt(&listener, sockopt::AcceptConn).unwrap_or(false) {
        return Err(invalid(place, "is not listened on: set Accept=no"));
    }
    Ok(listener)
}

fn invalid(place: usize, what: &str) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("Socket {place} of the service manager {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use Purpose::{Control, Nbd};

    #[test]
    fn names_say_what_sockets_are_for() {
        assert_eq!(purposes("control:nbd:nbd", 3).unwrap(), [Control, Nbd, Nbd]);
        assert_eq!(purposes("nbd", 1).unwrap(), [Nbd]);
        assert_eq!(purposes("", 0).unwrap(), []);
        assert!(purposes("nbd:tracker.socket", 2).is_err());
        assert!(purposes("control:control", 2).is_err());
    }

    #[test]
    fn without_names_the_order_counts() {
        assert_eq!(purposes("", 1).unwrap(), [Nbd]);
        assert_eq!(purposes("", 2).unwrap(), [Nbd, Control]);
        assert_eq!(
            purposes("a.socket:a.socket:a.socket", 3).unwrap(),
            [Nbd, Control, Nbd]
        );
        // Names that are fewer than the sockets belong to nobody knows which.
        assert_eq!(purposes("control", 2).unwrap(), [Nbd, Control]);
    }
}
