//! What a worker does for clients that send one request at a time. Pure.
//!
//! **It stays awake.** Such a client answers a reply within microseconds, while a processor that went
//! idle takes tens of them to wake, in a virtual machine above all. So the worker stays awake for a
//! moment. It does not where requests come in numbers: there they gather while it sleeps, and are
//! worked at together. Each time in vain makes the next attempts rarer, so that a client of another
//! rhythm costs next to nothing.
//!
//! **It syncs itself.** A sync that is handed to another thread costs two more wake-ups, a tenth of what a
//! fast disk takes for it. Nobody else may have to wait for that: where a request has come meanwhile, or
//! the disk is slow, the next syncs are handed over, ever more of them.

use std::time::Duration;

/// Time that a worker stays awake. In a virtual machine it takes 20 us to be woken, and a client
/// that is woken by a reply, works at it and sends the next request needs 20 to 45 us.
const AWAKE: Duration = Duration::from_micros(50);
/// Turns with a single request after which the next is expected to be one too.
const LONE_TURNS_MIN: u32 = 64;
/// Most waits that are slept through after attempts in vain.
const PAUSE_MAX: u32 = 255;
/// Longest sync that a worker makes itself; beside a longer one the wake-ups count for little.
const SYNC_MAX: Duration = Duration::from_millis(1);
/// Most syncs that are handed over after one that was made here and should not have been.
const SYNC_PAUSE_MAX: u32 = 4095;

/// What the turns and waits of one worker were like.
#[derive(Debug, Default)]
pub struct Patience {
    lone_turns: u32,
    /// Waits to be slept through after the next attempt in vain.
    pause: u32,
    /// Waits that are still to be slept through.
    paused: u32,
    /// Syncs to be handed over after the next one that should not have been made here.
    sync_pause: u32,
    /// Syncs that are still to be handed over.
    syncs_paused: u32,
}

impl Patience {
    /// A turn took so many requests. Turns without any tell nothing.
    pub fn note_turn(&mut self, requests: usize) {
        match requests {
            0 => {}
            1 => self.lone_turns = self.lone_turns.saturating_add(1),
            _ => self.lone_turns = 0,
        }
    }

    /// How long to stay awake in the wait that begins now, if at all.
    pub fn time_awake(&mut self) -> Option<Duration> {
        if self.lone_turns < LONE_TURNS_MIN {
            return None;
        }
        if self.paused > 0 {
            self.paused -= 1;
            return None;
        }
        Some(AWAKE)
    }

    /// Whether the sync that is asked for now is made by the worker itself.
    pub fn syncs_here(&mut self) -> bool {
        if self.lone_turns < LONE_TURNS_MIN {
            return false;
        }
        if self.syncs_paused > 0 {
            self.syncs_paused -= 1;
            return false;
        }
        true
    }

    /// How long that sync took, and whether a request has come meanwhile.
    pub fn note_sync(&mut self, took: Duration, request_came: bool) {
        self.sync_pause = match request_came || took > SYNC_MAX {
            false => 0,
            true => (self.sync_pause * 2 + 1).min(SYNC_PAUSE_MAX),
        };
        self.syncs_paused = self.sync_pause;
    }

    /// Whether something came while the worker was awake.
    pub fn note_awake(&mut self, came: bool) {
        self.pause = match came {
            true => 0,
            false => (self.pause * 2 + 1).min(PAUSE_MAX),
        };
        self.paused = self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempts(patience: &mut Patience, waits: usize, comes: bool) -> usize {
        let mut attempts = 0;
        for _ in 0..waits {
            patience.note_turn(1);
            if patience.time_awake().is_some() {
                attempts += 1;
                patience.note_awake(comes);
            }
        }
        attempts
    }

    #[test]
    fn lone_requests_are_awaited_awake() {
        let mut patience = Patience::default();
        assert_eq!(attempts(&mut patience, 63, true), 0);
        assert_eq!(attempts(&mut patience, 100, true), 100);
        patience.note_turn(2);
        assert_eq!(patience.time_awake(), None);
    }

    fn syncs(patience: &mut Patience, count: usize, took: Duration, comes: bool) -> usize {
        let mut here = 0;
        for _ in 0..count {
            patience.note_turn(1);
            if patience.syncs_here() {
                here += 1;
                patience.note_sync(took, comes);
            }
        }
        here
    }

    #[test]
    fn syncs_are_made_here_unless_somebody_waits_or_the_disk_is_slow() {
        let quick = Duration::from_micros(300);
        for (took, comes) in [(quick, true), (SYNC_MAX * 2, false)] {
            let mut patience = Patience::default();
            assert_eq!(syncs(&mut patience, 63, quick, false), 0);
            assert_eq!(syncs(&mut patience, 100, quick, false), 100);
            let wrong = syncs(&mut patience, 10_000, took, comes);
            assert!(wrong < 16, "{wrong} should not have been made here");
            // It finds out that things have changed.
            assert!(syncs(&mut patience, 10_000, quick, false) > 5000);
            patience.note_turn(3);
            assert!(!patience.syncs_here());
        }
    }

    #[test]
    fn attempts_in_vain_become_rare_and_success_brings_them_back() {
        let mut patience = Patience::default();
        let in_vain = attempts(&mut patience, 10_000, false);
        assert!(in_vain < 60, "{in_vain} attempts in vain");
        assert!(attempts(&mut patience, 300, true) > 40);
        assert_eq!(attempts(&mut patience, 100, true), 100);
    }
}
