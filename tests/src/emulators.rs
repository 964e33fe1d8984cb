//! Servers that speak the protocols of object stores on this machine: moto for S3, Azurite for Azure.
//!
//! `scripts/test` installs them in `target/tools`. Where they are missing, a test says that it is left out, unless
//! `TIDEMARK_EMULATORS=required`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::process::{Daemon, workspace};

/// Time that a server has until it listens; the first start of one reads thousands of files.
const START_TIME: Duration = Duration::from_secs(120);
/// Name of the bucket that is made.
pub const BUCKET: &str = "vaults";
/// Azurite's account; it is in every manual.
const ACCOUNT: &str = "devstoreaccount1";
/// The key of that account, which is in every manual as well.
const ACCOUNT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// A signature with that key for everything, until the year 2099.
pub const SIGNATURE: &str = "sv=2021-12-02&ss=b&srt=sco&sp=rwdlac&st=2020-01-01T00:00:00Z&se=2099-01-01T00:00:00Z\
     &sig=hzIAMpcSpnjrgC7TCPcYESOhlc2PR2ZNgHLAMRvDA1Y%3D";

/// Which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// S3, by moto.
    S3,
    /// Azure, by Azurite.
    Azure,
}

/// A running server with an empty bucket.
pub struct Emulator {
    protocol: Protocol,
    /// `127.0.0.1:PORT`.
    pub address: String,
    _server: Daemon,
}

impl Emulator {
    /// Starts a server; `None` where it is not installed and need not be.
    ///
    /// # Panics
    ///
    /// It does not start, or is missing and required.
    pub fn start(protocol: Protocol) -> Option<Self> {
        let (name, path) = match protocol {
            Protocol::S3 => ("moto", "moto/bin/moto_server"),
            Protocol::Azure => ("azurite", "azurite/node_modules/.bin/azurite-blob"),
        };
        let mut command = Command::new(tool(path)?);
        match protocol {
            Protocol::S3 => command.args(["-H", "127.0.0.1", "-p", "0"]),
            Protocol::Azure => command.args([
                "--blobHost",
                "127.0.0.1",
                "--blobPort",
                "0",
                "--inMemoryPersistence",
                "--skipApiVersionCheck",
                "--disableTelemetry",
            ]),
        };
        let server = Daemon::spawn(name, &mut command);
        let begin = match protocol {
            Protocol::S3 => "Running on http://",
            Protocol::Azure => "successfully listens on http://",
        };
        let line = server.await_line(START_TIME, |line| line.contains(begin));
        let line = line.unwrap_or_else(|| panic!("{name} does not start:\n{}", server.log()));
        let (_, address) = line.split_once("http://").expect("an address");
        let emulator = Self {
            protocol,
            address: address.trim().to_owned(),
            _server: server,
        };
        emulator.make_bucket();
        Some(emulator)
    }

    fn make_bucket(&self) {
        let path = match self.protocol {
            Protocol::S3 => format!("/{BUCKET}"),
            Protocol::Azure => format!("/{ACCOUNT}/{BUCKET}?restype=container&{SIGNATURE}"),
        };
        let mut line = TcpStream::connect(&self.address).expect("the server answers");
        let host = &self.address;
        write!(
            line,
            "PUT {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        .expect("a request");
        let mut answer = String::new();
        line.read_to_string(&mut answer).expect("an answer");
        assert!(
            answer.starts_with("HTTP/1.1 20"),
            "no bucket could be made: {answer}"
        );
    }

    /// Address of a vault below a prefix.
    pub fn url(&self, prefix: &str) -> String {
        let scheme = match self.protocol {
            Protocol::S3 => "s3",
            Protocol::Azure => "az",
        };
        format!("{scheme}://{BUCKET}/{prefix}")
    }

    /// The environment in which the shipper finds the server, by its own address or that of a proxy.
    pub fn environment(&self, address: &str) -> Vec<(String, String)> {
        let pairs = match self.protocol {
            Protocol::S3 => vec![
                ("AWS_ACCESS_KEY_ID", "key".to_owned()),
                ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
                ("AWS_REGION", "us-east-1".to_owned()),
                ("AWS_ENDPOINT_URL", format!("http://{address}")),
            ],
            Protocol::Azure => vec![
                ("AZURE_STORAGE_ACCOUNT", ACCOUNT.to_owned()),
                ("AZURE_STORAGE_KEY", ACCOUNT_KEY.to_owned()),
                (
                    "AZURE_STORAGE_ENDPOINT",
                    format!("http://{address}/{ACCOUNT}"),
                ),
            ],
        };
        pairs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }
}

/// A program among what `scripts/test` installs; `None` where it is not installed and need not be.
///
/// # Panics
///
/// It is missing and required.
pub fn tool(path: &str) -> Option<PathBuf> {
    let path = tools().join(path);
    if path.exists() {
        return Some(path);
    }
    let shown = path.display();
    let required = std::env::var("TIDEMARK_EMULATORS").as_deref() == Ok("required");
    assert!(
        !required,
        "{shown} is missing: scripts/test installs what tests need"
    );
    println!("LEFT OUT: {shown} is missing; scripts/test installs it");
    None
}

/// Where `scripts/test` installs what is not a package of the distribution.
fn tools() -> PathBuf {
    match std::env::var_os("TIDEMARK_TOOLS") {
        Some(folder) => folder.into(),
        None => workspace().join("target/tools"),
    }
}
