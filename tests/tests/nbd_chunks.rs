//! Structured replies, meta contexts and extended headers against the specification, by a client of
//! our own: what a good client sees, and what a hostile one cannot break.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use tests::chunks::{Chunk, ChunkClient, chunk, committed_cut, select};
use tests::nbd::{Raw, command, context_request, errno, extended_bytes, info_request, option};
use tests::process::Daemon;
use tests::seed::Random;
use tests::site::Site;

const MIB: u64 = 1 << 20;
const ALLOCATION: &str = "base:allocation";
const DIRTY: &str = "tidemark:dirty";
const QEMU_DIRTY: &str = "qemu:dirty-bitmap:tidemark";
/// Hole and zero, as `base:allocation` says it.
const HOLE: u64 = 3;

fn site() -> (Site, Daemon) {
    let site = Site::new(&[("disk", 16 * MIB)]);
    let tracker = site.start_tracker();
    (site, tracker)
}

/// A client with structured replies, then one with extended headers.
fn both(site: &Site, contexts: &[&str]) -> [ChunkClient; 2] {
    [false, true]
        .map(|extended| ChunkClient::connect(&site.socket(), "disk", extended, contexts).unwrap())
}

fn negotiating(site: &Site) -> Raw {
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    raw
}

#[track_caller]
fn still_serves(site: &Site) {
    let mut client = site.connect("disk");
    assert_eq!(client.read(0, 512).unwrap().len(), 512);
    client.disconnect().unwrap();
}

fn last(replies: &[(u32, Vec<u8>)]) -> u32 {
    let (kind, text) = replies.last().unwrap();
    assert!(std::str::from_utf8(text).is_ok());
    *kind
}

#[test]
fn flags_follow_what_was_negotiated() {
    let (site, _tracker) = site();
    let (df, cache, fast_zero, payload) = (1 << 7, 1 << 10, 1 << 11, 1 << 12);
    let simple = site.connect("disk").flags();
    assert_eq!(
        simple & (df | cache | fast_zero | payload),
        cache | fast_zero
    );
    let [structured, extended] = both(&site, &[ALLOCATION]).map(|client| client.flags);
    assert_eq!(structured & (df | payload), df);
    assert_eq!(extended & (df | payload), df | payload);
    let [_, bare] = both(&site, &[]).map(|client| client.flags);
    assert_eq!(bare & (df | payload), df, "no payload without contexts");
}

#[test]
fn modes_are_negotiated_by_the_book() {
    let (site, _tracker) = site();
    let mut raw = negotiating(&site);
    for number in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        let replies = raw.ask(number, b"x").unwrap();
        assert_eq!(last(&replies), option::ERR_INVALID, "data with {number}");
    }
    let contexts = context_request("disk", &[ALLOCATION]);
    for number in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let replies = raw.ask(number, &contexts).unwrap();
        assert_eq!(last(&replies), option::ERR_INVALID, "before structure");
    }
    for number in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        assert_eq!(raw.ask(number, &[]).unwrap(), [(option::ACK, Vec::new())]);
    }
    let back = raw.ask(option::STRUCTURED_REPLY, &[]).unwrap();
    assert_eq!(last(&back), option::ERR_EXT_HEADER_REQD);
    raw.send_option(option::EXPORT_NAME, b"disk").unwrap();
    assert!(raw.until_closed().unwrap().is_empty());
    // With structured replies the old way into transmission stays open.
    let mut raw = negotiating(&site);
    raw.ask(option::STRUCTURED_REPLY, &[]).unwrap();
    raw.send_option(option::EXPORT_NAME, b"disk").unwrap();
    let answer = raw.receive(10).unwrap();
    assert_eq!(answer[9] & 1 << 7, 1 << 7, "SEND_DF");
}

