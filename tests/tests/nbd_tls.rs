//! NBD over TLS: real clients both ways, what is told before TLS, who is refused, input that no client
//! should send, and how a connection ends. Certificates are made anew for each test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustls::version::{TLS12, TLS13};
use tests::nbd::{
    Client, Failure, Raw, command, context_request, info_request, option, option_bytes,
    request_bytes,
};
use tests::process::{Daemon, program, require, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};
use tests::tls::{Authority, Identity, Validity};

const MIB: u64 = 1 << 20;
/// Time for something that takes far less.
const PATIENCE: Duration = Duration::from_secs(60);
/// The flag DF of READ, which needs structured replies.
const SEND_DF: u16 = 1 << 7;
/// Types of TLS records, and the alert about versions.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const PROTOCOL_VERSION: u8 = 70;

/// A machine with certificates, and a tracker's arguments for them.
struct Place {
    site: Site,
    authority: Authority,
    client: Identity,
}

impl Place {
    fn new(size: u64) -> Self {
        let site = Site::new(&[("disk", size)]);
        let authority = Authority::new("authority of the test");
        let client = authority.client(Validity::Good);
        authority.write_folder(&site.path("with"), Some(&client));
        authority.write_folder(&site.path("without"), None);
        authority.server().write(site.root(), "server");
        Self {
            site,
            authority,
            client,
        }
    }

    /// `tracker serve` with TLS on some port of the loopback address.
    fn command(&self, more: &[&str]) -> Command {
        let mut command = self.site.serve_command();
        command.args(["--listen", "127.0.0.1:0"]);
        command
            .arg("--tls-cert")
            .arg(self.site.path("server-cert.pem"));
        command
            .arg("--tls-key")
            .arg(self.site.path("server-key.pem"));
        command.args(more).env("TIDEMARK_LOG", "debug");
        command
    }

    /// The option that asks clients for certificates of this authority.
    fn client_authority(&self) -> Vec<String> {
        let file = self.site.path("without").join("ca-cert.pem");
        vec!["--tls-client-ca".into(), file.display().to_string()]
    }

    #[track_caller]
    fn start(&self, more: &[&str]) -> (Daemon, SocketAddr) {
        let tracker = Daemon::start("tracker", &mut self.command(more));
        let address = address_of(&tracker);
        (tracker, address)
    }

    fn connect(&self, address: SocketAddr) -> Client {
        let config = self.authority.client_config(Some(&self.client));
        Client::tls(address, "disk", &config).expect("a connection over TLS")
    }

    /// Address for libnbd's clients, with the folder of their certificates.
    fn uri(&self, address: SocketAddr, folder: &str) -> String {
        let folder = self.site.path(folder).display().to_string();
        let port = address.port();
        format!("nbds://localhost:{port}/disk?tls-certificates={folder}")
    }

    #[track_caller]
    fn still_serves(&self, address: SocketAddr) {
        let mut client = self.connect(address);
        assert_eq!(client.read(0, 512).unwrap().len(), 512);
        client.disconnect().unwrap();
    }
}

/// The TCP address in the line that says that the tracker is ready.
#[track_caller]
fn address_of(tracker: &Daemon) -> SocketAddr {
    let log = tracker.log();
    log.lines()
        .filter(|line| line.starts_with("Ready"))
        .flat_map(|line| line.split(' '))
        .find_map(|word| word.trim_end_matches(',').parse().ok())
        .unwrap_or_else(|| panic!("no address in {log}"))
}

fn greeted(address: SocketAddr) -> Raw {
    let mut raw = Raw::tcp(address).unwrap();
    raw.greet(3).unwrap();
    raw
}

#[track_caller]
fn last_reply(raw: &mut Raw, number: u32, data: &[u8]) -> u32 {
    let replies = raw.ask(number, data).unwrap();
    if replies.last().unwrap().0 & 0x8000_0000 != 0 {
        assert_eq!(replies.len(), 1, "an error alone: {replies:?}");
    }
    replies.last().unwrap().0
}

