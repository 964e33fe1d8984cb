//! The monitor of qemu-storage-daemon: one command, which adds a dirty bitmap.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Result;
use crate::pattern::BLOCK_BYTES;

/// Time that the monitor has for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Adds to a node a bitmap that lives in memory alone, of the granularity that the tracker has.
///
/// # Errors
///
/// The monitor does not answer, or refuses.
pub fn add_bitmap(monitor: &Path, node: &str) -> Result<()> {
    let stream = UnixStream::connect(monitor)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(stream.try_clone()?).lines();
    let mut commands = stream;
    answers.next().ok_or("the monitor does not greet")??;
    let bitmap = json!({
        "node": node, "name": "changes", "granularity": BLOCK_BYTES, "persistent": false,
    });
    for command in [
        json!({"execute": "qmp_capabilities"}),
        json!({"execute": "block-dirty-bitmap-add", "arguments": bitmap}),
    ] {
        commands.write_all(format!("{command}\n").as_bytes())?;
        loop {
            let line = answers.next().ok_or("the monitor closed")??;
            let answer: Value = serde_json::from_str(&line)?;
            if answer.get("return").is_some() {
                break;
            }
            // Events may come between.
            if answer.get("event").is_none() {
                return Err(format!("the monitor refuses: {line}").into());
            }
        }
    }
    Ok(())
}
