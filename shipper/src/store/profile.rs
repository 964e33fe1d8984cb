//! The files of AWS: keys, region and endpoint of a profile.
//!
//! Only what stands in the files as such is offered. Files are read again for each request, so that
//! keys that somebody renews there are taken without a restart.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;

use super::cloud::Environment;
use crate::error::{Error, ErrorKind, Result};

/// Ways to credentials that a profile can have and that are not offered.
const NOT_OFFERED: [&str; 5] = [
    "role_arn",
    "credential_process",
    "sso_session",
    "sso_start_url",
    "web_identity_token_file",
];

type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// Which files, and which profile in them.
#[derive(Clone, Debug)]
pub(super) struct Profile {
    credentials: PathBuf,
    config: PathBuf,
    name: String,
    /// It was asked for by name, so it must be there.
    is_chosen: bool,
}

/// What the files say.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Key, secret and token.
    pub keys: Option<(String, String, Option<String>)>,
    pub region: Option<String>,
    pub endpoint: Option<String>,
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Found(..)")
    }
}

impl Profile {
    /// The profile that the environment chooses.
    pub fn of(environment: &Environment) -> Self {
        let home = environment
            .get("HOME")
            .map(PathBuf::from)
            .or_else(std::env::home_dir)
            .unwrap_or_default();
        let file = |variable: &str, name: &str| match environment.get(variable) {
            Some(path) => PathBuf::from(path),
            None => home.join(".aws").join(name),
        };
        let chosen = environment
            .get("AWS_PROFILE")
            .or_else(|| environment.get("AWS_DEFAULT_PROFILE"));
        Self {
            credentials: file("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: file("AWS_CONFIG_FILE", "config"),
            name: chosen.unwrap_or("default").to_owned(),
            is_chosen: chosen.is_some(),
        }
    }

    /// Reads the files. Those that do not exist say nothing.
    ///
    /// # Errors
    ///
    /// `Denied`: a file may not be read. `Invalid`: the profile was asked for and is not there, has half
    /// of a key, or gets its keys by a way that is not offered.
    pub fn read(&self) -> Result<Found> {
        let mut config = read_sections(&self.config)?;
        let mut credentials = read_sections(&self.credentials)?;
        let in_config = match self.name.as_str() {
            "default" => config
                .remove("default")
                .or_else(|| config.remove("profile default")),
            name => config.remove(&format!("profile {name}")),
        };
        let in_credentials = credentials.remove(&self.name);
        if self.is_chosen && in_config.is_none() && in_credentials.is_none() {
            return Err(self.invalid("is in neither"));
        }
        let (config, credentials) = (
            in_config.unwrap_or_default(),
            in_credentials.unwrap_or_default(),
        );
        // Both files may hold keys; those in the file for them count first.
        let keys = match self.keys_of(&credentials)? {
            Some(keys) => Some(keys),
            None => self.keys_of(&config)?,
        };
        if keys.is_none() {
            for (section, way) in [&credentials, &config]
                .into_iter()
                .flat_map(|section| NOT_OFFERED.map(|way| (section, way)))
            {
                if section.contains_key(way) {
                    return Err(self.invalid(&format!(
                        "gets its keys by {way}, which is not offered: give them by AWS_ACCESS_KEY_ID, \
                         AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN instead, for which `aws configure \
                         export-credentials` can be used. It"
                    )));
                }
            }
        }
        let value = |name: &str| credentials.get(name).or_else(|| config.get(name)).cloned();
        Ok(Found {
            keys,
            region: value("region"),
            endpoint: value("endpoint_url"),
        })
    }

    fn keys_of(
        &self,
        section: &BTreeMap<String, String>,
    ) -> Result<Option<(String, String, Option<String>)>> {
        let value = |name: &str| section.get(name).filter(|value| !value.is_empty()).cloned();
        match (value("aws_access_key_id"), value("aws_secret_access_key")) {
            (Some(key), Some(secret)) => Ok(Some((key, secret, value("aws_session_token")))),
            (None, None) => Ok(None),
            _ => Err(self.invalid(
                "has only one of aws_access_key_id and aws_secret_access_key in one of them. It",
            )),
        }
    }

    fn invalid(&self, what: &str) -> Error {
        let (credentials, config) = (self.credentials.display(), self.config.display());
        Error::new(
            ErrorKind::Invalid,
            format!(
                "Profile {:?} of AWS {what} is looked for in {credentials} and {config}",
                self.name
            ),
        )
    }
}

#[async_trait]
impl CredentialProvider for Profile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let found = self.read().and_then(|found| {
            found
                .keys
                .ok_or_else(|| self.invalid("has lost its keys. It"))
        });
        let (key_id, secret_key, token) = found.map_err(|error| object_store::Error::Generic {
            store: "S3",
            source: Box::new(error),
        })?;
        Ok(Arc::new(AwsCredential {
            key_id,
            secret_key,
            token,
        }))
    }
}

fn read_sections(path: &Path) -> Result<Sections> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(parse(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Sections::new()),
        Err(error) => Err(Error::new(
            ErrorKind::Denied,
            format!("Cannot read {}: let the shipper read it", path.display()),
        )
        .with_source(error)),
    }
}