#[test]
fn libnbd_tools_over_tls() {
    require(&["nbdinfo", "nbdcopy"]);
    let place = Place::new(64 * MIB);
    let (_tracker, address) = place.start(&[]);
    let uri = place.uri(address, "without");
    let info = run(Command::new("nbdinfo").arg(&uri)).success();
    assert!(info.contains("with TLS"), "{info}");
    assert!(info.contains(&(64 * MIB).to_string()), "{info}");
    let source = place.site.random_file("source", 64 * MIB);
    run(Command::new("nbdcopy")
        .args(["--flush", "--connections=4", "--request-size=1048576"])
        .arg(&source)
        .arg(&uri))
    .success();
    assert_same(&source, &place.site.image("disk"));
    let back = place.site.path("back");
    run(Command::new("nbdcopy").arg(&uri).arg(&back)).success();
    assert_same(&source, &back);
    // The same port without TLS tells nothing.
    let plain = format!("nbd://localhost:{}/disk", address.port());
    run(Command::new("nbdinfo").arg(&plain)).failure();
    run(Command::new("nbdinfo").args(["--list", &plain])).failure();
    place.still_serves(address);
}

#[test]
fn libnbd_asks_for_a_certificate_that_it_trusts() {
    require(&["nbdinfo"]);
    let place = Place::new(MIB);
    let (_tracker, address) = place.start(&[]);
    Authority::new("another authority").write_folder(&place.site.path("other"), None);
    let out = run(Command::new("nbdinfo").arg(place.uri(address, "other")));
    let message = out.failure();
    assert!(message.contains("ertificate"), "{message}");
    run(Command::new("nbdinfo").arg(place.uri(address, "without"))).success();
}

#[test]
fn qemu_over_tls() {
    require(&["qemu-img"]);
    let place = Place::new(32 * MIB);
    let authority = place.client_authority();
    let (_tracker, address) = place.start(&[&authority[0], &authority[1]]);
    let source = place.site.random_file("source", 32 * MIB);
    // The one version of TLS and the other.
    for version in ["1.2", "1.3"] {
        let credentials = format!(
            "tls-creds-x509,id=tls,endpoint=client,dir={},\
             priority=NORMAL:-VERS-ALL:+VERS-TLS{version}",
            place.site.path("with").display()
        );
        let image = format!(
            "driver=nbd,host=localhost,port={},export=disk,tls-creds=tls",
            address.port()
        );
        let qemu_img = |command: &str| {
            let mut process = Command::new("qemu-img");
            process.args([command, "--object", &credentials]);
            process
        };
        run(qemu_img("convert")
            .args(["-n", "-f", "raw", "--target-image-opts"])
            .arg(&source)
            .arg(&image))
        .success();
        assert_same(&source, &place.site.image("disk"));
        let local = format!("driver=raw,file.filename={}", source.display());
        run(qemu_img("compare").args(["--image-opts", &local, &image])).success();
        let info = run(qemu_img("info").args(["--image-opts", &image])).success();
        assert!(info.contains("33554432"), "{info}");
    }
}

#[test]
fn clients_without_a_good_certificate_are_refused() {
    require(&["nbdinfo"]);
    let place = Place::new(MIB);
    let authority = place.client_authority();
    let (_tracker, address) = place.start(&[&authority[0], &authority[1]]);
    let expired = place.authority.client(Validity::Expired);
    let foreign = Authority::new("another authority").client(Validity::Good);
    let server = place.authority.server();
    for versions in [&TLS12, &TLS13] {
        let attempt = |client: Option<&Identity>| {
            let config = place.authority.client_config_of(client, &[versions]);
            Client::tls(address, "disk", &config)
        };
        for (why, client) in [
            ("none", None),
            ("expired", Some(&expired)),
            ("of another authority", Some(&foreign)),
            ("of a server", Some(&server)),
        ] {
            // TLS 1.3 tells the client only when it reads the next answer.
            assert!(attempt(client).is_err(), "{versions:?} {why}");
        }
        let mut client = attempt(Some(&place.client)).unwrap();
        client.write(0, &[1; 512]).unwrap();
        client.disconnect().unwrap();
    }
    run(Command::new("nbdinfo").arg(place.uri(address, "without"))).failure();
    place
        .authority
        .write_folder(&place.site.path("expired"), Some(&expired));
    run(Command::new("nbdinfo").arg(place.uri(address, "expired"))).failure();
    run(Command::new("nbdinfo").arg(place.uri(address, "with"))).success();
    place.still_serves(address);
}

