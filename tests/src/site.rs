//! A place to test in: disks, sockets, vault, state and configuration of one machine in a temporary
//! directory, and the commands on them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use shipper::keys::source::{Access, generate_key_file};
use tempfile::TempDir;

use crate::nbd::Client;
use crate::process::{Daemon, Outcome, program, run};
use crate::seed::Random;

/// Compare and check this many bytes at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Time that a program has for what takes it a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder in memory if there is room for this many bytes, else that for temporary files. For tests of order
/// and not of durability: what syncs nothing has many more rounds in the same time.
pub fn fast_folder(bytes_min: u64) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let room = nix::sys::statvfs::statvfs(memory)
        .map_or(0, |found| found.blocks_available() * found.fragment_size());
    if room >= bytes_min {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

/// One machine with its files.
pub struct Site {
    root: TempDir,
    /// Where disks, journals and the shipper's state lie, if not in the temporary directory.
    storage: Option<PathBuf>,
    disks: Vec<(String, u64)>,
    /// Seconds or another unit between recovery points, as in the configuration.
    pub interval: String,
    /// Compression, as in the configuration.
    pub codec: String,
    /// More arguments of `tracker serve`.
    pub tracker_arguments: Vec<String>,
    /// More lines at the top of the configuration.
    pub settings: String,
    /// Address of the vault, if it is not in the temporary directory.
    pub vault_elsewhere: Option<String>,
    /// What the shipper finds in its environment beside what is there.
    pub environment: Vec<(String, String)>,
}

impl Site {
    /// A machine with sparse disks of these names and sizes in bytes.
    ///
    /// # Panics
    ///
    /// The files cannot be made.
    pub fn new(disks: &[(&str, u64)]) -> Self {
        Self::new_in(&std::env::temp_dir(), disks)
    }

    /// The same in a folder of choice, for disks that not every file system takes.
    ///
    /// # Panics
    ///
    /// The files cannot be made.
    pub fn new_in(folder: &Path, disks: &[(&str, u64)]) -> Self {
        Self::make(folder, None, disks)
    }

    /// The same with disks, journals and the shipper's state in another folder, apart from the vault.
    ///
    /// # Panics
    ///
    /// The files cannot be made.
    pub fn new_on(storage: &Path, disks: &[(&str, u64)]) -> Self {
        Self::make(&std::env::temp_dir(), Some(storage.to_owned()), disks)
    }

    fn make(folder: &Path, storage: Option<PathBuf>, disks: &[(&str, u64)]) -> Self {
        let root = tempfile::Builder::new()
            .prefix("tidemark-")
            .tempdir_in(folder)
            .expect("a temporary directory");
        let site = Self {
            root,
            storage,
            disks: disks
                .iter()
                .map(|(name, size)| ((*name).to_owned(), *size))
                .collect(),
            interval: "1h".to_owned(),
            codec: "zstd:1".to_owned(),
            tracker_arguments: Vec::new(),
            settings: String::new(),
            vault_elsewhere: None,
            environment: Vec::new(),
        };
        generate_key_file(&site.key_file()).expect("a key file");
        for (name, size) in &site.disks {
            let file = File::create_new(site.image(name)).expect("a disk image");
            file.set_len(*size).expect("a sparse disk");
        }
        site
    }

    /// The temporary directory.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// A path in the temporary directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn stored(&self, name: &str) -> PathBuf {
        self.storage.as_deref().unwrap_or(self.root()).join(name)
    }

    /// The image of a disk.
    pub fn image(&self, disk: &str) -> PathBuf {
        self.stored(&format!("{disk}.img"))
    }

    /// The journal of a disk.
    pub fn journal(&self, disk: &str) -> PathBuf {
        self.stored(&format!("{disk}.img.hrl"))
    }

    /// The NBD socket.
    pub fn socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    /// The tracker's control socket.
    pub fn control(&self) -> PathBuf {
        self.path("nbd.sock.control")
    }

    /// The key file of the vault.
    pub fn key_file(&self) -> PathBuf {
        self.path("vault.key")
    }

    /// What opens the vault.
    pub fn access(&self) -> Access {
        Access {
            key_file: Some(self.key_file()),
            ..Access::default()
        }
    }

    /// Arguments that make a vault at this address, encrypted with the key file.
    pub fn init(&self, url: &str) -> Vec<OsString> {
        let key_file = self.key_file().into_os_string();
        vec!["init".into(), url.into(), "--key-file".into(), key_file]
    }

    /// The vault's directory.
    pub fn vault(&self) -> PathBuf {
        self.path("vault")
    }

    /// The vault's address.
    pub fn vault_url(&self) -> String {
        match &self.vault_elsewhere {
            Some(url) => url.clone(),
            None => format!("file://{}", self.vault().display()),
        }
    }

    /// The shipper's state directory.
    pub fn state(&self) -> PathBuf {
        self.stored("state")
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.path("config.toml")
    }

    /// The address of an export, for foreign clients.
    pub fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///{disk}?socket={}", self.socket().display())
    }

    /// `tracker serve` for all disks, not yet started.
    pub fn serve_command(&self) -> Command {
        let mut command = Command::new(program("tracker"));
        command.arg("serve");
        for (name, _) in &self.disks {
            command.arg("--disk");
            command.arg(format!("{name}={}", self.image(name).display()));
        }
        command.arg("--socket").arg(self.socket());
        // So that the same tests run over each engine.
        if let Some(engine) = std::env::var_os("TIDEMARK_ENGINE") {
            command.arg("--engine").arg(engine);
        }
        command.args(&self.tracker_arguments);
        command
    }

    /// Starts the tracker.
    #[track_caller]
    pub fn start_tracker(&self) -> Daemon {
        Daemon::start("tracker", &mut self.serve_command())
    }

    /// Connects to a disk.
    ///
    /// # Panics
    ///
    /// The tracker does not answer.
    #[track_caller]
    pub fn connect(&self, disk: &str) -> Client {
        Client::unix(&self.socket(), disk).expect("the tracker answers")
    }

    /// `tracker status --json`.
    ///
    /// # Panics
    ///
    /// The tracker does not answer.
    #[track_caller]
    pub fn tracker_status(&self) -> Value {
        let out = run(Command::new(program("tracker"))
            .args(["status", "--json", "--control"])
            .arg(self.control()))
        .success();
        serde_json::from_str(&out).expect("the status is JSON")
    }

    /// The text of the configuration.
    pub fn config_text(&self) -> String {
        let mut text = format!(
            "machine = \"m1\"\ntracker = {:?}\nvault = {:?}\nkey_file = {:?}\nstate = {:?}\n\
             interval = {:?}\ncodec = {:?}\n{}\n",
            self.control(),
            self.vault_url(),
            self.key_file(),
            self.state(),
            self.interval,
            self.codec,
            self.settings,
        );
        for (name, _) in &self.disks {
            text.push_str(&format!(
                "[[disk]]\nname = {name:?}\npath = {:?}\n",
                self.image(name)
            ));
        }
        text
    }

    /// Writes the configuration.
    ///
    /// # Panics
    ///
    /// It cannot be written.
    pub fn write_config(&self) {
        fs::write(self.config(), self.config_text()).expect("the configuration");
    }

    /// The shipper in its environment, without arguments.
    pub fn shipper_program(&self) -> Command {
        let mut command = Command::new(program("shipper"));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Makes the vault and protects the machine; the tracker must run.
    #[track_caller]
    pub fn protect(&self) {
        self.write_config();
        run(self.shipper_program().args(self.init(&self.vault_url()))).success();
        self.shipper(&["protect"]).success();
    }

    /// The same with a vault that is not encrypted.
    #[track_caller]
    pub fn protect_plain(&self) {
        self.write_config();
        let url = self.vault_url();
        run(self.shipper_program().args(["init", &url, "--unencrypted"])).success();
        self.shipper(&["protect"]).success();
    }

    /// Starts `shipper run`.
    #[track_caller]
    pub fn start_shipper(&self) -> Daemon {
        Daemon::start(
            "shipper",
            self.shipper_program()
                .arg("run")
                .arg("--config")
                .arg(self.config()),
        )
    }

    /// Runs a command of the shipper on the configuration.
    #[track_caller]
    pub fn shipper(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.shipper_command(arguments))
    }

    /// A command of the shipper on the configuration, not yet run.
    pub fn shipper_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.shipper_program();
        command.args(arguments).arg("--config").arg(self.config());
        command
    }

    /// `shipper cut`: the number of the recovery point, sixteen digits.
    ///
    /// # Panics
    ///
    /// It fails or prints no number.
    #[track_caller]
    pub fn cut(&self) -> String {
        let out = self.shipper(&["cut"]).success();
        out.split(|c: char| !c.is_ascii_alphanumeric())
            .find(|word| is_point(word))
            .unwrap_or_else(|| panic!("shipper cut printed no recovery point: {out:?}"))
            .to_owned()
    }

    /// The same where a cut may be refused while the shipper finds its tracker again; it must succeed soon.
    ///
    /// # Panics
    ///
    /// None succeeds in a minute.
    #[track_caller]
    pub fn cut_soon(&self, what: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let outcome = self.shipper(&["cut"]);
            if outcome.status.success() {
                let point = outcome.out.split_whitespace().find(|word| word.len() == 16);
                return point.expect("a recovery point").to_owned();
            }
            assert!(
                Instant::now() < deadline,
                "{what}: no cut succeeds: {}",
                outcome.err
            );
        }
    }

    /// `shipper points`: their numbers, in the order printed.
    #[track_caller]
    pub fn points(&self) -> Vec<String> {
        let out = self.shipper(&["points"]).success();
        out.lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|word| is_point(word))
            .map(str::to_owned)
            .collect()
    }

    /// Restores a disk to a new file and returns its path.
    #[track_caller]
    pub fn restore(&self, point: &str, disk: &str, to: &str) -> PathBuf {
        let target = self.path(to);
        self.restore_to(point, disk, &target).success();
        target
    }

    /// Restores the disk `disk` at a recovery point; it must be what is expected.
    ///
    /// # Panics
    ///
    /// It cannot be restored, or is something else.
    #[track_caller]
    pub fn check_restore(&self, point: &str, expected: &Path) {
        let restored = self.restore(point, "disk", &format!("restored-{point}"));
        assert_same(expected, &restored);
        fs::remove_file(restored).unwrap();
    }

    /// A file of random bytes with a hole's worth of zeroes in it, the same for the same size.
    ///
    /// # Panics
    ///
    /// It cannot be written.
    pub fn random_file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let mut bytes = Random::new(size).bytes(size as usize);
        let hole = bytes.len() / 4..bytes.len() / 2;
        bytes[hole].fill(0);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Runs `shipper restore`.
    #[track_caller]
    pub fn restore_to(&self, point: &str, disk: &str, target: &Path) -> Outcome {
        let mut command = self.shipper_command(&["restore", "--point", point, "--disk", disk]);
        run(command.arg("--to").arg(target))
    }

    /// Bytes of all segments in the vault.
    pub fn segment_bytes(&self) -> u64 {
        files_below(&self.vault())
            .iter()
            .filter(|path| path.to_string_lossy().contains("/segments/"))
            .filter_map(|path| fs::metadata(path).ok())
            .map(|metadata| metadata.len())
            .sum()
    }
}

