//! The NBD server against the specification: negotiation, every command, every error, and input that
//! no client should send. After each hostile case the server must still serve.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use tests::nbd::request_bytes;
use tests::nbd::{Client, Failure, Raw, command, errno, info_request, option, option_bytes};
use tests::process::Daemon;
use tests::seed::Random;
use tests::site::Site;

const MIB: u64 = 1 << 20;
const FLAGS_OF_WRITABLE: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

fn site() -> (Site, Daemon) {
    let site = Site::new(&[("disk", 16 * MIB)]);
    let tracker = site.start_tracker();
    (site, tracker)
}

#[track_caller]
fn refused(result: Result<impl std::fmt::Debug, Failure>, expected: u32) {
    match result {
        Err(Failure::Refused(error)) => assert_eq!(error, expected, "error number"),
        other => panic!("error {expected} was expected: {other:?}"),
    }
}

#[track_caller]
fn still_serves(site: &Site) {
    let mut client = site.connect("disk");
    assert_eq!(client.read(0, 512).unwrap().len(), 512);
    client.disconnect().unwrap();
}

#[test]
fn go_tells_size_and_flags() {
    let (site, _tracker) = site();
    for name in ["", "disk"] {
        let client = site.connect(name);
        assert_eq!(client.size_bytes(), 16 * MIB);
        assert_eq!(client.flags() & FLAGS_OF_WRITABLE, FLAGS_OF_WRITABLE);
        assert_eq!(client.flags() & 2, 0, "not read-only");
        client.disconnect().unwrap();
    }
}

#[test]
fn info_tells_block_sizes_and_leaves_the_negotiation_open() {
    let (site, _tracker) = site();
    let mut raw = Raw::unix(&site.socket()).unwrap();
    assert_eq!(raw.greet(3).unwrap() & 3, 3);
    for _ in 0..2 {
        let [minimum, preferred, maximum] = raw.block_sizes("disk").unwrap();
        assert!(minimum.is_power_of_two() && minimum <= 4096);
        assert_eq!(preferred, 4096);
        assert!(maximum >= MIB as u32);
    }
    let replies = raw.ask(option::GO, &info_request("disk", &[])).unwrap();
    assert_eq!(replies.last().unwrap().0, option::ACK);
}

#[test]
fn every_item_of_information_that_is_asked_for() {
    let (site, _tracker) = site();
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    let wanted = [3, 1, 2, 77, u16::MAX];
    let replies = raw.ask(option::INFO, &info_request("", &wanted)).unwrap();
    let kinds: Vec<u8> = replies[..replies.len() - 1]
        .iter()
        .map(|reply| reply.1[1])
        .collect();
    assert_eq!(
        kinds,
        [0, 1, 3],
        "export, name and block sizes; no description, nothing unknown"
    );
    assert_eq!(replies[1].1[2..], *b"disk", "the default export has a name");
    assert_eq!(replies.last().unwrap().0, option::ACK);
}

#[test]
fn list_names_every_export() {
    let site = Site::new(&[("first", MIB), ("second", 2 * MIB)]);
    let _tracker = site.start_tracker();
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    let replies = raw.ask(option::LIST, &[]).unwrap();
    let names: Vec<Vec<u8>> = replies
        .iter()
        .filter(|(kind, _)| *kind == option::SERVER)
        .map(|(_, data)| data[4..].to_vec())
        .collect();
    assert_eq!(names, [b"first".to_vec(), b"second".to_vec()]);
    // Where there are several disks there is no default one.
    let replies = raw.ask(option::GO, &info_request("", &[])).unwrap();
    assert_eq!(replies.last().unwrap().0, option::ERR_UNKNOWN);
    assert_eq!(site.connect("second").size_bytes(), 2 * MIB);
    let mut list_with_data = raw.ask(option::LIST, b"x").unwrap();
    assert_eq!(list_with_data.pop().unwrap().0, option::ERR_INVALID);
}