#[test]
fn required_tls_tells_nothing_before_it() {
    let place = Place::new(MIB);
    let (_tracker, address) = place.start(&[]);
    let mut raw = greeted(address);
    let contexts = context_request("disk", &["base:allocation"]);
    let long = vec![0; 64 << 10];
    for (number, data) in [
        (option::LIST, &b""[..]),
        (option::INFO, &info_request("disk", &[])),
        (option::GO, &info_request("disk", &[])),
        (option::GO, &info_request("nothing", &[])),
        (option::GO, b"malformed"),
        (option::STRUCTURED_REPLY, b""),
        (option::EXTENDED_HEADERS, b""),
        (option::SET_META_CONTEXT, &contexts),
        (99, b"unknown"),
        (99, &long),
    ] {
        let reply = last_reply(&mut raw, number, data);
        assert_eq!(reply, option::ERR_TLS_REQD, "option {number}");
    }
    let reply = last_reply(&mut raw, option::STARTTLS, b"data");
    assert_eq!(reply, option::ERR_INVALID);
    // The connection is as good as it was.
    let config = place.authority.client_config(None);
    let mut client = Client::choose(raw.start_tls(&config).unwrap(), "disk").unwrap();
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    client.disconnect().unwrap();

    let mut raw = greeted(address);
    raw.send_option(option::EXPORT_NAME, b"disk").unwrap();
    assert!(
        raw.until_closed().unwrap().is_empty(),
        "it has no error reply"
    );
    let mut raw = greeted(address);
    assert_eq!(last_reply(&mut raw, option::ABORT, b""), option::ACK);
    assert!(raw.until_closed().unwrap().is_empty());
    // A client that does not know fixed newstyle cannot be told that it needs TLS.
    let mut raw = Raw::tcp(address).unwrap();
    raw.greet(2).unwrap();
    assert!(raw.until_closed().unwrap().is_empty());
}

#[test]
fn nothing_requires_tls_once_it_is_there() {
    let place = Place::new(MIB);
    let (_tracker, address) = place.start(&[]);
    let config = place.authority.client_config(None);
    let mut raw = greeted(address).start_tls(&config).unwrap();
    for (number, data, expected) in [
        (option::STARTTLS, &b""[..], option::ERR_INVALID),
        (option::STARTTLS, b"data", option::ERR_INVALID),
        (option::LIST, b"", option::ACK),
        (
            option::GO,
            &info_request("nothing", &[]),
            option::ERR_UNKNOWN,
        ),
        (99, b"", option::ERR_UNSUPPORTED),
        (99, &vec![0; 64 << 10], option::ERR_TOO_BIG),
    ] {
        assert_eq!(last_reply(&mut raw, number, data), expected, "{number}");
    }
    assert_eq!(last_reply(&mut raw, option::ABORT, b""), option::ACK);
    // An end that TLS did not announce would be an error.
    assert!(raw.until_closed().unwrap().is_empty());
}

#[test]
fn allowed_tls_leaves_the_choice_to_the_client() {
    require(&["nbdinfo"]);
    let place = Place::new(MIB);
    let (_tracker, address) = place.start(&["--tls", "allowed"]);
    let mut plain = Client::tcp(address, "disk").unwrap();
    plain.write(0, &[1; 512]).unwrap();
    assert_eq!(place.connect(address).read(0, 512).unwrap(), [1; 512]);
    let uri = format!("nbd://localhost:{}/disk", address.port());
    let info = run(Command::new("nbdinfo").arg(&uri)).success();
    assert!(info.contains("without TLS"), "{info}");
    let info = run(Command::new("nbdinfo").arg(place.uri(address, "without"))).success();
    assert!(info.contains("with TLS"), "{info}");
    // Without fixed newstyle there is no TLS, and the client goes on without.
    let mut raw = Raw::tcp(address).unwrap();
    raw.greet(2).unwrap();
    let reply = last_reply(&mut raw, option::STARTTLS, b"");
    assert_eq!(reply, option::ERR_POLICY);
    assert!(Client::choose(raw, "disk").is_ok());
}

