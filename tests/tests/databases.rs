//! Real databases on two protected disks: every recovery point, restored, starts and balances.
//!
//! PostgreSQL keeps its data on one file system and its log on another, each on a disk of its own. Its log must
//! never be older than its data; of a point whose disks are not from one moment it does not start, or has lost
//! what it had answered. SQLite works in WAL mode, where the log lies beside the data, so the rule across disks
//! is that of the application: a transfer is entered into a ledger on one disk, and when that is answered, into
//! the balances on the other. In any moment the balances are at the ledger's last entry or at the one before.
//!
//! The file systems are mounted through nbdfuse and loop devices. Points are cut under load; each is restored,
//! mounted, which replays the journal of its file systems, and put to work. Then e2fsck looks at it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::User;
use tests::loop_device::LoopDevice;
use tests::process::{Daemon, require, run};
use tests::seed::Random;
use tests::site::{Site, fast_folder};

const MIB: u64 = 1 << 20;
const DISKS: [(&str, u64); 2] = [("data", 128 * MIB), ("log", 64 * MIB)];
/// Recovery points that are checked at least, and how many of them are asked for.
const POINTS_MIN: usize = 16;
const ASKED: usize = 12;
/// Transfers of each client between two points that are asked for.
const TRANSFERS_MIN: u64 = 60;
/// Free bytes that a file system in memory must have to be used.
const MEMORY_BYTES_MIN: u64 = 2 << 30;
const ACCOUNTS: u64 = 2000;
/// What each account has in the beginning.
const OPENING: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(60);

