//! What a failed operation on a store means: whether it may pass, and what a person can do.
//!
//! No word of a secret: neither the library's texts nor addresses of requests are repeated, but the
//! service's own name for the error and its words.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::time::Duration;

use object_store::client::HttpError;

use super::counted::Kind;
use super::http::Heard;
use super::url::{Bucket, Service};
use crate::error::{Error, ErrorKind};

/// Why an operation ended without success.
#[derive(Debug)]
pub(super) enum Cause {
    /// The library's error.
    Store(object_store::Error),
    /// It took longer than it may.
    Late(Duration),
}

/// An operation without success.
#[derive(Debug)]
pub(super) struct Failure {
    pub cause: Cause,
    /// The last thing that was heard of the service; nothing where the store is a folder.
    pub heard: Option<Heard>,
}

/// The service's words, or those about the line to it.
#[derive(Debug)]
struct Said(String);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Said {}

impl Failure {
    /// Status and code of an answer that is an error.
    fn refusal(&self) -> Option<(u16, &str)> {
        match &self.heard {
            Some(Heard::Answer { status, code, .. }) if *status >= 300 => {
                Some((*status, code.as_deref().unwrap_or("")))
            }
            _ => None,
        }
    }

    /// There is no such object, or no such bucket.
    pub fn is_missing(&self) -> bool {
        matches!(
            self.cause,
            Cause::Store(object_store::Error::NotFound { .. })
        )
    }

    /// The service refuses to create an object, as it does where there is one.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self.cause,
            Cause::Store(object_store::Error::AlreadyExists { .. })
        )
    }

    /// Whether a conflict says that there is an object. S3 answers 409 to two creates at one time, and then
    /// neither need have been carried out.
    pub fn is_sure_conflict(&self) -> bool {
        match self.refusal() {
            Some((status, code)) => status != 409 || code == "BlobAlreadyExists",
            None => true,
        }
    }

    /// Whether the same operation may succeed in a moment. Not where it took long: whoever asks shall know.
    pub fn may_pass(&self) -> bool {
        if let Cause::Late(_) = self.cause {
            return false;
        }
        match (&self.heard, self.refusal()) {
            (_, Some((status, code))) => {
                matches!(status, 408 | 429 | 500..=506 | 508..=599) || code == "RequestTimeout"
            }
            (Some(Heard::Broken { .. }), None) => true,
            (Some(Heard::Answer { .. }), None) => self.is_cut(),
            (None, None) => false,
        }
    }

    /// The line broke within an answer.
    fn is_cut(&self) -> bool {
        let Cause::Store(error) = &self.cause else {
            return false;
        };
        chain(error).any(|cause| cause.is::<HttpError>())
    }

    /// The error of a service. `what` was being done, as in "write object a/b".
    pub fn in_bucket(self, what: &str, bucket: &Bucket) -> Error {
        if let Cause::Store(error) = &self.cause
            && let Some(own) = chain(error).find_map(|cause| cause.downcast_ref::<Error>())
        {
            // Ours from within, about the files of credentials.
            return Error::new(
                own.kind(),
                format!("Cannot {what} in {bucket}: {}", own.chain()),
            );
        }
        let kind = self.kind();
        let mut context = format!("Cannot {what} in {bucket}");
        if let Some(advice) = self.advice(kind, bucket) {
            context.push_str("; ");
            context.push_str(&advice);
        }
        Error::new(kind, context).with_source(Said(self.said()))
    }

    fn kind(&self) -> ErrorKind {
        if let (Some(Heard::Answer { kind, .. } | Heard::Broken { kind, .. }), true) =
            (&self.heard, self.is_error_heard())
            && *kind == Kind::Credentials
        {
            return ErrorKind::Denied;
        }
        match self.refusal() {
            Some((507, _)) => ErrorKind::Full,
            Some((_, code)) if code.contains("StorageFull") || code.contains("QuotaExceeded") => {
                ErrorKind::Full
            }
            Some((401 | 403, _)) => ErrorKind::Denied,
            Some((400, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired")) => {
                ErrorKind::Denied
            }
            Some((404, "NoSuchBucket" | "ContainerNotFound")) => ErrorKind::Unavailable,
            Some((404, _)) => ErrorKind::Missing,
            _ => match &self.cause {
                Cause::Store(object_store::Error::NotFound { .. }) => ErrorKind::Missing,
                Cause::Store(object_store::Error::InvalidPath { .. }) => ErrorKind::Invalid,
                _ => ErrorKind::Unavailable,
            },
        }
    }

    fn is_error_heard(&self) -> bool {
        self.refusal().is_some() || matches!(self.heard, Some(Heard::Broken { .. }))
    }

    /// What a person can do.
    fn advice(&self, kind: ErrorKind, bucket: &Bucket) -> Option<String> {
        let name = &bucket.name;
        match (kind, self.refusal()) {
            (ErrorKind::Denied, _) => Some(format!(
                "check the credentials ({}) and that they may list bucket {name} and read, write and remove \
                 its objects",
                sources(bucket.service)
            )),
            (ErrorKind::Unavailable, Some((404, _))) => {
                Some(format!("there is no bucket {name}: make it first"))
            }
            (ErrorKind::Unavailable, Some((300..=399, _))) => Some(format!(
                "bucket {name} is elsewhere: check region and endpoint"
            )),
            _ => None,
        }
    }

    fn said(&self) -> String {
        match (&self.cause, &self.heard) {
            (Cause::Late(limit), _) => {
                format!("It was not done after {} seconds", limit.as_secs())
            }
            (
                _,
                Some(Heard::Answer {
                    status,
                    code,
                    message,
                    ..
                }),
            ) if *status >= 300 => {
                let mut said = format!("The answer is {status}");
                for (before, text) in [(" ", code), (": ", message)] {
                    if let Some(text) = text {
                        said.push_str(before);
                        said.push_str(text);
                    }
                }
                said
            }
            (_, Some(Heard::Broken { why, .. })) => capitalized(why),
            _ if self.is_cut() => "The answer ended before its end".to_owned(),
            (Cause::Store(error), _) => format!(
                "The answer is not understood ({})",
                without_queries(&error.to_string())
            ),
        }
    }
}

