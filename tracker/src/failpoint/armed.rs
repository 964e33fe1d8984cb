//! What the environment asks for at the named places, in a program that was built with the feature
//! `failpoints`. For tests alone.
//!
//! `TIDEMARK_FAILPOINTS` holds rules with `;` between them, each `PLACE[@FIRST[xTIMES]]=ACTION`: the action
//! is taken from the FIRST time on that the place is reached, TIMES times, and without these numbers every
//! time. The actions are
//!
//! - `kill`: the process ends by SIGKILL;
//! - `wait:PIPE`: the thread waits until somebody has opened this named pipe for writing and closed it;
//! - `error:EIO` or `error:ENOSPC`: what is attempted there fails with this error, where it can.
//!
//! `TIDEMARK_CANARY` switches a rule off: `check-before-read` or `cut-per-disk`.
//!
//! With `TIDEMARK_FAILPOINTS_WHILE=FILE` the rules hold, and count, only while there is such a file. What is
//! done is said on standard error, the first time for each rule.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Canary, Place};
use crate::error::{Error, ErrorKind, Result};

const RULES: &str = "TIDEMARK_FAILPOINTS";
const CANARY: &str = "TIDEMARK_CANARY";
const WHILE: &str = "TIDEMARK_FAILPOINTS_WHILE";

/// The places at which something can be told to fail.
const FALLIBLE: [Place; 12] = [
    Place::WriteAfterAdmissionBeforeData,
    Place::FlushAfterDataBeforeSync,
    Place::IntentAfterPlanBeforeWrite,
    Place::IntentAfterWriteBeforeDurable,
    Place::SyncAfterStoresBeforeDurable,
    Place::UpdateAfterPublishBeforeSync,
    Place::FoldAfterScanBeforePages,
    Place::ReplaceAfterCopyBeforeRename,
    Place::ReplaceAfterSwitchBeforeFolder,
    Place::GrowAfterCopyBeforeSync,
    Place::CutAfterSettleBeforeMaps,
    Place::CopyAfterReadBeforeWrite,
];

/// The rule that is switched off.
pub fn canary() -> Option<Canary> {
    static SWITCHED_OFF: OnceLock<Option<Canary>> = OnceLock::new();
    *SWITCHED_OFF.get_or_init(|| match std::env::var(CANARY).ok()?.as_str() {
        "check-before-read" => Some(Canary::PreservedBeforeRead),
        "cut-per-disk" => Some(Canary::CutPerDisk),
        _ => None,
    })
}

#[derive(Debug)]
enum Action {
    Kill,
    Wait(PathBuf),
    Error(i32),
}

#[derive(Debug)]
struct Rule {
    place: Place,
    first: u64,
    times: u64,
    action: Action,
    reached: AtomicU64,
}

impl Rule {
    fn parse(text: &str) -> Result<Self> {
        let wrong = |what: &str| {
            let what = format!(
                "{RULES} holds {text:?}: {what}. A rule is PLACE[@FIRST[xTIMES]]=ACTION, an action kill, \
                 wait:PIPE, error:EIO or error:ENOSPC. Places:{}. Those that can fail:{}.",
                names(&Place::ALL),
                names(&FALLIBLE),
            );
            Error::new(ErrorKind::Invalid, what)
        };
        let (head, action) = text.split_once('=').ok_or_else(|| wrong("no action"))?;
        let (name, numbers) = head.split_once('@').unwrap_or((head, "1"));
        let (first, times) = match numbers.split_once('x') {
            Some((first, times)) => (first.parse(), times.parse()),
            None => (numbers.parse(), Ok(u64::MAX)),
        };
        let (Ok(first), Ok(times)) = (first, times) else {
            return Err(wrong("no such numbers"));
        };
        let mut all = Place::ALL.into_iter();
        let place = all
            .find(|place| format!("{place:?}") == name)
            .ok_or_else(|| wrong("no such place"))?;
        let action = match action.split_once(':') {
            None if action == "kill" => Action::Kill,
            Some(("wait", pipe)) if !pipe.is_empty() => Action::Wait(pipe.into()),
            Some(("error", "EIO")) => Action::Error(libc::EIO),
            Some(("error", "ENOSPC")) => Action::Error(libc::ENOSPC),
            _ => return Err(wrong("no such action")),
        };
        if matches!(action, Action::Error(_)) && !FALLIBLE.contains(&place) {
            return Err(wrong("nothing can fail there"));
        }
        let reached = AtomicU64::new(0);
        Ok(Self {
            place,
            first,
            times,
            action,
            reached,
        })
    }

    /// Counts, and whether the action is to be taken. It is said here, once.
    fn is_due(&self) -> bool {
        let number = self.reached.fetch_add(1, Ordering::Relaxed) + 1;
        if number == self.first && self.times > 0 {
            eprintln!("Failpoint {:?}: {:?}", self.place, self.action);
        }
        number >= self.first && number - self.first < self.times
    }
}

fn names(places: &[Place]) -> String {
    let names = places.iter().map(|place| format!(" {place:?}"));
    names.collect()
}

struct Rules {
    rules: Vec<Rule>,
    file: Option<PathBuf>,
}

impl Rules {
    fn from_environment() -> Result<Self> {
        let text = std::env::var_os(RULES).unwrap_or_default();
        let text = text.to_string_lossy();
        let rules = text.split(';').filter(|text| !text.is_empty());
        Ok(Self {
            rules: rules.map(Rule::parse).collect::<Result<_>>()?,
            file: std::env::var_os(WHILE).map(PathBuf::from),
        })
    }

    /// The rules about a place that hold at this moment.
    fn of(&self, place: Place) -> impl Iterator<Item = &Rule> {
        let rules = self.rules.iter();
        let of_place = rules.filter(move |rule| rule.place == place);
        of_place.filter(|_| self.file.as_deref().is_none_or(|file| file.exists()))
    }
}

static READ: OnceLock<Rules> = OnceLock::new();

/// Nothing before [`check`] has read them.
fn rules(place: Place) -> impl Iterator<Item = &'static Rule> {
    READ.get()
        .into_iter()
        .flat_map(move |rules| rules.of(place))
}

/// Reads what the environment asks for.
///
/// # Errors
///
/// It is not understood; the message lists the places.
pub fn check() -> Result<()> {
    let rules = Rules::from_environment()?;
    let _read_before = READ.set(rules);
    Ok(())
}

/// Ends the process or waits, if that is asked for.
pub fn reached(place: Place) {
    for rule in rules(place) {
        match &rule.action {
            Action::Kill if rule.is_due() => {
                let _never_returns = kill(Pid::this(), Signal::SIGKILL);
            }
            Action::Wait(pipe) if rule.is_due() => {
                let opened =
                    File::open(pipe).and_then(|mut pipe| pipe.read_to_end(&mut Vec::new()));
                if let Err(error) = opened {
                    eprintln!("Failpoint {place:?}: cannot wait: {error}");
                }
            }
            _ => {}
        }
    }
}

/// Fails, if that is asked for.
///
/// # Errors
///
/// The error that is asked for.
pub fn attempt(place: Place) -> io::Result<()> {
    debug_assert!(FALLIBLE.contains(&place), "{place:?} is not listed");
    for rule in rules(place) {
        if let Action::Error(errno) = rule.action
            && rule.is_due()
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
    }
    Ok(())
}
