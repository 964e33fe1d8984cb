//! Questions and answers as lines of JSON over a unix socket; what they mean is the callers'.
//!
//! Overview: a peer sends one line, the server answers with one line, an [`Answer`]; then the next.
//! The server gives each peer a thread, because a handler may take minutes; the client waits for
//! its answer under a deadline.
//!
//! Limits: peers at once, bytes of a line, bytes of an answer, time that a peer takes to receive
//! one. Peers are trusted by the mode of the socket, but nothing that they send can do more than
//! give them an error, and a peer that leaves is no event.
//!
//! After an answer that did not come in time, or not whole, nobody could tell which question the
//! next line answers. A client to which that happens takes no more questions.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::protocol::{Answer, LINE_BYTES_MAX, answer_of, error_of};
use crate::error::{Error, ErrorKind, Result};

/// Peers at once.
pub const PEERS_MAX: usize = 32;
/// Longest answer that a client reads.
pub const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Time that a peer has to take an answer, and a server to take a question.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// Time until the next attempt where descriptors or memory have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers one line (without its end). Called from the threads of all peers.
pub type Handler = Arc<dyn Fn(&str) -> Result<Value> + Send + Sync>;

/// Accepts and serves peers until the listener is shut down. A peer that comes while
/// [`PEERS_MAX`] others are there is told so and turned away.
pub fn serve(listener: &UnixListener, handler: Handler) {
    serve_each(&|| Ok(listener.accept()?.0), handler);
}

/// The same with another way to accept, until that fails for good.
pub fn serve_each(accept: &dyn Fn() -> io::Result<UnixStream>, handler: Handler) {
    let peers = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match accept() {
            Ok(stream) => stream,
            Err(error) => match error.raw_os_error() {
                Some(libc::ECONNABORTED | libc::EINTR) => continue,
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    tracing::warn!("Cannot accept a control connection: {error}");
                    std::thread::park_timeout(ACCEPT_PAUSE);
                    continue;
                }
                _ => return,
            },
        };
        let Some(place) = Place::take(&peers) else {
            turn_away(&stream);
            continue;
        };
        let handler = Arc::clone(&handler);
        let spawned = std::thread::Builder::new()
            .name("control-peer".into())
            .spawn(move || {
                let _place = place;
                // A peer that goes away in the middle of a line is no event.
                let _gone = serve_peer(&stream, &*handler);
            });
        if let Err(error) = spawned {
            tracing::warn!("Cannot start a thread for a control connection: {error}");
        }
    }
}

/// One of the places for peers, given back when dropped, also by a handler that panics.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(peers: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(Arc::clone(peers));
        (peers.fetch_add(1, Ordering::AcqRel) < PEERS_MAX).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Says that there is no place, without waiting for the peer.
fn turn_away(stream: &UnixStream) {
    tracing::warn!("More than {PEERS_MAX} control connections: one was turned away");
    let error = Error::new(
        ErrorKind::State,
        format!("More than {PEERS_MAX} control connections: try again later"),
    );
    // The buffer of a new socket takes a line; where it does not, the peer sees the end alone.
    let _full = stream
        .set_nonblocking(true)
        .and_then(|()| send_answer(stream, Err(error)));
}

fn serve_peer(
    stream: &UnixStream,
    handler: &(dyn Fn(&str) -> Result<Value> + Send + Sync),
) -> io::Result<()> {
    stream.set_write_timeout(Some(SEND_DEADLINE))?;
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = LINE_BYTES_MAX as u64 + 1;
        let count = (&mut reader).take(limit).read_until(b'\n', &mut line)?;
        if count == 0 {
            return Ok(());
        }
        if count > LINE_BYTES_MAX {
            // Where the next line begins is not known: the peer is told and let go.
            let what = format!("A request line has more than {LINE_BYTES_MAX} bytes");
            return send_answer(stream, Err(Error::new(ErrorKind::Protocol, what)));
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        let result = std::str::from_utf8(&line)
            .map_err(|_| Error::new(ErrorKind::Protocol, "The request is not UTF-8"))
            .and_then(handler);
        send_answer(stream, result)?;
    }
}