#[test]
fn contexts_are_listed_and_selected_by_the_book() {
    let site = Site::new(&[("disk", MIB), ("other", MIB)]);
    let _tracker = site.start_tracker();
    let mut raw = negotiating(&site);
    raw.ask(option::STRUCTURED_REPLY, &[]).unwrap();
    let mut list = |queries: &[&str]| -> Vec<String> {
        let data = context_request("disk", queries);
        let replies = raw.ask(option::LIST_META_CONTEXT, &data).unwrap();
        assert_eq!(last(&replies), option::ACK);
        let names = replies[..replies.len() - 1].iter();
        names
            .map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap())
            .collect()
    };
    assert_eq!(list(&[]), [ALLOCATION, DIRTY, QEMU_DIRTY]);
    assert_eq!(list(&["base:"]), [ALLOCATION]);
    assert_eq!(list(&["tidemark:", "base:allocation"]), [ALLOCATION, DIRTY]);
    assert_eq!(list(&["qemu:dirty-bitmap:"]), [QEMU_DIRTY]);
    assert!(list(&["x-unknown:", "base:nothing", "qemu:allocation-depth"]).is_empty());

    let names = |selected: Vec<(u32, String)>| -> Vec<String> {
        selected.into_iter().map(|context| context.1).collect()
    };
    let all = select(&mut raw, "disk", &[DIRTY, ALLOCATION, DIRTY, QEMU_DIRTY]).unwrap();
    assert_eq!(names(all), [ALLOCATION, DIRTY, QEMU_DIRTY]);
    assert!(
        select(&mut raw, "disk", &["base:", "tidemark:"])
            .unwrap()
            .is_empty()
    );
    assert!(select(&mut raw, "disk", &[]).unwrap().is_empty());
    let unknown = context_request("nothing", &[ALLOCATION]);
    for number in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let replies = raw.ask(number, &unknown).unwrap();
        assert_eq!(last(&replies), option::ERR_UNKNOWN);
        for data in [
            &b""[..],
            b"\0\0\0\x04disk",
            b"\0\0\0\x04disk\xff\xff\xff\xff",
            b"\0\0\0\x04disk\0\0\0\x01\xff\xff\xff\xff",
            b"\xff\xff\xff\xffdisk\0\0\0\0",
            b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x04base",
            b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x02\xff:",
            b"\0\0\0\x04disk\0\0\0\0x",
        ] {
            let replies = raw.ask(number, data).unwrap();
            assert_eq!(last(&replies), option::ERR_INVALID, "{data:?}");
        }
        let huge = context_request("disk", &["base:allocation"; 4000]);
        assert_eq!(last(&raw.ask(number, &huge).unwrap()), option::ERR_TOO_BIG);
    }
}

#[test]
fn a_selection_counts_for_its_export_until_the_next_one() {
    let site = Site::new(&[("disk", MIB), ("other", MIB)]);
    let _tracker = site.start_tracker();
    // What is selected, by which options in between, and whether BLOCK_STATUS then works on `disk`.
    type Between = fn(&mut Raw);
    let cases: [(Between, bool); 5] = [
        (|_| {}, true),
        (|raw| drop(select(raw, "disk", &[]).unwrap()), false),
        (
            |raw| drop(select(raw, "other", &[ALLOCATION]).unwrap()),
            false,
        ),
        (
            |raw| drop(raw.ask(option::SET_META_CONTEXT, b"x").unwrap()),
            false,
        ),
        (
            |raw| drop(raw.ask(option::GO, &info_request("no", &[])).unwrap()),
            true,
        ),
    ];
    for (index, (between, works)) in cases.into_iter().enumerate() {
        let mut raw = negotiating(&site);
        raw.ask(option::EXTENDED_HEADERS, &[]).unwrap();
        select(&mut raw, "disk", &[ALLOCATION]).unwrap();
        between(&mut raw);
        let replies = raw.ask(option::GO, &info_request("disk", &[])).unwrap();
        assert_eq!(last(&replies), option::ACK);
        raw.send(&extended_bytes(0, command::BLOCK_STATUS, 1, 0, 4096))
            .unwrap();
        let head = raw.receive(32).unwrap();
        let kind = u16::from_be_bytes([head[6], head[7]]);
        let expected = if works {
            chunk::BLOCK_STATUS_EXT
        } else {
            chunk::ERROR
        };
        assert_eq!(kind, expected, "case {index}");
    }
}

