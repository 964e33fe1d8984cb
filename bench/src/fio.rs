//! fio as the client, with its nbd engine.

use std::process::Command;

use serde_json::Value;

use crate::Result;
use crate::load::Load;
use crate::servers::Running;
use crate::settings::Settings;

/// 4 KiB random writes for the settings' time at their depth.
///
/// # Errors
///
/// fio fails, or its report has another form.
pub fn random_writes(server: &Running, settings: &Settings) -> Result<Load> {
    let uri = format!("nbd+unix:///?socket={}", server.socket().display());
    // fio takes the address in the global section only.
    let job = format!(
        "[global]\nioengine=nbd\nuri={uri}\n[write]\nrw=randwrite\nbs=4k\niodepth={}\n\
         size={}\ntime_based=1\nruntime={}\nnorandommap=1\nrandrepeat=0\n",
        settings.depth,
        settings.size_bytes(),
        settings.seconds,
    );
    let file = server.folder().join("job.fio");
    std::fs::write(&file, job)?;
    let output = Command::new("fio")
        .arg("--output-format=json")
        .arg(&file)
        .current_dir(server.folder())
        .output()
        .map_err(|error| format!("cannot run fio: {error}"))?;
    if !output.status.success() {
        return Err(format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    // fio may print notes before its JSON.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or("");
    let report: Value = serde_json::from_str(json)?;
    let job = report.pointer("/jobs/0").ok_or("fio's report has no job")?;
    if job.get("error").and_then(Value::as_u64) != Some(0) {
        return Err("fio reports an error".into());
    }
    let number = |path: &str| {
        job.pointer(path)
            .and_then(Value::as_f64)
            .ok_or_else(|| format!("fio's report lacks {path}"))
    };
    Ok(Load {
        requests: number("/write/total_ios")? as u64,
        seconds: number("/write/runtime")? / 1000.0,
    })
}
