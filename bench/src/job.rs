//! The jobs: what the clients ask of a server. Pure.

use clap::ValueEnum;
use serde::Serialize;

/// Name of a job on the command line and in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// 4 KiB random writes, one at a time
    #[value(name = "write-4k-1")]
    #[serde(rename = "write-4k-1")]
    Write4kSingle,
    /// 4 KiB random writes, depth 32
    #[value(name = "write-4k-32")]
    #[serde(rename = "write-4k-32")]
    Write4kDeep,
    /// 4 KiB random reads, depth 32
    #[value(name = "read-4k-32")]
    #[serde(rename = "read-4k-32")]
    Read4kDeep,
    /// 64 KiB random writes, depth 16
    #[value(name = "write-64k-16")]
    #[serde(rename = "write-64k-16")]
    Write64k,
    /// 1 MiB sequential writes, depth 8
    #[value(name = "write-1m-8")]
    #[serde(rename = "write-1m-8")]
    Write1m,
    /// 1 MiB sequential reads, depth 8
    #[value(name = "read-1m-8")]
    #[serde(rename = "read-1m-8")]
    Read1m,
    /// 4 KiB random writes, each followed by a flush
    #[value(name = "write-4k-sync")]
    #[serde(rename = "write-4k-sync")]
    Write4kSync,
    /// 4 KiB random writes, depth 16 on each of four connections
    #[value(name = "write-4k-4x16")]
    #[serde(rename = "write-4k-4x16")]
    Write4kConnections,
    /// 4 KiB random, 70% reads and 30% writes, depth 32
    #[value(name = "mixed-4k-32")]
    #[serde(rename = "mixed-4k-32")]
    Mixed4k,
    /// 4 KiB writes by zipf's law, one at a time; measured by --cost
    #[value(skip)]
    #[serde(rename = "zipf-4k-1")]
    ZipfSingle,
    /// 4 KiB writes by zipf's law, depth 32; measured by --cost
    #[value(skip)]
    #[serde(rename = "zipf-4k-32")]
    ZipfDeep,
}

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes alone.
    Write,
    /// Reads alone.
    Read,
    /// Reads of this share in percent, and writes.
    Mixed(u64),
}

/// A job in all its numbers.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Which one this is.
    pub kind: JobKind,
    /// What it does, for people.
    pub title: &'static str,
    /// Writes, reads or both.
    pub access: Access,
    /// Offsets follow each other; otherwise they are random.
    pub sequential: bool,
    /// Bytes of one request.
    pub block_bytes: usize,
    /// Requests in flight on each connection.
    pub depth: usize,
    /// Connections at the same time.
    pub connections: usize,
    /// Random offsets follow zipf's law with exponent 1.1, the same ones for the same number; with fio.
    pub zipf_seed: Option<u64>,
    /// Each write is followed by a flush, and counts when that is answered.
    pub sync_each: bool,
}

impl Job {
    /// The job of this name.
    pub fn of(kind: JobKind) -> Self {
        let base = Self {
            kind,
            title: "",
            access: Access::Write,
            sequential: false,
            block_bytes: 4096,
            depth: 32,
            connections: 1,
            zipf_seed: None,
            sync_each: false,
        };
        match kind {
            JobKind::Write4kSingle => Self {
                title: "4 KiB random write, depth 1",
                depth: 1,
                ..base
            },
            JobKind::Write4kDeep => Self {
                title: "4 KiB random write, depth 32",
                ..base
            },
            JobKind::Read4kDeep => Self {
                title: "4 KiB random read, depth 32",
                access: Access::Read,
                ..base
            },
            JobKind::Write64k => Self {
                title: "64 KiB random write, depth 16",
                block_bytes: 64 << 10,
                depth: 16,
                ..base
            },
            JobKind::Write1m => Self {
                title: "1 MiB sequential write, depth 8",
                sequential: true,
                block_bytes: 1 << 20,
                depth: 8,
                ..base
            },
            JobKind::Read1m => Self {
                title: "1 MiB sequential read, depth 8",
                access: Access::Read,
                sequential: true,
                block_bytes: 1 << 20,
                depth: 8,
                ..base
            },
            JobKind::Write4kSync => Self {
                title: "4 KiB random write, a flush after each",
                depth: 1,
                sync_each: true,
                ..base
            },
            JobKind::Write4kConnections => Self {
                title: "4 KiB random write, 4 connections of depth 16",
                depth: 16,
                connections: 4,
                ..base
            },
            JobKind::Mixed4k => Self {
                title: "4 KiB random, 70% read and 30% write, depth 32",
                access: Access::Mixed(70),
                ..base
            },
            JobKind::ZipfSingle => base.by_zipf("4 KiB write, zipf 1.1 over 100 GiB, depth 1", 1),
            JobKind::ZipfDeep => base.by_zipf("4 KiB write, zipf 1.1 over 100 GiB, depth 32", 32),
        }
    }

    fn by_zipf(self, title: &'static str, depth: usize) -> Self {
        Self {
            title,
            depth,
            zipf_seed: Some(depth as u64),
            ..self
        }
    }

    /// Whether the rate is told in MB/s; otherwise in requests per second.
    pub fn counts_bytes(&self) -> bool {
        self.block_bytes >= 1 << 20
    }

    /// The unit of its rate.
    pub fn unit(&self) -> &'static str {
        if self.counts_bytes() { "MB/s" } else { "IOPS" }
    }

    /// The rate in its unit.
    pub fn rate(&self, requests: u64, seconds: f64) -> f64 {
        let per_second = requests as f64 / seconds.max(f64::EPSILON);
        if self.counts_bytes() {
            per_second * self.block_bytes as f64 / 1e6
        } else {
            per_second
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_is_possible_and_has_a_title() {
        let measured_by_cost = [JobKind::ZipfSingle, JobKind::ZipfDeep];
        for kind in JobKind::value_variants().iter().chain(&measured_by_cost) {
            let job = Job::of(*kind);
            assert!(!job.title.is_empty() && job.depth > 0 && job.connections > 0);
            assert_eq!(job.block_bytes % 4096, 0);
            assert_eq!(job.kind, *kind);
        }
    }

    #[test]
    fn rates_are_in_their_unit() {
        assert_eq!(Job::of(JobKind::Write4kDeep).rate(100, 2.0), 50.0);
        assert_eq!(Job::of(JobKind::Read1m).rate(10, 1.0), 10.48576);
    }
}