/// Where a vault in a folder keeps what is of its only machine, whose name is not to be seen.
///
/// # Panics
///
/// There is not exactly one.
#[track_caller]
pub fn machine_folder(vault: &Path) -> PathBuf {
    let folders = fs::read_dir(vault.join("machines")).expect("a machine in the vault");
    let folders: Vec<_> = folders.flatten().map(|entry| entry.path()).collect();
    assert_eq!(folders.len(), 1, "{folders:?}");
    folders[0].clone()
}

fn is_point(word: &str) -> bool {
    word.len() == 16 && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// All files below a folder, in the order of their paths.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                Ok(_) => files.push(path),
                Err(_) => {}
            }
        }
    }
    files.sort();
    files
}

/// The ranges of a file that are not holes: offsets of begin and end in bytes.
///
/// # Panics
///
/// The file cannot be looked at.
pub fn data_ranges(path: &Path) -> Vec<(u64, u64)> {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let seek = |offset: u64, whence| nix::unistd::lseek(&file, offset as i64, whence);
    let mut ranges = Vec::new();
    let mut offset = 0;
    // ENXIO: no data up to the end.
    while let Ok(begin) = seek(offset, nix::unistd::Whence::SeekData) {
        let end = seek(begin as u64, nix::unistd::Whence::SeekHole).expect("a hole or the end");
        ranges.push((begin as u64, end as u64));
        offset = end as u64;
    }
    ranges
}

