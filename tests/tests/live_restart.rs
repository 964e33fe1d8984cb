//! A tracker that is stopped or killed and started again, under a client that reconnects: for the
//! client that is a pause, and nothing is lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use tests::process::require;
use tests::seed::Random;
use tests::site::Site;

const BLOCK_BYTES: usize = 64 << 10;
const BLOCKS: usize = 256;
const ROUNDS: usize = 8;
const WRITES_PER_ROUND: usize = 60;
/// Time that qemu waits for the tracker to come back, and we for qemu.
const PATIENCE: Duration = Duration::from_secs(60);

/// qemu-io, which reconnects and sends again what was not answered.
struct Qemu {
    child: Child,
    commands: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Qemu {
    fn start(site: &Site, export: &str) -> Self {
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},export={export},reconnect-delay={}",
            site.socket().display(),
            PATIENCE.as_secs(),
        );
        // Without it qemu-io holds its words back, and overlooks commands that come together.
        let mut child = Command::new("stdbuf")
            .args(["-i0", "-oL", "qemu-io", "--image-opts", &options])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let seen = Vec::new();
        Self {
            child,
            commands,
            lines,
            seen,
        }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        self.commands.flush().unwrap();
    }

    /// Waits for so many more lines with this text.
    fn await_lines(&mut self, text: &str, count: usize) {
        let mut found = 0;
        while found < count {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                panic!("qemu-io stands still; it said: {:?}", self.seen.last())
            });
            found += usize::from(line.contains(text));
            self.seen.push(line);
        }
    }

    /// Everything that it said, after its end.
    fn finish(mut self) -> String {
        self.say("quit");
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen.push(line);
        }
        assert!(self.child.wait().unwrap().success());
        self.seen.join("\n")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[test]
fn a_client_that_reconnects_loses_nothing() {
    require(&["qemu-io"]);
    let mut seed = Random::from_environment("live_restart");
    let size = (BLOCKS * BLOCK_BYTES) as u64;
    let site = Site::new(&[("root", size), ("data", size)]);
    let mut tracker = site.start_tracker();
    let mut clients = [Qemu::start(&site, "root"), Qemu::start(&site, "data")];
    let mut disks = [[0_u8; BLOCKS]; 2];
    for round in 0..ROUNDS {
        for _ in 0..WRITES_PER_ROUND {
            for (client, disk) in clients.iter_mut().zip(&mut disks) {
                let (block, pattern) = (seed.below(BLOCKS as u64), seed.below(255) as u8 + 1);
                disk[block as usize] = pattern;
                client.say(&format!("write -P {pattern} {}k 64k", block * 64));
            }
        }
        // In the middle of the writes of this round.
        clients[0].await_lines("wrote", WRITES_PER_ROUND / 2);
        if round % 2 == 0 {
            tracker.stop();
        } else {
            tracker.kill();
        }
        tracker = site.start_tracker();
        clients[0].await_lines("wrote", WRITES_PER_ROUND / 2);
        clients[1].await_lines("wrote", WRITES_PER_ROUND);
    }
    for (mut client, disk) in clients.into_iter().zip(&disks) {
        client.say("flush");
        for (block, pattern) in disk.iter().enumerate() {
            client.say(&format!("read -P {pattern} {}k 64k", block * 64));
        }
        let said = client.finish();
        assert_eq!(said.matches("read 65536/65536").count(), BLOCKS, "{said}");
        for wrong in ["failed", "error", "Pattern"] {
            assert!(!said.contains(wrong), "{said}");
        }
    }
    tracker.stop();
    for (name, disk) in ["root", "data"].iter().zip(&disks) {
        let image = std::fs::File::open(site.image(name)).unwrap();
        for (block, pattern) in disk.iter().enumerate() {
            let mut bytes = vec![0; BLOCK_BYTES];
            let offset = (block * BLOCK_BYTES) as u64;
            image.read_exact_at(&mut bytes, offset).unwrap();
            assert!(
                bytes.iter().all(|byte| byte == pattern),
                "block {block} of {name} is not what was written last"
            );
        }
    }
}