fn send_answer(mut stream: &UnixStream, result: Result<Value>) -> io::Result<()> {
    let mut answer = serde_json::to_vec(&answer_of(result))?;
    answer.push(b'\n');
    stream.write_all(&answer)
}

/// A connection that asks one question at a time.
#[derive(Debug)]
pub struct LineClient {
    stream: BufReader<UnixStream>,
    path: PathBuf,
    who: String,
    deadline: Option<Duration>,
    out_of_step: bool,
}

impl LineClient {
    /// Connects to the program called `who` in errors. `deadline` is the time that each answer
    /// may take; `None` waits for ever.
    ///
    /// # Errors
    ///
    /// Nobody listens there.
    pub fn connect(path: &Path, who: &str, deadline: Option<Duration>) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .and_then(|stream| {
                stream.set_write_timeout(Some(SEND_DEADLINE))?;
                Ok(stream)
            })
            .map_err(|error| {
                let path = path.display();
                Error::io(
                    format!("Cannot reach the {who} at {path}: is it running?"),
                    error,
                )
            })?;
        Ok(Self {
            stream: BufReader::new(stream),
            path: path.to_owned(),
            who: who.to_owned(),
            deadline,
            out_of_step: false,
        })
    }

    /// Sends a line (without its end) and waits for its answer.
    ///
    /// # Errors
    ///
    /// The answer is an error, which is returned as its sender had it. The peer is lost, too slow
    /// or does not speak this protocol; then the connection is of no more use. The line is longer
    /// than a peer takes, or more than one.
    pub fn ask(&mut self, line: &str) -> Result<Value> {
        if line.contains('\n') || line.len() >= LINE_BYTES_MAX {
            let what = format!("A request is one line of less than {LINE_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        if self.out_of_step {
            return Err(self.lost(io::ErrorKind::NotConnected.into()));
        }
        self.out_of_step = true;
        let received = self.exchange(line).map_err(|error| self.lost(error))?;
        let answer: Answer = serde_json::from_slice(&received).map_err(|error| {
            let path = self.path.display();
            let what = format!(
                "The answer from {path} is not one of a {} of this version",
                self.who
            );
            Error::new(ErrorKind::Protocol, what).with_source(error)
        })?;
        self.out_of_step = false;
        match answer {
            Answer::Ok(value) => Ok(value),
            Answer::Error(wire) => Err(error_of(wire)),
        }
    }

    fn lost(&self, error: io::Error) -> Error {
        let path = self.path.display();
        Error::io(format!("Lost the {} at {path}", self.who), error)
    }

    fn exchange(&mut self, line: &str) -> io::Result<Vec<u8>> {
        let end = self.deadline.map(|deadline| Instant::now() + deadline);
        let sent = self
            .stream
            .get_mut()
            .write_all(format!("{line}\n").as_bytes());
        match sent {
            // A server that turns a peer away has closed, but its reason can still be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            result => result?,
        }
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let left = match end.map(|end| end.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                left => left,
            };
            self.stream.get_ref().set_read_timeout(left)?;
            let available = match self.stream.fill_buf() {
                Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            };
            let used = available
                .iter()
                .position(|&byte| byte == b'\n')
                .map_or(available.len(), |end| end + 1);
            answer.extend_from_slice(&available[..used]);
            self.stream.consume(used);
            if answer.len() as u64 > ANSWER_BYTES_MAX {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    struct Served {
        folder: tempfile::TempDir,
        listener: Arc<UnixListener>,
        thread: Option<std::thread::JoinHandle<()>>,
    }

    impl Served {
        fn new(handler: impl Fn(&str) -> Result<Value> + Send + Sync + 'static) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = Arc::new(UnixListener::bind(folder.path().join("s")).unwrap());
            let thread_listener = Arc::clone(&listener);
            let thread = std::thread::spawn(move || serve(&thread_listener, Arc::new(handler)));
            Self {
                folder,
                listener,
                thread: Some(thread),
            }
        }

        fn client(&self, deadline: Option<Duration>) -> LineClient {
            LineClient::connect(&self.folder.path().join("s"), "test server", deadline).unwrap()
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            use std::os::fd::AsRawFd;
            let how = nix::sys::socket::Shutdown::Both;
            nix::sys::socket::shutdown(self.listener.as_raw_fd(), how).unwrap();
            self.thread.take().unwrap().join().unwrap();
        }
    }

    fn echo(line: &str) -> Result<Value> {
        match line {
            "fail" => Err(Error::io("Cannot do it", io::Error::other("the reason"))),
            "panic" => panic!("on request"),
            line => Ok(json!({ "echo": line })),
        }
    }

    #[test]
    fn questions_are_answered_in_order_and_errors_keep_their_kind() {
        let served = Served::new(echo);
        let mut client = served.client(None);
        assert_eq!(client.ask("one").unwrap(), json!({ "echo": "one" }));
        let error = client.ask("fail").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.to_string(), "Cannot do it: the reason");
        let long = "x".repeat(LINE_BYTES_MAX - 1);
        assert_eq!(client.ask(&long).unwrap()["echo"], long);
        for line in ["two\nthree".to_owned(), "x".repeat(LINE_BYTES_MAX)] {
            assert_eq!(client.ask(&line).unwrap_err().kind(), ErrorKind::Invalid);
        }
        assert_eq!(client.ask("four").unwrap(), json!({ "echo": "four" }));
    }

    #[test]
    fn bytes_that_are_no_question_are_answered_with_an_error() {
        let served = Served::new(echo);
        let table: [(Vec<u8>, &str); 2] = [
            (b"\xff\xfe\n".to_vec(), "not UTF-8"),
            (vec![b'x'; 2 * LINE_BYTES_MAX], "more than 65536 bytes"),
        ];
        for (bytes, expected) in table {
            let mut stream = UnixStream::connect(served.folder.path().join("s")).unwrap();
            // The rest of a line that is too long may meet a closed socket.
            let _closed = stream.write_all(&bytes);
            let mut answer = String::new();
            BufReader::new(&stream).read_line(&mut answer).unwrap();
            assert!(answer.contains(expected), "{answer}");
        }
    }

    #[test]
    fn peers_are_capped_and_a_panic_gives_its_place_back() {
        let served = Served::new(echo);
        for _ in 0..2 * PEERS_MAX {
            // The place is given back a moment after the connection ended.
            let mut error = served.client(None).ask("panic").unwrap_err();
            while error.kind() == ErrorKind::State {
                error = served.client(None).ask("panic").unwrap_err();
            }
            assert!(error.to_string().starts_with("Lost the test server"));
        }
        let mut clients = Vec::new();
        while clients.len() < PEERS_MAX {
            let mut client = served.client(None);
            if client.ask("here").is_ok() {
                clients.push(client);
            }
        }
        let error = served.client(None).ask("one more").unwrap_err();
        assert!(
            error.to_string().contains("control connections"),
            "{}",
            error.chain()
        );
        assert!(clients[0].ask("still").is_ok());
    }

    #[test]
    fn an_answer_that_is_late_or_cut_short_ends_the_conversation() {
        let (release, released) = crossbeam_channel::bounded::<()>(0);
        let served = Served::new(move |line| {
            let _dropped = released.recv();
            Ok(line.into())
        });
        let mut client = served.client(Some(Duration::from_millis(20)));
        let error = client.ask("slow").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        drop(release);
        // The late answer must not be taken for that of the next question.
        assert_eq!(client.ask("next").unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(served.client(None).ask("other").unwrap(), json!("other"));

        let path = served.folder.path().join("short");
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = LineClient::connect(&path, "stub", None).unwrap();
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(b"{\"ok\":1}").unwrap();
        drop(stream);
        assert_eq!(client.ask("x").unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn nobody_there_is_said_with_the_name_and_place() {
        let error = LineClient::connect(Path::new("/nowhere"), "tracker", None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Cannot reach the tracker at /nowhere: is it running?"
        );
    }
}
