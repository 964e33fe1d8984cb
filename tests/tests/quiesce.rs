//! Recovery points for which everything was at rest: hooks, their time limit, and what thaws when
//! somebody dies.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::loop_device::LoopDevice;
use tests::nbd::Client;
use tests::process::{Daemon, Outcome, program, require, run, run_within};
use tests::site::{Site, await_status, number};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// A limit that no test reaches unless it wants to.
const LONG: &str = "120s";

/// A protected machine of one disk. What is dropped first stands first.
struct World {
    shipper: Option<Daemon>,
    _client: Client,
    _tracker: Daemon,
    site: Site,
}

impl World {
    /// `quiesce` is the section of the configuration, without its heading.
    fn new(quiesce: &str) -> Self {
        Self::with(|_| quiesce.to_owned())
    }

    /// The same where the section needs paths of the site.
    fn with(quiesce: impl Fn(&Site) -> String) -> Self {
        let mut site = Site::new(&[("disk", 4 * MIB)]);
        site.settings = format!("[quiesce]\n{}", quiesce(&site));
        let tracker = site.start_tracker();
        let mut client = site.connect("disk");
        client.write(0, &[7; 4096]).unwrap();
        site.protect();
        let shipper = Some(site.start_shipper());
        Self {
            shipper,
            _client: client,
            _tracker: tracker,
            site,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.site.path(name)
    }

    fn cut(&self) -> Outcome {
        self.site.shipper(&["cut", "--quiesce"])
    }

    /// A quiesced cut that goes on while the test looks.
    fn begin_cut(&self) -> Asking {
        let mut command = self.site.shipper_command(&["cut", "--quiesce"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Asking(command.spawn().unwrap())
    }

    /// The recovery points in the vault, oldest first.
    fn points(&self) -> Vec<Value> {
        let out = self.site.shipper(&["points", "--json"]).success();
        serde_json::from_str(&out).unwrap()
    }

    fn open_epoch(&self) -> u64 {
        number(&self.site.tracker_status(), "/machine/open")
    }

    /// A cut that must be consistent for applications.
    #[track_caller]
    fn cut_at_rest(&self) {
        let out = self.cut().success();
        assert!(out.ends_with(" application-consistent\n"), "{out}");
        let newest = self.points().pop().unwrap();
        assert_eq!(newest["consistency"], "application", "{newest:#}");
        assert_eq!(newest["reason"], Value::Null);
        assert!(out.starts_with(newest["epoch"].as_str().unwrap()), "{out}");
    }

    /// A cut that must be crash-consistent alone, for a reason with these words. Vault, command and
    /// status say the same.
    #[track_caller]
    fn cut_in_spite_of(&self, words: &str) {
        let outcome = self.cut();
        assert!(outcome.out.ends_with(" crash-consistent\n"), "{outcome:?}");
        let error = outcome.failure();
        assert!(error.contains(words), "{error}");
        let newest = self.points().pop().unwrap();
        assert_eq!(newest["consistency"], "crash", "{newest:#}");
        assert!(
            newest["reason"].as_str().unwrap().contains(words),
            "{newest:#}"
        );
        await_status(&self.site, "the reason", |status| {
            status["problems"]["quiesce"]
                .as_str()
                .is_some_and(|text| text.contains(words))
        });
    }

    /// The process number of the guard that the shipper has started.
    fn guard(&self) -> Pid {
        let parent = self.shipper.as_ref().unwrap().pid().to_string();
        let own = |folder: &Path| {
            let stat = fs::read_to_string(folder.join("stat")).ok()?;
            let is_child = stat.rsplit(") ").next()?.split(' ').nth(1)? == parent;
            let command = fs::read_to_string(folder.join("cmdline")).ok()?;
            let is_guard = is_child && command.contains("quiesce-guard");
            is_guard.then(|| folder.file_name()?.to_str()?.parse().ok())?
        };
        let found = await_some("a guard", || {
            let folders = fs::read_dir("/proc").unwrap().flatten();
            folders.into_iter().find_map(|folder| own(&folder.path()))
        });
        Pid::from_raw(found)
    }

    fn kill_shipper(&mut self) {
        self.shipper.take().unwrap().kill();
    }
}

/// A command that is killed at the end of the test.
struct Asking(Child);

impl Drop for Asking {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Looks until there is something.
#[track_caller]
fn await_some<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::yield_now();
    }
}

#[track_caller]
fn await_true(what: &str, look: impl Fn() -> bool) {
    await_some(what, || look().then_some(()));
}

/// A command of a hook: a script with the site's folder as its current one.
fn script(site: &Site, text: &str) -> String {
    let text = format!("cd {}; {text}", site.root().display());
    json!(["sh", "-c", text]).to_string()
}

fn pair(site: &Site, freeze: &str, thaw: &str) -> String {
    let (freeze, thaw) = (script(site, freeze), script(site, thaw));
    format!("[[quiesce.hook]]\nkind = \"command\"\nfreeze = {freeze}\nthaw = {thaw}\n")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn commands_run_before_and_after_the_cut() {
    let tracker = program("tracker");
    let world = World::with(|site| {
        // What the tracker says at that moment is what shows the order.
        let say = |what: &str| {
            let (tracker, control) = (tracker.display(), site.control());
            let control = control.display();
            format!(
                "{tracker} status --json --control {control} >{what}.json && echo {what} >>log && sync {what}.json"
            )
        };
        pair(site, &say("freeze1"), &say("thaw1")) + &pair(site, &say("freeze2"), &say("thaw2"))
    });
    world.site.cut();
    assert_eq!(read(&world.path("log")), "", "an ordinary cut runs no hook");
    let before = world.open_epoch();
    world.cut_at_rest();
    assert_eq!(read(&world.path("log")), "freeze1\nfreeze2\nthaw2\nthaw1\n");
    let open_at = |what: &str| {
        let text = read(&world.path(&format!("{what}.json")));
        let status: Value = serde_json::from_str(&text).unwrap();
        number(&status, "/machine/open")
    };
    assert_eq!([open_at("freeze1"), open_at("freeze2")], [before; 2]);
    assert!(
        open_at("thaw2") > before && open_at("thaw1") > before,
        "thawed before the cut"
    );
    assert!(!world.site.state().join("frozen.json").exists());
    let text = world.site.shipper(&["points"]).success();
    assert_eq!(text.matches("application-consistent").count(), 1, "{text}");
    let status = await_status(&world.site, "an application-consistent point", |status| {
        status["application_point"]["epoch"].is_number()
    });
    assert_eq!(status["application_point"]["epoch"], status["newest_point"]);
    assert_eq!(status["health"], "ok");
}

#[test]
fn a_command_that_fails_is_the_reason() {
    let world = World::with(|site| {
        let first = pair(site, "echo freeze1 >>log", "echo thaw1 >>log");
        let failing = "echo freeze2 >>log; if [ -e good ]; then exit 0; fi; echo no such database >&2; exit 3";
        first + &pair(site, failing, "echo thaw2 >>log")
    });
    world.cut_in_spite_of("exit status: 3: no such database");
    // What was not frozen is not thawed.
    assert_eq!(read(&world.path("log")), "freeze1\nfreeze2\nthaw1\n");
    fs::write(world.path("good"), "").unwrap();
    world.cut_at_rest();
    await_status(&world.site, "no trouble", |status| status["health"] == "ok");
}

#[test]
fn a_program_that_is_not_there_is_the_reason() {
    let world = World::new(
        "[[quiesce.hook]]\nkind = \"command\"\nfreeze = [\"/nonexistent/program\"]\nthaw = [\"true\"]\n",
    );
    world.cut_in_spite_of("Cannot run \"/nonexistent/program\"");
}

#[test]
fn a_command_that_hangs_is_killed_and_thawed() {
    let world = World::with(|site| {
        let hanging = "echo $$ >process; echo freeze >>log; sleep 1000 & echo $! >child; wait";
        "time_limit = \"500ms\"\n".to_owned() + &pair(site, hanging, "echo thaw >>log")
    });
    let begin = Instant::now();
    world.cut_in_spite_of("did not end within the time limit and was killed");
    assert!(begin.elapsed() >= Duration::from_millis(500));
    assert_eq!(read(&world.path("log")), "freeze\nthaw\n");
    for name in ["process", "child"] {
        let process = read(&world.path(name)).trim().to_owned();
        await_true("the end of the group", || {
            let stat = read(Path::new(&format!("/proc/{process}/stat")));
            stat.is_empty() || stat.contains(") Z ")
        });
    }
}

#[test]
fn the_time_frozen_is_limited_whatever_the_cut_does() {
    let world = World::with(|site| {
        "time_limit = \"1s\"\n".to_owned()
            + &pair(
                site,
                "kill -STOP $(cat tracker); echo freeze >>log",
                "echo thaw >>log; kill -CONT $(cat tracker)",
            )
    });
    let pid = number(&world.site.tracker_status(), "/pid");
    fs::write(world.path("tracker"), pid.to_string()).unwrap();
    // The tracker cannot cut before the thaw, which it is that lets it go on.
    world.cut_in_spite_of("The time limit of 1 s was over before the cut was made");
    assert_eq!(read(&world.path("log")), "freeze\nthaw\n");
}

#[test]
fn a_thaw_that_fails_is_repeated_and_shown() {
    let world = World::with(|site| {
        pair(
            site,
            "echo freeze >>log",
            "echo thaw >>log; [ -e good ] || { echo stuck >&2; exit 1; }",
        )
    });
    let outcome = world.cut();
    assert!(outcome.failure().contains("stuck"));
    await_status(&world.site, "what may be frozen", |status| {
        let text = status["problems"]["quiesce"].as_str().unwrap_or_default();
        text.contains("may still be") && text.contains("stuck")
    });
    fs::write(world.path("good"), "").unwrap();
    await_status(&world.site, "no trouble", |status| status["health"] == "ok");
    assert!(!world.site.state().join("frozen.json").exists());
    world.cut_at_rest();
}

#[test]
fn commands_may_end_what_they_start() {
    // The guard blocks signals; a command must not inherit that.
    let world =
        World::with(|site| pair(site, "sleep 1000 & kill $!; wait $!; [ $? = 143 ]", "true"));
    world.cut_at_rest();
}

#[test]
fn both_schedules_go_on_apart() {
    let mut site = Site::new(&[("disk", 4 * MIB)]);
    site.interval = "50ms".to_owned();
    let hook = pair(&site, "echo 1 >>log", "true");
    site.settings = format!("[quiesce]\ninterval = \"1h\"\n{hook}");
    let tracker = site.start_tracker();
    let client = RefCell::new(site.connect("disk"));
    let change = || client.borrow_mut().write(0, &[1; 4096]).unwrap();
    change();
    site.protect();
    let await_points = |site: &Site, wanted: u64| {
        await_status(site, "recovery points", |status| {
            // A point is made only where something has changed.
            change();
            number(status, "/points") >= wanted
        });
    };
    let flags = |site: &Site| -> Vec<bool> {
        let out = site.shipper(&["points", "--json"]).success();
        let points: Vec<Value> = serde_json::from_str(&out).unwrap();
        let flag = |point: &Value| point["consistency"] == "application";
        points.iter().map(flag).collect()
    };
    let shipper = site.start_shipper();
    await_points(&site, 5);
    shipper.stop();
    assert_eq!(read(&site.path("log")), "1\n", "one in this hour");
    let before = flags(&site);
    assert!(before[0] && !before[1..].contains(&true), "{before:?}");
    // The other way round: each is quiesced, though an ordinary one is due once in an hour.
    site.settings = site.settings.replace("1h", "50ms");
    site.interval = "1h".to_owned();
    site.write_config();
    let shipper = site.start_shipper();
    await_points(&site, 4);
    shipper.stop();
    let all = flags(&site);
    // The last ordinary one may have waited in the spool.
    let quiesced = &all[before.len() + 1..];
    assert!(quiesced.len() >= 2 && !quiesced.contains(&false), "{all:?}");
    tracker.stop();
}

/// How a guest agent behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Good,
    /// It begins with half of an answer to somebody else, and whole ones of others.
    Stale,
    /// It answers the freeze with an error.
    Refuses,
    /// It freezes, and does not say so.
    FreezesSilently,
    /// It answers nothing at all.
    Silent,
    /// It thaws by itself, as a Windows guest does after a while.
    ThawsItself,
    /// It finds nothing to freeze.
    Empty,
    /// It answers the freeze with what is no answer.
    Garbles,
}

/// A guest agent with a unix socket.
#[derive(Clone)]
struct FakeAgent {
    manner: Manner,
    frozen: Arc<Mutex<bool>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakeAgent {
    fn serve(path: &Path, manner: Manner) -> Self {
        let agent = Self {
            manner,
            frozen: Arc::default(),
            asked: Arc::default(),
        };
        let listener = UnixListener::bind(path).unwrap();
        let serving = agent.clone();
        // One peer after the other, as qemu does it.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serving.attend(stream);
            }
        });
        agent
    }