/// Asserts that two sparse files are the same; only what is data in either is read.
///
/// # Panics
///
/// They are not.
#[track_caller]
pub fn assert_same_sparse(left: &Path, right: &Path) {
    let open = |path: &Path| File::open(path).expect("the file can be opened");
    let (one, two) = (open(left), open(right));
    let size = one.metadata().expect("the size").len();
    assert_eq!(size, two.metadata().expect("the size").len(), "sizes");
    let mut buffers = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    for (begin, end) in data_ranges(left).into_iter().chain(data_ranges(right)) {
        let mut offset = begin;
        while offset < end {
            let step = CHUNK_BYTES.min((end - offset) as usize);
            let (a, b) = (&mut buffers.0[..step], &mut buffers.1[..step]);
            one.read_exact_at(a, offset).expect("it can be read");
            two.read_exact_at(b, offset).expect("it can be read");
            assert!(a == b, "they differ in the {step} bytes from {offset} on");
            offset += step as u64;
        }
    }
}

/// Hands a file's content to `visit` in pieces with their offsets.
///
/// # Panics
///
/// The file cannot be read.
pub fn for_each_chunk(path: &Path, mut visit: impl FnMut(u64, &[u8])) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let size = file.metadata().expect("the size").len();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while offset < size {
        let step = CHUNK_BYTES.min((size - offset) as usize);
        file.read_exact_at(&mut buffer[..step], offset)
            .expect("the file can be read");
        visit(offset, &buffer[..step]);
        offset += step as u64;
    }
}