#[test]
fn reads_come_in_chunks_with_holes() {
    let (site, _tracker) = site();
    for mut client in both(&site, &[]) {
        let mut model = vec![0; (16 * MIB) as usize];
        for at in [MIB, 3 * MIB, 3 * MIB + 64 * 1024, 7 * MIB] {
            client.write(at, &[7; 8192]);
            model[at as usize..at as usize + 8192].fill(7);
        }
        let (data, hole_bytes) = client.read(0, 0, 16 * MIB as usize);
        assert!(data == model, "data and holes in their places");
        assert!(
            hole_bytes > 15 * MIB as usize,
            "{hole_bytes} bytes of holes"
        );
        // Holes at the edges of a range that begins and ends inside one, and inside data.
        for (offset, length) in [
            (MIB - 100, 40_000),
            (MIB + 100, 40_000),
            (9 * MIB + 1, 70_001),
        ] {
            let (data, hole_bytes) = client.read(0, offset, length);
            assert!(data == model[offset as usize..offset as usize + length]);
            assert!(hole_bytes > 0, "at {offset}");
        }
        // Don't fragment: one chunk of data whatever it is made of.
        let answer = client.call(command::DF, command::READ, 0, 4 * MIB, &[]);
        assert_eq!(answer.chunks.len(), 1);
        assert_eq!(answer.chunks[0].kind, chunk::OFFSET_DATA);
        assert!(answer.assemble(0, 4 << 20).0 == model[..4 << 20]);
        // A short one costs less than the search for holes.
        assert_eq!(client.read(0, 0, 4096), (vec![0; 4096], 0));
        let discarded = client.call(0, command::TRIM, 0, 16 * MIB, &[]);
        assert_eq!(discarded.error(), 0);
    }
}

#[test]
fn many_small_holes_are_read_right() {
    let (site, _tracker) = site();
    let [mut client, _] = both(&site, &[]);
    let mut model = vec![0; 4 << 20];
    for at in (0..4 * MIB).step_by(8192) {
        client.write(at, &[9; 4096]);
        model[at as usize..at as usize + 4096].fill(9);
    }
    let (data, _) = client.read(0, 0, 4 << 20);
    assert!(data == model);
}

#[test]
fn errors_come_in_chunks() {
    let (site, _tracker) = site();
    for mut client in both(&site, &[ALLOCATION]) {
        let end = 16 * MIB;
        for (flags, number, offset, length, expected) in [
            (0, command::READ, end, 512, errno::EINVAL),
            (0, command::READ, u64::MAX, 512, errno::EINVAL),
            (1 << 15, command::READ, 0, 512, errno::EINVAL),
            (0, command::TRIM, end, 512, errno::EINVAL),
            (0, command::CACHE, end - 1, 2, errno::EINVAL),
            (0, command::WRITE_ZEROES, end, 512, errno::ENOSPC),
            (command::DF, command::TRIM, 0, 512, errno::EINVAL),
            (command::REQ_ONE, command::READ, 0, 512, errno::EINVAL),
            (0, command::BLOCK_STATUS, end, 1, errno::EINVAL),
            (0, command::BLOCK_STATUS, 0, 0, errno::EINVAL),
            (command::DF, command::BLOCK_STATUS, 0, 512, errno::EINVAL),
            (0, command::FLUSH, 512, 0, errno::EINVAL),
            (0, 8, 0, 0, errno::EINVAL),
            (0, 99, 0, 0, errno::EINVAL),
        ] {
            let answer = client.call(flags, number, offset, length, &[]);
            assert_eq!(answer.error(), expected, "{number} at {offset}");
            assert_eq!(answer.chunks.len(), 1, "an error is a chunk with a text");
        }
        let past = client.call(0, command::WRITE, end - 512, 1024, &[1; 1024]);
        assert_eq!(past.error(), errno::ENOSPC);
        // A READ of nothing is answered in chunks too, and has no content.
        let nothing = client.call(0, command::READ, 0, 0, &[]);
        assert_eq!(
            nothing.chunks,
            [Chunk {
                kind: chunk::NONE,
                payload: Vec::new()
            }]
        );
        assert_eq!(client.read(0, 0, 512).0, [0; 512]);
    }
}

#[test]
fn oversized_reads_overflow() {
    let site = Site::new(&[("disk", 80 * MIB)]);
    let _tracker = site.start_tracker();
    for mut client in both(&site, &[]) {
        for flags in [0, command::DF] {
            let answer = client.call(flags, command::READ, 0, 32 * MIB + 1, &[]);
            assert_eq!(answer.error(), errno::EOVERFLOW);
            client.read(flags, 0, 32 << 20);
        }
    }
    let mut simple = site.connect("disk");
    let refused = simple.read(0, (32 << 20) + 1);
    assert!(matches!(
        refused,
        Err(tests::nbd::Failure::Refused(errno::EINVAL))
    ));
}