/// Administrators' programs are not in everybody's PATH.
fn administrator(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn can_mount() -> bool {
    let can = nix::unistd::geteuid().is_root()
        && Path::new("/dev/fuse").exists()
        && Path::new("/dev/loop-control").exists();
    if !can {
        println!("not run: mounting needs root, /dev/fuse and loop devices");
    }
    can
}

/// Waits until something is there.
#[track_caller]
fn poll(what: &str, mut is_there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// A mounted file system. Dropping it takes it away, however busy it is.
struct Mount(PathBuf);

impl Mount {
    fn new(device: &str, folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        run(administrator("mount").arg(device).arg(folder)).success();
        Self(folder.to_owned())
    }

    /// In good order: everything has arrived afterwards.
    fn end(self) {
        run(administrator("umount").arg(&self.0)).success();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mut umount = administrator("umount");
        let _not_there = umount
            .arg("--lazy")
            .arg(&self.0)
            .stderr(Stdio::null())
            .status();
    }
}

/// An export as a file.
struct Fuse {
    child: Child,
    folder: PathBuf,
}

impl Fuse {
    fn new(site: &Site, disk: &str) -> Self {
        let folder = site.path(&format!("fuse-{disk}"));
        fs::create_dir_all(&folder).unwrap();
        let mut command = Command::new("nbdfuse");
        command
            .arg(&folder)
            .arg(site.uri(disk))
            .stdin(Stdio::null());
        let fuse = Self {
            child: command.spawn().unwrap(),
            folder,
        };
        poll("the file of nbdfuse", || fuse.file().exists());
        fuse
    }

    fn file(&self) -> PathBuf {
        self.folder.join("nbd")
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let mut umount = administrator("umount");
        let _not_there = umount
            .arg("--lazy")
            .arg(&self.folder)
            .stderr(Stdio::null())
            .status();
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Both disks of the machine with file systems on them, as its user has them. Fields are dropped in order.
struct Guest {
    mounts: Vec<Mount>,
    devices: Vec<LoopDevice>,
    files: Vec<Fuse>,
    folder: PathBuf,
}

impl Guest {
    fn new(site: &Site) -> Self {
        let folder = site.path("live");
        let mut guest = Self {
            mounts: Vec::new(),
            devices: Vec::new(),
            files: Vec::new(),
            folder: folder.clone(),
        };
        for (disk, _) in DISKS {
            let file = Fuse::new(site, disk);
            let device = LoopDevice::over(&file.file(), 512);
            run(administrator("mkfs.ext4").args(["-q", &device.path])).success();
            guest
                .mounts
                .push(Mount::new(&device.path, &folder.join(disk)));
            guest.devices.push(device);
            guest.files.push(file);
        }
        guest
    }

    /// What is to be in the first point already reaches the disks.
    fn sync(&self) {
        for mount in &self.mounts {
            run(Command::new("sync").arg("--file-system").arg(&mount.0)).success();
        }
    }

    fn end(self) {
        for mount in self.mounts {
            mount.end();
        }
    }
}

/// A recovery point as a machine has it that was started from it.
struct Restored {
    mounts: Vec<Mount>,
    devices: Vec<LoopDevice>,
    images: Vec<PathBuf>,
    folder: PathBuf,
}

impl Restored {
    fn new(site: &Site, point: &str) -> Self {
        let folder = site.path("restored");
        let mut restored = Self {
            mounts: Vec::new(),
            devices: Vec::new(),
            images: Vec::new(),
            folder: folder.clone(),
        };
        for (disk, _) in DISKS {
            let image = site.restore(point, disk, &format!("{disk}-{point}.img"));
            let device = LoopDevice::over(&image, 512);
            restored
                .mounts
                .push(Mount::new(&device.path, &folder.join(disk)));
            restored.devices.push(device);
            restored.images.push(image);
        }
        restored
    }

    /// Takes it apart; the file systems must be clean.
    fn end(mut self) {
        for mount in self.mounts.drain(..) {
            mount.end();
        }
        self.devices.clear();
        for image in &self.images {
            run(administrator("e2fsck").arg("-fn").arg(image)).success();
            fs::remove_file(image).unwrap();
        }
    }
}

/// A program that is told statements, and answers some of them by a line.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn tell(&mut self, text: &str) {
        writeln!(self.input, "{text}").expect("the client runs");
    }

    /// Waits for a line that is this number.
    fn await_number(&mut self, number: u64) {
        let expected = number.to_string();
        let mut line = String::new();
        while line.trim() != expected {
            line.clear();
            let read = self.output.read_line(&mut line).expect("the client runs");
            assert!(read > 0, "the client has ended before it answered {number}");
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// One transfer.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    number: u64,
    from: u64,
    to: u64,
    amount: u64,
}

/// Clients at work, each with how many of its transfers were answered.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn new() -> Self {
        Self {
            stop: Arc::default(),
            answered: Vec::new(),
            threads: Vec::new(),
        }
    }

    /// `make` makes a transfer, and returns when it is answered.
    fn add(
        &mut self,
        mut random: Random,
        accounts: impl Fn(&mut Random) -> u64 + Send + 'static,
        mut make: impl FnMut(Transfer) + Send + 'static,
    ) {
        let (stop, answered) = (Arc::clone(&self.stop), Arc::new(AtomicU64::new(0)));
        self.answered.push(Arc::clone(&answered));
        self.threads.push(std::thread::spawn(move || {
            for number in 1.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let from = accounts(&mut random);
                let to = accounts(&mut random);
                let amount = random.between(1, 9);
                make(Transfer {
                    number,
                    from,
                    to,
                    amount,
                });
                answered.store(number, Ordering::Release);
            }
        }));
    }

    /// How many transfers of each client are answered.
    fn answered(&self) -> Vec<u64> {
        let load = |count: &Arc<AtomicU64>| count.load(Ordering::Acquire);
        self.answered.iter().map(load).collect()
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client");
        }
    }
}