#[test]
fn sockets_without_tls_refuse_it_and_go_on() {
    let place = Place::new(MIB);
    let (_tracker, _) = place.start(&[]);
    let unix = Raw::unix(&place.site.socket()).unwrap();
    let other = Site::new(&[("disk", MIB)]);
    let mut command = other.serve_command();
    let plain = Daemon::start("tracker", command.args(["--listen", "127.0.0.1:0"]));
    for mut raw in [unix, Raw::tcp(address_of(&plain)).unwrap()] {
        raw.greet(3).unwrap();
        for (data, expected) in [(&b"x"[..], option::ERR_INVALID), (b"", option::ERR_POLICY)] {
            assert_eq!(last_reply(&mut raw, option::STARTTLS, data), expected);
        }
        let mut client = Client::choose(raw, "disk").unwrap();
        assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn what_was_settled_before_tls_is_forgotten() {
    let place = Place::new(MIB);
    let (_tracker, address) = place.start(&["--tls", "allowed"]);
    let config = place.authority.client_config(None);
    for upgrades in [false, true] {
        let mut raw = greeted(address);
        assert_eq!(
            last_reply(&mut raw, option::STRUCTURED_REPLY, b""),
            option::ACK
        );
        let contexts = context_request("disk", &["base:allocation"]);
        let selected = last_reply(&mut raw, option::SET_META_CONTEXT, &contexts);
        assert_eq!(selected, option::ACK);
        if upgrades {
            raw = raw.start_tls(&config).unwrap();
            // Contexts need structured replies, which are not in use any more.
            let reply = last_reply(&mut raw, option::SET_META_CONTEXT, &contexts);
            assert_eq!(reply, option::ERR_INVALID);
        }
        let mut client = Client::choose(raw, "disk").unwrap();
        assert_eq!(client.flags() & SEND_DF == 0, upgrades);
        if upgrades {
            // A simple reply, or the client loses its place.
            assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
        }
    }
    // The flags of the greeting are no option: it is not repeated.
    for (client_flags, zeroes) in [(3, 0), (1, 124)] {
        let mut raw = Raw::tcp(address).unwrap();
        raw.greet(client_flags).unwrap();
        let mut raw = raw.start_tls(&config).unwrap();
        raw.send_option(option::EXPORT_NAME, b"disk").unwrap();
        assert_eq!(raw.receive(10 + zeroes).unwrap()[..8], MIB.to_be_bytes());
        let mut client = Client::after_negotiation(raw, MIB, 0);
        assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
        client.disconnect().unwrap();
    }
}

#[test]
fn plaintext_behind_starttls_is_refused() {
    let place = Place::new(MIB);
    for how in ["required", "allowed"] {
        let (tracker, address) = place.start(&["--tls", how]);
        let injected = [
            option_bytes(option::LIST, 0, b""),
            option_bytes(option::ABORT, 0, b""),
            vec![0; 4096],
        ];
        for behind in injected {
            let mut raw = greeted(address);
            let start = option_bytes(option::STARTTLS, 0, b"");
            raw.send(&[start, behind].concat()).unwrap();
            let reply = raw.receive_option_reply(option::STARTTLS).unwrap();
            assert_eq!(reply, (option::ACK, Vec::new()));
            let rest = raw.until_closed().unwrap();
            let is_alert = rest.first().is_none_or(|kind| *kind == ALERT);
            assert!(is_alert && rest.len() < 20, "{rest:?}");
        }
        place.still_serves(address);
        tracker.stop();
    }
}

/// A ClientHello by hand, of TLS 1.1 (0x0302) or 1.2 (0x0303), with usual suites and groups.
fn client_hello(version: u16) -> Vec<u8> {
    let suites: [u16; 6] = [0xc02b, 0xc02f, 0xc009, 0xc013, 0x002f, 0x0035];
    let extensions: [&[u8]; 4] = [
        &[0, 10, 0, 6, 0, 4, 0, 23, 0, 24],
        &[0, 11, 0, 2, 1, 0],
        &[0, 13, 0, 8, 0, 6, 4, 3, 8, 4, 4, 1],
        &[0, 23, 0, 0],
    ];
    let extensions = extensions.concat();
    let mut body = version.to_be_bytes().to_vec();
    body.extend([7; 32]);
    body.push(0);
    body.extend((suites.len() as u16 * 2).to_be_bytes());
    body.extend(suites.iter().flat_map(|suite| suite.to_be_bytes()));
    body.extend([1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut message = vec![HANDSHAKE, 3, 1];
    message.extend((body.len() as u16 + 4).to_be_bytes());
    message.extend([1, 0]);
    message.extend((body.len() as u16).to_be_bytes());
    message.extend(body);
    message
}

#[test]
fn tls_1_2_and_1_3_are_spoken_and_1_1_is_not() {
    let place = Place::new(MIB);
    let (_tracker, address) = place.start(&[]);
    for versions in [&TLS12, &TLS13] {
        let config = place.authority.client_config_of(None, &[versions]);
        let mut client = Client::tls(address, "disk", &config).unwrap();
        client.write(0, &[3; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [3; 4096]);
        client.disconnect().unwrap();
    }
    let answer = |version: u16| {
        let mut raw = greeted(address);
        assert_eq!(last_reply(&mut raw, option::STARTTLS, b""), option::ACK);
        raw.send(&client_hello(version)).unwrap();
        let head = raw.receive(5).unwrap();
        let length = u16::from_be_bytes([head[3], head[4]]);
        (head[0], raw.receive(length.into()).unwrap())
    };
    // The same hello of TLS 1.2 is answered, so that it is the version that is refused.
    assert_eq!(answer(0x0303).0, HANDSHAKE);
    for old in [0x0302, 0x0301, 0x0300] {
        assert_eq!(answer(old), (ALERT, vec![2, PROTOCOL_VERSION]), "{old:#x}");
    }
    place.still_serves(address);
}

#[test]
fn hostile_handshakes_end_their_own_connection_alone() {
    let place = Place::new(MIB);
    let (mut tracker, address) = place.start(&[]);
    let mut random = Random::from_environment("hostile_handshakes");
    let mut neighbour = place.connect(address);
    let hello = client_hello(0x0303);
    for round in 0..60 {
        let mut bytes = hello.clone();
        match round % 4 {
            0 => bytes = random.bytes(random_length(round)),
            1 => {
                let place = random.below(bytes.len() as u64) as usize;
                bytes[place] ^= 1 << random.below(8);
            }
            2 => bytes.truncate(random.below(bytes.len() as u64) as usize),
            // Records that never make a message whole.
            _ => {
                bytes = [
                    &[HANDSHAKE, 3, 3, 0x40, 0, 1, 0xff, 0xff, 0xff][..],
                    &[0; 16400],
                ]
                .concat()
            }
        }
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        stream
            .write_all(&option_bytes(option::STARTTLS, 0, b""))
            .unwrap();
        // The server may have closed before it has read all.
        let _closed = stream.write_all(&bytes);
        let _closed = stream.shutdown(std::net::Shutdown::Write);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut rest = Vec::new();
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        neighbour.write(0, &[round as u8; 512]).unwrap();
    }
    place.still_serves(address);
    assert!(tracker.is_running());
    assert!(!tracker.log().contains("panicked"), "{}", tracker.log());
}

fn random_length(round: usize) -> usize {
    1 << (round / 4)
}

#[test]
fn a_handshake_that_stalls_is_dropped_after_the_deadline_and_costs_nobody() {
    let place = Place::new(MIB);
    let authority = place.client_authority();
    let (_tracker, address) = place.start(&[&authority[0], &authority[1]]);
    let begin = Instant::now();
    let hello = client_hello(0x0303);
    // Before the first byte of TLS, in the middle of the hello, and after it.
    let mut silent: Vec<Raw> = [0, hello.len() / 2, hello.len()]
        .into_iter()
        .cycle()
        .take(9)
        .map(|sent| {
            let mut raw = greeted(address);
            assert_eq!(last_reply(&mut raw, option::STARTTLS, b""), option::ACK);
            raw.send(&hello[..sent]).unwrap();
            raw
        })
        .collect();
    place.still_serves(address);
    assert!(begin.elapsed() < Duration::from_secs(5), "nobody waits");
    for raw in &mut silent {
        raw.until_closed().unwrap();
    }
    let lasted = begin.elapsed();
    assert!(
        lasted > Duration::from_secs(5) && lasted < Duration::from_secs(20),
        "{lasted:?}"
    );
    place.still_serves(address);
}

#[test]
fn many_connections_transfer_at_once() {
    const SHARE: u64 = 16 * MIB;
    const DEPTH: usize = 16;
    let place = Place::new(4 * SHARE);
    let (tracker, address) = place.start(&[]);
    let work = |number: u64| {
        let mut client = place.connect(address);
        let mut random = Random::new(number);
        let data = random.bytes(SHARE as usize);
        let base = number * SHARE;
        let mut at = 0;
        while at < data.len() || client.in_flight() > 0 {
            if at < data.len() && client.in_flight() < DEPTH {
                let length = random.between(1, 300_000).min((data.len() - at) as u64) as usize;
                let piece = &data[at..at + length];
                client
                    .submit(0, command::WRITE, base + at as u64, length as u32, piece)
                    .unwrap();
                at += length;
            } else {
                assert_eq!(client.receive().unwrap().error, 0);
            }
        }
        client.flush().unwrap();
        for at in (0..data.len()).step_by(MIB as usize) {
            let found = client.read(base + at as u64, MIB as u32).unwrap();
            assert!(found == data[at..at + MIB as usize], "at {at}");
        }
        client.disconnect().unwrap();
        data
    };
    let shares = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|number| scope.spawn(move || work(number)))
            .collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, Vec<u8>>| worker.join().unwrap();
        workers.into_iter().map(join).collect::<Vec<_>>()
    });
    tracker.stop();
    assert!(std::fs::read(place.site.image("disk")).unwrap() == shares.concat());
}

#[test]
fn a_client_that_never_reads_costs_only_itself() {
    let place = Place::new(64 * MIB);
    let (tracker, address) = place.start(&["--workers", "1"]);
    let mut greedy: Vec<Client> = (0..4).map(|_| place.connect(address)).collect();
    for client in &mut greedy {
        for number in 0..256 {
            let offset = number % 64 * MIB;
            client
                .submit(0, command::READ, offset, MIB as u32, &[])
                .unwrap();
        }
        // What cannot be understood closes the connection behind replies that nobody takes.
        client.raw().send(&[0xee; 64]).unwrap();
    }
    place.still_serves(address);
    // Three of them read after all, the last one never does.
    let idle = greedy.pop();
    for mut client in greedy {
        for _ in 0..256 {
            assert_eq!(client.receive().unwrap().data.len(), MIB as usize);
        }
        assert!(client.raw().until_closed().unwrap().is_empty());
    }
    // By now the last one's replies would all be waiting here, had nothing held them back.
    let memory = tracker.memory_bytes("VmHWM");
    assert!(memory < 300 * MIB, "{memory} bytes");
    let begin = Instant::now();
    tracker.stop();
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
    drop(idle);
}

#[test]
fn a_client_that_does_not_close_is_left() {
    let place = Place::new(MIB);
    let (tracker, address) = place.start(&[]);
    let mut client = place.connect(address);
    let goodbye = request_bytes(0, command::DISCONNECT, 0, 0, 0);
    client.raw().send(&goodbye).unwrap();
    let fits = |line: &str| line.contains("was too slow");
    assert!(
        tracker.await_line(PATIENCE, fits).is_some(),
        "{}",
        tracker.log()
    );
    assert!(client.raw().until_closed().unwrap().is_empty());
    place.still_serves(address);
}

#[test]
fn a_stopping_tracker_answers_what_is_in_flight() {
    let place = Place::new(64 * MIB);
    let (tracker, address) = place.start(&[]);
    let mut client = place.connect(address);
    let mut idle = place.connect(address);
    let mut sent = 0;
    for number in 0..32 {
        let data = vec![number as u8 + 1; MIB as usize];
        client
            .submit(0, command::WRITE, number * MIB, MIB as u32, &data)
            .unwrap();
        sent += 1;
    }
    tracker.signal(Signal::SIGTERM);
    let mut answered = Vec::new();
    // Those that the tracker had not read yet when it was told to stop have no answer.
    while client.in_flight() > 0
        && let Ok(reply) = client.receive()
    {
        assert_eq!(reply.error, 0);
        answered.push(reply.cookie - 1);
    }
    // An end that TLS did not announce would be an error.
    assert!(idle.raw().until_closed().unwrap().is_empty());
    assert!(client.raw().until_closed().unwrap().is_empty());
    drop((client, idle));
    tracker.stop();
    assert!(answered.len() <= sent);
    let image = std::fs::read(place.site.image("disk")).unwrap();
    for number in answered {
        let at = (number * MIB) as usize;
        let expected = number as u8 + 1;
        assert!(
            image[at..at + MIB as usize]
                .iter()
                .all(|byte| *byte == expected)
        );
    }
}

#[test]
fn what_was_answered_outlives_a_kill() {
    let place = Place::new(16 * MIB);
    let (tracker, address) = place.start(&[]);
    let mut client = place.connect(address);
    for number in 0..16_u8 {
        client
            .write(u64::from(number) * MIB, &[number + 1; 4096])
            .unwrap();
    }
    let data = vec![99; MIB as usize];
    client
        .submit(0, command::WRITE, 0, MIB as u32, &data)
        .unwrap();
    tracker.kill();
    while client.in_flight() > 0 && client.receive().is_ok() {}
    assert!(matches!(client.read(0, 512), Err(Failure::Lost(_))));
    let (_tracker, address) = place.start(&[]);
    let mut client = place.connect(address);
    for number in 1..16_u8 {
        let found = client.read(u64::from(number) * MIB, 4096).unwrap();
        assert_eq!(found, [number + 1; 4096]);
    }
}

#[test]
fn a_client_that_leaves_without_closing_tls_loses_no_answered_write() {
    let place = Place::new(MIB);
    let (tracker, address) = place.start(&[]);
    let mut client = place.connect(address);
    client.write(0, &[5; 4096]).unwrap();
    // Half of a request, and then the end of TCP but not of TLS.
    client
        .raw()
        .send(&request_bytes(0, command::WRITE, 9, 0, 4096))
        .unwrap();
    client.raw().send(&[6; 100]).unwrap();
    drop(client);
    let fits = |line: &str| line.contains("closed without closing TLS");
    let told = tracker.await_line(PATIENCE, fits);
    assert!(told.is_some(), "{}", tracker.log());
    let mut client = place.connect(address);
    assert_eq!(client.read(0, 4096).unwrap(), [5; 4096]);
}

#[test]
fn records_that_were_tampered_with_end_the_connection() {
    let place = Place::new(MIB);
    let (tracker, address) = place.start(&[]);
    // Between the two stands somebody who changes one byte after the handshake.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let between = listener.local_addr().unwrap();
    let (armed, arm) = std::sync::mpsc::channel::<()>();
    let meddler = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(address).unwrap();
        let (mut back_from, mut back_to) =
            (server.try_clone().unwrap(), client.try_clone().unwrap());
        let back = std::thread::spawn(move || {
            let _reset = std::io::copy(&mut back_from, &mut back_to);
            let _closed = back_to.shutdown(std::net::Shutdown::Both);
        });
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = client.read(&mut buffer) {
            if arm.try_recv().is_ok() {
                buffer[count - 1] ^= 1;
            }
            if server.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        back.join().unwrap();
    });
    let mut client = place.connect(between);
    client.write(0, &[1; 512]).unwrap();
    armed.send(()).unwrap();
    assert!(matches!(client.write(0, &[2; 512]), Err(Failure::Lost(_))));
    drop(client);
    meddler.join().unwrap();
    let fits = |line: &str| line.contains("A connection over TLS ended");
    assert!(tracker.await_line(PATIENCE, fits).is_some());
    assert_eq!(place.connect(address).read(0, 512).unwrap(), [1; 512]);
}

/// Files that are no certificate or key, or not in order, beside those of the server.
fn write_useless_files(place: &Place) {
    let site = &place.site;
    place.authority.server().write(site.root(), "other");
    let key = std::fs::read_to_string(site.path("server-key.pem")).unwrap();
    let section =
        |name: &str, text: &str| format!("-----BEGIN {name}-----\n{text}\n-----END {name}-----\n");
    for (name, mode, text) in [
        ("empty.pem", 0o600, String::new()),
        (
            "broken.pem",
            0o600,
            "-----BEGIN CERTIFICATE-----\n!!!\n".to_owned(),
        ),
        ("garbled-cert.pem", 0o600, section("CERTIFICATE", "AAAA")),
        ("garbled-key.pem", 0o600, section("PRIVATE KEY", "AAAA")),
        (
            "encrypted.pem",
            0o600,
            section("ENCRYPTED PRIVATE KEY", "AAAA"),
        ),
        ("readable.pem", 0o644, key.clone()),
        ("writable.pem", 0o660, key),
    ] {
        std::fs::write(site.path(name), text).unwrap();
        set_mode(site, name, mode);
    }
}

fn set_mode(site: &Site, name: &str, mode: u32) {
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(site.path(name), permissions).unwrap();
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let place = Place::new(MIB);
    let site = &place.site;
    write_useless_files(&place);
    let message = |certificate: &str, key: &str, authority: Option<&str>| {
        let mut command = site.serve_command();
        command.args(["--listen", "127.0.0.1:0"]);
        command.arg("--tls-cert").arg(site.path(certificate));
        command.arg("--tls-key").arg(site.path(key));
        if let Some(authority) = authority {
            command.arg("--tls-client-ca").arg(site.path(authority));
        }
        run(&mut command).failure()
    };
    for (certificate, expected) in [
        ("missing.pem", "missing.pem"),
        ("empty.pem", "empty.pem holds no certificate"),
        ("broken.pem", "broken.pem is no PEM file"),
        ("garbled-cert.pem", "garbled-cert.pem begins with a"),
    ] {
        let message = message(certificate, "server-key.pem", None);
        assert!(message.contains(expected), "{certificate}: {message}");
    }
    for (key, expected) in [
        ("missing.pem", "missing.pem"),
        ("empty.pem", "empty.pem holds no private key"),
        ("encrypted.pem", "openssl pkey"),
        ("garbled-key.pem", "garbled-key.pem holds a key that cannot"),
        ("other-key.pem", "is not the key of the first certificate"),
        ("readable.pem", "chmod 0600"),
        ("writable.pem", "chmod 0600"),
    ] {
        let message = message("server-cert.pem", key, None);
        assert!(message.contains(expected), "{key}: {message}");
    }
    for (authority, expected) in [
        ("missing.pem", "missing.pem"),
        ("empty.pem", "empty.pem holds no certificate"),
        ("garbled-cert.pem", "garbled-cert.pem holds a certificate"),
    ] {
        let message = message("server-cert.pem", "server-key.pem", Some(authority));
        assert!(message.contains(expected), "{authority}: {message}");
    }
    // A group may read the key, and then the same files work.
    set_mode(site, "server-key.pem", 0o640);
    let (_tracker, address) = place.start(&[]);
    place.still_serves(address);
}

#[test]
fn plaintext_leaves_the_machine_only_by_name() {
    let place = Place::new(MIB);
    let site = &place.site;
    let key = site.path("server-key.pem").display().to_string();
    let certificate = site.path("server-cert.pem").display().to_string();
    let tls = ["--tls-cert", &certificate, "--tls-key", &key];
    let anywhere = ["--listen", "0.0.0.0:0"];
    let by_name = ["--allow-plaintext-network"];
    let allowed = ["--tls", "allowed"];
    for (arguments, expected) in [
        (anywhere.to_vec(), "not a loopback address"),
        (
            [&anywhere[..], &tls, &allowed].concat(),
            "not a loopback address",
        ),
        ([&anywhere[..], &tls, &by_name].concat(), "allows nothing"),
        (tls.to_vec(), "give an address with --listen"),
        (by_name.to_vec(), "give an address with --listen"),
        ([&anywhere[..], &allowed].concat(), "--tls-cert"),
        ([&anywhere[..], &tls[..2]].concat(), "--tls-key"),
        ([&anywhere[..], &tls[2..]].concat(), "--tls-cert"),
    ] {
        let message = run(site.serve_command().args(&arguments)).failure();
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
    for arguments in [
        [&anywhere[..], &tls].concat(),
        [&anywhere[..], &tls, &allowed, &by_name].concat(),
        [&anywhere[..], &by_name].concat(),
    ] {
        let tracker = Daemon::start("tracker", site.serve_command().args(&arguments));
        let port = address_of(&tracker).port();
        let here = SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(
            arguments.contains(&"--tls-cert"),
            tracker.log().contains("(TLS ")
        );
        if arguments.contains(&"--tls-cert") {
            place.still_serves(here);
        }
        let plain = Client::tcp(here, "disk");
        assert_eq!(
            plain.is_ok(),
            arguments.contains(&"--allow-plaintext-network")
        );
    }
}

#[test]
fn sockets_of_the_service_manager_obey_the_same_rules() {
    let place = Place::new(MIB);
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let start = |shell: &mut Command, arguments: &[String]| {
        let socket: OwnedFd = listener.try_clone().unwrap().into();
        // The socket comes as standard input and belongs at 3; the variables name the process.
        let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
        shell
            .args(["-c", script, "sh"])
            .arg(program("tracker"))
            .args(["serve", "--disk"])
            .arg(format!("disk={}", place.site.image("disk").display()))
            .arg("--control")
            .arg(place.site.control())
            .args(arguments)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    // One that serves all the same would not end by itself.
    let bounded = start(Command::new("timeout").args(["60", "sh"]), &[]);
    let out = bounded.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && message.contains("not a loopback address"),
        "{message}"
    );
    let file = |name: &str| place.site.path(name).display().to_string();
    let arguments = [
        "--tls-cert".to_owned(),
        file("server-cert.pem"),
        "--tls-key".to_owned(),
        file("server-key.pem"),
    ];
    let mut child = start(&mut Command::new("sh"), &arguments);
    // It waits in the queue of the socket until the tracker accepts.
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let config = place.authority.client_config(None);
    let served = Client::tls(here, "disk", &config).map(|mut client| client.read(0, 512).is_ok());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(served.unwrap());
}
