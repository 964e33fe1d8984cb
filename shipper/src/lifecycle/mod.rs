//! Protection of a machine over time: prerequisites, first copy, epochs, health.
//!
//! [`conductor`] is the one thread that steers; `scan`, `epoch` and `reconcile` are what it does.

pub mod config;

pub mod state;

pub mod control;

pub mod protect;

pub mod conductor;

mod reconcile;

mod scan;

mod epoch;
