//! One list of what a worker relies on, for both drivers.
//!
//! Where io_uring is forbidden, its half of the list cannot be run and says so.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use nix::sys::socket::{setsockopt, sockopt};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::buffer::{Buffer, BufferPool};
use super::driver::{Driver, EngineKind};
use super::transfer::{Completion, Held, PIECES_MAX, Piece, SendBatch};
use crate::disk::Disk;

const BLOCK_BYTES: usize = 4096;
const DISK_BLOCKS: usize = 64;
const DISK_BYTES: u64 = (DISK_BLOCKS * BLOCK_BYTES) as u64;

/// Runs a case over each driver.
fn over_both(case: impl Fn(&mut Driver)) {
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        match Driver::new(kind) {
            Ok(mut driver) => case(&mut driver),
            Err(error) if kind == EngineKind::IoUring => {
                eprintln!("not run over io_uring: {error}");
            }
            Err(error) => panic!("{kind}: {error}"),
        }
    }
}

fn buffer(content: &[u8]) -> Buffer {
    let mut buffer = BufferPool::default().take(content.len()).unwrap();
    buffer.bytes_mut()[..content.len()].copy_from_slice(content);
    buffer
}

fn next(driver: &mut Driver) -> Completion {
    let mut completions = Vec::new();
    driver.wait(&mut completions, true).unwrap();
    assert_eq!(completions.len(), 1, "one operation was in flight");
    completions.remove(0)
}

/// Nothing is finished yet.
fn assert_none(driver: &mut Driver) {
    let mut completions = Vec::new();
    driver.wait(&mut completions, false).unwrap();
    assert!(completions.is_empty(), "{}", completions[0].result);
}

fn bytes_of(held: &Held) -> &[u8] {
    match held {
        Held::Buffer(buffer) => buffer.bytes(),
        _ => panic!("the buffer did not come back"),
    }
}

fn socket_pair(driver: &mut Driver) -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    driver.add_socket(ours.as_fd()).unwrap();
    (ours, theirs)
}

fn new_disk(read_only: bool) -> (tempfile::TempDir, Arc<Disk>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    File::create_new(&path)
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    let disk = Arc::new(Disk::open("disk", &path, read_only).unwrap());
    (folder, disk)
}

#[test]
fn a_receive_takes_what_is_there_and_waits_for_what_is_not() {
    over_both(|driver| {
        let (ours, mut theirs) = socket_pair(driver);
        theirs.write_all(b"first").unwrap();
        driver.receive(ours.as_fd(), buffer(&[0; 100]), 10..100, false, 7);
        let done = next(driver);
        assert_eq!((done.tag, done.result), (7, 5));
        assert_eq!(&bytes_of(&done.held)[10..15], b"first");
        driver.receive(ours.as_fd(), buffer(&[0; 100]), 0..100, false, 8);
        assert_none(driver);
        theirs.write_all(b"second").unwrap();
        let done = next(driver);
        assert_eq!((done.tag, done.result), (8, 6));
        // What comes while nobody receives is not forgotten.
        theirs.write_all(b"third").unwrap();
        assert_none(driver);
        driver.receive(ours.as_fd(), buffer(&[0; 3]), 0..3, false, 9);
        assert_eq!(&bytes_of(&next(driver).held)[..3], b"thi");
        driver.receive(ours.as_fd(), buffer(&[0; 3]), 0..3, false, 10);
        assert_eq!(&bytes_of(&next(driver).held)[..2], b"rd");
    });
}

#[test]
fn the_end_of_a_stream_is_a_receive_of_nothing() {
    over_both(|driver| {
        let (ours, mut theirs) = socket_pair(driver);
        theirs.write_all(b"last").unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_none(driver);
        for expected in [4, 0, 0] {
            driver.receive(ours.as_fd(), buffer(&[0; 100]), 0..100, false, 1);
            assert_eq!(next(driver).result, expected);
        }
    });
}

