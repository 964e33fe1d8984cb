//! Protection of a machine over time: prerequisites, first copy, epochs, health.
//!
//! [`conductor`] is the one thread that steers; `scan`, `resync`, `epoch` and `reconcile` are what it
//! does.

pub mod config;

pub mod reason;

pub mod progress;

pub mod state;

pub mod control;

pub mod protect;

pub mod conductor;

mod reconcile;

mod fence;

pub mod pruning;

mod scan;

pub mod resync;

mod epoch;

mod capture;

mod rest;