#[test]
fn an_error_of_the_disk_tells_where() {
    let (site, _tracker) = site();
    for mut client in both(&site, &[ALLOCATION]) {
        client.write(0, &[1; 4096]);
        let image = std::fs::OpenOptions::new()
            .write(true)
            .open(site.image("disk"))
            .unwrap();
        image.set_len(2 * MIB).unwrap();
        let answer = client.call(0, command::READ, MIB, 4 * MIB, &[]);
        assert_eq!(answer.error(), 5, "EIO, never zeroes for what is lost");
        let error = answer.chunks.last().unwrap();
        assert_eq!(error.kind, chunk::ERROR_OFFSET);
        let at = u64::from_be_bytes(error.payload[error.payload.len() - 8..].try_into().unwrap());
        assert!((MIB..5 * MIB).contains(&at));
        image.set_len(16 * MIB).unwrap();
        assert_eq!(client.read(0, MIB, 4 << 20).0, vec![0; 4 << 20]);
    }
}

#[test]
fn allocation_tells_holes() {
    let (site, _tracker) = site();
    for mut client in both(&site, &[ALLOCATION]) {
        client.write(MIB, &[1; 1 << 20]);
        client.write(4 * MIB, &[1; 4096]);
        let expected = [
            (MIB, HOLE),
            (MIB, 0),
            (2 * MIB, HOLE),
            (4096, 0),
            (12 * MIB - 4096, HOLE),
        ];
        assert_eq!(client.status(ALLOCATION, 0, 16 * MIB), expected);
        assert_eq!(client.status(ALLOCATION, MIB - 1, 2), [(1, HOLE), (1, 0)]);
        assert_eq!(client.status(ALLOCATION, 16 * MIB - 1, 1), [(1, HOLE)]);
        let one = client.call(command::REQ_ONE, command::BLOCK_STATUS, MIB, 8 * MIB, &[]);
        assert_eq!(one.status()[0].1, [(MIB, 0)]);
        let one = client.call(command::REQ_ONE, command::BLOCK_STATUS, MIB, 4096, &[]);
        assert_eq!(one.status()[0].1, [(4096, 0)]);
        let trimmed = client.call(0, command::TRIM, 0, 16 * MIB, &[]);
        assert_eq!(trimmed.error(), 0);
        assert_eq!(client.status(ALLOCATION, 0, 16 * MIB), [(16 * MIB, HOLE)]);
    }
}

#[test]
fn a_fragmented_disk_is_told_piece_by_piece() {
    let (site, _tracker) = site();
    let mut model = Vec::new();
    let [mut writer, _] = both(&site, &[]);
    for at in (0..16 * MIB).step_by(8192) {
        writer.write(at, &[3; 4096]);
        model.extend([(4096, 0), (4096, HOLE)]);
    }
    for mut client in both(&site, &[ALLOCATION]) {
        let mut found = Vec::new();
        let mut at = 0;
        while at < 16 * MIB {
            let extents = client.status(ALLOCATION, at, 16 * MIB - at);
            assert!(
                extents.len() <= 1024,
                "{} extents in one reply",
                extents.len()
            );
            at += extents.iter().map(|extent| extent.0).sum::<u64>();
            found.extend(extents);
        }
        assert!(found == model);
    }
}

#[test]
fn changes_are_told_since_the_last_recovery_point() {
    let (site, _tracker) = site();
    let contexts = [DIRTY, ALLOCATION, QEMU_DIRTY];
    let [mut client, _] = both(&site, &contexts);
    assert_eq!(
        client.status(DIRTY, 0, 16 * MIB),
        [(16 * MIB, 1)],
        "no point yet: all of it"
    );
    site.protect();
    let _shipper = site.start_shipper();
    for mut client in both(&site, &contexts) {
        committed_cut(&site);
        assert_eq!(
            client.status(DIRTY, 0, 16 * MIB),
            [(16 * MIB, 0)],
            "nothing since"
        );
        client.write(MIB + 100, &[1; 10]);
        let zeroed = client.call(0, command::WRITE_ZEROES, 2 * MIB, MIB, &[]);
        assert_eq!(zeroed.error(), 0);
        let trimmed = client.call(0, command::TRIM, 3 * MIB, 8192, &[]);
        assert_eq!(trimmed.error(), 0);
        let expected = [
            (MIB, 0),
            (4096, 1),
            (MIB - 4096, 0),
            (MIB + 8192, 1),
            (13 * MIB - 8192, 0),
        ];
        for context in [DIRTY, QEMU_DIRTY] {
            assert_eq!(client.status(context, 0, 16 * MIB), expected, "{context}");
        }
        assert_eq!(client.status(DIRTY, MIB + 4095, 2), [(1, 1), (1, 0)]);
        let one = client.call(command::REQ_ONE, command::BLOCK_STATUS, 0, 16 * MIB, &[]);
        let status = one.status();
        assert_eq!(status.len(), 3, "one chunk for each context");
        assert!(status.iter().all(|(_, extents)| extents.len() == 1));
        committed_cut(&site);
        assert_eq!(client.status(DIRTY, 0, 16 * MIB), [(16 * MIB, 0)]);
    }
}

