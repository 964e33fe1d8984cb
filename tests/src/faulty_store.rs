//! A proxy before an object store that fails as such stores do: it refuses, is slow, breaks off within requests and
//! answers, and carries out what it never answers.
//!
//! Which request fails how follows from a seed and from what the request asks for. No object is failed more
//! than a few times in a row, so that whoever tries again gets there.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::seed::Random;

/// Failures of one object, one after the other, at most. The shipper tries more often than that.
const IN_A_ROW_MAX: u32 = 2;
/// Requests in a hundred that fail.
const SHARE_PERCENT: u64 = 30;

/// A way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// 409 to a create, and nothing is written.
    Conflict,
    /// 429.
    TooMany,
    /// 500.
    Internal,
    /// 503.
    SlowDown,
    /// The answer comes late.
    Slow,
    /// The connection breaks while the request is sent.
    CutRequest,
    /// The connection breaks within the answer.
    CutAnswer,
    /// It is carried out, and the connection breaks before the answer.
    Lost,
    /// A create is carried out, and the answer is 412 as if somebody else had done it.
    CreatedBefore,
}

/// Every way to fail.
pub const FAULTS: [Fault; 9] = [
    Fault::Conflict,
    Fault::TooMany,
    Fault::Internal,
    Fault::SlowDown,
    Fault::Slow,
    Fault::CutRequest,
    Fault::CutAnswer,
    Fault::Lost,
    Fault::CreatedBefore,
];

/// What the proxy has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Requests by their method; listings as LIST.
    pub requests: BTreeMap<String, u64>,
    /// How often it failed in which way.
    pub faults: BTreeMap<Fault, u64>,
}

struct Shared {
    upstream: String,
    is_faulty: AtomicBool,
    ignores_conditions: AtomicBool,
    random: Mutex<Random>,
    in_a_row: Mutex<BTreeMap<String, u32>>,
    seen: Mutex<Seen>,
}

/// A running proxy. Its threads end with the test.
pub struct FaultyStore {
    /// `127.0.0.1:PORT`.
    pub address: String,
    shared: Arc<Shared>,
}