    fn attend(&self, mut stream: UnixStream) {
        if self.manner == Manner::Stale {
            let stale = b"{\"return\": 5}\n\xff{\"return\": 12}\n{\"error\": {\"cla";
            stream.write_all(stale).unwrap();
        }
        let reader = BufReader::new(stream.try_clone().unwrap());
        for line in reader.split(b'\n') {
            let Ok(line) = line else { return };
            let begin = line
                .iter()
                .rposition(|byte| *byte == 0xff)
                .map_or(0, |at| at + 1);
            let Ok(request) = serde_json::from_slice::<Value>(&line[begin..]) else {
                continue;
            };
            if let Some(answer) = self.answer(&request) {
                // A peer that has gone shows at the next line.
                let _gone = stream.write_all(&answer);
            }
        }
    }

    fn answer(&self, request: &Value) -> Option<Vec<u8>> {
        let command = request["execute"].as_str().unwrap();
        self.asked.lock().unwrap().push(command.to_owned());
        let mut frozen = self.frozen.lock().unwrap();
        let returned =
            |value: Value| Some(format!("{}\n", json!({ "return": value })).into_bytes());
        match (command, self.manner) {
            (_, Manner::Silent) => None,
            ("guest-sync-delimited", _) => {
                let mut answer = vec![0xff];
                answer.extend(returned(request["arguments"]["id"].clone())?);
                Some(answer)
            }
            ("guest-fsfreeze-freeze", Manner::Refuses) => {
                let error =
                    json!({ "class": "GenericError", "desc": "failed to freeze /data: busy" });
                Some(format!("{}\n", json!({ "error": error })).into_bytes())
            }
            ("guest-fsfreeze-freeze", Manner::Empty) => returned(json!(0)),
            ("guest-fsfreeze-freeze", manner) => {
                *frozen = true;
                match manner {
                    Manner::FreezesSilently => None,
                    Manner::Garbles => Some(b"<html>\n".to_vec()),
                    _ => returned(json!(2)),
                }
            }
            ("guest-fsfreeze-status", manner) => {
                let status = if *frozen { "frozen" } else { "thawed" };
                if manner == Manner::ThawsItself {
                    *frozen = false;
                }
                returned(json!(status))
            }
            ("guest-fsfreeze-thaw", _) => {
                returned(json!(if std::mem::take(&mut *frozen) { 2 } else { 0 }))
            }
            other => panic!("asked {other:?}"),
        }
    }

