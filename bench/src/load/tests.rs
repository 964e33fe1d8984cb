//! The light client against a server in memory that is honest, or is not.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use super::run;
use crate::job::{Job, JobKind};
use crate::pattern::{self, Version};

const SIZE_BYTES: usize = 2 << 20;

/// What is wrong with the server.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Its first reply has another cookie.
    Cookie,
    /// Its first reply comes twice.
    Twice,
    /// Its first reply is an error.
    Error,
    /// It flips a bit of what is read.
    Data,
    /// It acknowledges writes and forgets them.
    Forgets,
    /// It leaves before its first reply.
    Leaves,
}

fn serve(stream: &mut UnixStream, fault: Fault) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 20])?;
    stream.write_all(&(SIZE_BYTES as u64).to_be_bytes())?;
    stream.write_all(&[0, 1])?;
    let mut disk = vec![0; SIZE_BYTES];
    pattern::fill(&mut disk, 0, Version::Old);
    for number in 1.. {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let offset = u64::from_be_bytes(header[16..24].try_into().unwrap()) as usize;
        let length = u32::from_be_bytes(header[24..].try_into().unwrap()) as usize;
        let mut data = disk[offset..offset + length].to_vec();
        let mut reply = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        reply[8..].copy_from_slice(&header[8..16]);
        match header[7] {
            0 if fault == Fault::Data => data[4090 % length] ^= 4,
            0 => {}
            1 => {
                stream.read_exact(&mut data)?;
                if fault != Fault::Forgets {
                    disk[offset..offset + length].copy_from_slice(&data);
                }
                data.clear();
            }
            3 => assert_eq!((offset, length), (0, 0), "a flush is of the whole disk"),
            _ => return Ok(()),
        }
        match fault {
            Fault::Cookie if number == 1 => reply[13] ^= 1,
            Fault::Error if number == 1 => reply[7] = 28,
            Fault::Twice if number == 1 => stream.write_all(&reply)?,
            Fault::Leaves if number == 1 => return Ok(()),
            _ => {}
        }
        stream.write_all(&reply)?;
        stream.write_all(&data)?;
    }
    Ok(())
}

/// The requests that were made, or what went wrong.
fn against(fault: Fault, kind: JobKind) -> Result<u64, String> {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let job = Job::of(kind);
    let connections = job.connections;
    std::thread::spawn(move || {
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().unwrap();
            // A client that has seen a fault leaves in the middle.
            std::thread::spawn(move || {
                let _left = serve(&mut stream, fault);
            });
        }
    });
    let socket: &Path = &socket;
    run((socket, ""), &job, Duration::from_millis(400), true)
        .map(|load| load.requests)
        .map_err(|error| error.to_string())
}

#[test]
fn every_job_is_done_by_an_honest_server() {
    for kind in <JobKind as clap::ValueEnum>::value_variants() {
        let requests = against(Fault::None, *kind).unwrap();
        assert!(requests > 0, "{kind:?}: {requests}");
    }
}

#[test]
fn each_fault_is_seen() {
    for (fault, kind, expected) in [
        (Fault::Cookie, JobKind::Write4kDeep, "no request"),
        (Fault::Cookie, JobKind::Read4kDeep, "no request"),
        (Fault::Twice, JobKind::Write4kDeep, "no request"),
        (Fault::Error, JobKind::Write4kDeep, "error 28"),
        (Fault::Error, JobKind::Write4kConnections, "error 28"),
        (Fault::Data, JobKind::Read4kDeep, "wrong data"),
        (Fault::Data, JobKind::Read1m, "wrong data"),
        (Fault::Forgets, JobKind::Write4kDeep, "wrong data"),
        (Fault::Leaves, JobKind::Read4kDeep, "closed"),
    ] {
        let error = against(fault, kind).unwrap_err();
        assert!(error.contains(expected), "{kind:?}: {error}");
    }
}
