//! Real NBD clients against the tracker: libnbd's tools and its Python binding, qemu's, and fio.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use tests::process::{require, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};

const MIB: u64 = 1 << 20;

fn random_file(site: &Site, name: &str, size: u64) -> std::path::PathBuf {
    let path = site.path(name);
    let mut bytes = Random::new(size).bytes(size as usize);
    let hole = bytes.len() / 4..bytes.len() / 2;
    bytes[hole].fill(0);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn nbdinfo_describes_and_lists() {
    require(&["nbdinfo"]);
    let site = Site::new(&[("first", MIB), ("second", 3 * MIB)]);
    let _tracker = site.start_tracker();
    let json = run(Command::new("nbdinfo").args(["--json", &site.uri("second")])).success();
    assert!(json.contains(&(3 * MIB).to_string()), "{json}");
    let uri = format!("nbd+unix:///?socket={}", site.socket().display());
    let list = run(Command::new("nbdinfo").args(["--list", &uri])).success();
    assert!(list.contains("first") && list.contains("second"), "{list}");
    for ability in ["flush", "fua", "trim", "zero", "multi-conn"] {
        run(Command::new("nbdinfo").args(["--can", ability, &site.uri("first")])).success();
    }
    let read_only = run(Command::new("nbdinfo").args(["--is", "read-only", &site.uri("first")]));
    assert_eq!(read_only.status.code(), Some(2), "2 means no");
}

#[test]
fn nbdcopy_both_ways() {
    require(&["nbdcopy"]);
    let site = Site::new(&[("disk", 64 * MIB)]);
    let _tracker = site.start_tracker();
    let source = random_file(&site, "source", 64 * MIB);
    run(Command::new("nbdcopy")
        .arg("--flush")
        .arg(&source)
        .arg(site.uri("disk")))
    .success();
    assert_same(&source, &site.image("disk"));
    let back = site.path("back");
    run(Command::new("nbdcopy").arg(site.uri("disk")).arg(&back)).success();
    assert_same(&source, &back);
    // The same over several connections and with large requests.
    let options = [
        "--connections=4",
        "--request-size=1048576",
        "--destination-is-zero",
    ];
    let other = Site::new(&[("disk", 64 * MIB)]);
    let _other_tracker = other.start_tracker();
    run(Command::new("nbdcopy")
        .args(options)
        .arg(site.uri("disk"))
        .arg(other.uri("disk")))
    .success();
    assert_same(&source, &other.image("disk"));
}

#[test]
fn qemu_img_reads_writes_and_compares() {
    require(&["qemu-img"]);
    let site = Site::new(&[("disk", 32 * MIB)]);
    let _tracker = site.start_tracker();
    let source = random_file(&site, "source", 32 * MIB);
    let info = run(Command::new("qemu-img").args(["info", &site.uri("disk")])).success();
    assert!(info.contains("33554432"), "{info}");
    run(Command::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "raw"])
        .arg(&source)
        .arg(site.uri("disk")))
    .success();
    run(Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw"])
        .arg(&source)
        .arg(site.uri("disk")))
    .success();
    let back = site.path("back.qcow2");
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", &site.uri("disk")])
        .arg(&back))
    .success();
    run(Command::new("qemu-img")
        .arg("compare")
        .arg(&source)
        .arg(&back)
        .args(["-f", "raw"]))
    .success();
}

#[test]
fn qemu_io_writes_zeroes_and_discards() {
    require(&["qemu-io"]);
    let site = Site::new(&[("disk", 16 * MIB)]);
    let _tracker = site.start_tracker();
    let out = run(Command::new("qemu-io")
        .args(["-f", "raw", "-d", "unmap"])
        .args(["-c", "write -P 0xab 0 4M", "-c", "write -f -P 0xcd 4M 64k"])
        .args([
            "-c",
            "write -z 1M 1M",
            "-c",
            "write -z -u 2M 1M",
            "-c",
            "discard 3M 1M",
            "-c",
            "flush",
        ])
        .args([
            "-c",
            "read -P 0xab 0 1M",
            "-c",
            "read -P 0 1M 3M",
            "-c",
            "read -P 0xcd 4M 64k",
        ])
        .args([
            "-c",
            "aio_write -P 1 8M 1M",
            "-c",
            "aio_write -P 2 9M 1M",
            "-c",
            "aio_flush",
        ])
        .args(["-c", "read -P 1 8M 1M", "-c", "read -P 2 9M 1M"])
        .arg(site.uri("disk")))
    .success();
    assert!(!out.contains("failed") && !out.contains("error"), "{out}");
}

#[test]
fn libnbd_in_python() {
    require(&["nbdsh"]);
    let site = Site::new(&[("disk", 16 * MIB)]);
    let _tracker = site.start_tracker();
    let script = "\
assert h.get_size() == 16 << 20
assert h.can_multi_conn() and h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero()
assert not h.is_read_only()
h.pwrite(b'a' * 1000, 100, nbd.CMD_FLAG_FUA)
assert h.pread(1000, 100) == b'a' * 1000
h.zero(500, 100)
h.flush()
h.trim(4096, 0)
done = []
buffer = nbd.Buffer.from_bytearray(bytearray(b'b' * 4096))
for index in range(64):
    h.aio_pwrite(buffer, index * 4096, completion=lambda error: done.append(error.value) or 1)
while len(done) < 64:
    h.poll(-1)
assert set(done) == {0}
h.set_strict_mode(0)
for request, expected in [
    (lambda: h.pread(512, 16 << 20), 'EINVAL'),
    (lambda: h.pwrite(b'x' * 512, 16 << 20), 'ENOSPC'),
    (lambda: h.zero(512, 16 << 20), 'ENOSPC'),
    (lambda: h.trim(512, 16 << 20), 'EINVAL'),
]:
    try:
        request()
        raise SystemExit('no error: ' + expected)
    except nbd.Error as error:
        assert error.errno == expected, (error.errno, expected)
assert h.pread(4096, 63 * 4096) == b'b' * 4096
h.shutdown()
";
    // The binding belongs to the system's Python; another one may stand before it in the PATH.
    run(Command::new("nbdsh")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-u", &site.uri("disk"), "-c", script]))
    .success();
}

#[test]
fn fio_verifies_what_it_wrote() {
    require(&["fio"]);
    let site = Site::new(&[("disk", 64 * MIB)]);
    let _tracker = site.start_tracker();
    let job = format!(
        "[global]\nioengine=nbd\nuri={}\nsize=32m\nverify=crc32c\nverify_fatal=1\ndo_verify=1\n\
         iodepth=16\n[one]\nrw=randwrite\nbs=4k\nfsync=64\n[two]\nstonewall\noffset=32m\n\
         rw=randwrite\nbsrange=512-128k\nbs_unaligned=0\n",
        site.uri("disk")
    );
    let file = site.path("verify.fio");
    std::fs::write(&file, job).unwrap();
    let out = run(Command::new("fio").current_dir(site.root()).arg(&file)).success();
    assert!(out.contains("err= 0"), "{out}");
}