    fn is_frozen(&self) -> bool {
        *self.frozen.lock().unwrap()
    }

    fn was_asked(&self, command: &str) -> bool {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .any(|asked| asked == command)
    }
}

fn agent_hook(site: &Site) -> String {
    format!(
        "[[quiesce.hook]]\nkind = \"guest-agent\"\nsocket = {:?}\n",
        site.path("agent")
    )
}

fn agent_world(time_limit: &str, manner: Manner) -> (World, FakeAgent) {
    let world = World::with(|site| format!("time_limit = \"{time_limit}\"\n{}", agent_hook(site)));
    let agent = FakeAgent::serve(&world.path("agent"), manner);
    (world, agent)
}

#[test]
fn a_guest_rests_for_the_cut() {
    for manner in [Manner::Good, Manner::Stale] {
        let (world, agent) = agent_world(LONG, manner);
        for _ in 0..2 {
            world.cut_at_rest();
            assert!(!agent.is_frozen());
        }
        assert_eq!(
            agent.asked.lock().unwrap()[..6],
            [
                "guest-sync-delimited",
                "guest-fsfreeze-freeze",
                "guest-fsfreeze-status",
                "guest-sync-delimited",
                "guest-fsfreeze-status",
                "guest-fsfreeze-thaw",
            ]
        );
    }
}

