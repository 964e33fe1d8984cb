//! Recovery points for which everything is brought to rest: when, and what became of it.
//!
//! A quiesced recovery point has an interval of its own, and is an ordinary point besides: both
//! schedules go on from it. When its time has come it stays wanted until a point is sealed for which it
//! was tried; nothing more is frozen in between than recovery points are made.
//!
//! Failing to freeze costs the point nothing but its flag. What could not be thawed is tried again
//! every few seconds, and the status says so.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tracker::extent::Epoch;

use super::conductor::{Conductor, Trouble};
use super::config::Config;
use super::control::{Made, Reply};
use crate::error::{Error, ErrorKind, Result};
use crate::quiesce::{Outcome, Quiesce, recover};
use crate::status::{ApplicationPoint, Board, Part};
use crate::store::VaultUrl;
use crate::vault::manifest::{Consistency, short_reason};

/// Time that a wanted recovery point survives trouble before those who wait are told.
const CUT_PATIENCE: Duration = Duration::from_secs(5);
/// Recovery points that may be given up before those who wait for one are told.
const GIVEN_UP_MAX: u32 = 3;
/// Pause before what may still be frozen is thawed again.
const THAW_PAUSE: Duration = Duration::from_secs(2);

/// Somebody who wants a recovery point.
pub(super) struct Wish {
    /// Since when it waits for a cut.
    pub since: Instant,
    /// Recovery points that were cut for it and given up.
    pub given_up: u32,
    /// Whether everything is to be at rest for it.
    pub quiesce: bool,
    /// Where the answer goes.
    pub reply: Reply,
}

impl Wish {
    /// Whether whoever has it is told of the trouble that is met.
    pub fn is_late(&self) -> bool {
        self.since.elapsed() >= CUT_PATIENCE || self.given_up >= GIVEN_UP_MAX
    }

    /// A recovery point that was cut for it is given up: it waits for another one.
    pub fn wait_again(mut self) -> Self {
        self.since = Instant::now();
        self.given_up += 1;
        self
    }

    /// One of this moment.
    pub fn new(quiesce: bool, reply: Reply) -> Self {
        let since = Instant::now();
        Self {
            since,
            given_up: 0,
            quiesce,
            reply,
        }
    }
}

/// Whether everything was at rest for a cut; `None`: nobody asked for it.
#[derive(Debug, Default)]
pub(super) struct Rest(Option<Outcome>);

impl Rest {
    pub fn consistency(&self) -> Consistency {
        match &self.0 {
            Some(Outcome { reason: None, .. }) => Consistency::Application,
            _ => Consistency::Crash,
        }
    }

    /// Why not, as a manifest takes it.
    pub fn reason(&self) -> Option<String> {
        let reason = self.0.as_ref()?.reason.as_deref()?;
        Some(short_reason(reason))
    }

    /// The recovery point for those who wait for it.
    pub fn made(&self, epoch: Epoch) -> Made {
        Made {
            epoch,
            consistency: self.consistency(),
            reason: self.reason(),
        }
    }
}

/// The schedule of quiesced recovery points, and what is known of them.
#[derive(Debug, Default)]
pub(super) struct Resting {
    quiesce: Option<Quiesce>,
    interval: Option<Duration>,
    /// When the next one is due; `None`: only on demand.
    due: Option<Instant>,
    /// It was due, and no recovery point has been made with it yet.
    wanted: bool,
    /// Something may still be frozen: when to thaw again.
    thaw_due: Option<Instant>,
    /// Points that are sealed and not known to be published.
    sealed: Vec<ApplicationPoint>,
}

impl Resting {
    /// Refuses hooks that would freeze ourselves, and shows what `thaw_at_start` could not thaw. The first
    /// quiesced point is due at once.
    pub fn start(config: &Config, board: &Board) -> Result<Self> {
        let mut resting = Self::default();
        resting.thaw_left(config, board);
        if let Some(quiesce) = &config.quiesce {
            let quiesce_it = Quiesce::new(quiesce.clone(), &config.state);
            quiesce_it.check_ground(&borrowed(&needed(config)))?;
            resting.quiesce = Some(quiesce_it);
            resting.interval = quiesce.interval;
            resting.due = quiesce.interval.map(|_| Instant::now());
        }
        Ok(resting)
    }

    fn thaw_left(&mut self, config: &Config, board: &Board) {
        let left = match recover(&config.state) {
            Ok(left) => left.map(|what| Error::new(ErrorKind::State, still_frozen(&what))),
            Err(error) => Some(error),
        };
        let had_any = self.thaw_due.take().is_some();
        if let Some(error) = left {
            board.note(Part::Quiesce, Some(&error));
            self.thaw_due = Some(Instant::now() + THAW_PAUSE);
        } else if had_any {
            board.note(Part::Quiesce, None);
        }
    }

    /// Takes note of a time that has come. The next look is after an interval, whatever comes of it.
    fn take_due(&mut self, now: Instant, interval: Duration) {
        if self.due.is_some_and(|due| due <= now) {
            self.wanted = true;
            let own = self.interval.unwrap_or(interval);
            self.due = Some(now + own.min(interval));
        }
    }
}

/// Thaws what a killed shipper may have left frozen. The first of all steps: without vault or tracker a
/// shipper gets no further, and guests would stand still. Whatever fails is tried again.
pub(super) fn thaw_at_start(config: &Config) {
    match recover(&config.state) {
        Ok(None) => {}
        Ok(Some(what)) => tracing::error!("{}", still_frozen(&what)),
        Err(error) => tracing::error!("{}", error.chain()),
    }
}

fn still_frozen(what: &str) -> String {
    format!("What was frozen for a cut may still be: {what}")
}