#[test]
fn a_receive_of_all_is_filled_unless_the_stream_ends() {
    over_both(|driver| {
        let (ours, mut theirs) = socket_pair(driver);
        let content: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 7) as u8).collect();
        driver.receive(ours.as_fd(), buffer(&content), 100..content.len(), true, 1);
        theirs.write_all(&content[100..200]).unwrap();
        assert_none(driver);
        let rest = content.clone();
        let sender = std::thread::spawn(move || {
            theirs.write_all(&rest[200..]).unwrap();
            theirs.write_all(b"end").unwrap();
        });
        let done = next(driver);
        assert_eq!(done.result as usize, content.len() - 100);
        assert!(bytes_of(&done.held)[100..content.len()] == content[100..]);
        sender.join().unwrap();
        driver.receive(ours.as_fd(), buffer(&[0; 10]), 0..10, true, 2);
        assert_eq!(next(driver).result, 3);
    });
}

#[test]
fn a_socket_that_is_shut_ends_the_receive_in_flight() {
    over_both(|driver| {
        let (ours, theirs) = socket_pair(driver);
        driver.receive(ours.as_fd(), buffer(&[0; 10]), 0..10, true, 1);
        assert_none(driver);
        ours.shutdown(Shutdown::Both).unwrap();
        assert_eq!(next(driver).result, 0);
        drop(theirs);
    });
}

#[test]
fn a_number_that_is_used_again_is_another_socket() {
    over_both(|driver| {
        for round in 0..20_u8 {
            let (ours, mut theirs) = socket_pair(driver);
            driver.receive(ours.as_fd(), buffer(&[0; 10]), 0..10, false, 1);
            theirs.write_all(&[round]).unwrap();
            assert_eq!(bytes_of(&next(driver).held)[0], round);
            if round % 2 == 0 {
                // Its end is noticed by nobody.
                drop(theirs);
            }
        }
    });
}

/// Sends a batch to its end, as a worker does.
fn send_all(driver: &mut Driver, socket: &UnixStream, mut batch: Box<SendBatch>) -> usize {
    let mut calls = 0;
    while !batch.is_empty() {
        driver.send(socket.as_fd(), batch, 3);
        let done = next(driver);
        assert!(done.result > 0, "{}", done.result);
        let Held::Send(returned) = done.held else {
            panic!("the batch did not come back");
        };
        batch = returned;
        batch.advance(done.result as usize, drop);
        calls += 1;
    }
    calls
}

#[test]
fn a_batch_arrives_whole_through_a_narrow_socket() {
    over_both(|driver| {
        let (ours, mut theirs) = socket_pair(driver);
        setsockopt(&ours, sockopt::SndBuf, &4096).unwrap();
        let mut batch = Box::new(SendBatch::default());
        let mut expected = Vec::new();
        for number in 0..PIECES_MAX * 3 {
            let content = vec![number as u8; number * 131 % 70_000 + 1];
            expected.extend_from_slice(&content);
            if number % 3 == 0 {
                let length = content.len();
                batch.push(Piece::Data(buffer(&content), 0..length));
            } else {
                batch.push(Piece::Bytes(content));
            }
        }
        let length = expected.len();
        let reader = std::thread::spawn(move || {
            let mut found = vec![0; length];
            theirs.read_exact(&mut found).unwrap();
            found
        });
        let calls = send_all(driver, &ours, batch);
        assert!(calls >= 3, "{calls}");
        assert!(reader.join().unwrap() == expected);
    });
}

#[test]
fn a_send_waits_for_space_while_receives_go_on() {
    over_both(|driver| {
        let (ours, mut theirs) = socket_pair(driver);
        setsockopt(&ours, sockopt::SndBuf, &4096).unwrap();
        // Until nothing goes in any more.
        let mut filled = 0;
        ours.set_nonblocking(true).unwrap();
        while let Ok(count) = (&ours).write(&[1; 512]) {
            filled += count;
        }
        ours.set_nonblocking(false).unwrap();
        let mut batch = Box::new(SendBatch::default());
        batch.push(Piece::Bytes(b"reply".to_vec()));
        driver.send(ours.as_fd(), batch, 1);
        assert_none(driver);
        theirs.write_all(b"request").unwrap();
        driver.receive(ours.as_fd(), buffer(&[0; 10]), 0..10, false, 2);
        let done = next(driver);
        assert_eq!((done.tag, done.result), (2, 7));
        let mut found = vec![0; filled + 5];
        theirs.read_exact(&mut found[..filled]).unwrap();
        let done = next(driver);
        assert_eq!((done.tag, done.result), (1, 5));
        theirs.read_exact(&mut found[filled..]).unwrap();
        assert_eq!(&found[filled..], b"reply");
    });
}