/// Points under load: their numbers, and for those that were asked for, what had been answered before.
fn cut_under(load: &Load, site: &Site) -> Vec<(String, Vec<u64>)> {
    let mut asked = Vec::new();
    let mut busy = load.answered();
    while asked.len() < ASKED || site.points().len() < POINTS_MIN {
        // Every point has something new of every client.
        poll("the next transfers of every client", || {
            let pairs = load.answered().into_iter().zip(&busy);
            pairs
                .into_iter()
                .all(|(now, before)| now >= before + TRANSFERS_MIN)
        });
        busy = load.answered();
        asked.push((site.cut(), busy.clone()));
    }
    let none = vec![0; busy.len()];
    let needed = |point: &String| asked.iter().find(|(asked, _)| asked == point);
    let points = site.points().into_iter();
    points
        .map(|point| {
            let answered = needed(&point).map_or(none.clone(), |(_, answered)| answered.clone());
            (point, answered)
        })
        .collect()
}

/// A machine whose guest has both file systems, with the shipper's own points every second.
fn machine() -> (Site, Daemon, Guest) {
    let mut site = Site::new_in(&fast_folder(MEMORY_BYTES_MIN), &DISKS);
    site.interval = "1s".to_owned();
    // The shipper reads all of the ring for every point.
    site.tracker_arguments = ["--ring-size", "1MiB"].map(str::to_owned).to_vec();
    // Others than root look for their files in it.
    fs::set_permissions(site.root(), Permissions::from_mode(0o711)).unwrap();
    let tracker = site.start_tracker();
    let guest = Guest::new(&site);
    (site, tracker, guest)
}

/// What a query of a database prints, without the last line break.
fn answer(command: &mut Command) -> String {
    run(command).success().trim_end().to_owned()
}

/// The folder of PostgreSQL's programs, which is in nobody's PATH.
fn postgres_folder() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let folders = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    let mut folders: Vec<PathBuf> = folders
        .filter(|bin| bin.join("postgres").exists())
        .collect();
    folders.sort();
    let newest = folders.pop();
    newest.expect("PostgreSQL is not installed: scripts/test installs what tests need")
}

/// A PostgreSQL cluster in two folders, `data` and `log`, below another one.
struct Cluster {
    bin: PathBuf,
    user: User,
    folder: PathBuf,
    sockets: PathBuf,
}

impl Cluster {
    fn at(folder: &Path, sockets: PathBuf) -> Self {
        let user = User::from_name("postgres").unwrap();
        let cluster = Self {
            bin: postgres_folder(),
            user: user.expect("a user postgres"),
            folder: folder.to_owned(),
            sockets,
        };
        fs::create_dir_all(&cluster.sockets).unwrap();
        cluster.give(&cluster.sockets);
        cluster
    }

    fn give(&self, path: &Path) {
        let (user, group) = (self.user.uid.as_raw(), self.user.gid.as_raw());
        chown(path, Some(user), Some(group)).unwrap();
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data/cluster")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .uid(self.user.uid.as_raw())
            .gid(self.user.gid.as_raw())
            .current_dir("/");
        command
    }

    /// Makes it; the log is found by a path that is right wherever both are mounted.
    fn make(&self) {
        for part in ["data", "log"] {
            self.give(&self.folder.join(part));
        }
        let mut initdb = self.command("initdb");
        initdb.args([
            "--auth",
            "trust",
            "--data-checksums",
            "--no-sync",
            "--wal-segsize",
            "1",
        ]);
        initdb.args(["--encoding", "UTF8", "--no-locale"]);
        initdb.arg("--waldir").arg(self.folder.join("log/wal"));
        run(initdb.arg("--pgdata").arg(self.data())).success();
        let link = self.data().join("pg_wal");
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("../../log/wal", &link).unwrap();
    }

