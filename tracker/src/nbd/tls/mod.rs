//! TLS for NBD over TCP: the certificates, and the upgrade of a connection.
//!
//! Overview: [`Tls::load`] reads the files once, when the tracker starts. A client that sends
//! STARTTLS is given to [`Tls::accept`] while it still negotiates, under the deadline of its
//! negotiation; where client certificates are asked for, one that has none gets no further. The
//! rest of the negotiation goes through [`Secured`]. The workers know nothing of TLS: afterwards a
//! [`relay::Relay`] stands between the client and its worker.
//!
//! TLS 1.2 and 1.3 alone are spoken. No session is kept or resumed, so that every connection
//! shows its certificate, and shows it while it is valid.
//!
//! What it does not handle: keys that are shared beforehand (PSK), which the library lacks; lists
//! of revoked certificates; new files while the tracker runs.

pub mod relay;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ServerConnection, WebPkiClientVerifier};
use rustls::{
    CipherSuite, InconsistentKeys, RootCertStore, ServerConfig, SupportedCipherSuite, version,
};

use crate::error::{Error, ErrorKind, Result};

/// Largest file of certificates or of a key that is read into memory.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Bits of a file's mode that let everybody read or change it, or its group change it.
const MODE_OF_NO_SECRET: u32 = 0o027;

/// The files that TLS needs, all in PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate, followed by those between it and its authority.
    pub certificate: PathBuf,
    /// The key of that certificate.
    pub key: PathBuf,
    /// Authorities of client certificates; with them a client must have one.
    pub client_authorities: Option<PathBuf>,
}

/// Whether clients on a socket may or must use TLS.
#[derive(Clone, Debug, Default)]
pub enum Encryption {
    /// It is not offered.
    #[default]
    Off,
    /// The client chooses.
    Allowed(Tls),
    /// Nothing is told or served without it.
    Required(Tls),
}

/// What a server needs for TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files and checks that they fit each other.
    ///
    /// # Errors
    ///
    /// A file cannot be read, holds nothing of use, or holds a key that is no secret; or
    /// certificate and key do not belong together.
    pub fn load(files: &TlsFiles) -> Result<Self> {
        let provider = Arc::new(provider());
        let chain = read_certificates(&files.certificate)?;
        let key = read_key(&files.key)?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])
            .map_err(|error| {
                Error::new(ErrorKind::Unsupported, "Cannot set up TLS 1.2 and 1.3")
                    .with_source(error)
            })?;
        let builder = match &files.client_authorities {
            Some(path) => builder.with_client_cert_verifier(verifier(path, provider)?),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|error| unusable(files, error))?;
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self {
            config: Arc::new(config),
        })
    }

    /// The server's side of the TLS handshake over `channel`, which has the deadline.
    ///
    /// # Errors
    ///
    /// What the client sends is no TLS that is acceptable, its certificate is not, or the channel
    /// fails.
    pub fn accept(&self, channel: &mut (impl Read + Write)) -> io::Result<Secured> {
        let connection = ServerConnection::new(Arc::clone(&self.config));
        let mut connection = connection.map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(channel)?;
        }
        Ok(Secured {
            connection: Box::new(connection),
        })
    }
}

/// A connection over which TLS is spoken.
#[derive(Debug)]
pub struct Secured {
    connection: Box<ServerConnection>,
}

impl Secured {
    /// Reads and writes over the socket that the connection was made on.
    pub fn over<'a, C: Read + Write>(
        &'a mut self,
        channel: &'a mut C,
    ) -> rustls::Stream<'a, ServerConnection, C> {
        rustls::Stream::new(&mut self.connection, channel)
    }

    /// Says that nothing more comes. The client may have gone, which is as good.
    pub fn say_goodbye(&mut self, channel: &mut impl Write) {
        self.connection.send_close_notify();
        while self.connection.wants_write() {
            if !matches!(self.connection.write_tls(channel), Ok(count) if count > 0) {
                return;
            }
        }
    }
}

