//! Real NBD clients against the tracker: libnbd's tools and its Python binding, qemu's, and fio.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use tests::chunks::committed_cut;
use tests::process::{require, run};
use tests::site::{Site, assert_same};

const MIB: u64 = 1 << 20;

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
    let source = site.random_file("source", 64 * MIB);
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
    let source = site.random_file("source", 32 * MIB);
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

/// Runs a script with a handle `h` that is not connected and the export's address in `uri`.
///
/// The binding belongs to the system's Python; another one may stand before it in the PATH.
fn nbdsh(uri: &str, script: &str) {
    require(&["nbdsh"]);
    let script = format!("uri = '{uri}'\n{script}");
    run(Command::new("nbdsh")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .args(["-c", &script]))
    .success();
}

/// The extents that `nbdinfo --map` or `qemu-img map` print as JSON: start, length and a field.
fn extents(json: &str, start: &str, field: &str) -> Vec<(u64, u64, String)> {
    let list: serde_json::Value = serde_json::from_str(json).unwrap();
    let list = list.as_array().unwrap();
    list.iter()
        .map(|extent| {
            let number = |name: &str| extent[name].as_u64().unwrap();
            (number(start), number("length"), extent[field].to_string())
        })
        .collect()
}

#[test]
fn libnbd_reads_holes_and_block_status() {
    let site = Site::new(&[("disk", 16 * MIB)]);
    let _tracker = site.start_tracker();
    let script = "\
for context in ['base:allocation', 'tidemark:dirty', 'qemu:dirty-bitmap:tidemark']:
    h.add_meta_context(context)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()
assert h.can_df() and h.can_cache() and h.can_fast_zero()
for context in ['base:allocation', 'tidemark:dirty', 'qemu:dirty-bitmap:tidemark']:
    assert h.can_meta_context(context)
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.pwrite(b'a' * 65536, 1 << 20)
chunks = []
data = h.pread_structured(4 << 20, 0, lambda data, at, kind, error: chunks.append((len(data), at, kind)))
assert data == bytes(1 << 20) + b'a' * 65536 + bytes((3 << 20) - 65536)
kinds = [kind for _, _, kind in chunks]
assert kinds == [nbd.READ_HOLE, nbd.READ_DATA, nbd.READ_HOLE], kinds
chunks.clear()
h.pread_structured(4 << 20, 0, lambda data, at, kind, error: chunks.append(kind), nbd.CMD_FLAG_DF)
assert chunks == [nbd.READ_DATA], chunks
found = {}
def note(context, offset, entries, error):
    found[context] = list(entries)
h.block_status(16 << 20, 0, note)
assert found['base:allocation'] == [1 << 20, 3, 65536, 0, (15 << 20) - 65536, 3], found
assert found['tidemark:dirty'] == [16 << 20, 1], found
assert found['qemu:dirty-bitmap:tidemark'] == [16 << 20, 1], found
h.block_status(1 << 20, 1 << 20, note, nbd.CMD_FLAG_REQ_ONE)
assert found['base:allocation'] == [65536, 0], found
h.cache(1 << 20, 0)
h.zero(65536, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(65536, 1 << 20) == bytes(65536)
h.set_strict_mode(0)
for request, expected in [
    (lambda: h.pread(512, 16 << 20), 'EINVAL'),
    (lambda: h.pread((32 << 20) + 1, 0), 'EINVAL'),
    (lambda: h.block_status(512, 16 << 20, note), 'EINVAL'),
]:
    try:
        request()
        raise SystemExit('no error: ' + expected)
    except nbd.Error as error:
        assert error.errno == expected, (error.errno, expected)
assert h.pread(512, 0) == bytes(512)
h.shutdown()
";
    nbdsh(&site.uri("disk"), script);
    let script = "\
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated() and not h.can_df()
h.pwrite(b'b' * 65536, 1 << 20)
assert h.pread(1 << 20, 1 << 20) == b'b' * 65536 + bytes((1 << 20) - 65536)
h.shutdown()
";
    nbdsh(&site.uri("disk"), script);
}

#[test]
fn nbdinfo_maps_holes_and_changes() {
    require(&["nbdinfo"]);
    let site = Site::new(&[("disk", 16 * MIB)]);
    let _tracker = site.start_tracker();
    let map = |context: &str| {
        let option = format!("--map={context}");
        let uri = site.uri("disk");
        let json = run(Command::new("nbdinfo").args(["--json", &option, &uri])).success();
        extents(&json, "offset", "type")
    };
    let number = |kind: u64| kind.to_string();
    assert_eq!(map("tidemark:dirty"), [(0, 16 * MIB, number(1))]);
    site.protect();
    let _shipper = site.start_shipper();
    committed_cut(&site);
    assert_eq!(map("tidemark:dirty"), [(0, 16 * MIB, number(0))]);
    site.connect("disk").write(MIB, &[1; 65536]).unwrap();
    for (context, rest, inside) in [("base:allocation", 3, 0), ("tidemark:dirty", 0, 1)] {
        let expected = [
            (0, MIB, number(rest)),
            (MIB, 65536, number(inside)),
            (MIB + 65536, 15 * MIB - 65536, number(rest)),
        ];
        assert_eq!(map(context), expected, "{context}");
    }
    let list = run(Command::new("nbdinfo").arg(site.uri("disk"))).success();
    for context in [
        "base:allocation",
        "tidemark:dirty",
        "qemu:dirty-bitmap:tidemark",
    ] {
        assert!(list.contains(context), "{list}");
    }
}

#[test]
fn nbdcopy_keeps_holes() {
    use std::os::unix::fs::MetadataExt;
    require(&["nbdcopy"]);
    let [from, to] = [(); 2].map(|()| Site::new(&[("disk", 64 * MIB)]));
    let (_from_tracker, _to_tracker) = (from.start_tracker(), to.start_tracker());
    let mut client = from.connect("disk");
    for at in [0, 10 * MIB, 63 * MIB] {
        client.write(at, &[6; 1 << 20]).unwrap();
    }
    run(Command::new("nbdcopy")
        .arg("--flush")
        .args([from.uri("disk"), to.uri("disk")]))
    .success();
    assert_same(&from.image("disk"), &to.image("disk"));
    let allocated = std::fs::metadata(to.image("disk")).unwrap().blocks() * 512;
    assert!(allocated <= 4 * MIB, "{allocated} bytes are allocated");
}

#[test]
fn qemu_img_maps_holes_and_changes() {
    require(&["qemu-img"]);
    let site = Site::new(&[("disk", 16 * MIB)]);
    let _tracker = site.start_tracker();
    site.protect();
    let _shipper = site.start_shipper();
    committed_cut(&site);
    site.connect("disk").write(MIB, &[1; 65536]).unwrap();
    let map = |more: &str, field: &str| {
        let socket = site.socket();
        let image = format!(
            "driver=nbd,server.type=unix,server.path={},export=disk{more}",
            socket.display()
        );
        let json =
            run(Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &image]))
                .success();
        extents(&json, "start", field)
    };
    let expected = |rest: bool, inside: bool| {
        [
            (0, MIB, rest.to_string()),
            (MIB, 65536, inside.to_string()),
            (MIB + 65536, 15 * MIB - 65536, rest.to_string()),
        ]
    };
    assert_eq!(map("", "data"), expected(false, true));
    assert_eq!(map("", "zero"), expected(true, false));
    // Of a bitmap qemu shows what is dirty as a hole.
    let bitmap = ",x-dirty-bitmap=qemu:dirty-bitmap:tidemark";
    assert_eq!(map(bitmap, "data"), expected(true, false));
    // What it negotiated shows in its trace: the option for extended headers from 8.2 on.
    let version = run(Command::new("qemu-img").arg("--version")).success();
    let number = version.split("version ").nth(1).unwrap();
    let mut parts = number
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap(), parts.next().unwrap());
    let uri = site.uri("disk");
    let traced = run(Command::new("qemu-img").args(["-T", "nbd_*", "map", "-f", "raw", &uri]));
    if version >= (8, 2) {
        assert!(traced.err.contains("extended headers"), "{}", traced.err);
    }
    traced.success();
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