#[test]
fn changes_follow_a_model() {
    let mut site = Site::new(&[("disk", 16 * MIB)]);
    // A small ring is walked soon and folds into the checkpoint; one that could fill up would make
    // every block count.
    site.tracker_arguments = vec!["--ring-size".into(), "64KiB".into()];
    // Much of the disk changes, which must not lead to a scan and a point of its own.
    site.settings = "resync_share_percent = 100".to_owned();
    let _tracker = site.start_tracker();
    let mut random = Random::from_environment("changes_follow_a_model");
    site.protect();
    let _shipper = site.start_shipper();
    committed_cut(&site);
    let mut clients = both(&site, &[DIRTY]);
    let size = 16 * MIB;
    let mut model = vec![false; (size / 4096) as usize];
    for _ in 0..6000 {
        let client = &mut clients[random.below(2) as usize];
        let offset = random.below(size);
        let length = random.between(1, (size - offset).min(9000));
        match random.below(4) {
            0 => {
                let number = if random.chance(1, 2) {
                    command::TRIM
                } else {
                    command::WRITE_ZEROES
                };
                let answer = client.call(0, number, offset, length, &[]);
                assert_eq!(answer.error(), 0);
            }
            1 => client.write(offset, &random.bytes(length as usize)),
            _ => {
                let (mut at, length) = (offset, (size - offset).min(MIB));
                for (bytes, dirty) in client.status(DIRTY, offset, length) {
                    for block in at / 4096..(at + bytes).div_ceil(4096) {
                        assert_eq!(u64::from(model[block as usize]), dirty, "block {block}");
                    }
                    at += bytes;
                }
                assert_eq!(at, offset + length, "few extents are told of at once");
                continue;
            }
        }
        let blocks = offset as usize / 4096..(offset + length).div_ceil(4096) as usize;
        model[blocks].fill(true);
    }
    let disk = &site.tracker_status()["machine"]["disks"][0];
    assert!(
        disk["folds"].as_u64() > Some(0),
        "nothing was folded: {disk}"
    );
}

#[test]
fn a_stopping_tracker_answers_status_and_ends() {
    let (site, tracker) = site();
    let mut clients: Vec<ChunkClient> = (0..16)
        .map(|_| ChunkClient::connect(&site.socket(), "disk", true, &[ALLOCATION, DIRTY]).unwrap())
        .collect();
    for client in &mut clients {
        for _ in 0..50 {
            client
                .submit(0, command::BLOCK_STATUS, 0, 16 * MIB, &[])
                .unwrap();
        }
    }
    tracker.stop();
    for client in &mut clients {
        // All that were taken are answered in order, then the connection closes.
        for cookie in 1..=50 {
            let Ok(answer) = client.receive(cookie, 0) else {
                break;
            };
            assert!([0, errno::ESHUTDOWN].contains(&answer.error()));
        }
        assert!(client.raw().until_closed().unwrap().is_empty());
    }
}

#[test]
fn without_a_journal_no_changes_are_offered() {
    let mut site = Site::new(&[("disk", MIB)]);
    site.tracker_arguments.push("--no-journal".into());
    let _tracker = site.start_tracker();
    let mut raw = negotiating(&site);
    raw.ask(option::STRUCTURED_REPLY, &[]).unwrap();
    let selected = select(&mut raw, "disk", &[DIRTY, ALLOCATION, QEMU_DIRTY]).unwrap();
    assert_eq!(selected.len(), 1);
    assert_eq!(selected[0].1, ALLOCATION);
}

