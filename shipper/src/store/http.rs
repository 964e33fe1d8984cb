//! The line to a service: every request is counted, and of every answer is kept what a person needs to know.
//!
//! The library's errors hide the answer's status and repeat addresses, which may hold a signature. So what
//! was heard is kept here, for each operation by itself: the operation runs as one task, and this is called
//! from within it.

use std::error::Error as StdError;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

use super::counted::{Counters, Kind};

/// Longest text of a service that is repeated, in characters.
const TEXT_CHARACTERS_MAX: usize = 200;

/// What came back last in an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// The service answered.
    Answer {
        /// What was asked.
        kind: Kind,
        /// The status of HTTP.
        status: u16,
        /// The service's name for an error.
        code: Option<String>,
        /// Its words.
        message: Option<String>,
    },
    /// No whole answer came.
    Broken {
        /// What was asked.
        kind: Kind,
        /// Why, without an address.
        why: String,
    },
}

type Ear = Arc<Mutex<Option<Heard>>>;

tokio::task_local! {
    static EAR: Ear;
}

/// Runs an operation; what was heard last comes with its result.
pub(super) async fn listening<T>(operation: impl Future<Output = T>) -> (T, Option<Heard>) {
    let ear = Ear::default();
    let result = EAR.scope(Arc::clone(&ear), operation).await;
    let heard = ear.lock().unwrap_or_else(PoisonError::into_inner).take();
    (result, heard)
}

fn hear(heard: Heard) {
    // Outside of an operation nobody asks.
    let _unheard = EAR.try_with(|ear| {
        *ear.lock().unwrap_or_else(PoisonError::into_inner) = Some(heard);
    });
}

/// Makes the clients that a store and its credentials use.
#[derive(Debug)]
pub(super) struct Connector {
    pub counters: Arc<Counters>,
    /// Name of the bucket, by which requests to the store are told from those for credentials.
    pub bucket: String,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Line {
            inner: ReqwestConnector::default().connect(options)?,
            counters: Arc::clone(&self.counters),
            bucket: self.bucket.clone(),
        }))
    }
}

#[derive(Debug)]
struct Line {
    inner: HttpClient,
    counters: Arc<Counters>,
    bucket: String,
}

#[async_trait]
impl HttpService for Line {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let uri = request.uri();
        let to_store = is_of_bucket(&self.bucket, uri.host().unwrap_or(""), uri.path());
        let kind = match to_store {
            true => kind_of(request.method().as_str(), uri.query().unwrap_or("")),
            false => Kind::Credentials,
        };
        self.counters.request(kind);
        self.counters
            .bytes(kind, request.body().content_length() as u64);
        let broken = |error: HttpError| {
            let why = causes(&error);
            hear(Heard::Broken { kind, why });
            error
        };
        let response = self.inner.execute(request).await.map_err(broken)?;
        let (parts, body) = response.into_parts();
        let status = parts.status.as_u16();
        let header = |name: &str| parts.headers.get(name)?.to_str().ok();
        if parts.status.is_success() {
            if matches!(kind, Kind::Get | Kind::List) {
                let length = header("content-length").and_then(|text| text.parse().ok());
                self.counters.bytes(kind, length.unwrap_or(0));
            }
            hear(Heard::Answer {
                kind,
                status,
                code: None,
                message: None,
            });
            return Ok(HttpResponse::from_parts(parts, body));
        }
        let body = body.bytes().await.map_err(broken)?;
        let text = String::from_utf8_lossy(&body);
        // Where an answer has no body, Azure names the error in a header.
        let code = element(&text, "Code").or_else(|| header("x-ms-error-code").map(printable));
        hear(Heard::Answer {
            kind,
            status,
            code,
            message: element(&text, "Message"),
        });
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

fn is_of_bucket(bucket: &str, host: &str, path: &str) -> bool {
    let in_host = host
        .strip_prefix(bucket)
        .is_some_and(|rest| rest.starts_with('.'));
    in_host || path.split('/').any(|segment| segment == bucket)
}

fn kind_of(method: &str, query: &str) -> Kind {
    let asks = |name: &str| query.split('&').any(|pair| pair == name);
    match method {
        "PUT" => Kind::Put,
        "HEAD" => Kind::Head,
        "DELETE" => Kind::Delete,
        // Azure removes by a batch.
        "POST" => Kind::Delete,
        _ if asks("comp=list") || asks("list-type=2") => Kind::List,
        _ => Kind::Get,
    }
}

/// An error and its causes on one line. The library has taken the address out of them.
fn causes(error: &HttpError) -> String {
    let first = match error.kind() {
        HttpErrorKind::Connect => "no connection",
        HttpErrorKind::Timeout => "no answer in time",
        _ => "the connection broke",
    };
    let mut line = first.to_owned();
    let mut cause = error.source().and_then(StdError::source);
    while let Some(error) = cause {
        let text = error.to_string();
        // Some repeat what they are caused by.
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// The first line of an element of an error's document.
fn element(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (inside, _) = rest.split_once(&format!("</{name}>"))?;
    let found = printable(inside.trim().lines().next()?);
    (!found.is_empty()).then_some(found)
}

/// A service's text as far as it can stand in a line of a log.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(TEXT_CHARACTERS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        for (method, query, expected) in [
            ("PUT", "", Kind::Put),
            ("GET", "", Kind::Get),
            ("GET", "prefix=list-type=2", Kind::Get),
            ("GET", "list-type=2&prefix=a%2F", Kind::List),
            ("GET", "restype=container&comp=list", Kind::List),
            ("HEAD", "", Kind::Head),
            ("DELETE", "", Kind::Delete),
            ("POST", "restype=container&comp=batch", Kind::Delete),
        ] {
            assert_eq!(kind_of(method, query), expected, "{method} {query}");
        }
        assert!(is_of_bucket("b", "127.0.0.1", "/b/machines/m"));
        assert!(is_of_bucket("b", "b.s3.amazonaws.com", "/machines/m"));
        assert!(is_of_bucket("b", "127.0.0.1", "/account/b"));
        assert!(!is_of_bucket("b", "169.254.169.254", "/latest/api/token"));
        assert!(!is_of_bucket("b", "bb.example.com", "/bb/b2"));
    }

    #[test]
    fn errors_of_services_are_read() {
        let s3 = "<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>";
        assert_eq!(element(s3, "Code").unwrap(), "AccessDenied");
        assert_eq!(element(s3, "Message").unwrap(), "Access Denied");
        let azure = "\u{feff}<Error><Code>X</Code><Message>First.\nRequestId:1</Message></Error>";
        assert_eq!(element(azure, "Message").unwrap(), "First.");
        let long = format!("<Message>a\u{7}{}</Message>", "x".repeat(1000));
        let found = element(&long, "Message").unwrap();
        assert_eq!(found.len(), TEXT_CHARACTERS_MAX);
        assert!(found.starts_with("ax"));
        for text in ["", "<Code>", "</Code><Code>", "<Code></Code>", "{}"] {
            assert_eq!(element(text, "Code"), None, "{text}");
        }
    }
}
