//! The report: tables on the terminal, JSON with every run, and plots.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

use crate::Result;
use crate::measure::Measurement;
use crate::plot;
use crate::servers::ServerKind;
use crate::settings::{Plan, Section, Settings};
use crate::statistics::Spread;
use crate::summary::{Ratio, Row, Summary};

/// System calls of a server per request, counted in a run of its own.
#[derive(Clone, Debug, Serialize)]
struct Calls {
    section: String,
    server: ServerKind,
    per_request: f64,
}

/// All that was measured.
pub struct Report<'a> {
    plan: &'a Plan,
    load_before: String,
    measurements: Vec<Measurement>,
    calls: Vec<Calls>,
    parts: Vec<Part>,
}

/// What is told beside the sections.
struct Part {
    name: &'static str,
    value: Value,
    text: String,
}

impl<'a> Report<'a> {
    /// An empty report.
    pub fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            load_before: load_average(),
            measurements: Vec::new(),
            calls: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Adds what is told beside the sections: for the JSON under a name, and for people.
    pub fn add_part(&mut self, name: &'static str, value: Value, text: String) {
        self.parts.push(Part { name, value, text });
    }

    /// Adds a run.
    pub fn add(&mut self, measurement: Measurement) {
        self.measurements.push(measurement);
    }

    /// Adds the system calls per request of a server, if they were counted.
    pub fn add_calls(&mut self, section: &Section, server: ServerKind, calls: Option<f64>) {
        if let Some(per_request) = calls {
            self.calls.push(Calls {
                section: crate::summary::title(section),
                server,
                per_request,
            });
        }
    }

    /// A summary of each section.
    pub fn summaries(&self) -> Vec<Summary> {
        let sections = self.plan.sections.iter();
        sections
            .map(|section| {
                let title = crate::summary::title(section);
                Summary::of(self.plan, section, &self.measurements, |server| {
                    let mut calls = self.calls.iter();
                    calls
                        .find(|calls| calls.section == title && calls.server == server)
                        .map(|calls| calls.per_request)
                })
            })
            .collect()
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} MiB disk, {} rounds of {:.2} s; median (least to most); * others disturbed some runs\n",
            self.plan.size_bytes >> 20,
            self.plan.rounds,
            self.plan.duration.as_secs_f64()
        );
        for summary in self.summaries() {
            push_summary(&mut text, &summary);
        }
        for part in &self.parts {
            text.push('\n');
            text.push_str(&part.text);
        }
        text
    }

    /// Writes the JSON and the plots, and returns their paths.
    ///
    /// # Errors
    ///
    /// The folder or a file cannot be written.
    pub fn save(&self, settings: &Settings) -> Result<Vec<PathBuf>> {
        let summaries = self.summaries();
        let mut report = json!({
            "date": jiff::Zoned::now().strftime("%F %H:%M %:z").to_string(),
            "machine": machine(),
            "load_average_before": self.load_before,
            "load_average_after": load_average(),
            "versions": versions(&self.plan.servers),
            "disk_bytes": self.plan.size_bytes,
            "rounds": self.plan.rounds,
            "seconds": self.plan.duration.as_secs_f64(),
            "verified": settings.verify,
            "sections": summaries,
            "runs": self.measurements,
            "calls": self.calls,
        });
        for part in &self.parts {
            report[part.name] = part.value.clone();
        }
        let name = settings
            .name
            .clone()
            .unwrap_or_else(|| jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string());
        std::fs::create_dir_all(&settings.results)?;
        let json = settings.results.join(format!("{name}.json"));
        std::fs::write(&json, serde_json::to_string_pretty(&report)? + "\n")?;
        let svg = settings.results.join(format!("{name}.svg"));
        std::fs::write(&svg, plot::draw(&summaries))?;
        Ok(vec![json, svg])
    }
}

fn push_summary(text: &mut String, summary: &Summary) {
    let mut line = |words: std::fmt::Arguments| {
        // Writing into a string cannot fail.
        let _written = text.write_fmt(words);
        text.push('\n');
    };
    line(format_args!("\n{}", summary.title));
    line(format_args!(
        "{:<22}{:>26}{:>26}{:>32}{:>11}{:>9}",
        "", summary.unit, "p50 / p99 / p99.9 us", "server us/request", "switches", "calls"
    ));
    for row in &summary.rows {
        line(format_args!("{}", row_text(row)));
    }
    for ratio in &summary.ratios {
        line(format_args!("{}", ratio_text(ratio)));
    }
    if let Some(peer) = summary.best_peer {
        line(format_args!("  best peer: {peer}"));
    }
}

fn row_text(row: &Row) -> String {
    let mark = if row.disturbed > 0 { " *" } else { "" };
    let latency = format!(
        "{:.0} / {:.0} / {:.0}",
        row.p50.median, row.p99.median, row.p999.median
    );
    let cost = row.server_microseconds.map(|cost| cost.text(2));
    let switches = row.switches.map(|spread| format!("{:.3}", spread.median));
    let calls = row.calls.map(|calls| format!("{calls:.2}"));
    format!(
        "{:<22}{:>26}{:>26}{:>32}{:>11}{:>9}",
        format!("{}{mark}", row.server),
        row.rate.text(0),
        latency,
        cost.unwrap_or_default(),
        switches.unwrap_or_default(),
        calls.unwrap_or_default(),
    )
}

fn ratio_text(ratio: &Ratio) -> String {
    let cost = |cost: Spread| format!("server time {}", cost.text(2));
    format!(
        "  {:<44}rate {:<24}{}",
        format!("{} / {}", ratio.server, ratio.against),
        ratio.rate.text(2),
        ratio.server_microseconds.map(cost).unwrap_or_default(),
    )
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

/// What a reader needs to know of the machine.
pub fn machine() -> Value {
    let first = |file: &str, key: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text
            .lines()
            .find(|line| line.starts_with(key))
            .unwrap_or("");
        line.split_once(':')
            .map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "processor": first("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": kernel.trim(),
    })
}

/// The first line that each program says of its version.
fn versions(servers: &[ServerKind]) -> Value {
    let mut programs: Vec<&str> = servers
        .iter()
        .filter_map(|server| server.program())
        .collect();
    programs.push("fio");
    programs.sort_unstable();
    programs.dedup();
    let version = |program: &&str| {
        let output = std::process::Command::new(program)
            // nbd-server knows no long form.
            .arg(if *program == "nbd-server" {
                "-V"
            } else {
                "--version"
            })
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Some(text.lines().next()?.to_owned())
    };
    programs.iter().filter_map(version).collect()
}