#[test]
fn a_guest_that_does_not_rest_is_the_reason() {
    for (manner, time_limit, words) in [
        (Manner::Refuses, LONG, "failed to freeze /data: busy"),
        (Manner::Empty, LONG, "it has frozen no file system"),
        (Manner::Garbles, LONG, "no answer of a guest agent"),
        (Manner::ThawsItself, LONG, "was not frozen any more"),
        (Manner::Silent, "300ms", "it does not answer in time"),
        (
            Manner::FreezesSilently,
            "300ms",
            "guest-fsfreeze-freeze: it does not answer in time",
        ),
    ] {
        let (world, agent) = agent_world(time_limit, manner);
        world.cut_in_spite_of(words);
        assert!(!agent.is_frozen(), "{manner:?}");
        let is_thawed = agent.was_asked("guest-fsfreeze-thaw");
        let in_doubt = [Manner::FreezesSilently, Manner::Garbles].contains(&manner);
        assert_eq!(is_thawed, in_doubt, "{manner:?}");
    }
    let world = World::with(agent_hook);
    world.cut_in_spite_of("cannot connect to it: No such file or directory");
}

/// An ext4 file system on a loop device. It is thawed and unmounted at the end.
struct Mounted {
    path: PathBuf,
    _device: LoopDevice,
    _folder: tempfile::TempDir,
}