impl FaultyStore {
    /// Starts a proxy before a server; it does not fail until it is told to.
    ///
    /// # Panics
    ///
    /// It cannot listen.
    pub fn start(upstream: &str, random: Random) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            is_faulty: AtomicBool::new(false),
            ignores_conditions: AtomicBool::new(false),
            random: Mutex::new(random),
            in_a_row: Mutex::default(),
            seen: Mutex::default(),
        });
        let to_serve = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = Arc::clone(&to_serve);
                std::thread::spawn(move || {
                    let _gone = serve(&shared, client);
                });
            }
        });
        Self { address, shared }
    }

    /// Fails from now on, or not any more.
    pub fn set_faulty(&self, is_faulty: bool) {
        self.shared.is_faulty.store(is_faulty, Ordering::SeqCst);
    }

    /// Takes the conditions out of requests, as a store does that does not know them.
    pub fn ignore_conditions(&self) {
        self.shared.ignores_conditions.store(true, Ordering::SeqCst);
    }

    /// What it has seen so far.
    pub fn seen(&self) -> Seen {
        lock(&self.shared.seen).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request: its head, line by line, and its body.
struct Request {
    lines: Vec<String>,
    body: Vec<u8>,
}

impl Request {
    fn words(&self) -> (&str, &str) {
        let mut words = self.lines[0].split(' ');
        (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        )
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.lines[1..].iter().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    fn is_create(&self) -> bool {
        self.header("if-none-match").is_some()
    }

    fn method(&self) -> String {
        let (method, path) = self.words();
        let (_, query) = path.split_once('?').unwrap_or_default();
        let lists = |pair: &str| pair == "list-type=2" || pair == "comp=list";
        match method {
            "GET" if query.split('&').any(lists) => "LIST".to_owned(),
            _ => method.to_owned(),
        }
    }

    /// The request as it goes on, by a connection of its own.
    fn bytes(&self, ignores_conditions: bool) -> Vec<u8> {
        let mut head = self.lines[0].clone() + "\r\n";
        for line in &self.lines[1..] {
            let lower = line.to_ascii_lowercase();
            let is_condition = lower.starts_with("if-none-match:");
            if !(lower.starts_with("connection:") || (is_condition && ignores_conditions)) {
                head.push_str(line);
                head.push_str("\r\n");
            }
        }
        head.push_str("connection: close\r\n\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Serves the one request of a connection.
fn serve(shared: &Shared, client: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut request = Request {
        lines,
        body: Vec::new(),
    };
    let length = request
        .header("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let fault = choose(shared, &request);
    if fault == Some(Fault::CutRequest) {
        request.body.resize(length / 2, 0);
        reader.read_exact(&mut request.body)?;
        return client.shutdown(Shutdown::Both);
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body)?;
    answer(shared, &request, fault, client)
}

fn choose(shared: &Shared, request: &Request) -> Option<Fault> {
    let method = request.method();
    let mut seen = lock(&shared.seen);
    *seen.requests.entry(method.clone()).or_default() += 1;
    if !shared.is_faulty.load(Ordering::SeqCst) {
        return None;
    }
    let (_, path) = request.words();
    let mut in_a_row = lock(&shared.in_a_row);
    let failures = in_a_row.entry(format!("{method} {path}")).or_default();
    let mut random = lock(&shared.random);
    if *failures >= IN_A_ROW_MAX || random.below(100) >= SHARE_PERCENT {
        *failures = 0;
        return None;
    }
    let mut fault = FAULTS[random.below(FAULTS.len() as u64) as usize];
    if matches!(fault, Fault::Conflict | Fault::CreatedBefore) && !request.is_create() {
        fault = Fault::Internal;
    }
    *failures += 1;
    *seen.faults.entry(fault).or_default() += 1;
    Some(fault)
}

fn answer(
    shared: &Shared,
    request: &Request,
    fault: Option<Fault>,
    mut client: TcpStream,
) -> io::Result<()> {
    let refuse = |client: &mut TcpStream, status: &str, code: &str| {
        let body = match request.words().0 {
            "HEAD" => String::new(),
            _ => {
                format!("<Error><Code>{code}</Code><Message>A fault on purpose.</Message></Error>")
            }
        };
        write!(
            client,
            "HTTP/1.1 {status}\r\ncontent-type: application/xml\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            body.len()
        )
    };
    match fault {
        Some(Fault::Conflict) => {
            return refuse(&mut client, "409 Conflict", "ConditionalRequestConflict");
        }
        Some(Fault::TooMany) => {
            return refuse(&mut client, "429 Too Many Requests", "TooManyRequests");
        }
        Some(Fault::Internal) => {
            return refuse(&mut client, "500 Internal Server Error", "InternalError");
        }
        Some(Fault::SlowDown) => return refuse(&mut client, "503 Slow Down", "SlowDown"),
        Some(Fault::Slow) => std::thread::sleep(Duration::from_millis(300)),
        _ => {}
    }
    let mut upstream = TcpStream::connect(&shared.upstream)?;
    upstream.write_all(&request.bytes(shared.ignores_conditions.load(Ordering::SeqCst)))?;
    let mut whole = Vec::new();
    upstream.read_to_end(&mut whole)?;
    match fault {
        Some(Fault::Lost) => client.shutdown(Shutdown::Both),
        Some(Fault::CreatedBefore) => {
            refuse(&mut client, "412 Precondition Failed", "PreconditionFailed")
        }
        Some(Fault::CutAnswer) => {
            client.write_all(&whole[..whole.len() / 2])?;
            client.shutdown(Shutdown::Both)
        }
        _ => client.write_all(&whole),
    }
}
