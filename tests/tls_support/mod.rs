//! Certificates made for a test, and a small NBD client that speaks TLS.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const GO: u32 = 7;
pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const ACK: u32 = 1;
pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
pub(crate) const ERR_TLS_REQD: u32 = 0x8000_0005;
/// A peer silent for this long has hung, and the test fails.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Makes an authority `NAME-ca.pem` in `dir`.
pub(crate) fn authority(dir: &Path, name: &str) {
    let (key, certificate) = (format!("{name}-ca-key.pem"), format!("{name}-ca.pem"));
    let subject = format!("/CN={name} authority");
    let mut args = vec!["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    args.extend(["-days", "30", "-subj", &subject, "-keyout", &key, "-out", &certificate]);
    openssl(dir, &args);
}

/// Makes `NAME.pem` and `NAME-key.pem`, issued by `ca`, good for `days`.
pub(crate) fn certificate(dir: &Path, ca: &str, name: &str, days: i32) {
    let (key, request, out) = (format!("{name}-key.pem"), format!("{name}.csr"), format!("{name}.pem"));
    let (ca, ca_key) = (format!("{ca}-ca.pem"), format!("{ca}-ca-key.pem"));
    let (days, subject) = (days.to_string(), format!("/CN={name}"));
    let mut args = vec!["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    args.extend(["-subj", &subject, "-keyout", &key, "-out", &request]);
    openssl(dir, &args);
    std::fs::write(dir.join("ext"), "subjectAltName=DNS:localhost\n").unwrap();
    let mut args = vec!["x509", "-req", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-set_serial", "7"];
    args.extend(["-days", &days, "-extfile", "ext", "-out", &out]);
    openssl(dir, &args);
}

pub(crate) fn openssl(dir: &Path, args: &[&str]) {
    let output = Command::new("openssl").args(args).current_dir(dir).stdin(Stdio::null()).output();
    let output = output.expect("openssl is installed (scripts/lib/packages)");
    assert!(output.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What a client trusts, and what it shows.
pub(crate) struct Trust {
    config: Arc<ClientConfig>,
}

impl Trust {
    /// Trusts the authority `ca`; shows the certificate `identity`, if any.
    pub(crate) fn new(
        dir: &Path,
        ca: &str,
        identity: Option<&str>,
        version: &'static SupportedProtocolVersion,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(dir.join(format!("{ca}-ca.pem"))).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let chain = vec![CertificateDer::from_pem_file(dir.join(format!("{name}.pem"))).unwrap()];
                let key = PrivateKeyDer::from_pem_file(dir.join(format!("{name}-key.pem"))).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        Self { config: Arc::new(config) }
    }
}

/// The address that a daemon says it serves at.
pub(crate) fn address(banner: &str) -> SocketAddr {
    let line =
        banner.lines().find(|line| line.contains("://127.0.0.1")).unwrap_or_else(|| panic!("{banner}"));
    line.split("://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap()
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
    stream.set_write_timeout(Some(SILENCE_MAX)).unwrap();
    stream
}

/// Reads the greeting and sends the client's flags.
pub(crate) fn greet(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    stream.write_all(&3_u32.to_be_bytes())
}

pub(crate) fn option_bytes(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Sends an option and gives the kind of the last reply to it.
pub(crate) fn option(stream: &mut (impl Read + Write), code: u32, data: &[u8]) -> io::Result<u32> {
    stream.write_all(&option_bytes(code, data))?;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        assert_eq!(header[8..12], code.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut text = vec![0; number(16) as usize];
        stream.read_exact(&mut text)?;
        // A server's name, information, and a metadata context are followed by more.
        if !matches!(number(12), 2..=4) {
            return Ok(number(12));
        }
    }
}

pub(crate) type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// The TLS handshake, as far as the client's part goes.
pub(crate) fn begin_tls(mut stream: TcpStream, trust: &Trust) -> io::Result<TlsStream> {
    assert_eq!(option(&mut stream, STARTTLS, &[])?, ACK);
    inside_tls(stream, trust)
}

pub(crate) fn inside_tls(mut stream: TcpStream, trust: &Trust) -> io::Result<TlsStream> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::clone(&trust.config), name).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(connection, stream))
}

/// A client in the transmission phase.
pub(crate) struct TlsClient {
    pub(crate) stream: TlsStream,
}

impl TlsClient {
    pub(crate) fn try_new(address: SocketAddr, trust: &Trust) -> io::Result<Self> {
        let mut stream = connect(address);
        greet(&mut stream)?;
        let mut stream = begin_tls(stream, trust)?;
        match option(&mut stream, GO, &[0; 6])? {
            ACK => Ok(Self { stream }),
            kind => Err(io::Error::other(format!("GO: {kind:#x}"))),
        }
    }

    pub(crate) fn new(address: SocketAddr, trust: &Trust) -> Self {
        Self::try_new(address, trust).unwrap()
    }

    /// Sends a request without waiting.
    pub(crate) fn send(&mut self, kind: u16, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The cookie of the next reply, which must be a success.
    pub(crate) fn reply(&mut self) -> u64 {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        u64::from_be_bytes(header[8..].try_into().unwrap())
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.send(1, offset, offset, data.len() as u32, data);
        assert_eq!(self.reply(), offset);
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.send(0, !offset, offset, len as u32, &[]);
        assert_eq!(self.reply(), !offset);
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// Waits for the end, which must be close_notify and not a cut.
    pub(crate) fn expect_close_notify(&mut self) {
        assert_eq!(self.stream.read(&mut [0]).unwrap(), 0);
    }
}

/// Waits until the peer closes, with whatever it says before.
pub(crate) fn expect_end(stream: &mut impl Read) {
    match io::copy(stream, &mut io::sink()) {
        Ok(_) => {}
        Err(error) => assert!(
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof),
            "not closed: {error}"
        ),
    }
}