/// Asserts that two files are the same, byte for byte.
///
/// # Panics
///
/// They are not; the message names the first block that differs.
#[track_caller]
pub fn assert_same(left: &Path, right: &Path) {
    let other = File::open(right).unwrap_or_else(|error| panic!("{}: {error}", right.display()));
    assert_eq!(
        fs::metadata(left).expect("the size").len(),
        other.metadata().expect("the size").len(),
        "sizes of {} and {}",
        left.display(),
        right.display()
    );
    let mut buffer = vec![0; CHUNK_BYTES];
    for_each_chunk(left, |offset, bytes| {
        let buffer = &mut buffer[..bytes.len()];
        other
            .read_exact_at(buffer, offset)
            .expect("the file can be read");
        if buffer != bytes {
            let at = bytes.iter().zip(buffer.iter()).position(|(a, b)| a != b);
            let at = offset + at.unwrap_or(0) as u64;
            panic!(
                "{} and {} differ at byte {at} (block {})",
                left.display(),
                right.display(),
                at / 4096
            );
        }
    });
}

/// `shipper status --json`; `None` while it does not answer.
///
/// # Panics
///
/// What it prints is no JSON.
#[track_caller]
pub fn status(site: &Site) -> Option<Value> {
    let outcome = site.shipper(&["status", "--json"]);
    let success = outcome.status.success();
    success.then(|| serde_json::from_str(&outcome.out).expect("the status is JSON"))
}

/// Asks again and again until the status fits.
///
/// # Panics
///
/// It does not in a minute.
#[track_caller]
pub fn await_status(site: &Site, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = status(site);
        if let Some(found) = found.as_ref().filter(|found| fits(found)) {
            return found.clone();
        }
        assert!(
            Instant::now() < deadline,
            "no status with {what}: {found:#?}"
        );
    }
}

/// The number at a place in a status.
///
/// # Panics
///
/// There is none.
#[track_caller]
pub fn number(status: &Value, pointer: &str) -> u64 {
    status
        .pointer(pointer)
        .and_then(Value::as_u64)
        .unwrap_or_else(|| panic!("no {pointer}: {status:#?}"))
}
