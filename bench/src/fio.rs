//! fio as the client: its nbd engine against a server, its io_uring engine on the file itself.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::Result;
use crate::job::{Access, Job};
use crate::measure::{Latency, Load};
use crate::servers::Running;

/// Does the job against a server for a time.
///
/// # Errors
///
/// fio fails, or its report has another form.
pub fn run(server: &Running, job: &Job, duration: Duration) -> Result<Load> {
    let span = format!("time_based=1\nruntime={}ms", duration.as_millis());
    run_for(server, job, &span)
}

/// Makes so many requests of the job, and no more than the disk has bytes for.
///
/// # Errors
///
/// fio fails, or its report has another form.
pub fn run_requests(server: &Running, job: &Job, requests: u64) -> Result<Load> {
    run_for(server, job, &format!("number_ios={requests}"))
}

fn run_for(server: &Running, job: &Job, span: &str) -> Result<Load> {
    let file = server.folder().join("job.fio");
    std::fs::write(&file, job_file(server, job, span))?;
    let output = Command::new("fio")
        .arg("--output-format=json")
        .arg(&file)
        .current_dir(server.folder())
        .output()
        .map_err(|error| format!("cannot run fio: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio failed: {errors}{text}").into());
    }
    // fio may print notes before its JSON.
    let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or("");
    load_of(&serde_json::from_str(json)?, job)
}

fn job_file(server: &Running, job: &Job, span: &str) -> String {
    let target = if server.is_served() {
        // fio takes the address in the global section only.
        format!("ioengine=nbd\nuri={}", server.uri())
    } else {
        format!(
            "ioengine=io_uring\nfilename={}\ndirect={}",
            server.image().display(),
            u8::from(server.is_direct())
        )
    };
    let pattern = match (job.access, job.sequential) {
        (Access::Write, false) => "randwrite".to_owned(),
        (Access::Read, false) => "randread".to_owned(),
        (Access::Write, true) => "write".to_owned(),
        (Access::Read, true) => "read".to_owned(),
        (Access::Mixed(reads), _) => format!("randrw\nrwmixread={reads}"),
    };
    let order = match job.zipf_seed {
        Some(seed) => format!("random_distribution=zipf:1.1\nrandseed={seed}\n"),
        None => String::new(),
    };
    // A thread, as a forked job might outlive a fio that is killed.
    format!(
        "[global]\n{target}\nthread=1\ngroup_reporting=1\nunified_rw_reporting={}\n\
         lat_percentiles=1\nclat_percentiles=0\npercentile_list=50:99:99.9\n\
         [job]\nrw={pattern}\nbs={}\niodepth={}\nnumjobs={}\nfsync={}\nsize={}\n\
         {span}\nnorandommap=1\nrandrepeat=0\n{order}",
        // Only without it fio tells the time of syncs.
        if direction(job) == "mixed" {
            "mixed"
        } else {
            "none"
        },
        job.block_bytes,
        job.depth,
        job.connections,
        u8::from(job.sync_each),
        server.size_bytes(),
    )
}

/// fio's name of what a job does.
fn direction(job: &Job) -> &'static str {
    match job.access {
        Access::Write => "write",
        Access::Read => "read",
        Access::Mixed(_) => "mixed",
    }
}

fn load_of(report: &Value, job: &Job) -> Result<Load> {
    let result = report.pointer("/jobs/0").ok_or("fio's report has no job")?;
    if result.get("error").and_then(Value::as_u64) != Some(0) {
        return Err("fio reports an error".into());
    }
    let number = |path: &str| {
        result
            .pointer(path)
            .and_then(Value::as_f64)
            .ok_or_else(|| format!("fio's report lacks {path}"))
    };
    // Where each write is synced, the sync is what takes the time.
    let direction = direction(job);
    let latencies = if job.sync_each { "sync" } else { direction };
    let microseconds = |percentile: &str| -> Result<f64> {
        let path = format!("/{latencies}/lat_ns/percentile/{percentile}");
        Ok(number(&path)? / 1000.0)
    };
    Ok(Load {
        requests: number(&format!("/{direction}/total_ios"))? as u64,
        seconds: number(&format!("/{direction}/runtime"))? / 1000.0,
        latency: Latency {
            p50: microseconds("50.000000")?,
            p99: microseconds("99.000000")?,
            p999: microseconds("99.900000")?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobKind;

    fn report(error: u64) -> Value {
        let lat = serde_json::json!({
            "percentile": {"50.000000": 1000, "99.000000": 2000, "99.900000": 3000}
        });
        serde_json::json!({"jobs": [{
            "error": error,
            "write": {"total_ios": 10, "runtime": 500, "lat_ns": lat},
        }]})
    }

    #[test]
    fn a_report_is_read() {
        let load = load_of(&report(0), &Job::of(JobKind::Write4kDeep)).unwrap();
        assert_eq!((load.requests, load.seconds), (10, 0.5));
        assert_eq!((load.latency.p50, load.latency.p999), (1.0, 3.0));
    }

    #[test]
    fn errors_and_gaps_are_told() {
        assert!(load_of(&report(5), &Job::of(JobKind::Write4kDeep)).is_err());
        assert!(load_of(&report(0), &Job::of(JobKind::Write4kSync)).is_err());
    }
}
