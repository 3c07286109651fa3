//! The operator's end of the admin socket: blocking, one request and one reply at a time.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::failure::Failure;
use super::protocol::{ANSWER_BYTES_MAX, Answer, Request};
use super::runtime_dir::{CONTROL_SUFFIX, trusted_runtime_dir};

/// How long a daemon may take to answer, by command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A stop finishes and flushes what is in flight, which a slow disk may take minutes for.
const STOP_TIMEOUT: Duration = Duration::from_secs(600);

/// A connection to a running volume's daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Client {
    /// Connects to the daemon of the running volume `name`, which [`super::runtime_dir::check_volume_name`] accepts.
    ///
    /// # Errors
    /// No such volume is running in the runtime directory, or we may not connect.
    pub fn connect_to_volume(name: &str) -> Result<Self, Failure> {
        let path = trusted_runtime_dir()?.map(|dir| dir.join(format!("{name}{CONTROL_SUFFIX}")));
        let Some(path) = path.filter(|path| path.exists()) else {
            return Err(Failure::new(format!("no volume named `{name}` is running")).hint(
                "`nbdmirror status` lists the running volumes; --control PATH names a socket elsewhere",
            ));
        };
        Self::connect(&path)
    }

    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or we may not connect.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        match Self::connect_if_alive(path)? {
            Some(client) => Ok(client),
            None => Err(Failure::new(format!("no volume is running at {}", path.display()))
                .hint("`nbdmirror status` lists the running volumes; `nbdmirror serve` starts one")),
        }
    }

    /// Connects to the control socket at `path`; `None` where no daemon is behind it.
    ///
    /// # Errors
    /// There is one and we may not connect, or the path is no socket.
    pub fn connect_if_alive(path: &Path) -> Result<Option<Self>, Failure> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Some(Self { stream: BufReader::new(stream), path: path.to_owned() })),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused if is_socket(path) => Ok(None),
                io::ErrorKind::NotFound => Ok(None),
                io::ErrorKind::PermissionDenied => {
                    Err(Failure::new(format!("may not connect to {}", path.display()))
                        .hint("the control socket is its owner's; use the same user or sudo"))
                }
                _ => Err(Failure::new(format!("cannot connect to {}: {error}", path.display()))
                    .hint("give the control socket that `nbdmirror serve` printed")),
            },
        }
    }

    /// The control socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends `request` and waits for the answer.
    ///
    /// # Errors
    /// The daemon refused it (with its words), does not answer in time, or went away.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, Failure> {
        let answer = self.exchange(request).map_err(|error| self.broken(&error))?;
        if answer.ok {
            return Ok(answer);
        }
        Err(Failure { what: answer.error.unwrap_or_else(|| "refused".to_owned()), hint: answer.hint })
    }

    fn exchange(&mut self, request: &Request) -> io::Result<Answer> {
        let timeout = if matches!(request, Request::Stop) { STOP_TIMEOUT } else { ANSWER_TIMEOUT };
        let stream = self.stream.get_mut();
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        (&mut self.stream).take(ANSWER_BYTES_MAX).read_line(&mut answer)?;
        if !answer.ends_with('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&answer)?)
    }

    fn broken(&self, error: &io::Error) -> Failure {
        let path = self.path.display();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Failure::new(format!("the daemon at {path} does not answer"))
                    .hint("it may be waiting for a disk; look at its log")
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Failure::new(format!("the daemon at {path} went away before it answered"))
                    .hint("look at its log; it may have been stopped")
            }
            _ => Failure::new(format!("cannot talk to the daemon at {path}: {error}"))
                .hint("is it an nbdmirror of another version, or another program's socket?"),
        }
    }
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}
