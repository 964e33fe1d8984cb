//! Protection of a machine over time.
