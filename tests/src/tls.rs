//! Certificates for tests of TLS, made anew each time, and the client's side of TLS for [`crate::nbd`].

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};

/// Who signs certificates.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key, both in PEM.
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// What a certificate is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// Now.
    Good,
    /// It has ended.
    Expired,
}

impl Authority {
    /// An authority that signs itself.
    ///
    /// # Panics
    ///
    /// No key can be made.
    pub fn new(name: &str) -> Self {
        let mut parameters = parameters(name, Validity::Good);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(parameters, key).expect("an authority");
        Self { issuer }
    }

    /// Its certificate in PEM.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for a server on this machine.
    ///
    /// # Panics
    ///
    /// No key can be made.
    pub fn server(&self) -> Identity {
        self.issue(
            "server",
            ExtendedKeyUsagePurpose::ServerAuth,
            Validity::Good,
        )
    }

    /// A certificate for a client.
    ///
    /// # Panics
    ///
    /// No key can be made.
    pub fn client(&self, validity: Validity) -> Identity {
        self.issue("client", ExtendedKeyUsagePurpose::ClientAuth, validity)
    }

    fn issue(&self, name: &str, purpose: ExtendedKeyUsagePurpose, validity: Validity) -> Identity {
        let mut parameters = parameters(name, validity);
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .expect("a certificate");
        Identity {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }

    /// A folder as GnuTLS's clients want it: the authority, and a client's certificate if there is.
    ///
    /// # Panics
    ///
    /// The files cannot be written.
    pub fn write_folder(&self, folder: &Path, client: Option<&Identity>) {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("ca-cert.pem"), self.pem()).expect("a file");
        if let Some(client) = client {
            client.write(folder, "client");
        }
    }

    /// A client that trusts this authority and may show a certificate.
    ///
    /// # Panics
    ///
    /// The certificates cannot be used.
    pub fn client_config(&self, client: Option<&Identity>) -> Arc<ClientConfig> {
        self.client_config_of(client, &[&version::TLS13, &version::TLS12])
    }

    /// The same with some versions of TLS alone.
    ///
    /// # Panics
    ///
    /// The certificates cannot be used.
    pub fn client_config_of(
        &self,
        client: Option<&Identity>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        let mut authorities = RootCertStore::empty();
        authorities
            .add(self.issuer.der().clone())
            .expect("an authority");
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions of TLS")
            .with_root_certificates(authorities);
        Arc::new(match client {
            Some(client) => builder
                .with_client_auth_cert(client.chain(), client.private_key())
                .expect("a client's certificate"),
            None => builder.with_no_client_auth(),
        })
    }
}

impl Identity {
    /// Writes NAME-cert.pem and NAME-key.pem, and returns both paths.
    ///
    /// # Panics
    ///
    /// They cannot be written.
    pub fn write(&self, folder: &Path, name: &str) -> (PathBuf, PathBuf) {
        let certificate = folder.join(format!("{name}-cert.pem"));
        let key = folder.join(format!("{name}-key.pem"));
        fs::write(&certificate, &self.certificate).expect("a file");
        fs::write(&key, &self.key).expect("a file");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("permissions");
        (certificate, key)
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        let der = CertificateDer::from_pem_slice(self.certificate.as_bytes());
        vec![der.expect("a certificate")]
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).expect("a key")
    }
}

fn parameters(name: &str, validity: Validity) -> CertificateParams {
    let names = ["localhost", "127.0.0.1"].map(str::to_owned);
    let mut parameters = CertificateParams::new(names).expect("names");
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.not_before = date_time_ymd(2020, 1, 1);
    parameters.not_after = match validity {
        Validity::Good => date_time_ymd(2120, 1, 1),
        Validity::Expired => date_time_ymd(2021, 1, 1),
    };
    parameters
}