#[test]
fn a_peer_that_has_gone_fails_the_send() {
    over_both(|driver| {
        let (ours, theirs) = socket_pair(driver);
        drop(theirs);
        let mut batch = Box::new(SendBatch::default());
        batch.push(Piece::Bytes(vec![0; 100]));
        driver.send(ours.as_fd(), batch, 1);
        let done = next(driver);
        assert_eq!(done.result, -libc::EPIPE);
        assert!(matches!(done.held, Held::Send(batch) if !batch.is_empty()));
    });
}

#[test]
fn disks_are_read_and_written_up_to_their_end() {
    over_both(|driver| {
        let (_folder, disk) = new_disk(false);
        for durable in [false, true] {
            let at = 5000 + u64::from(durable);
            driver.write(&disk, at, buffer(b"..content"), 2..9, durable, 1);
            assert_eq!(next(driver).result, 7);
            let mut found = [0; 7];
            disk.file().read_exact_at(&mut found, at).unwrap();
            assert_eq!(&found, b"content");
            driver.read(&disk, at, buffer(&[0; 20]), 4..11, 2);
            let done = next(driver);
            assert_eq!((done.tag, done.result), (2, 7));
            assert_eq!(&bytes_of(&done.held)[4..11], b"content");
        }
        driver.read(&disk, DISK_BYTES - 3, buffer(&[9; 20]), 0..20, 3);
        assert_eq!(next(driver).result, 3);
        driver.read(&disk, DISK_BYTES, buffer(&[9; 20]), 0..20, 3);
        assert_eq!(next(driver).result, 0);
        driver.sync(&disk, 4);
        assert_eq!(next(driver).result, 0);
        driver.prefetch(&disk, 0, 1 << 16, 5);
        assert_eq!(next(driver).result, 0);
    });
}

#[test]
fn ranges_are_dug_out_and_wrong_modes_refused() {
    over_both(|driver| {
        let (_folder, disk) = new_disk(false);
        disk.file().write_all_at(&[1; 3 * BLOCK_BYTES], 0).unwrap();
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let block = BLOCK_BYTES as u64;
        driver.allocate(&disk, punch, block, block, 1);
        let done = next(driver);
        assert_eq!((done.tag, done.result), (1, 0));
        let mut found = [9; 3 * BLOCK_BYTES];
        disk.file().read_exact_at(&mut found, 0).unwrap();
        for (number, block) in found.chunks(BLOCK_BYTES).enumerate() {
            let expected = u8::from(number != 1);
            assert!(block.iter().all(|byte| *byte == expected), "{number}");
        }
        driver.allocate(&disk, libc::FALLOC_FL_PUNCH_HOLE, 0, block, 2);
        assert_eq!(next(driver).result, -libc::EOPNOTSUPP);
    });
}

#[test]
fn errors_of_a_disk_come_back_with_the_memory() {
    over_both(|driver| {
        let (_folder, disk) = new_disk(true);
        for durable in [false, true] {
            driver.write(&disk, 0, buffer(&[1; 512]), 0..512, durable, 1);
            let done = next(driver);
            assert_eq!(done.result, -libc::EBADF);
            assert_eq!(bytes_of(&done.held)[511], 1);
        }
    });
}

#[test]
fn a_descriptor_is_waited_for_once_each_time() {
    over_both(|driver| {
        let wake = EventFd::new().unwrap();
        for round in 0..3 {
            driver.poll_readable(wake.as_fd(), 11);
            assert_none(driver);
            let other = wake.as_fd().try_clone_to_owned().unwrap();
            let ringer =
                std::thread::spawn(move || nix::unistd::write(&other, &1_u64.to_ne_bytes()));
            assert_eq!(next(driver).tag, 11, "{round}");
            ringer.join().unwrap().unwrap();
            // It still can be read, but nobody has asked again.
            assert_none(driver);
            wake.read().unwrap();
        }
    });
}

/// One write of some blocks.
#[derive(Clone, Debug)]
struct Writing {
    first_block: usize,
    block_count: usize,
    durable: bool,
}

