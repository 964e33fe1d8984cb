//! How many requests of which kind a store was sent, and how many bytes went with them.
//!
//! What is counted are requests as they go out, so that one that was tried again counts again, and
//! a long listing as often as it has pages. A folder has no requests: there, operations are counted.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stores an object.
    Put,
    /// Reads an object or a range of one.
    Get,
    /// Asks whether an object is there, and for its size.
    Head,
    /// Asks for a page of a listing.
    List,
    /// Removes an object.
    Delete,
    /// Gets credentials; it may go to another service.
    Credentials,
}

/// Counters that all threads share.
#[derive(Debug, Default)]
pub struct Counters {
    put: Counter,
    get: Counter,
    head: Counter,
    list: Counter,
    delete: Counter,
    credentials: Counter,
}

#[derive(Debug, Default)]
struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Counters {
    fn of(&self, kind: Kind) -> &Counter {
        match kind {
            Kind::Put => &self.put,
            Kind::Get => &self.get,
            Kind::Head => &self.head,
            Kind::List => &self.list,
            Kind::Delete => &self.delete,
            Kind::Credentials => &self.credentials,
        }
    }

    /// Counts a request.
    pub fn request(&self, kind: Kind) {
        self.of(kind).requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts bytes of content, in the direction that the kind of request has.
    pub fn bytes(&self, kind: Kind, bytes: u64) {
        self.of(kind).bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The sums at this moment.
    pub fn sums(&self) -> Requests {
        let sum = |counter: &Counter| Sum {
            requests: counter.requests.load(Ordering::Relaxed),
            bytes: counter.bytes.load(Ordering::Relaxed),
        };
        Requests {
            put: sum(&self.put),
            get: sum(&self.get),
            head: sum(&self.head),
            list: sum(&self.list),
            delete: sum(&self.delete),
            credentials: sum(&self.credentials),
        }
    }
}

/// Requests since the program was started, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Requests {
    /// Objects stored; bytes that were sent.
    pub put: Sum,
    /// Objects or ranges read; bytes that were received.
    pub get: Sum,
    /// Looks at an object.
    pub head: Sum,
    /// Pages of listings; bytes that were received.
    pub list: Sum,
    /// Objects removed.
    pub delete: Sum,
    /// Requests for credentials.
    pub credentials: Sum,
}

impl Requests {
    /// All kinds, with the names that people and programs know them by.
    pub fn kinds(&self) -> [(&'static str, Sum); 6] {
        [
            ("put", self.put),
            ("get", self.get),
            ("head", self.head),
            ("list", self.list),
            ("delete", self.delete),
            ("credentials", self.credentials),
        ]
    }
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sum {
    /// How many, those among them that failed.
    pub requests: u64,
    /// Bytes of content.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_by_itself() {
        let counters = Counters::default();
        let kinds = [
            Kind::Put,
            Kind::Get,
            Kind::Head,
            Kind::List,
            Kind::Delete,
            Kind::Credentials,
        ];
        for (count, kind) in kinds.into_iter().enumerate() {
            for _ in 0..=count {
                counters.request(kind);
                counters.bytes(kind, 10);
            }
        }
        let sums = counters.sums();
        let found = [
            sums.put,
            sums.get,
            sums.head,
            sums.list,
            sums.delete,
            sums.credentials,
        ];
        for (count, sum) in (1..).zip(found) {
            assert_eq!((sum.requests, sum.bytes), (count, 10 * count));
        }
    }
}
