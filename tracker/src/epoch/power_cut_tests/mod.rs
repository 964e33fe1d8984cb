//! A machine whose power is cut at any moment: everything that the tracker does, over storage that keeps,
//! drops, tears and reorders what was not synced.
//!
//! One seed is one world. `SEED=N` lives one and tells its steps; `WORLDS=N` lives so many, from seed
//! `FIRST` on. Each rule that the design rests on is switched off once, and the break must show.

mod guest;

mod shipper;

mod storage;

mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::failpoint::Canary;
use world::{Tally, World};

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Break {
    Nothing,
    /// Data go to the disk although the admission says that they have to wait.
    DataBeforeIntent,
    /// Data go to the disk before their record stands.
    DataBeforeRecord,
    /// There is one bit for each block, which a commit clears, whatever came since.
    ReleaseByBit,
    /// The fingerprints are not synced before an epoch is released.
    FingerprintBeforeDurable,
    /// An epoch is captured of disks that were not synced after its cut.
    SealBeforeDiskDurable,
    /// A rule of the tracker.
    Product(Canary),
}

const BREAKS: [Break; 7] = [
    Break::DataBeforeIntent,
    Break::DataBeforeRecord,
    Break::ReleaseByBit,
    Break::FingerprintBeforeDurable,
    Break::SealBeforeDiskDurable,
    Break::Product(Canary::WatermarkBeforeSync),
    Break::Product(Canary::ChainBeforeSuspectsDurable),
];

/// How a world is lived.
#[derive(Clone, Copy, Debug)]
struct Mode {
    broken: Break,
}

impl Mode {
    fn breaks(self, what: Break) -> bool {
        self.broken == what
    }
}

/// What must not be.
struct Violation(String);

/// Worlds in which a broken rule must show.
const CANARY_WORLDS: u64 = 10_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Lives one world; the error is what must not be.
fn live(seed: u64, folder: &Path, mode: Mode, trace: bool) -> Result<Tally, String> {
    let lived = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, folder, mode, trace);
        world.live();
        world.tally.clone()
    }));
    lived.map_err(|panic| match panic.downcast::<Violation>() {
        Ok(violation) => violation.0,
        Err(_told_above) => "it panicked".to_owned(),
    })
}

/// Lives many worlds on all processors, up to the first that must not be. Returns what they came to, and
/// that one's seed with what is wrong.
fn live_many(first: u64, count: u64, mode: Mode) -> (Tally, Option<(u64, String)>) {
    let next = AtomicU64::new(0);
    let tally = Mutex::new(Tally::default());
    let worst: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let folder = folder();
                let mut mine = Tally::default();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    match live(first + number, folder.path(), mode, false) {
                        Ok(lived) => mine.merge(&lived),
                        Err(what) => {
                            next.store(count, Ordering::Relaxed);
                            let mut worst = worst.lock().unwrap();
                            if worst.as_ref().is_none_or(|worst| first + number < worst.0) {
                                *worst = Some((first + number, what));
                            }
                        }
                    }
                }
                tally.lock().unwrap().merge(&mine);
            });
        }
    });
    (tally.into_inner().unwrap(), worst.into_inner().unwrap())
}

#[test]
fn a_machine_that_loses_its_power_forgets_nothing() {
    let mode = Mode {
        broken: Break::Nothing,
    };
    if let Some(seed) = number("SEED") {
        let lived = live(seed, folder().path(), mode, true);
        println!("{:?}", lived.map(|tally| tally.0));
        return;
    }
    let default = if cfg!(debug_assertions) { 300 } else { 3000 };
    let (first, count) = (
        number("FIRST").unwrap_or(1),
        number("WORLDS").unwrap_or(default),
    );
    let begun = Instant::now();
    let (tally, wrong) = live_many(first, count, mode);
    if let Some((seed, what)) = wrong {
        panic!("SEED={seed}: {what}");
    }
    let micros = begun.elapsed().as_micros() as u64 / count.max(1);
    println!("{micros} us for each world: {:#?}", tally.0);
    for what in [
        "exact, with suspects",
        "exact",
        "killed",
        "clean",
        "lost",
        "folds",
        "coarse",
        "evictions",
        "replacements",
        "recoveries cut off",
        "points",
        "waits",
    ] {
        assert!(
            tally.of(what) > count / 1000,
            "too little of {what}: {:#?}",
            tally.0
        );
    }
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "minutes in a debug build; scripts/test runs it in a release build"
)]
fn every_rule_of_the_power_cut_shows_when_it_is_broken() {
    let mut hidden = Vec::new();
    for broken in BREAKS {
        let begun = Instant::now();
        let (_, wrong) = live_many(1, CANARY_WORLDS, Mode { broken });
        let Some((seed, what)) = wrong else {
            hidden.push(broken);
            continue;
        };
        let whole = Mode {
            broken: Break::Nothing,
        };
        let without = live(seed, folder().path(), whole, false);
        assert!(without.is_ok(), "world {seed} is wrong whatever is broken");
        println!(
            "{broken:?}: world {seed}, {} ms: {what}",
            begun.elapsed().as_millis()
        );
    }
    assert!(
        hidden.is_empty(),
        "these do not show in {CANARY_WORLDS} worlds: {hidden:?}"
    );
}