impl Mounted {
    fn new() -> Self {
        require(&["fsfreeze", "mkfs.ext4", "losetup", "mount"]);
        let folder = tempfile::tempdir().unwrap();
        let (image, path) = (folder.path().join("image"), folder.path().join("mount"));
        fs::File::create(&image)
            .unwrap()
            .set_len(256 * MIB)
            .unwrap();
        run(Command::new("/sbin/mkfs.ext4").arg("-q").arg(&image)).success();
        let device = LoopDevice::over(&image, 512);
        fs::create_dir(&path).unwrap();
        run(Command::new("mount").arg(&device.path).arg(&path)).success();
        Self {
            path,
            _device: device,
            _folder: folder,
        }
    }

    fn hook(&self) -> String {
        format!(
            "[[quiesce.hook]]\nkind = \"fsfreeze\"\nmount = {:?}\n",
            self.path
        )
    }

    /// Somebody who writes there once.
    fn writer(&self) -> Writer {
        let file = self.path.join("written");
        let child = Command::new("dd")
            .args([
                "if=/dev/zero",
                "bs=4096",
                "count=1",
                "conv=fsync",
                "status=none",
            ])
            .arg(format!("of={}", file.display()))
            .spawn()
            .unwrap();
        Writer { child, file }
    }

    /// Thaws by hand: whether it was frozen.
    fn thaw(&self) -> bool {
        let mut command = Command::new("/sbin/fsfreeze");
        run(command.arg("--unfreeze").arg(&self.path))
            .status
            .success()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.thaw();
        run(Command::new("umount").arg("--lazy").arg(&self.path));
    }
}

struct Writer {
    child: Child,
    file: PathBuf,
}

impl Writer {
    /// Waits until it stands still in the kernel, before it has written.
    #[track_caller]
    fn await_blocked(&self) {
        let stack = format!("/proc/{}/stat", self.child.id());
        await_true("a writer that stands still", || {
            read(Path::new(&stack)).contains(") D ")
        });
        assert!(!self.file.exists());
    }