#[test]
fn export_name_goes_straight_to_transmission() {
    let (site, _tracker) = site();
    for (client_flags, zeroes) in [(3, 0), (1, 124)] {
        let mut raw = Raw::unix(&site.socket()).unwrap();
        raw.greet(client_flags).unwrap();
        raw.send_option(option::EXPORT_NAME, b"disk").unwrap();
        let answer = raw.receive(10 + zeroes).unwrap();
        assert_eq!(answer[..8], (16 * MIB).to_be_bytes());
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        let mut client = Client::after_negotiation(raw, 16 * MIB, 0);
        client.write(0, &[7; 512]).unwrap();
        assert_eq!(client.read(0, 512).unwrap(), [7; 512]);
        client.disconnect().unwrap();
    }
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    raw.send_option(option::EXPORT_NAME, b"nothing").unwrap();
    assert!(raw.until_closed().unwrap().is_empty());
}

#[test]
fn abort_is_acknowledged_and_closes() {
    let (site, _tracker) = site();
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    let replies = raw.ask(option::ABORT, &[]).unwrap();
    assert_eq!(replies, [(option::ACK, Vec::new())]);
    assert!(raw.until_closed().unwrap().is_empty());
}

#[test]
fn unknown_and_malformed_options_are_refused_and_the_negotiation_goes_on() {
    let (site, _tracker) = site();
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    for number in [99, 0, 4, u32::MAX, option::STARTTLS] {
        let replies = raw.ask(number, b"abc").unwrap();
        assert!(replies.last().unwrap().0 & 0x8000_0000 != 0, "{number}");
    }
    for data in [
        &b""[..],
        b"abc",
        b"\xff\xff\xff\xff\0\0",
        b"\0\0\0\x04disk\0\x02\0\0",
    ] {
        let replies = raw.ask(option::GO, data).unwrap();
        assert_eq!(replies.last().unwrap().0, option::ERR_INVALID, "{data:?}");
        let text = &replies.last().unwrap().1;
        assert!(std::str::from_utf8(text).is_ok());
    }
    let replies = raw.ask(option::GO, &info_request("no", &[])).unwrap();
    assert_eq!(replies.last().unwrap().0, option::ERR_UNKNOWN);
    let replies = raw.ask(99, &vec![0; 1 << 20]).unwrap();
    assert!(replies.last().unwrap().0 & 0x8000_0000 != 0);
    let replies = raw.ask(option::GO, &info_request("disk", &[])).unwrap();
    assert_eq!(replies.last().unwrap().0, option::ACK);
}