#[test]
fn extended_lengths_reach_beyond_32_bits() {
    let size = 10 << 40;
    let site = Site::new(&[("disk", size)]);
    let _tracker = site.start_tracker();
    let mut client = ChunkClient::connect(&site.socket(), "disk", true, &[ALLOCATION]).unwrap();
    assert_eq!(
        client.status(ALLOCATION, 0, size),
        [(size, HOLE)],
        "64 bits in one extent"
    );
    let far = 9 << 40;
    client.write(far, &[5; 4096]);
    let length = (5 << 30) + 12_345;
    for number in [command::WRITE_ZEROES, command::TRIM, command::CACHE] {
        client.write(far, &[5; 4096]);
        let answer = client.call(0, number, far - (1 << 30), length, &[]);
        assert_eq!(answer.error(), 0, "{number}");
        let kinds: Vec<u16> = answer.chunks.iter().map(|chunk| chunk.kind).collect();
        assert_eq!(kinds, [chunk::NONE]);
    }
    assert_eq!(
        client.read(0, far, 4096).0,
        [5; 4096],
        "CACHE changes nothing"
    );
    let durable = client.call(
        command::FUA,
        command::WRITE_ZEROES,
        far - (2 << 30),
        length,
        &[],
    );
    assert_eq!(durable.error(), 0);
    assert_eq!(client.read(0, far, 4096).0, [0; 4096]);
    assert_eq!(
        client.call(0, command::READ, 0, 1 << 33, &[]).error(),
        errno::EOVERFLOW
    );
    for length in [size + 1, 1 << 63, u64::MAX] {
        let zeroed = client.call(0, command::WRITE_ZEROES, 0, length, &[]);
        assert_eq!(zeroed.error(), errno::ENOSPC);
        assert_eq!(
            client.call(0, command::TRIM, 0, length, &[]).error(),
            errno::EINVAL
        );
    }
    // The structured form has 32 bits, and says less rather than something wrong.
    let mut older = ChunkClient::connect(&site.socket(), "disk", false, &[ALLOCATION]).unwrap();
    let extents = older.status(ALLOCATION, 0, u32::MAX.into());
    assert_eq!(extents[0].1, HOLE);
    assert!(extents[0].0 > u64::from(u32::MAX) - 4096);
}

#[test]
fn a_status_payload_chooses_contexts() {
    let (site, _tracker) = site();
    let contexts = [ALLOCATION, DIRTY];
    let mut client = ChunkClient::connect(&site.socket(), "disk", true, &contexts).unwrap();
    let (allocation, dirty) = (client.id(ALLOCATION), client.id(DIRTY));
    let payload = |length: u64, ids: &[u32]| {
        let mut bytes = length.to_be_bytes().to_vec();
        for id in ids {
            bytes.extend_from_slice(&id.to_be_bytes());
        }
        bytes
    };
    let ask = |client: &mut ChunkClient, offset: u64, bytes: &[u8]| {
        client.call(0, command::BLOCK_STATUS, offset, bytes.len() as u64, bytes)
    };
    for ids in [&[allocation][..], &[dirty], &[dirty, allocation]] {
        let status = ask(&mut client, MIB, &payload(4096, ids)).status();
        assert_eq!(status.len(), ids.len());
        assert!(
            status
                .iter()
                .all(|(id, extents)| ids.contains(id) && extents[0].0 == 4096)
        );
    }
    for bad in [
        payload(4096, &[]),
        payload(4096, &[77]),
        payload(4096, &[dirty, dirty]),
        payload(4096, &[dirty, allocation, dirty]),
        payload(0, &[dirty]),
        payload(u64::MAX, &[dirty]),
        payload(16 * MIB, &[dirty]),
        payload(4096, &[dirty])[..11].to_vec(),
        vec![1],
        vec![0; 70_000],
    ] {
        assert_eq!(
            ask(&mut client, MIB, &bad).error(),
            errno::EINVAL,
            "{} bytes",
            bad.len()
        );
    }
    assert_eq!(
        client.read(0, 0, 512).0,
        [0; 512],
        "the payloads were consumed"
    );
}

#[test]
fn an_extended_write_may_leave_the_flag_out() {
    // qemu's client does; the data follow all the same.
    let (site, _tracker) = site();
    let [_, mut client] = both(&site, &[]);
    for flags in [0, command::PAYLOAD_LEN, command::FUA] {
        let mut bytes = extended_bytes(flags, command::WRITE, 5, 4096, 512);
        bytes.extend([flags as u8 + 1; 512]);
        client.raw().send(&bytes).unwrap();
        assert_eq!(client.receive(5, 4096).unwrap().error(), 0);
        assert_eq!(client.read(0, 4096, 512).0, [flags as u8 + 1; 512]);
    }
}