    #[track_caller]
    fn await_done(mut self) {
        await_true("the end of the writer", || {
            fs::metadata(&self.file).is_ok_and(|metadata| metadata.len() == 4096)
        });
        assert!(self.child.wait().unwrap().success());
        fs::remove_file(&self.file).unwrap();
    }
}

/// A machine with a file system, a guest and a command as hooks. The command stops the tracker, so that
/// everything stays frozen until the test lets the tracker go on.
struct Held {
    writer: Option<Writer>,
    world: World,
    mounted: Mounted,
    agent: FakeAgent,
    _asking: Asking,
}

impl Held {
    fn new() -> Self {
        let mounted = Mounted::new();
        let world = World::with(|site| {
            let stop = "echo frozen >>log; kill -STOP $(cat tracker); touch held";
            let mut text = format!("time_limit = \"{LONG}\"\n");
            text.push_str(&mounted.hook());
            text.push_str(&agent_hook(site));
            text + &pair(site, stop, "echo thawed >>log")
        });
        let agent = FakeAgent::serve(&world.path("agent"), Manner::Good);
        let tracker = number(&world.site.tracker_status(), "/pid");
        fs::write(world.path("tracker"), tracker.to_string()).unwrap();
        let asking = world.begin_cut();
        await_true("everything frozen", || world.path("held").exists());
        let writer = mounted.writer();
        writer.await_blocked();
        assert!(agent.is_frozen());
        Self {
            writer: Some(writer),
            world,
            mounted,
            agent,
            _asking: asking,
        }
    }

    /// Everything is thawed while the tracker, and so the cut, still stands.
    #[track_caller]
    fn await_thawed(&mut self) {
        self.writer.take().unwrap().await_done();
        await_true("a guest that goes on", || !self.agent.is_frozen());
        let log = read(&self.world.path("log"));
        assert!(log.starts_with("frozen\nthawed\n"), "{log}");
        assert!(!self.mounted.thaw(), "it was still frozen");
    }

    fn continue_tracker(&self) {
        let pid = read(&self.world.path("tracker")).parse().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    }

    fn note(&self) -> PathBuf {
        self.world.site.state().join("frozen.json")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.continue_tracker();
        // So that no writer stays in the kernel if the test fails.
        self.mounted.thaw();
    }
}

#[test]
fn a_file_system_rests_for_the_cut() {
    let mounted = Mounted::new();
    let world = World::new(&mounted.hook());
    fs::write(mounted.path.join("dirty"), "not synced").unwrap();
    world.cut_at_rest();
    assert!(!mounted.thaw(), "it was still frozen");
    mounted.writer().await_done();
    // One that somebody else has frozen is left as it is.
    run(Command::new("/sbin/fsfreeze")
        .arg("--freeze")
        .arg(&mounted.path))
    .success();
    world.cut_in_spite_of("busy");
    assert!(mounted.thaw(), "it was thawed under somebody else");
    world.cut_at_rest();
    run(Command::new("umount").arg(&mounted.path)).success();
    world.cut_in_spite_of("is no mount point");
}

#[test]
fn a_killed_shipper_leaves_nothing_frozen() {
    let mut held = Held::new();
    assert!(held.note().exists());
    held.world.kill_shipper();
    held.await_thawed();
    await_true("the end of the note", || !held.note().exists());
    held.continue_tracker();
    let shipper = held.world.site.start_shipper();
    held.world.shipper = Some(shipper);
    held.world.site.cut_soon("after the kill");
}

#[test]
fn a_killed_guard_leaves_nothing_frozen() {
    let mut held = Held::new();
    kill(held.world.guard(), Signal::SIGKILL).unwrap();
    held.await_thawed();
    held.continue_tracker();
    await_status(
        &held.world.site,
        "a point that is only crash-consistent",
        |status| {
            let text = status["problems"]["quiesce"].as_str().unwrap_or_default();
            number(status, "/points") == 1 && text.contains("it ended before it had thawed")
        },
    );
    let point = held.world.points().pop().unwrap();
    assert_eq!(point["consistency"], "crash");
    assert!(!held.note().exists());
}

