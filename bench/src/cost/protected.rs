//! A machine that is protected: a tracker, a shipper beside it, and a vault in a folder.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::counters;
use crate::Result;
use crate::servers::Running;
use crate::settings::Settings;

/// Time that the shipper has to find its tracker and to become idle.
const PATIENCE: Duration = Duration::from_secs(120);
/// Name of the vault's key file.
const KEY_FILE: &str = "vault.key";
/// Time between two looks at it.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What the shipper counts.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Bytes read from the disk.
    pub read_bytes: u64,
    /// Bytes put into the vault.
    pub uploaded_bytes: u64,
}

/// The shipper of a tracker. Dropping it kills it.
pub struct Shipper {
    program: PathBuf,
    folder: PathBuf,
    child: Child,
}

impl Shipper {
    /// Makes a vault beside the image of a tracker, and starts the shipper.
    ///
    /// # Errors
    ///
    /// A command fails.
    pub fn start(program: &Path, server: &Running) -> Result<Self> {
        Self::start_with(program, server, "interval = \"24h\"\n")
    }

    /// The same with an interval, and other lines of the configuration.
    ///
    /// # Errors
    ///
    /// A command fails.
    pub fn start_with(program: &Path, server: &Running, lines: &str) -> Result<Self> {
        let vault = configure(server, lines)?;
        let key_file = server.folder().join(KEY_FILE);
        let mut init = Command::new(program);
        init.arg("init").arg(&vault).arg("--key-file");
        success(init.arg(key_file).arg("--generate-key-file"))?;
        success(&mut command(program, server.folder(), "protect"))?;
        Self::launch(program, server)
    }

    /// Starts it again on the vault and state that an earlier one has left, with these lines.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start_again(program: &Path, server: &Running, lines: &str) -> Result<Self> {
        configure(server, lines)?;
        Self::launch(program, server)
    }

    fn launch(program: &Path, server: &Running) -> Result<Self> {
        let folder = server.folder().to_owned();
        let log = File::create(folder.join("shipper.log"))?;
        let child = command(program, &folder, "run")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let program = program.to_owned();
        Ok(Self {
            program,
            folder,
            child,
        })
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.folder.join("state").join("shipper.sock")
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has nothing to do, with the tracker beside it.
    ///
    /// # Errors
    ///
    /// It does not come to that in time.
    pub fn await_idle(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let last = match self.status() {
                Ok(status) if is_idle(&status) => return Ok(()),
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(self.folder.join("shipper.log"));
                let log = log.unwrap_or_default();
                return Err(format!("the shipper is not ready: {last}\n{log}").into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn status(&self) -> Result<Value> {
        let mut command = command(&self.program, &self.folder, "status");
        Ok(serde_json::from_str(&success(command.arg("--json"))?)?)
    }

    /// What it has read and uploaded since it was started.
    ///
    /// # Errors
    ///
    /// It does not tell.
    pub fn shipped(&self) -> Result<Shipped> {
        let status = self.status()?;
        let number = |path: &str| {
            let value = status.pointer(path).and_then(Value::as_u64);
            value.ok_or_else(|| format!("the shipper's status lacks {path}"))
        };
        Ok(Shipped {
            read_bytes: number("/disks/0/bytes_read")?,
            uploaded_bytes: number("/uploaded_bytes")?,
        })
    }

    /// Makes a recovery point, and waits until the tracker knows that it is in the vault.
    ///
    /// # Errors
    ///
    /// There is none, or the tracker does not hear of it.
    pub fn cut(&self, settings: &Settings, server: &Running) -> Result<()> {
        let point = self.cut_alone()?;
        self.await_committed(settings, server, point)
    }

    /// Waits until the tracker knows that a recovery point is in the vault.
    ///
    /// # Errors
    ///
    /// It does not hear of it in time.
    pub fn await_committed(&self, settings: &Settings, server: &Running, point: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = counters::status(settings, server)?;
            let committed = status.pointer("/machine/committed").and_then(Value::as_u64);
            if committed >= Some(point) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("the tracker does not hear of the recovery point".into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Makes a recovery point: its number when it is in the vault.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn cut_alone(&self) -> Result<u64> {
        let text = success(&mut command(&self.program, &self.folder, "cut"))?;
        text.split(|c: char| !c.is_ascii_hexdigit())
            .filter(|word| word.len() == POINT_DIGITS)
            .find_map(|word| u64::from_str_radix(word, 16).ok())
            .ok_or_else(|| format!("shipper cut says: {text}").into())
    }

    /// Ends it in good order.
    ///
    /// # Errors
    ///
    /// It cannot be told.
    pub fn stop(mut self) -> Result<()> {
        kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            Signal::SIGTERM,
        )?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() && Instant::now() < deadline {
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

const CONFIGURATION: &str = "shipper.toml";
/// Digits of the number of a recovery point.
const POINT_DIGITS: usize = 16;

/// Writes the configuration file; the address of the vault.
fn configure(server: &Running, lines: &str) -> Result<String> {
    let folder = server.folder();
    let vault = format!("file://{}", folder.join("vault").display());
    let disk = server.image();
    let name = disk.file_name().unwrap_or_default();
    let text = format!(
        "machine = \"bench\"\ntracker = {:?}\nvault = {vault:?}\nkey_file = {:?}\nstate = {:?}\n{lines}\
         [[disk]]\nname = {name:?}\npath = {disk:?}\n",
        server.control(),
        folder.join(KEY_FILE),
        folder.join("state"),
    );
    std::fs::write(folder.join(CONFIGURATION), text)?;
    Ok(vault)
}

fn is_idle(status: &Value) -> bool {
    let problems = status.get("problems").and_then(Value::as_object);
    status.get("phase").and_then(Value::as_str) == Some("waiting")
        && status.get("spool_epochs").and_then(Value::as_u64) == Some(0)
        && problems.is_some_and(serde_json::Map::is_empty)
}

fn command(program: &Path, folder: &Path, what: &str) -> Command {
    let mut command = Command::new(program);
    command
        .arg(what)
        .arg("--config")
        .arg(folder.join(CONFIGURATION));
    command
}

fn success(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?} failed: {errors}").into())
}