    fn start(&self) -> Daemon {
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.data())
            .arg("-k")
            .arg(&self.sockets);
        for setting in [
            "listen_addresses=",
            "fsync=on",
            "synchronous_commit=on",
            "full_page_writes=on",
            "shared_buffers=1MB",
            "bgwriter_delay=20ms",
            "max_wal_size=16MB",
            "min_wal_size=2MB",
        ] {
            command.arg("-c").arg(setting);
        }
        let daemon = Daemon::spawn("postgres", &mut command);
        daemon.await_text("ready to accept connections");
        daemon
    }

    /// SIGINT: it ends at once and in good order.
    fn stop(&self, daemon: Daemon) {
        daemon.signal(Signal::SIGINT);
        let (status, log) = daemon.outcome(PATIENCE);
        assert!(status.success(), "{status}\n{log}");
    }

    fn client(&self) -> Command {
        let mut command = Command::new(self.bin.join("psql"));
        command.args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            "postgres",
            "-d",
            "postgres",
        ]);
        command.arg("-h").arg(&self.sockets);
        command
    }

    fn ask(&self, text: &str) -> String {
        answer(self.client().arg("-c").arg(text))
    }
}

const POSTGRES_CLIENTS: u64 = 3;

fn postgres_tables() -> String {
    format!(
        "CREATE EXTENSION amcheck;
         CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL, filler text NOT NULL);
         CREATE TABLE transfers (client int, number int, source int, target int, amount int,
            PRIMARY KEY (client, number));
         INSERT INTO accounts SELECT id, {OPENING}, repeat('x', 200) FROM generate_series(0, {ACCOUNTS} - 1) id;"
    )
}

/// Starts the clients. Each has accounts of its own, all mixed, so that none waits for another.
fn postgres_load(cluster: &Cluster, random: &mut Random) -> Load {
    let mut load = Load::new();
    for client in 0..POSTGRES_CLIENTS {
        let mut shell = Shell::start(cluster.client());
        let own = move |random: &mut Random| {
            random.below(ACCOUNTS / POSTGRES_CLIENTS) * POSTGRES_CLIENTS + client
        };
        load.add(random.fork(), own, move |transfer| {
            let Transfer { number, from, to, amount } = transfer;
            if number % 40 == client {
                shell.tell("CHECKPOINT;");
            }
            shell.tell(&format!(
                "BEGIN; UPDATE accounts SET balance = balance - {amount} WHERE id = {from}; \
                 UPDATE accounts SET balance = balance + {amount} WHERE id = {to}; \
                 INSERT INTO transfers VALUES ({client}, {number}, {from}, {to}, {amount}); COMMIT; SELECT {number};"
            ));
            shell.await_number(number);
        });
    }
    load
}

/// Starts the cluster of a point, and asks it everything.
fn check_postgres(cluster: &Cluster, answered: &[u64]) -> u64 {
    // It names the process that was there at that moment.
    fs::remove_file(cluster.data().join("postmaster.pid")).unwrap();
    let daemon = cluster.start();
    let total = cluster.ask("SELECT sum(balance) FROM accounts");
    assert_eq!(total, (ACCOUNTS * OPENING).to_string());
    let wrong = cluster.ask(&format!(
        "WITH moved(id, amount) AS (
            SELECT target, amount FROM transfers UNION ALL SELECT source, -amount FROM transfers),
         sums AS (SELECT id, sum(amount) AS amount FROM moved GROUP BY id)
         SELECT count(*) FROM accounts LEFT JOIN sums USING (id)
            WHERE balance <> {OPENING} + coalesce(amount, 0)"
    ));
    assert_eq!(wrong, "0", "balances that the transfers do not explain");
    let mut sum = 0;
    for (client, answered) in answered.iter().enumerate() {
        let text = cluster.ask(&format!(
            "SELECT count(*), coalesce(max(number), 0) FROM transfers WHERE client = {client}"
        ));
        let (count, last) = text.split_once('|').expect("two numbers");
        assert_eq!(count, last, "client {client}: a transfer is missing");
        let last: u64 = last.parse().unwrap();
        assert!(
            last >= *answered,
            "client {client}: {answered} were answered, {last} are there"
        );
        sum += last;
    }
    let damage = cluster.ask(
        "SELECT (SELECT count(*) FROM verify_heapam('accounts')) + (SELECT count(*) FROM verify_heapam('transfers'))",
    );
    assert_eq!(damage, "0", "verify_heapam found something");
    cluster.ask(
        "SELECT bt_index_check('accounts_pkey', true), bt_index_check('transfers_pkey', true)",
    );
    cluster.stop(daemon);
    run(cluster
        .command("pg_checksums")
        .arg("--check")
        .arg("-D")
        .arg(cluster.data()))
    .success();
    sum
}

