//! From an accepted connection to a worker: negotiation, on a thread of its own, and TLS where it is spoken.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::prctl::set_name;

use super::CONNECTIONS_MAX;
use crate::engine::{Engine, View};
use crate::epoch::Machine;
use crate::nbd::handshake::{Export, Negotiated, negotiate};
use crate::nbd::listener::Stream;
use crate::nbd::tls::Encryption;
use crate::nbd::tls::relay::{Relay, Relays};

/// What an accepted connection needs.
pub(super) struct House {
    /// One for each disk, in their order.
    pub exports: Vec<Export>,
    pub machine: Arc<Machine>,
    /// For TCP; a unix socket is as private as its permission bits make it.
    pub encryption: Encryption,
    pub engine: Arc<Engine>,
    pub negotiating: AtomicUsize,
    pub relays: Arc<Relays>,
}

impl House {
    pub fn receive(self: &Arc<Self>, stream: Stream) {
        // A relay whose worker has closed is counted by nobody else.
        let connected = self.engine.status().connections as usize + self.relays.parting();
        if self.negotiating.fetch_add(1, Ordering::AcqRel) + connected >= CONNECTIONS_MAX {
            self.negotiating.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("More than {CONNECTIONS_MAX} connections: one was turned away");
            return;
        }
        let house = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("negotiation".into())
            .spawn(move || {
                let relay = house.negotiate(stream);
                house.negotiating.fetch_sub(1, Ordering::AcqRel);
                if let Some(relay) = relay {
                    pass_on(relay);
                }
            });
        if let Err(error) = spawned {
            self.negotiating.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("Cannot start a thread for a connection: {error}");
        }
    }

    /// Has the client choose, and gives it to a worker; where it speaks TLS there is a relay to
    /// be run.
    fn negotiate(&self, stream: Stream) -> Option<Relay> {
        let encryption = match &stream {
            Stream::Tcp(_) => &self.encryption,
            Stream::Unix(_) => &Encryption::Off,
        };
        let mut exports = self.exports.clone();
        let views: Vec<View> = self
            .machine
            .views()
            .into_iter()
            .map(|(disk, frozen)| View { disk, frozen })
            .collect();
        exports.extend(
            views
                .iter()
                .map(|view| self.exports[view.disk].frozen(view)),
        );
        let chosen = negotiate(&stream, &exports, encryption).and_then(|chosen| {
            // The deadline was the negotiation's; from here on the worker waits as it likes.
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
            Ok(chosen)
        });
        match chosen {
            Ok(Some(mut chosen)) => {
                let view = chosen.session.export.checked_sub(self.exports.len());
                let view = view.and_then(|index| views.into_iter().nth(index));
                if let Some(view) = &view {
                    chosen.session.export = view.disk;
                }
                self.hand_over(stream, chosen, view)
            }
            Ok(None) => None,
            Err(error) => {
                let peer = stream.peer();
                tracing::debug!("A negotiation with {peer} failed: {error}");
                None
            }
        }
    }

    fn hand_over(&self, stream: Stream, chosen: Negotiated, view: Option<View>) -> Option<Relay> {
        let (relay, socket) = match (stream, chosen.secured) {
            (Stream::Tcp(stream), Some(secured)) => {
                match Relay::new(&self.relays, stream, secured) {
                    Ok((relay, socket)) => (Some(relay), socket),
                    Err(error) => {
                        tracing::warn!("Cannot relay a connection over TLS: {error}");
                        return None;
                    }
                }
            }
            (stream, _) => (None, stream.into()),
        };
        match self.engine.serve(socket, chosen.session, view) {
            Ok(()) => relay,
            Err(error) => {
                tracing::error!("{}", error.chain());
                None
            }
        }
    }
}

fn pass_on(relay: Relay) {
    // The thread negotiated before; whoever looks at its name sees what it does now.
    let _unnamed = set_name(c"tls-relay");
    if let Err(error) = relay.run() {
        tracing::debug!("A connection over TLS ended: {error}");
    }
}