/// Writes that do not overlap, in an order of their own, all in flight at once; then as many reads.
fn write_and_read_at_depth(driver: &mut Driver, writes: &[Writing]) -> Result<(), TestCaseError> {
    let (_folder, disk) = new_disk(false);
    let mut completions = Vec::new();
    let mut model = vec![0_u8; DISK_BYTES as usize];
    let mut taken = [false; DISK_BLOCKS];
    let mut in_flight = 0;
    for (number, writing) in writes.iter().enumerate() {
        let blocks =
            writing.first_block..(writing.first_block + writing.block_count).min(DISK_BLOCKS);
        if taken[blocks.clone()].contains(&true) {
            continue;
        }
        taken[blocks.clone()].fill(true);
        let bytes = blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES;
        model[bytes.clone()].fill(number as u8 + 1);
        let memory = buffer(&model[bytes.clone()]);
        let offset = bytes.start as u64;
        driver.write(
            &disk,
            offset,
            memory,
            0..bytes.len(),
            writing.durable,
            bytes.len() as u64,
        );
        in_flight += 1;
    }
    collect(driver, in_flight, &mut completions);
    for done in completions.drain(..) {
        prop_assert_eq!(done.result as u64, done.tag);
    }
    for block in 0..DISK_BLOCKS {
        let memory = buffer(&[0xee; BLOCK_BYTES]);
        driver.read(
            &disk,
            (block * BLOCK_BYTES) as u64,
            memory,
            0..BLOCK_BYTES,
            block as u64,
        );
    }
    collect(driver, DISK_BLOCKS, &mut completions);
    for done in completions {
        prop_assert_eq!(done.result as usize, BLOCK_BYTES);
        let start = done.tag as usize * BLOCK_BYTES;
        let bytes = start..start + BLOCK_BYTES;
        prop_assert!(bytes_of(&done.held)[..BLOCK_BYTES] == model[bytes]);
    }
    Ok(())
}

fn collect(driver: &mut Driver, count: usize, completions: &mut Vec<Completion>) {
    while completions.len() < count {
        driver.wait(completions, true).unwrap();
    }
    assert_eq!(completions.len(), count);
}

#[test]
fn many_operations_do_not_mix_up_their_memory() {
    let writing = (0..DISK_BLOCKS, 1..6_usize, any::<bool>()).prop_map(
        |(first_block, block_count, durable)| Writing {
            first_block,
            block_count,
            durable,
        },
    );
    let lists = prop::collection::vec(writing, 1..60);
    over_both(|driver| {
        let cell = std::cell::RefCell::new(driver);
        let mut runner = TestRunner::new(Config::with_cases(24));
        runner
            .run(&lists, |writes| {
                write_and_read_at_depth(&mut cell.borrow_mut(), &writes)
            })
            .unwrap();
    });
}

#[test]
fn writes_handed_to_threads_are_finished_before_they_end() {
    let (_folder, disk) = new_disk(false);
    let mut driver = Driver::new(EngineKind::Threads).unwrap();
    for block in 0..DISK_BLOCKS {
        let memory = buffer(&[block as u8 + 1; BLOCK_BYTES]);
        let offset = (block * BLOCK_BYTES) as u64;
        driver.write(&disk, offset, memory, 0..BLOCK_BYTES, true, 1);
    }
    drop(driver);
    let mut found = vec![0; DISK_BYTES as usize];
    disk.file().read_exact_at(&mut found, 0).unwrap();
    for (block, bytes) in found.chunks(BLOCK_BYTES).enumerate() {
        assert!(
            bytes.iter().all(|byte| usize::from(*byte) == block + 1),
            "{block}"
        );
    }
    // The threads have let go of it.
    assert_eq!(Arc::strong_count(&disk), 1);
}

#[test]
fn a_panic_in_a_thread_is_an_error_of_the_disk() {
    let (_folder, disk) = new_disk(false);
    let mut driver = Driver::new(EngineKind::Threads).unwrap();
    // More than there are threads, each of which must live on.
    for _ in 0..40 {
        let beyond = 1 << 20..2 << 20;
        driver.write(&disk, 0, buffer(&[1; 512]), beyond, true, 1);
        let done = next(&mut driver);
        assert_eq!(done.result, -libc::EIO);
        assert_eq!(bytes_of(&done.held)[511], 1);
    }
    driver.write(&disk, 0, buffer(&[1; 512]), 0..512, true, 1);
    assert_eq!(next(&mut driver).result, 512);
}