#[test]
fn fast_zero_and_cache() {
    let (site, _tracker) = site();
    for mut client in both(&site, &[]) {
        client.write(0, &[1; 1 << 20]);
        let fast = client.call(command::FAST_ZERO, command::WRITE_ZEROES, 0, MIB, &[]);
        if fast.error() == 0 {
            assert_eq!(client.read(0, 0, 1 << 20).0, vec![0; 1 << 20]);
        } else {
            assert_eq!(fast.error(), errno::ENOTSUP);
            assert_eq!(client.read(0, 0, 1 << 20).0, vec![1; 1 << 20]);
        }
        for flags in [command::FUA, 0] {
            assert_eq!(
                client.call(flags, command::CACHE, 0, 16 * MIB, &[]).error(),
                0
            );
        }
        let flagged = client.call(command::NO_HOLE, command::CACHE, 0, MIB, &[]);
        assert_eq!(flagged.error(), errno::EINVAL);
    }
    // tmpfs cannot zero a range in place: with NO_HOLE zeroes would have to be written.
    let site = Site::new_in(std::path::Path::new("/dev/shm"), &[("disk", 4 * MIB)]);
    let _tracker = site.start_tracker();
    for mut client in both(&site, &[]) {
        client.write(0, &[1; 1 << 20]);
        let flags = command::FAST_ZERO | command::NO_HOLE;
        let slow = client.call(flags, command::WRITE_ZEROES, 0, MIB, &[]);
        assert_eq!(slow.error(), errno::ENOTSUP);
        assert_eq!(client.read(0, 0, 1 << 20).0, vec![1; 1 << 20], "untouched");
        let slow = client.call(command::NO_HOLE, command::WRITE_ZEROES, 0, MIB, &[]);
        assert_eq!(slow.error(), 0);
        assert_eq!(client.read(0, 0, 1 << 20).0, vec![0; 1 << 20]);
    }
}

#[test]
fn a_read_only_export_offers_no_fast_zero() {
    let mut site = Site::new(&[("disk", MIB)]);
    site.tracker_arguments.push("--read-only".into());
    let _tracker = site.start_tracker();
    for mut client in both(&site, &[ALLOCATION]) {
        assert_eq!(client.flags & (1 << 11 | 1 << 6 | 1 << 5 | 2), 2);
        let fast = client.call(command::FAST_ZERO, command::WRITE_ZEROES, 0, 512, &[]);
        assert_eq!(fast.error(), errno::EINVAL);
        let write = client.call(0, command::WRITE, 0, 512, &[1; 512]);
        assert_eq!(write.error(), errno::EPERM);
        assert_eq!(
            client.call(0, command::TRIM, 0, 512, &[]).error(),
            errno::EPERM
        );
        assert_eq!(client.call(0, command::CACHE, 0, 512, &[]).error(), 0);
        assert_eq!(client.status(ALLOCATION, 0, MIB), [(MIB, HOLE)]);
    }
}

#[test]
fn every_mode_sees_the_same_disk() {
    let (site, _tracker) = site();
    let mut random = Random::from_environment("every_mode_sees_the_same_disk");
    let size = 16 * MIB;
    let mut model = vec![0_u8; size as usize];
    let mut simple = site.connect("disk");
    let mut clients = both(&site, &[ALLOCATION]);
    for _ in 0..300 {
        let client = &mut clients[random.below(2) as usize];
        let offset = random.below(size);
        let length = random.between(1, (size - offset).min(300_000));
        let range = offset as usize..(offset + length) as usize;
        match random.below(5) {
            0 => {
                let zeroed = client.call(0, command::WRITE_ZEROES, offset, length, &[]);
                assert_eq!(zeroed.error(), 0);
                model[range].fill(0);
            }
            1 => {
                let data = random.bytes(length as usize);
                client.write(offset, &data);
                model[range].copy_from_slice(&data);
            }
            2 => {
                let mut at = offset;
                for (bytes, flags) in client.status(ALLOCATION, offset, length) {
                    let told = at as usize..(at + bytes).min(size) as usize;
                    assert!(flags == 0 || model[told].iter().all(|byte| *byte == 0));
                    at += bytes;
                }
                assert!(at > offset);
            }
            3 => assert!(simple.read(offset, length as u32).unwrap() == model[range]),
            _ => {
                let flags = if random.chance(1, 3) { command::DF } else { 0 };
                assert!(client.read(flags, offset, length as usize).0 == model[range]);
            }
        }
    }
}

