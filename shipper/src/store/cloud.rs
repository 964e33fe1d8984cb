//! Stores of services: what the environment says, and the library's clients made of it.
//!
//! Credentials, regions and endpoints come from the variables and files that each service's own tools
//! use, never from a configuration or an address, so that no secret stands where it may be printed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::HttpConnector;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::prefix::PrefixStore;
use object_store::{ClientConfigKey, ObjectStore, RetryConfig};

use super::counted::Counters;
use super::http::Connector;
use super::object::{ObjectStoreBacked, Place};
use super::profile::Profile;
use super::url::{Bucket, Service};
use crate::error::{Error, ErrorKind, Result};

/// Time to get a connection.
const CONNECT_TIME: &str = "10s";
/// The library's own limit, which knows nothing of sizes, is out of the way; requests have theirs.
const NO_LIMIT: &str = "30 days";

/// Names and values, of which no value is ever shown.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The environment of this process. What is not UTF-8 is not in it.
    pub fn of_process() -> Self {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect()
    }

    /// A value; one that is empty counts as none.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.get(name).map(String::as_str);
        value.filter(|value| !value.is_empty())
    }

    /// All that begin so and are not empty, the names in small letters.
    fn beginning(&self, begin: &str) -> impl Iterator<Item = (String, &str)> {
        self.0
            .iter()
            .filter(move |(name, value)| name.starts_with(begin) && !value.is_empty())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Opens the store in a bucket. Nothing is sent yet.
///
/// # Errors
///
/// `Invalid`: the environment or a file of credentials says something wrong.
pub(super) fn open(bucket: &Bucket, environment: &Environment) -> Result<ObjectStoreBacked> {
    let counters = Arc::new(Counters::default());
    let connector = Connector {
        counters: Arc::clone(&counters),
        bucket: bucket.name.clone(),
    };
    let store = match bucket.service {
        Service::S3 => s3(bucket, environment, connector)?,
        Service::Azure => azure(bucket, environment, connector)?,
        Service::Google => google(bucket, environment, connector)?,
    };
    let store: Box<dyn ObjectStore> = match bucket.prefix.is_empty() {
        true => store,
        false => Box::new(PrefixStore::new(store, bucket.prefix.as_str())),
    };
    ObjectStoreBacked::counting(store, Place::Bucket(bucket.clone()), counters)
}

/// Every attempt is made and seen by [`ObjectStoreBacked`].
fn no_retries() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        retry_timeout: Duration::ZERO,
        ..RetryConfig::default()
    }
}