/// The library's algorithms, in our order: TLS 1.2 counts how many records a key of AES-GCM has
/// protected and ends the connection after 2^24 of them, because it cannot change keys as TLS 1.3
/// does. A disk outlives that; ChaCha20 has no such end, and comes first there.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| matches!(suite, SupportedCipherSuite::Tls12(_)) && is_bounded(suite));
    provider
}

fn is_bounded(suite: &SupportedCipherSuite) -> bool {
    !matches!(
        suite.suite(),
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
    )
}

fn verifier(path: &Path, provider: Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut authorities = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        authorities
            .add(certificate)
            .map_err(|error| invalid(path, "holds a certificate that is malformed", error))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider)
        .build()
        .map_err(|error| invalid(path, "holds no authority for client certificates", error))
}

/// Why certificate and key were refused, and which of the two.
fn unusable(files: &TlsFiles, error: rustls::Error) -> Error {
    match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => Error::new(
            ErrorKind::Mismatch,
            format!(
                "The key {} is not the key of the first certificate in {}: give the two that \
                 were made together, the server's own certificate first",
                files.key.display(),
                files.certificate.display()
            ),
        ),
        rustls::Error::InvalidCertificate(_) => {
            let what = "begins with a certificate that is malformed";
            invalid(&files.certificate, what, error)
        }
        error => {
            let what = "holds a key that cannot be used: make one with ECDSA P-256 or RSA 2048 \
                        or more";
            invalid(&files.key, what, error)
        }
    }
}

fn invalid(
    path: &Path,
    what: &str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    let text = format!("{} {what}", path.display());
    Error::new(ErrorKind::Invalid, text).with_source(source)
}

/// The contents of a file and its permission bits.
fn read_file(path: &Path) -> Result<(Vec<u8>, u32)> {
    let read = || -> io::Result<(Vec<u8>, u32)> {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        Ok((bytes, mode))
    };
    let (bytes, mode) = read()
        .map_err(|error| Error::io(format!("Cannot read {} for TLS", path.display()), error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let text = format!(
            "{} has more than {} MiB: give a PEM file",
            path.display(),
            FILE_BYTES_MAX >> 20
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok((bytes, mode))
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let (bytes, _) = read_file(path)?;
    let certificates = CertificateDer::pem_slice_iter(&bytes)
        .collect::<std::result::Result<Vec<_>, pem::Error>>()
        .map_err(|error| invalid(path, "is no PEM file that can be read", error))?;
    if certificates.is_empty() {
        let text = format!(
            "{} holds no certificate: give a PEM file with BEGIN CERTIFICATE",
            path.display()
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(certificates)
}

/// A key that every account can read is no secret: it is refused rather than used, because a
/// warning is not read and the remedy is one command. Groups may read it, as services have it.
fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let (bytes, mode) = read_file(path)?;
    if mode & MODE_OF_NO_SECRET != 0 {
        let text = format!(
            "The key {} has mode {:04o}, so that others can read or change it: chmod 0600 it, or \
             0640 with a group of its own, and make a new one if it was ever used so",
            path.display(),
            mode & 0o7777
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    match PrivateKeyDer::from_pem_slice(&bytes) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) => {
            let encrypted = bytes.windows(9).any(|word| word == b"ENCRYPTED");
            let why = if encrypted {
                "only one that is encrypted: write it without password by openssl pkey -in KEY -out NEW"
            } else {
                "no private key: give a PEM file with BEGIN PRIVATE KEY"
            };
            let text = format!("{} holds {why}", path.display());
            Err(Error::new(ErrorKind::Invalid, text))
        }
        Err(error) => Err(invalid(path, "is no PEM file that can be read", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_1_2_prefers_what_has_no_end() {
        let suites = provider().cipher_suites;
        let old: Vec<bool> = suites
            .iter()
            .filter(|suite| matches!(suite, SupportedCipherSuite::Tls12(_)))
            .map(is_bounded)
            .collect();
        assert!(old.contains(&true) && old.contains(&false));
        assert!(old.is_sorted(), "{suites:?}");
        assert!(suites.first().is_some_and(|suite| suite.tls13().is_some()));
    }
}