/// Sections of names and values. What is none of it says nothing, and a line that begins with a
/// space belongs to the value before it and is left out with it.
fn parse(text: &str) -> Sections {
    let mut sections = Sections::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        if line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        let line = without_comment(line.trim_end());
        if let Some(rest) = line.strip_prefix('[') {
            current = rest.split_once(']').map(|(name, _)| section_name(name));
            if let Some(name) = &current {
                sections.entry(name.clone()).or_default();
            }
        } else if let (Some(section), Some((name, value))) = (&current, line.split_once('=')) {
            let section = sections.entry(section.clone()).or_default();
            section.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    sections
}

/// One space between words, and no quotes.
fn section_name(text: &str) -> String {
    let unquoted = text.replace(['"', '\''], " ");
    unquoted.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A comment within a line has a space before it.
fn without_comment(line: &str) -> &str {
    let begins = [" #", " ;", "\t#", "\t;"]
        .into_iter()
        .filter_map(|begin| line.find(begin))
        .min();
    begins.map_or(line, |begin| line[..begin].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Files(tempfile::TempDir);

    impl Files {
        fn new(credentials: &str, config: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join(".aws")).unwrap();
            let files = Self(folder);
            files.write("credentials", credentials);
            files.write("config", config);
            files
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.0.path().join(".aws").join(name), text).unwrap();
        }

        fn profile(&self, chosen: Option<&str>) -> Profile {
            let mut environment = vec![("HOME".to_owned(), self.0.path().display().to_string())];
            environment.extend(chosen.map(|name| ("AWS_PROFILE".to_owned(), name.to_owned())));
            Profile::of(&environment.into_iter().collect())
        }
    }

    fn keys(
        key: &str,
        secret: &str,
        token: Option<&str>,
    ) -> Option<(String, String, Option<String>)> {
        Some((key.into(), secret.into(), token.map(str::to_owned)))
    }

    #[test]
    fn profiles_are_found_in_both_files() {
        let files = Files::new(
            "# keys\n[default]\naws_access_key_id = ID\naws_secret_access_key=a/b+c=  # old\n\n\
             [work]\nAWS_ACCESS_KEY_ID=WID\naws_secret_access_key=W#S\naws_session_token=T\n",
            "[default]\nregion = eu-north-1\ns3 =\n  endpoint_url = http://no\n\
             [profile work]\nendpoint_url = http://127.0.0.1:9000\n[profile  \"two words\"]\n\
             aws_access_key_id = C\naws_secret_access_key = S\n",
        );
        let found = files.profile(None).read().unwrap();
        assert_eq!(found.keys, keys("ID", "a/b+c=", None));
        assert_eq!(found.region.as_deref(), Some("eu-north-1"));
        assert_eq!(found.endpoint, None);
        let found = files.profile(Some("work")).read().unwrap();
        assert_eq!(found.keys, keys("WID", "W#S", Some("T")));
        assert_eq!(found.endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        let found = files.profile(Some("two words")).read().unwrap();
        assert_eq!(found.keys, keys("C", "S", None));
    }

    #[test]
    fn what_is_not_there_or_not_offered_is_told() {
        let files = Files::new(
            "[half]\naws_access_key_id = s-e-c-r-e-t\n",
            "[profile role]\nrole_arn = arn:x\nsource_profile = default\n",
        );
        assert_eq!(files.profile(None).read().unwrap(), Found::default());
        for (name, word) in [
            ("nobody", "neither"),
            ("half", "only one"),
            ("role", "role_arn"),
        ] {
            let error = files.profile(Some(name)).read().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(word), "{error}");
            assert!(!error.to_string().contains("s-e-c-r-e-t"), "{error}");
        }
        let nowhere = Environment::from_iter([("HOME".to_owned(), "/nonexistent".to_owned())]);
        assert_eq!(Profile::of(&nowhere).read().unwrap(), Found::default());
    }

    #[test]
    fn renewed_keys_are_taken() {
        let files = Files::new(
            "[default]\naws_access_key_id=A\naws_secret_access_key=1\n",
            "",
        );
        let profile = files.profile(None);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let get = || runtime.block_on(profile.get_credential());
        assert_eq!(get().unwrap().key_id, "A");
        files.write(
            "credentials",
            "[default]\naws_access_key_id=B\naws_secret_access_key=2\n",
        );
        assert_eq!(get().unwrap().key_id, "B");
        files.write("credentials", "");
        assert!(get().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(\\[[a-z \"\\]]{0,6}\\]?|[a-z_=# ;\\t\\n\\PC]{0,12}|\\n){0,20}") {
            let _sections = parse(&text);
        }

        #[test]
        fn values_come_back(name in "[a-z_]{1,10}", value in "[A-Za-z0-9/+=]{0,40}") {
            let sections = parse(&format!("[s]\r\n{name} = {value}\r\n"));
            prop_assert_eq!(&sections["s"][&name], &value);
        }
    }
}