#[test]
fn hostile_extended_requests_end_their_own_connection_alone() {
    let (site, _tracker) = site();
    let extended =
        |contexts: &[&str]| ChunkClient::connect(&site.socket(), "disk", true, contexts).unwrap();
    // A payload beyond the limit has no answer, whatever the command.
    for number in [command::WRITE, command::READ, command::BLOCK_STATUS, 99] {
        for length in [(32 * MIB) + 1, u64::from(u32::MAX), u64::MAX] {
            let mut client = extended(&[ALLOCATION]);
            let bytes = extended_bytes(command::PAYLOAD_LEN, number, 1, 0, length);
            client.raw().send(&bytes).unwrap();
            assert!(client.raw().until_closed().unwrap().is_empty(), "{number}");
        }
    }
    // BLOCK_STATUS with a payload and no context, which ended a well-known server.
    let mut bare = extended(&[]);
    for payload in [&[0; 8][..], &[0; 12], &[0; 16], &[0xff; 4096]] {
        let answer = bare.call(0, command::BLOCK_STATUS, 0, payload.len() as u64, payload);
        assert_eq!(answer.error(), errno::EINVAL);
    }
    assert_eq!(
        bare.call(0, command::BLOCK_STATUS, 0, 512, &[]).error(),
        errno::EINVAL
    );
    // A payload where none belongs.
    for number in [
        command::READ,
        command::FLUSH,
        command::TRIM,
        command::WRITE_ZEROES,
        99,
    ] {
        assert_eq!(
            bare.call(0, number, 0, 64, &[1; 64]).error(),
            errno::EINVAL,
            "{number}"
        );
    }
    bare.write(512, &[4; 512]);
    assert_eq!(bare.read(0, 512, 512).0, [4; 512]);
    // A compact header where extended ones were agreed on, and the other way round.
    let compact = tests::nbd::request_bytes(0, command::READ, 1, 0, 512);
    bare.raw().send(&[compact, vec![0; 4]].concat()).unwrap();
    assert!(bare.raw().until_closed().unwrap().is_empty());
    let [mut structured, _] = both(&site, &[]);
    let bytes = extended_bytes(0, command::READ, 1, 0, 512);
    structured.raw().send(&bytes).unwrap();
    assert!(structured.raw().until_closed().unwrap().is_empty());
    still_serves(&site);
}

#[test]
fn random_requests_and_early_leave_never_end_the_server() {
    let (site, tracker) = site();
    let mut random = Random::from_environment("random_requests_and_early_leave");
    for round in 0..300 {
        let extended = random.chance(1, 2);
        let contexts: &[&str] = if random.chance(1, 2) {
            &[ALLOCATION, DIRTY]
        } else {
            &[]
        };
        let mut client = ChunkClient::connect(&site.socket(), "disk", extended, contexts).unwrap();
        for _ in 0..random.between(1, 12) {
            let (flags, number) = (random.next_u64() as u16 & 0x3f, random.below(10) as u16);
            let offset = random.below(17 * MIB);
            let bits = random.between(1, 22);
            let length = random.below(1 << bits);
            let cookie = random.next_u64();
            let mut bytes = if extended {
                extended_bytes(flags, number, cookie, offset, length)
            } else {
                tests::nbd::request_bytes(flags, number, cookie, offset, length as u32)
            };
            let payload = random.below(length.min(100_000) + 1) as usize;
            bytes.extend(random.bytes(payload));
            if client.raw().send(&bytes).is_err() {
                break;
            }
        }
        if round % 50 == 0 {
            still_serves(&site);
        }
    }
    still_serves(&site);
    assert!(!tracker.log().contains("panicked"), "{}", tracker.log());
}

#[test]
fn a_client_that_never_reads_its_status_costs_only_itself() {
    let (site, tracker) = site();
    let [mut writer, _] = both(&site, &[]);
    for at in (0..16 * MIB).step_by(8192) {
        writer.write(at, &[3; 4096]);
    }
    let mut greedy = ChunkClient::connect(&site.socket(), "disk", true, &[ALLOCATION]).unwrap();
    let request = extended_bytes(0, command::BLOCK_STATUS, 1, 0, 16 * MIB);
    // As much as the socket takes without the server reading on.
    for _ in 0..20_000 {
        if greedy.raw().send_now(&request).is_err() {
            break;
        }
    }
    for _ in 0..50 {
        still_serves(&site);
    }
    let memory = tracker.memory_bytes("VmHWM");
    assert!(memory < 400 << 20, "{memory} bytes");
}
