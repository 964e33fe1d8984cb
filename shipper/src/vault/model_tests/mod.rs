//! The protocol of publishing, taking over, pinning and removing, tried in all orders.
//!
//! The code is the real one. Each actor is a thread with a vault of its own over one store in memory, and stops before each
//! request until it is its turn; `search` goes through the orders in which turns can be given. After each change of the
//! store the promises are checked (`promises`). That the search would find what is wrong is proven by actors that forget a rule.

mod promises;

mod scenes;

mod search;

mod store;
