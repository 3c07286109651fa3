//! What TLS is spoken with: certificate, key, and the authority that clients' certificates must come from.
//!
//! ```text
//!   files ──load──► ServerConfig ──► each new TLS handshake takes the current one
//!             ▲          │ SIGHUP: load again; a failure keeps the one there is
//!             └──────────┘
//! ```
//!
//! What must hold: TLS 1.2 at least. A reload that began earlier takes nothing back from one that began later, however long
//! its files were in coming. No session is resumed: a client whose certificate has run out or whose
//! authority has been taken away is not let in by a ticket of better days. (A handshake more is nothing to
//! connections that last for days.)

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, ServerConfig, WebPkiClientVerifier};
use rustls::{RootCertStore, version};

use super::failure::Failure;

/// Longest file that is read as PEM, bytes: many times the longest chain.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its authority, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM: PKCS#8, SEC1 or PKCS#1, not encrypted.
    pub key: PathBuf,
    /// The authorities that clients' certificates come from, PEM; with them a client must have one.
    pub client_ca: Option<PathBuf>,
}

/// TLS as new connections speak it.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    current: RwLock<Current>,
    /// Loads begun so far.
    begun: AtomicU64,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    /// Which load it is of.
    load: u64,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(files: TlsFiles) -> Result<Self, Failure> {
        let current = Current { config: Arc::new(server_config(&files)?), load: 0 };
        Ok(Self { files, current: RwLock::new(current), begun: AtomicU64::new(0) })
    }

    /// Reads the files again, for connections from now on. Where a later call was done earlier, that one's files stay.
    ///
    /// # Errors
    /// As with `load`; then nothing has changed.
    pub fn reload(&self) -> Result<(), Failure> {
        let load = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let config = Arc::new(server_config(&self.files)?);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if load > current.load {
            *current = Current { config, load };
        }
        Ok(())
    }

    /// What a new connection is to be served with.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).config)
    }
}

fn server_config(files: &TlsFiles) -> Result<ServerConfig, Failure> {
    let chain = certificates(&files.certificate)?;
    let key = private_key(&files.key)?;
    let provider = Arc::new(default_provider());
    let unusable = |error: rustls::Error| {
        Failure::new(format!("TLS cannot be set up with {}: {error}", files.certificate.display()))
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])
        .map_err(unusable)?;
    let builder = match &files.client_ca {
        Some(path) => builder.with_client_cert_verifier(client_verifier(path, provider)?),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| {
        let (certificate, key) = (files.certificate.display(), files.key.display());
        match error {
            rustls::Error::InconsistentKeys(_) => Failure::new(format!(
                "the key {key} is not the one of the certificate {certificate}"
            ))
            .hint("the server's own certificate comes first in its file; name the key that it was made with"),
            rustls::Error::InvalidCertificate(why) => {
                Failure::new(format!("the certificate {certificate} is not usable: {why}"))
                    .hint("it has to be an X.509 certificate of version 3 (see docs/tls.md)")
            }
            error => Failure::new(format!("the key {key} is not usable: {error}"))
                .hint("RSA of 2048 bits or more, ECDSA on P-256, P-384 or P-521, and Ed25519 are supported"),
        }
    })?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_verifier(
    path: &Path,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, Failure> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| {
            Failure::new(format!("{}: a certificate in it is not usable: {error}", path.display()))
                .hint("each has to be the X.509 certificate of an authority")
        })?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let text = read_pem(path)?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => {
            Err(Failure::new(format!("{} holds no certificate", path.display())).hint(
                "it has to be PEM, with -----BEGIN CERTIFICATE----- (`openssl x509 -inform der` converts)",
            ))
        }
        Ok(found) => Ok(found),
        Err(error) => Err(broken_pem(path, &error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Failure> {
    let text = read_pem(path)?;
    warn_of_open_key(path);
    match PrivateKeyDer::from_pem_slice(&text) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) if text.windows(9).any(|word| word == b"ENCRYPTED") => {
            Err(Failure::new(format!("the key {} is encrypted", path.display()))
                .hint("nobody is there to ask for its passphrase: give one without, readable by nbdmirror alone (`openssl pkey -in KEY -out PLAIN`)"))
        }
        Err(pem::Error::NoItemsFound) => Err(Failure::new(format!("{} holds no private key", path.display()))
            .hint("it has to be PEM, with -----BEGIN PRIVATE KEY-----, or BEGIN EC or RSA PRIVATE KEY")),
        Err(error) => Err(broken_pem(path, &error)),
    }
}

fn broken_pem(path: &Path, error: &pem::Error) -> Failure {
    let what = match error {
        pem::Error::MissingSectionEnd { .. } => "it ends in the middle of a section".to_owned(),
        pem::Error::IllegalSectionStart { .. } => "a line that begins a section is malformed".to_owned(),
        error => error.to_string(),
    };
    Failure::new(format!("{} is not PEM: {what}", path.display())).hint("was it copied whole?")
}

fn read_pem(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(PEM_BYTES_MAX + 1).read_to_end(&mut text));
    match read {
        Err(error) => Err(Failure::new(format!("cannot read {}: {error}", path.display()))
            .hint("check the path, and that the user who runs nbdmirror may read it")),
        Ok(count) if count as u64 > PEM_BYTES_MAX => {
            Err(Failure::new(format!("{} is too long for a certificate or key", path.display()))
                .hint("give a PEM file"))
        }
        Ok(_) => Ok(text),
    }
}

fn warn_of_open_key(path: &Path) {
    let open = std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0);
    if open {
        tracing::warn!("the private key {0} can be read by everybody here: chmod o= {0}", path.display());
    }
}