/// What must not be on a frozen file system, as far as the configuration and our own files tell.
fn needed(config: &Config) -> Vec<(&'static str, PathBuf)> {
    let mut needed = vec![("the state folder", config.state.clone())];
    if let Ok(VaultUrl::Folder(folder)) = VaultUrl::parse(&config.vault) {
        needed.push(("the vault", folder));
    }
    for disk in &config.disks {
        needed.push(("the disk image", disk.path.clone()));
        needed.extend(disk.journal.clone().map(|journal| ("the journal", journal)));
    }
    // A line of the log would stand still as well.
    for descriptor in [1, 2] {
        let log = std::fs::canonicalize(format!("/proc/self/fd/{descriptor}"));
        needed.extend(log.ok().map(|log| ("the shipper's output", log)));
    }
    needed
}

fn borrowed<'a>(needed: &'a [(&'static str, PathBuf)]) -> Vec<(&'a str, &'a Path)> {
    let borrow = |(what, path): &'a (&'static str, PathBuf)| (*what, path.as_path());
    needed.iter().map(borrow).collect()
}

impl Conductor {
    /// When the next recovery point of either kind is due.
    pub(super) fn next_due(&self) -> Instant {
        let quiesced = self.resting.due.unwrap_or(self.due);
        self.due.min(quiesced)
    }

    /// Takes note if the point that is due is to be a quiesced one.
    pub(super) fn take_quiesce_due(&mut self, now: Instant) {
        self.resting.take_due(now, self.config.interval);
    }

    pub(super) fn cut_asked(&mut self, quiesce: bool, reply: Reply) {
        if quiesce && self.resting.quiesce.is_none() {
            let what = "There is nothing to quiesce: name it in [[quiesce.hook]] of the configuration, and \
                        start the shipper again";
            let _left = reply.send(Err(Error::new(ErrorKind::State, what)));
            return;
        }
        self.cuts.push(Wish::new(quiesce, reply));
    }

    /// Cuts, with everything at rest if this point is to be a quiesced one.
    pub(super) fn cut_at_rest(
        &mut self,
        cuts: &[Wish],
    ) -> std::result::Result<(Epoch, Rest), Trouble> {
        if !self.resting.wanted && !cuts.iter().any(|wish| wish.quiesce) {
            return Ok((self.cut()?, Rest::default()));
        }
        let needed = self.needed_now();
        let Some(quiesce) = &self.resting.quiesce else {
            return Ok((self.cut()?, Rest::default()));
        };
        let frozen = quiesce.freeze(&borrowed(&needed));
        let cut = self.cut();
        let outcome = match frozen {
            Ok(frozen) => frozen.thaw(),
            Err(outcome) => outcome,
        };
        self.note_rest(&outcome);
        Ok((cut?, Rest(Some(outcome))))
    }

    /// What must not be frozen, with what the tracker says.
    fn needed_now(&mut self) -> Vec<(&'static str, PathBuf)> {
        let mut needed = needed(&self.config);
        let status = self.link.as_mut().map(|link| link.client.epochs());
        // A tracker that does not answer will not cut either.
        for disk in status.into_iter().flatten().flat_map(|status| status.disks) {
            needed.push(("the disk image", disk.image));
            needed.push(("the journal", disk.journal));
            needed.extend(disk.preserve_file.map(|file| ("the preserve file", file)));
        }
        needed
    }

    fn note_rest(&mut self, outcome: &Outcome) {
        let what = match (&outcome.not_thawed, &outcome.reason) {
            (Some(what), _) => Some(still_frozen(what)),
            (None, Some(reason)) => Some(format!(
                "A recovery point is only crash-consistent: {reason}"
            )),
            (None, None) => None,
        };
        let pause = outcome.not_thawed.as_ref().map(|_| THAW_PAUSE);
        self.resting.thaw_due = pause.map(|pause| Instant::now() + pause);
        let error = what.map(|what| Error::new(ErrorKind::State, what));
        self.board.note(Part::Quiesce, error.as_ref());
    }

    /// Thaws again what may still be frozen, when it is time to.
    pub(super) fn thaw_left(&mut self) {
        if self
            .resting
            .thaw_due
            .is_some_and(|due| due <= Instant::now())
        {
            self.resting.thaw_left(&self.config, &self.board);
        }
    }

    /// A recovery point is sealed.
    pub(super) fn rested(&mut self, epoch: Epoch, rest: &Rest, created: jiff::Timestamp) {
        if rest.0.is_none() {
            return;
        }
        self.resting.wanted = false;
        let next = self
            .resting
            .interval
            .map(|interval| Instant::now() + interval);
        self.resting.due = next;
        if rest.consistency() == Consistency::Application {
            self.resting
                .sealed
                .push(ApplicationPoint { epoch, created });
        }
    }

    /// Shows the newest point that is known to be consistent for applications.
    pub(super) fn show_application_point(&mut self, published: Epoch) {
        let is_published = |point: &ApplicationPoint| point.epoch <= published;
        let newest = self.resting.sealed.iter().copied().rfind(is_published);
        self.resting.sealed.retain(|point| !is_published(point));
        if newest.is_some() {
            self.board
                .update(|status| status.application_point = newest);
        }
    }

    /// Shows that the point at which this shipper begins is consistent for applications, if it is.
    pub(super) fn show_base_at_start(&mut self) {
        let base = self.base.as_ref();
        let base = base.filter(|base| base.consistency == Consistency::Application);
        if let Some((epoch, created)) = base.map(|base| (base.epoch, base.created)) {
            let point = ApplicationPoint { epoch, created };
            self.board
                .update(|status| status.application_point = Some(point));
        }
    }
}