/// Where the credentials of a service come from.
fn sources(service: Service) -> &'static str {
    match service {
        Service::S3 => {
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and ~/.aws/credentials, or the \
             role of the machine"
        }
        Service::Azure => {
            "AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or the identity of \
             the machine"
        }
        Service::Google => "GOOGLE_APPLICATION_CREDENTIALS, or the account of the machine",
    }
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_uppercase().chain(characters).collect(),
        None => String::new(),
    }
}

/// A text of the library without the queries of addresses, which may be signatures.
fn without_queries(text: &str) -> String {
    let mut shown = String::new();
    let mut in_query = false;
    for c in text.chars() {
        in_query = match c {
            '?' => true,
            _ if c.is_whitespace() || c == '"' || c == ')' => false,
            _ => in_query,
        };
        if !in_query {
            shown.push(c);
        }
    }
    shown
}

fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// The error of a store in a folder.
pub(super) fn of_folder(context: String, error: object_store::Error) -> Error {
    let kind = match &error {
        object_store::Error::NotFound { .. } => ErrorKind::Missing,
        object_store::Error::InvalidPath { .. } => ErrorKind::Invalid,
        _ => match system_error(&error) {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::Full,
            Some(_) => ErrorKind::Io,
            None => ErrorKind::Unavailable,
        },
    };
    Error::new(kind, context).with_source(error)
}