#[test]
fn postgres_with_its_log_on_another_disk() {
    if !can_mount() {
        return;
    }
    require(&["nbdfuse", "losetup", "mkfs.ext4", "e2fsck"]);
    let mut random = Random::from_environment("postgres_with_its_log_on_another_disk");
    let (site, tracker, guest) = machine();
    let live = Cluster::at(&guest.folder, site.path("sockets"));
    live.make();
    let server = live.start();
    live.ask(&postgres_tables());
    guest.sync();
    site.protect();
    let shipper = site.start_shipper();
    let load = postgres_load(&live, &mut random);
    let points = cut_under(&load, &site);
    load.stop();
    live.stop(server);
    guest.end();

    let again = Cluster::at(&site.path("restored"), site.path("sockets"));
    let mut before = 0;
    for (point, answered) in &points {
        let restored = Restored::new(&site, point);
        let transfers = check_postgres(&again, answered);
        restored.end();
        assert!(
            transfers >= before,
            "point {point} has less than the one before"
        );
        before = transfers;
    }
    println!(
        "postgres: {} points, {before} transfers in the last one",
        points.len()
    );
    assert!(points.len() >= POINTS_MIN && before > TRANSFERS_MIN * ASKED as u64);
    shipper.stop();
    tracker.stop();
}

/// Where the ledgers of the banks lie, and where their balances: every second bank has it the other way round.
const BANKS: [(&str, &str); 4] = [
    ("log", "data"),
    ("data", "log"),
    ("log", "data"),
    ("data", "log"),
];

fn ledger(folder: &Path, bank: usize) -> PathBuf {
    folder.join(BANKS[bank].0).join(format!("ledger-{bank}.db"))
}

fn balances(folder: &Path, bank: usize) -> PathBuf {
    folder
        .join(BANKS[bank].1)
        .join(format!("balances-{bank}.db"))
}

fn sqlite(database: &Path, text: &str) -> String {
    answer(
        Command::new("sqlite3")
            .args(["-batch", "-bail"])
            .arg(database)
            .arg(text),
    )
}

fn make_bank(folder: &Path, bank: usize) {
    sqlite(
        &ledger(folder, bank),
        "PRAGMA journal_mode=WAL; CREATE TABLE entries (number INTEGER PRIMARY KEY, source INT, target INT, amount INT);",
    );
    sqlite(
        &balances(folder, bank),
        &format!(
            "PRAGMA journal_mode=WAL; CREATE TABLE applied (number INT); INSERT INTO applied VALUES (0);
             CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INT, filler TEXT);
             WITH RECURSIVE n(id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM n WHERE id < {ACCOUNTS} - 1)
             INSERT INTO accounts SELECT id, {OPENING}, printf('%.200c', 'x') FROM n;"
        ),
    );
}