#[test]
fn when_both_are_killed_the_next_shipper_thaws() {
    let mut held = Held::new();
    let guard = held.world.guard();
    // The shipper cannot see that the guard dies.
    held.world.shipper.as_ref().unwrap().signal(Signal::SIGSTOP);
    kill(guard, Signal::SIGKILL).unwrap();
    held.world.kill_shipper();
    held.writer.as_ref().unwrap().await_blocked();
    assert!(held.agent.is_frozen() && held.note().exists());
    // It thaws even where it cannot go on.
    let elsewhere = held.world.path("elsewhere");
    fs::rename(held.world.site.vault(), &elsewhere).unwrap();
    held.world.site.shipper(&["run"]).failure();
    held.await_thawed();
    assert!(!held.note().exists());
    fs::rename(&elsewhere, held.world.site.vault()).unwrap();
}

#[test]
fn a_guard_takes_no_other_signal() {
    let mut held = Held::new();
    let guard = held.world.guard();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        kill(guard, signal).unwrap();
    }
    held.continue_tracker();
    await_status(&held.world.site, "a point", |status| {
        number(status, "/points") == 1
    });
    held.await_thawed();
    // The first point of all is made without being asked for, before or after this one.
    await_true("a point at rest", || {
        let points = held.world.points();
        points
            .iter()
            .any(|point| point["consistency"] == "application")
    });
}

#[test]
fn a_command_of_a_killed_guard_does_not_freeze_later() {
    let world = World::with(|site| {
        let freeze = "echo $$ >process; echo freezing >>log; while [ ! -e go ]; do sleep 0.01; done; echo frozen >>log";
        format!("time_limit = \"{LONG}\"\n") + &pair(site, freeze, "echo thawed >>log")
    });
    let _asking = world.begin_cut();
    await_true("a command", || world.path("log").exists());
    kill(world.guard(), Signal::SIGKILL).unwrap();
    await_status(&world.site, "a point", |status| {
        number(status, "/points") == 1
    });
    fs::write(world.path("go"), "").unwrap();
    assert_eq!(read(&world.path("log")), "freezing\nthawed\n");
    let process = read(&world.path("process")).trim().to_owned();
    let stat = read(Path::new(&format!("/proc/{process}/stat")));
    assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
}

#[test]
fn a_killed_shipper_ends_a_freeze_that_hangs() {
    let mut world = World::with(|site| {
        let first = pair(site, "echo freeze1 >>log", "echo thaw1 >>log");
        let hanging = pair(site, "touch hanging; sleep 1000", "echo thaw2 >>log");
        format!("time_limit = \"{LONG}\"\n{first}{hanging}")
    });
    let _asking = world.begin_cut();
    await_true("a command that hangs", || world.path("hanging").exists());
    world.kill_shipper();
    await_true("both thawed", || {
        read(&world.path("log")) == "freeze1\nthaw2\nthaw1\n"
    });
}

#[test]
fn nobody_freezes_what_the_shipper_stands_on() {
    let mounted = Mounted::new();
    let mut site = Site::new_on(&mounted.path, &[("disk", MIB)]);
    site.tracker_arguments = vec!["--ring-size".to_owned(), "4MiB".to_owned()];
    let tracker = site.start_tracker();
    site.settings = format!("[quiesce]\n{}", mounted.hook());
    site.protect();
    let error = run_within(&mut site.shipper_command(&["run"]), PATIENCE).failure();
    assert!(
        error.contains("cannot be frozen: the state folder"),
        "{error}"
    );
    assert!(error.contains(mounted.path.to_str().unwrap()), "{error}");
    assert!(!mounted.thaw(), "it was frozen");
    site.settings = String::new();
    site.write_config();
    let shipper = site.start_shipper();
    let error = site.shipper(&["cut", "--quiesce"]).failure();
    assert!(error.contains("There is nothing to quiesce"), "{error}");
    shipper.stop();
    tracker.stop();
}