/// The operating system's error number somewhere down the chain of causes.
fn system_error(error: &(dyn StdError + 'static)) -> Option<i32> {
    chain(error)
        .find_map(|cause| cause.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket() -> Bucket {
        Bucket {
            service: Service::S3,
            name: "bucket".into(),
            prefix: "a/b".into(),
        }
    }

    fn library(text: &str) -> Cause {
        Cause::Store(object_store::Error::Generic {
            store: "S3",
            source: text.to_owned().into(),
        })
    }

    fn answered(status: u16, code: &str) -> Failure {
        Failure {
            cause: library("https://host/bucket/key?sig=secret"),
            heard: Some(Heard::Answer {
                kind: Kind::Put,
                status,
                code: (!code.is_empty()).then(|| code.to_owned()),
                message: Some("Its words.".to_owned()),
            }),
        }
    }

    #[test]
    fn answers_have_their_kinds() {
        use ErrorKind::{Denied, Full, Missing, Unavailable};
        for (status, code, kind, may_pass) in [
            (401, "", Denied, false),
            (403, "SignatureDoesNotMatch", Denied, false),
            (400, "ExpiredToken", Denied, false),
            (400, "AuthorizationHeaderMalformed", Unavailable, false),
            (400, "RequestTimeout", Unavailable, true),
            (301, "PermanentRedirect", Unavailable, false),
            (404, "NoSuchKey", Missing, false),
            (404, "NoSuchBucket", Unavailable, false),
            (404, "ContainerNotFound", Unavailable, false),
            (408, "", Unavailable, true),
            (429, "", Unavailable, true),
            (500, "InternalError", Unavailable, true),
            (503, "SlowDown", Unavailable, true),
            (507, "XMinioStorageFull", Full, false),
            (403, "QuotaExceeded", Full, false),
        ] {
            let failure = answered(status, code);
            assert_eq!(failure.may_pass(), may_pass, "{status} {code}");
            let error = failure.in_bucket("write object k", &bucket());
            assert_eq!(error.kind(), kind, "{status} {code}");
            let text = error.chain();
            for part in [
                "Cannot write object k in s3://bucket/a/b",
                &status.to_string(),
                code,
                "Its words.",
            ] {
                assert!(text.contains(part), "{text}");
            }
            assert!(!text.contains("secret"), "{text}");
        }
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let text = answered(403, "AccessDenied")
            .in_bucket("write object k", &bucket())
            .chain();
        assert!(text.contains("AWS_ACCESS_KEY_ID"), "{text}");
        let text = answered(404, "NoSuchBucket")
            .in_bucket("write object k", &bucket())
            .chain();
        assert!(text.contains("make it"), "{text}");
    }

    #[test]
    fn only_some_conflicts_prove_that_an_object_is_there() {
        assert!(answered(412, "PreconditionFailed").is_sure_conflict());
        assert!(answered(409, "BlobAlreadyExists").is_sure_conflict());
        assert!(!answered(409, "ConditionalRequestConflict").is_sure_conflict());
        assert!(!answered(409, "").is_sure_conflict());
    }

    #[test]
    fn lines_break_and_credentials_are_not_to_be_had() {
        let broken = |kind| Failure {
            cause: library("secret"),
            heard: Some(Heard::Broken {
                kind,
                why: "no connection: refused".to_owned(),
            }),
        };
        assert!(broken(Kind::Get).may_pass());
        let error = broken(Kind::Get).in_bucket("read object k", &bucket());
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.chain().ends_with(": No connection: refused"));
        let error = broken(Kind::Credentials).in_bucket("read object k", &bucket());
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.chain().contains("AWS_PROFILE"), "{}", error.chain());
    }

    #[test]
    fn what_takes_too_long_is_told_at_once() {
        let failure = Failure {
            cause: Cause::Late(Duration::from_secs(61)),
            heard: None,
        };
        assert!(!failure.may_pass());
        let error = failure.in_bucket("write object k", &bucket());
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.chain().contains("61 seconds"));
    }

    #[test]
    fn the_library_is_repeated_without_queries() {
        assert_eq!(
            without_queries("bad \"https://h/p?sig=secret\" (x?y=secret) and more"),
            "bad \"https://h/p\" (x) and more"
        );
        let strange = Failure {
            cause: library("https://host/key?sig=secret no etag"),
            heard: None,
        };
        let text = strange.in_bucket("read object k", &bucket()).chain();
        assert!(!text.contains("secret") && text.contains("no etag"));
    }

    #[test]
    fn an_error_from_within_keeps_its_kind() {
        let own = Error::new(ErrorKind::Invalid, "File f has no profile p");
        let failure = Failure {
            cause: Cause::Store(object_store::Error::Generic {
                store: "S3",
                source: Box::new(own),
            }),
            heard: None,
        };
        let error = failure.in_bucket("read object k", &bucket());
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("File f has no profile p"));
    }
}