/// One client for each bank: entered on one disk and answered, then applied on the other.
fn sqlite_load(folder: &Path, random: &mut Random) -> Load {
    let mut load = Load::new();
    for bank in 0..BANKS.len() {
        let mut command = Command::new("sqlite3");
        let mut shell = Shell::start({
            command
                .args(["-batch", "-bail"])
                .arg(balances(folder, bank));
            command
        });
        shell.tell(&format!(
            "ATTACH '{}' AS ledger;",
            ledger(folder, bank).display()
        ));
        shell.tell("PRAGMA main.synchronous=FULL; PRAGMA ledger.synchronous=FULL;");
        // So that pages move from the logs into the databases all the time.
        shell.tell("PRAGMA wal_autocheckpoint=40;");
        let any = |random: &mut Random| random.below(ACCOUNTS);
        load.add(random.fork(), any, move |transfer| {
            let Transfer { number, from, to, amount } = transfer;
            shell.tell(&format!(
                "INSERT INTO ledger.entries VALUES ({number}, {from}, {to}, {amount});"
            ));
            shell.tell(&format!(
                "BEGIN IMMEDIATE; UPDATE accounts SET balance = balance - {amount} WHERE id = {from}; \
                 UPDATE accounts SET balance = balance + {amount} WHERE id = {to}; \
                 UPDATE applied SET number = {number}; COMMIT; SELECT {number};"
            ));
            shell.await_number(number);
        });
    }
    load
}

/// Opens a bank of a point, which replays its logs, and asks it everything. How many transfers it has.
fn check_bank(folder: &Path, bank: usize, answered: u64) -> u64 {
    let (ledger, balances) = (ledger(folder, bank), balances(folder, bank));
    for database in [&ledger, &balances] {
        assert_eq!(
            sqlite(database, "PRAGMA integrity_check"),
            "ok",
            "{database:?}"
        );
    }
    let number = |database: &Path, text: &str| -> u64 { sqlite(database, text).parse().unwrap() };
    let total = number(&balances, "SELECT sum(balance) FROM accounts");
    assert_eq!(total, ACCOUNTS * OPENING, "bank {bank}");
    let entered = number(&ledger, "SELECT coalesce(max(number), 0) FROM entries");
    let count = number(&ledger, "SELECT count(*) FROM entries");
    let applied = number(&balances, "SELECT number FROM applied");
    assert_eq!(entered, count, "bank {bank}: an entry is missing");
    assert!(
        entered == applied || entered == applied + 1,
        "bank {bank}: {entered} entered, {applied} applied: the disks are not from one moment"
    );
    assert!(
        applied >= answered,
        "bank {bank}: {answered} were answered, {applied} are there"
    );
    let wrong = sqlite(
        &balances,
        &format!(
            "ATTACH '{}' AS ledger;
             WITH moved(id, amount) AS (
                SELECT target, amount FROM ledger.entries WHERE number <= {applied} UNION ALL
                SELECT source, -amount FROM ledger.entries WHERE number <= {applied}),
             sums AS (SELECT id, sum(amount) AS amount FROM moved GROUP BY id)
             SELECT count(*) FROM accounts LEFT JOIN sums USING (id)
                WHERE balance <> {OPENING} + coalesce(amount, 0)",
            ledger.display()
        ),
    );
    assert_eq!(
        wrong, "0",
        "bank {bank}: balances that the ledger does not explain"
    );
    applied
}

#[test]
fn sqlite_with_its_ledger_on_another_disk() {
    if !can_mount() {
        return;
    }
    require(&["nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "sqlite3"]);
    let mut random = Random::from_environment("sqlite_with_its_ledger_on_another_disk");
    let (site, tracker, guest) = machine();
    for bank in 0..BANKS.len() {
        make_bank(&guest.folder, bank);
    }
    guest.sync();
    site.protect();
    let shipper = site.start_shipper();
    let load = sqlite_load(&guest.folder, &mut random);
    let points = cut_under(&load, &site);
    load.stop();
    guest.end();

    let mut before = 0;
    for (point, answered) in &points {
        let restored = Restored::new(&site, point);
        let banks = 0..BANKS.len();
        let applied = banks
            .map(|bank| check_bank(&restored.folder, bank, answered[bank]))
            .sum();
        restored.end();
        assert!(
            applied >= before,
            "point {point} has less than the one before"
        );
        before = applied;
    }
    println!(
        "sqlite: {} points, {before} transfers in the last one",
        points.len()
    );
    assert!(points.len() >= POINTS_MIN && before > TRANSFERS_MIN * ASKED as u64);
    shipper.stop();
    tracker.stop();
}