/// Settings of the client that are the same for all services. Plain HTTP is for endpoints that say so.
fn client_settings(plain_http: bool) -> [(ClientConfigKey, &'static str); 3] {
    [
        (ClientConfigKey::Timeout, NO_LIMIT),
        (ClientConfigKey::ConnectTimeout, CONNECT_TIME),
        (
            ClientConfigKey::AllowHttp,
            if plain_http { "true" } else { "false" },
        ),
    ]
}

fn is_plain(endpoint: Option<&str>) -> bool {
    endpoint.is_some_and(|endpoint| endpoint.to_ascii_lowercase().starts_with("http://"))
}

fn unfit(bucket: &Bucket, error: object_store::Error) -> Error {
    // The library repeats values of variables only where they name a choice; still, no more than its
    // own line is shown.
    Error::new(
        ErrorKind::Invalid,
        format!("Cannot use {bucket} with what the environment says of it: {error}"),
    )
}

fn s3(
    bucket: &Bucket,
    environment: &Environment,
    connector: impl HttpConnector,
) -> Result<Box<dyn ObjectStore>> {
    let mut builder = AmazonS3Builder::new();
    for (name, value) in environment.beginning("AWS_") {
        if let Ok(key) = name.parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let has = |name: &str| environment.get(name).is_some();
    let is_given = has("AWS_ACCESS_KEY_ID") || has("AWS_SECRET_ACCESS_KEY");
    let is_web = has("AWS_WEB_IDENTITY_TOKEN_FILE") && has("AWS_ROLE_ARN");
    let is_anonymous = has("AWS_SKIP_SIGNATURE");
    if !(is_given || is_web || is_anonymous) {
        let profile = Profile::of(environment);
        let found = profile.read()?;
        if found.keys.is_some() {
            builder = builder.with_credentials(Arc::new(profile));
        }
        for (key, value) in [
            (AmazonS3ConfigKey::Region, found.region),
            (AmazonS3ConfigKey::Endpoint, found.endpoint),
        ] {
            if let (Some(value), None) = (value, builder.get_config_value(&key)) {
                builder = builder.with_config(key, value);
            }
        }
    }
    let endpoint = builder
        .get_config_value(&AmazonS3ConfigKey::S3Endpoint)
        .or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
    for (key, value) in client_settings(is_plain(endpoint.as_deref())) {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    let store = builder
        .with_bucket_name(&bucket.name)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // Not every server has the bulk request, and one object is removed at a time.
        .with_disable_bulk_delete(true)
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()
        .map_err(|error| unfit(bucket, error))?;
    Ok(Box::new(store))
}

/// What the library calls otherwise than Azure's own tools.
const AZURE_NAMES: [(&str, AzureConfigKey); 4] = [
    ("AZURE_STORAGE_ACCOUNT", AzureConfigKey::AccountName),
    ("AZURE_STORAGE_KEY", AzureConfigKey::AccessKey),
    ("AZURE_STORAGE_SERVICE_ENDPOINT", AzureConfigKey::Endpoint),
    ("IDENTITY_ENDPOINT", AzureConfigKey::MsiEndpoint),
];

fn azure(
    bucket: &Bucket,
    environment: &Environment,
    connector: impl HttpConnector,
) -> Result<Box<dyn ObjectStore>> {
    let mut builder = MicrosoftAzureBuilder::new();
    if let Some(text) = environment.get("AZURE_STORAGE_CONNECTION_STRING") {
        for (key, value) in connection_string(text) {
            builder = builder.with_config(key, value);
        }
    }
    for (name, key) in AZURE_NAMES {
        if let Some(value) = environment.get(name) {
            builder = builder.with_config(key, value);
        }
    }
    for (name, value) in environment.beginning("AZURE_") {
        if let Ok(key) = name.parse::<AzureConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
    for (key, value) in client_settings(is_plain(endpoint.as_deref())) {
        builder = builder.with_config(AzureConfigKey::Client(key), value);
    }
    let store = builder
        .with_container_name(&bucket.name)
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()
        .map_err(|error| unfit(bucket, error))?;
    Ok(Box::new(store))
}

/// Reads the one line in which Azure's portal gives everything.
fn connection_string(text: &str) -> Vec<(AzureConfigKey, String)> {
    let pairs: BTreeMap<String, &str> = text
        .split(';')
        .filter_map(|pair| pair.trim().split_once('='))
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .collect();
    let mut found = Vec::new();
    for (name, key) in [
        ("accountname", AzureConfigKey::AccountName),
        ("accountkey", AzureConfigKey::AccessKey),
        ("sharedaccesssignature", AzureConfigKey::SasKey),
        ("blobendpoint", AzureConfigKey::Endpoint),
    ] {
        if let Some(value) = pairs.get(name) {
            found.push((key, value.trim_end_matches('/').to_owned()));
        }
    }
    if let (None, Some(account), Some(suffix)) = (
        pairs.get("blobendpoint"),
        pairs.get("accountname"),
        pairs.get("endpointsuffix"),
    ) {
        let protocol = pairs.get("defaultendpointsprotocol").unwrap_or(&"https");
        let endpoint = format!("{protocol}://{account}.blob.{suffix}");
        found.push((AzureConfigKey::Endpoint, endpoint));
    }
    found
}

fn google(
    bucket: &Bucket,
    environment: &Environment,
    connector: impl HttpConnector,
) -> Result<Box<dyn ObjectStore>> {
    let mut builder = GoogleCloudStorageBuilder::new();
    if let Some(path) = environment.get("SERVICE_ACCOUNT") {
        builder = builder.with_config(GoogleConfigKey::ServiceAccount, path);
    }
    for (name, value) in environment.beginning("GOOGLE_") {
        if let Ok(key) = name.parse::<GoogleConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let endpoint = builder.get_config_value(&GoogleConfigKey::BaseUrl);
    for (key, value) in client_settings(is_plain(endpoint.as_deref())) {
        builder = builder.with_config(GoogleConfigKey::Client(key), value);
    }
    let store = builder
        .with_bucket_name(&bucket.name)
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()
        .map_err(|error| unfit(bucket, error))?;
    Ok(Box::new(store))
}

#[cfg(test)]
mod tests {
    use super::super::VaultUrl;
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        let mut all = vec![("HOME".to_owned(), "/nonexistent".to_owned())];
        all.extend(
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        all.into_iter().collect()
    }

    fn opened(url: &str, pairs: &[(&str, &str)]) -> Result<ObjectStoreBacked> {
        VaultUrl::parse(url)?.open_in(&environment(pairs))
    }

    #[test]
    fn stores_are_made_of_the_usual_variables() {
        for (url, pairs) in [
            (
                "s3://bucket/a/b",
                &[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")][..],
            ),
            ("s3://bucket", &[("AWS_REGION", "eu-north-1")][..]),
            (
                "az://container",
                &[
                    ("AZURE_STORAGE_ACCOUNT", "a"),
                    ("AZURE_STORAGE_KEY", "YQ=="),
                ][..],
            ),
            (
                "az://container/p",
                &[(
                    "AZURE_STORAGE_CONNECTION_STRING",
                    "AccountName=a;AccountKey=YQ==",
                )][..],
            ),
            (
                "az://container",
                &[("AZURE_STORAGE_USE_EMULATOR", "true")][..],
            ),
            ("gs://bucket/p", &[("GOOGLE_SKIP_SIGNATURE", "true")][..]),
        ] {
            opened(url, pairs).unwrap_or_else(|error| panic!("{url}: {}", error.chain()));
        }
    }

    #[test]
    fn what_is_wrong_is_told_without_secrets() {
        for (url, pairs, word) in [
            (
                "s3://bucket",
                &[("AWS_SECRET_ACCESS_KEY", "s-e-c-r-e-t")][..],
                "accesskeyid",
            ),
            ("s3://bucket", &[("AWS_PROFILE", "nobody")][..], "nobody"),
            (
                "az://container",
                &[("AZURE_STORAGE_KEY", "s-e-c-r-e-t")][..],
                "account",
            ),
            (
                "az://container",
                &[
                    ("AZURE_STORAGE_ACCOUNT", "a"),
                    ("AZURE_STORAGE_KEY", "s-e-c-r-e-t"),
                ][..],
                "key",
            ),
            (
                "gs://bucket",
                &[("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent/file")][..],
                "/nonexistent/file",
            ),
        ] {
            let error = opened(url, pairs).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::Invalid);
            let text = error.chain();
            assert!(text.to_ascii_lowercase().contains(word), "{text}");
            assert!(!text.contains("s-e-c-r-e-t"), "{text}");
        }
        let shown = format!(
            "{:?}",
            environment(&[("AWS_SECRET_ACCESS_KEY", "s-e-c-r-e-t")])
        );
        assert!(shown.contains("AWS_SECRET_ACCESS_KEY") && !shown.contains("s-e-c-r-e-t"));
    }

    #[test]
    fn connection_strings_are_read() {
        let text = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a+b/c==;EndpointSuffix=core.windows.net";
        let found = connection_string(text);
        let value = |key| {
            found
                .iter()
                .find(|(k, _)| *k == key)
                .map(|(_, v)| v.as_str())
        };
        assert_eq!(value(AzureConfigKey::AccountName), Some("acc"));
        assert_eq!(value(AzureConfigKey::AccessKey), Some("a+b/c=="));
        let endpoint = "https://acc.blob.core.windows.net";
        assert_eq!(value(AzureConfigKey::Endpoint), Some(endpoint));
        let found =
            connection_string("BlobEndpoint=http://h:1/acc/;SharedAccessSignature=sv=1&sig=x");
        assert_eq!(found[0], (AzureConfigKey::SasKey, "sv=1&sig=x".to_owned()));
        assert_eq!(
            found[1],
            (AzureConfigKey::Endpoint, "http://h:1/acc".to_owned())
        );
        assert!(connection_string("").is_empty());
    }
}