#[test]
fn reads_and_writes_of_any_alignment() {
    let (site, _tracker) = site();
    let mut client = site.connect("disk");
    let mut random = Random::from_environment("reads_and_writes_of_any_alignment");
    let mut model = vec![0_u8; (16 * MIB) as usize];
    for _ in 0..200 {
        let offset = random.below(16 * MIB);
        let length = random.between(1, (16 * MIB - offset).min(70_000)) as usize;
        let range = offset as usize..offset as usize + length;
        match random.below(4) {
            0 => {
                client.zero(offset, length as u32).unwrap();
                model[range].fill(0);
            }
            1 => {
                let found = client.read(offset, length as u32).unwrap();
                assert!(found == model[range], "at {offset}, {length} bytes");
            }
            _ => {
                let data = random.bytes(length);
                client.write(offset, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
    for offset in (0..16 * MIB).step_by(MIB as usize) {
        let found = client.read(offset, MIB as u32).unwrap();
        assert!(found == model[offset as usize..(offset + MIB) as usize]);
    }
}

#[test]
fn large_and_empty_requests() {
    let (site, _tracker) = site();
    let mut client = site.connect("disk");
    let data = Random::new(3).bytes(8 << 20);
    client.write(4096, &data).unwrap();
    assert!(client.read(4096, 8 << 20).unwrap() == data);
    // The specification leaves requests of no length to the server; they may fail, not hang.
    for number in [command::READ, command::TRIM, command::WRITE_ZEROES] {
        match client.call(0, number, 0, 0, &[]) {
            Ok(_) | Err(Failure::Refused(_)) => {}
            Err(Failure::Lost(error)) => panic!("{number}: {error}"),
        }
    }
    assert_eq!(client.read(4096, 16).unwrap(), data[..16]);
}

#[test]
fn trim_and_write_zeroes_leave_zeroes_and_holes() {
    use std::os::unix::fs::MetadataExt;
    let (site, _tracker) = site();
    let mut client = site.connect("disk");
    let blocks = || {
        std::fs::File::open(site.image("disk"))
            .unwrap()
            .sync_all()
            .unwrap();
        std::fs::metadata(site.image("disk")).unwrap().blocks()
    };
    client.write(0, &vec![1; 8 << 20]).unwrap();
    client.flush().unwrap();
    assert!(blocks() >= 8 * 2048);
    client.trim(0, 4 << 20).unwrap();
    client.zero(4 << 20, 2 << 20).unwrap();
    client.flush().unwrap();
    assert!(blocks() < 3 * 2048, "{} sectors are left", blocks());
    assert!(
        client
            .read(0, 6 << 20)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
    client
        .call(command::NO_HOLE, command::WRITE_ZEROES, 0, 4 << 20, &[])
        .unwrap();
    client.flush().unwrap();
    assert!(blocks() >= 6 * 2048, "NO_HOLE must allocate");
    assert!(
        client
            .read(0, 6 << 20)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(client.read(6 << 20, 1).unwrap(), [1]);
}

#[test]
fn flush_and_fua_are_taken_by_every_connection() {
    let (site, _tracker) = site();
    let mut one = site.connect("disk");
    let mut two = site.connect("disk");
    one.call(command::FUA, command::WRITE, 0, 4096, &[1; 4096])
        .unwrap();
    two.flush().unwrap();
    assert_eq!(two.read(0, 4096).unwrap(), [1; 4096]);
    two.call(command::FUA, command::WRITE_ZEROES, 0, 4096, &[])
        .unwrap();
    one.call(command::FUA, command::TRIM, 4096, 4096, &[])
        .unwrap();
    assert_eq!(one.read(0, 4096).unwrap(), [0; 4096]);
    // The specification lets a client set FUA on any command.
    one.call(command::FUA, command::READ, 0, 512, &[]).unwrap();
    one.call(command::FUA, command::FLUSH, 0, 0, &[]).unwrap();
}

#[test]
fn errors_past_the_end() {
    let (site, _tracker) = site();
    let mut client = site.connect("disk");
    let end = 16 * MIB;
    for (offset, length) in [
        (end, 512_u32),
        (end - 512, 1024),
        (u64::MAX - 511, 512),
        (1 << 63, 4096),
    ] {
        refused(client.read(offset, length), errno::EINVAL);
        refused(client.trim(offset, length), errno::EINVAL);
        refused(client.zero(offset, length), errno::ENOSPC);
        refused(
            client.write(offset, &vec![1; length as usize]),
            errno::ENOSPC,
        );
    }
    assert_eq!(client.read(end - 512, 512).unwrap(), [0; 512]);
    client.write(end - 512, &[9; 512]).unwrap();
}

#[test]
fn unknown_commands_and_flags_are_invalid() {
    let (site, _tracker) = site();
    let mut client = site.connect("disk");
    // BLOCK_STATUS needs contexts, which need structured replies.
    for number in [command::BLOCK_STATUS, 8, 99, u16::MAX] {
        refused(client.call(0, number, 0, 0, &[]), errno::EINVAL);
    }
    for flag in [command::DF, command::PAYLOAD_LEN] {
        refused(client.call(flag, command::READ, 0, 512, &[]), errno::EINVAL);
    }
    for number in [command::READ, command::TRIM, command::FLUSH, command::CACHE] {
        refused(client.call(1 << 15, number, 0, 0, &[]), errno::EINVAL);
    }
    refused(
        client.call(1 << 15, command::WRITE, 0, 512, &[1; 512]),
        errno::EINVAL,
    );
    assert_eq!(
        client.read(0, 512).unwrap(),
        [0; 512],
        "the payload was skipped"
    );
}

#[test]
fn a_read_only_export_refuses_changes() {
    let mut site = Site::new(&[("disk", MIB)]);
    site.tracker_arguments.push("--read-only".into());
    let _tracker = site.start_tracker();
    let mut client = site.connect("disk");
    assert_eq!(client.flags() & 2, 2);
    refused(client.write(0, &[1; 512]), errno::EPERM);
    refused(client.zero(0, 512), errno::EPERM);
    refused(client.trim(0, 512), errno::EPERM);
    client.flush().unwrap();
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn many_requests_in_flight_all_come_back() {
    let (site, _tracker) = site();
    let mut clients: Vec<Client> = (0..4).map(|_| site.connect("disk")).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        for slot in 0..64_u64 {
            let tag = index as u64 * 64 + slot;
            client
                .submit(0, command::WRITE, tag * 4096, 4096, &[tag as u8; 4096])
                .unwrap();
        }
    }
    for client in &mut clients {
        while client.in_flight() > 0 {
            assert_eq!(client.receive().unwrap().error, 0);
        }
    }
    let client = &mut clients[0];
    let cookies: Vec<u64> = (0..256)
        .map(|tag| {
            client
                .submit(0, command::READ, tag * 4096, 4096, &[])
                .unwrap()
        })
        .collect();
    for _ in 0..256 {
        let reply = client.receive().unwrap();
        let tag = cookies
            .iter()
            .position(|cookie| *cookie == reply.cookie)
            .unwrap();
        assert!(reply.data == [tag as u8; 4096], "block {tag}");
    }
}

#[test]
fn disconnect_answers_what_is_in_flight_first() {
    let (site, _tracker) = site();
    let mut client = site.connect("disk");
    for slot in 0..64 {
        client
            .submit(0, command::WRITE, slot * 4096, 4096, &[1; 4096])
            .unwrap();
    }
    client
        .raw()
        .send(&request_bytes(0, command::DISCONNECT, 0, 0, 0))
        .unwrap();
    for _ in 0..64 {
        assert_eq!(client.receive().unwrap().error, 0);
    }
    assert!(client.raw().until_closed().unwrap().is_empty());
}

#[test]
fn tcp_serves_loopback_alone() {
    let mut site = Site::new(&[("disk", MIB)]);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    site.tracker_arguments = vec!["--listen".into(), port.to_string()];
    let _tracker = site.start_tracker();
    let mut client = Client::tcp(port, "disk").unwrap();
    client.write(512, &[3; 512]).unwrap();
    assert_eq!(site.connect("").read(512, 512).unwrap(), [3; 512]);
    client.disconnect().unwrap();

    let mut open_to_all = Site::new(&[("disk", MIB)]);
    open_to_all.tracker_arguments = vec!["--listen".into(), "0.0.0.0:0".into()];
    let message = tests::process::run(&mut open_to_all.serve_command()).failure();
    assert!(message.contains("loopback"), "{message}");
}

#[test]
fn a_silent_client_is_dropped_after_the_deadline_and_costs_nobody() {
    let (site, _tracker) = site();
    let begin = Instant::now();
    let mut silent: Vec<Raw> = (0..8).map(|_| Raw::unix(&site.socket()).unwrap()).collect();
    still_serves(&site);
    for raw in &mut silent {
        assert_eq!(raw.until_closed().unwrap().len(), 18, "the greeting alone");
    }
    let lasted = begin.elapsed();
    assert!(
        lasted > Duration::from_secs(5) && lasted < Duration::from_secs(20),
        "{lasted:?}"
    );
    still_serves(&site);
}

#[test]
fn hostile_negotiations_end_their_own_connection_alone() {
    let (site, _tracker) = site();
    let mut random = Random::from_environment("hostile_negotiations");
    let hostile: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 64],
        [&[0, 0, 0, 3][..], &option_bytes(7, u32::MAX, &[])].concat(),
        [&[0, 0, 0, 3][..], &option_bytes(1, 1 << 20, &[0; 4096])].concat(),
        [&[0, 0, 0, 3][..], &option_bytes(3, 4, b"ab")].concat(),
        [&[0, 0, 0, 3][..], &option_bytes(6, 3, b"\0\0\0")].concat(),
        [&[0, 0, 0, 3][..], &[0x41; 16][..]].concat(),
        [&[0, 0, 0, 3][..], &option_bytes(99, 0, &[]).repeat(2000)].concat(),
    ];
    for bytes in hostile {
        let mut raw = Raw::unix(&site.socket()).unwrap();
        let _closed_early = raw.send(&bytes);
        drop(raw);
        still_serves(&site);
    }
    for _ in 0..300 {
        let mut raw = Raw::unix(&site.socket()).unwrap();
        let mut bytes = vec![0, 0, 0, 3];
        for _ in 0..random.between(1, 4) {
            let length = random.below(40) as usize;
            let claimed = if random.chance(1, 4) {
                random.next_u64() as u32
            } else {
                length as u32
            };
            let data = random.bytes(length);
            bytes.extend_from_slice(&option_bytes(random.below(12) as u32, claimed, &data));
        }
        let _closed_early = raw.send(&bytes);
    }
    still_serves(&site);
}

#[test]
fn hostile_transmissions_end_their_own_connection_alone() {
    let (site, _tracker) = site();
    let mut random = Random::from_environment("hostile_transmissions");
    // A wrong magic cannot be followed: the connection closes.
    let mut client = site.connect("disk");
    client.raw().send(&[0x55; 28]).unwrap();
    assert!(client.raw().until_closed().is_ok());
    still_serves(&site);
    // A header alone, half a payload, a payload beyond any limit, leaving in mid-reply.
    for (number, length, payload) in [
        (command::WRITE, 4096, 0),
        (command::WRITE, 4096, 100),
        (command::WRITE, u32::MAX, 70_000),
        (command::READ, 8 << 20, 0),
    ] {
        let mut client = site.connect("disk");
        let mut bytes = request_bytes(0, number, 1, 0, length);
        bytes.extend_from_slice(&vec![1; payload]);
        client.raw().send(&bytes).unwrap();
        drop(client);
        still_serves(&site);
    }
    refused(site.connect("disk").read(0, u32::MAX), errno::EINVAL);
    for _ in 0..300 {
        let mut client = site.connect("disk");
        for _ in 0..random.between(1, 8) {
            let bytes = request_bytes(
                random.next_u64() as u16 & 0x1f,
                random.below(10) as u16,
                random.next_u64(),
                random.below(32 * MIB),
                random.below(1 << 17) as u32,
            );
            if client.raw().send(&bytes).is_err() {
                break;
            }
        }
    }
    still_serves(&site);
}

#[test]
fn a_client_that_never_reads_costs_only_itself() {
    let (site, _tracker) = site();
    let mut greedy: Vec<Client> = (0..4).map(|_| site.connect("disk")).collect();
    for client in &mut greedy {
        for _ in 0..64 {
            client.submit(0, command::READ, 0, 1 << 20, &[]).unwrap();
        }
    }
    let begin = Instant::now();
    still_serves(&site);
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn connections_are_capped() {
    let (site, tracker) = site();
    let mut held = Vec::new();
    while held.len() < 1000 {
        match Client::unix(&site.socket(), "disk") {
            Ok(client) => held.push(client),
            Err(_) => break,
        }
    }
    assert!(
        held.len() >= 64 && held.len() < 1000,
        "{} connections",
        held.len()
    );
    held[0].write(0, &[1; 512]).unwrap();
    drop(held);
    // The places are free again as soon as the workers have seen the clients leave.
    let deadline = Instant::now() + Duration::from_secs(20);
    while Client::unix(&site.socket(), "disk").is_err() {
        assert!(
            Instant::now() < deadline,
            "no place is free again:\n{}",
            tracker.log()
        );
        std::thread::yield_now();
    }
}

#[test]
fn sigterm_answers_what_was_sent_and_ends_with_success() {
    let (site, tracker) = site();
    let mut client = site.connect("disk");
    for slot in 0..32 {
        client
            .submit(0, command::WRITE, slot * 4096, 4096, &[5; 4096])
            .unwrap();
    }
    for _ in 0..32 {
        assert_eq!(client.receive().unwrap().error, 0);
    }
    tracker.stop();
    assert!(!site.socket().exists(), "the socket is removed");
    let tracker = site.start_tracker();
    assert_eq!(
        site.connect("disk").read(31 * 4096, 4096).unwrap(),
        [5; 4096]
    );
    tracker.stop();
}
