//! fio reads given blocks of an image at depth: through the page cache, where the tracker uses it, else from the storage.

use std::fmt::Write;
use std::process::Command;

use serde_json::Value;

use crate::Result;
use crate::pattern::BLOCK_BYTES;
use crate::servers::Running;

/// Longest read.
const READ_BLOCKS_MAX: u32 = 256;

/// Bytes a second of reading these blocks, which are in order.
///
/// # Errors
///
/// fio fails, or its report has another form.
pub fn rate(server: &Running, blocks: &[u32], direct: bool) -> Result<f64> {
    let image = server.image();
    let image = image.display();
    let mut log = format!("fio version 2 iolog\n{image} add\n{image} open\n");
    for extent in blocks.chunk_by(|a, b| a + 1 == *b) {
        for piece in extent.chunks(READ_BLOCKS_MAX as usize) {
            let offset = u64::from(piece[0]) * BLOCK_BYTES as u64;
            writeln!(log, "{image} read {offset} {}", piece.len() * BLOCK_BYTES)?;
        }
    }
    writeln!(log, "{image} close")?;
    let path = server.folder().join("extents.iolog");
    std::fs::write(&path, log)?;
    let output = Command::new("fio")
        .args(["--output-format=json", "--name=read", "--ioengine=io_uring"])
        .args(["--iodepth=32", "--thread=1", "--invalidate=0"])
        .arg(format!("--direct={}", u8::from(direct)))
        .arg(format!("--read_iolog={}", path.display()))
        .current_dir(server.folder())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio failed: {errors}{text}").into());
    }
    let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or("");
    let report: Value = serde_json::from_str(json)?;
    let number = |path: &str| {
        let value = report.pointer(path).and_then(Value::as_f64);
        value.ok_or_else(|| format!("fio's report lacks {path}"))
    };
    let milliseconds = number("/jobs/0/read/runtime")?.max(1.0);
    Ok(number("/jobs/0/read/io_bytes")? * 1000.0 / milliseconds)
}
