//! The part of the configuration that is about quiescing.

use std::time::Duration;

use serde::Deserialize;

use super::protocol::Hook;
use crate::lifecycle::config::parse_interval;

/// Time for freezing and the time frozen unless the configuration says otherwise.
pub const TIME_LIMIT_DEFAULT: Duration = Duration::from_secs(10);
/// Longest time that guests may be made to stand still.
const TIME_LIMIT_MAX: Duration = Duration::from_secs(600);
const TIME_LIMIT_MIN: Duration = Duration::from_millis(100);
const HOOKS_MAX: usize = 64;

/// What the file says, as it was typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawQuiesce {
    interval: Option<String>,
    time_limit: Option<String>,
    #[serde(default, rename = "hook")]
    hooks: Vec<Hook>,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuiesceConfig {
    /// Time between quiesced recovery points; `None`: only on demand.
    pub interval: Option<Duration>,
    /// Time for freezing and the time frozen.
    pub time_limit: Duration,
    /// What freezes and thaws, in the order of freezing.
    pub hooks: Vec<Hook>,
}

impl RawQuiesce {
    /// Checks it.
    ///
    /// # Errors
    ///
    /// What is wrong, with its key.
    pub fn checked(self) -> Result<QuiesceConfig, String> {
        let interval = self.interval.as_deref().map(parse_interval).transpose();
        let interval = interval.map_err(|what| format!("quiesce: {what}"))?;
        let time_limit = match &self.time_limit {
            Some(text) => parse_time_limit(text)?,
            None => TIME_LIMIT_DEFAULT,
        };
        if self.hooks.is_empty() {
            return Err("quiesce: it names no hook: add a section [[quiesce.hook]]".to_owned());
        }
        if self.hooks.len() > HOOKS_MAX {
            return Err(format!("quiesce: more than {HOOKS_MAX} hooks"));
        }
        for (index, hook) in self.hooks.iter().enumerate() {
            check(hook).map_err(|what| format!("quiesce.hook {}: {what}", index + 1))?;
            if self.hooks[..index].contains(hook) {
                return Err(format!(
                    "quiesce.hook {}: the same is given twice",
                    index + 1
                ));
            }
        }
        Ok(QuiesceConfig {
            interval,
            time_limit,
            hooks: self.hooks,
        })
    }
}

fn parse_time_limit(text: &str) -> Result<Duration, String> {
    let duration: Option<jiff::SignedDuration> = text.parse().ok();
    duration
        .and_then(|duration| Duration::try_from(duration).ok())
        .filter(|duration| (TIME_LIMIT_MIN..=TIME_LIMIT_MAX).contains(duration))
        .ok_or_else(|| {
            format!("quiesce.time_limit: {text:?} is not a time such as \"10s\", from 100ms to 10m")
        })
}

fn check(hook: &Hook) -> Result<(), String> {
    match hook {
        Hook::Fsfreeze { mount: path } | Hook::GuestAgent { socket: path } => {
            match path.is_absolute() {
                true => Ok(()),
                false => Err(format!("{} is no absolute path", path.display())),
            }
        }
        Hook::Command { freeze, thaw } => {
            for (key, words) in [("freeze", freeze), ("thaw", thaw)] {
                if words.first().is_none_or(String::is_empty) {
                    return Err(format!("{key} names no program"));
                }
                if words.iter().any(|word| word.contains('\0')) {
                    return Err(format!("{key} has a word with a zero byte"));
                }
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "interval = \"1h\"\n[[hook]]\nkind = \"fsfreeze\"\nmount = \"/srv\"\n\
        [[hook]]\nkind = \"guest-agent\"\nsocket = \"/run/agent\"\n\
        [[hook]]\nkind = \"command\"\nfreeze = [\"prog\", \"on\"]\nthaw = [\"prog\", \"off\"]\n";

    fn parse(text: &str) -> Result<QuiesceConfig, String> {
        let raw: RawQuiesce = toml::from_str(text).map_err(|error| error.to_string())?;
        raw.checked()
    }

    #[test]
    fn a_good_one_has_defaults() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.interval, Some(Duration::from_secs(3600)));
        assert_eq!(config.time_limit, Duration::from_secs(10));
        assert_eq!(config.hooks.len(), 3);
        let on_demand = parse(&GOOD.replace("interval = \"1h\"", "time_limit = \"1s\"")).unwrap();
        assert_eq!(on_demand.interval, None);
        assert_eq!(on_demand.time_limit, Duration::from_secs(1));
    }

    #[test]
    fn bad_ones_are_named() {
        for (from, to, word) in [
            ("interval", "intervall", "intervall"),
            ("\"1h\"", "\"0s\"", "quiesce: interval"),
            ("\"1h\"", "\"1h\"\ntime_limit = \"0s\"", "time_limit"),
            ("\"1h\"", "\"1h\"\ntime_limit = \"1d\"", "time_limit"),
            ("\"1h\"", "\"1h\"\ntime_limit = \"soon\"", "time_limit"),
            ("\"fsfreeze\"", "\"lvm\"", "lvm"),
            ("mount", "point", "point"),
            ("\"/srv\"", "\"srv\"", "hook 1: srv"),
            ("\"/run/agent\"", "\"agent\"", "hook 2: agent"),
            ("[\"prog\", \"on\"]", "[]", "hook 3: freeze"),
            ("[\"prog\", \"off\"]", "[\"\"]", "hook 3: thaw"),
            ("\"off\"", "\"o\\u0000\"", "zero byte"),
        ] {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD);
            let error = parse(&text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        assert!(
            parse("interval = \"1h\"\n")
                .unwrap_err()
                .contains("no hook")
        );
        let twice = format!("{GOOD}[[hook]]\nkind = \"fsfreeze\"\nmount = \"/srv\"\n");
        assert!(parse(&twice).unwrap_err().contains("hook 4"));
    }
}
