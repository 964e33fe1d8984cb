//! The whole line with a real file system: mkfs, mount, files, recovery points, restore, fsck.
//!
//! Where this machine lets us mount (administrator, fuse, loop devices), the file system is mounted
//! through nbdfuse and the tracker is killed under it. Everywhere, an ext4 image is copied through NBD.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tests::process::{require, run, workspace};
use tests::site::{Site, assert_same};

const MIB: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

fn fsck(image: &Path) {
    run(Command::new("e2fsck")
        .env("PATH", path())
        .arg("-fn")
        .arg(image))
    .success();
}

/// Administrators' programs are not in everybody's PATH.
fn path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
}

#[test]
fn an_image_with_files_is_copied_in_and_restored() {
    require(&["mkfs.ext4", "e2fsck", "nbdcopy"]);
    let mut site = Site::new(&[("disk", 128 * MIB)]);
    site.interval = "200ms".to_owned();
    let tracker = site.start_tracker();
    site.protect();
    let shipper = site.start_shipper();
    let mut points = Vec::new();
    for folder in ["docs", "tracker/src", "shipper/src"] {
        let image = site.path("source.img");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(128 * MIB).unwrap();
        run(Command::new("mkfs.ext4")
            .env("PATH", path())
            .args(["-q", "-F", "-d"])
            .arg(workspace().join(folder))
            .arg(&image))
        .success();
        run(Command::new("nbdcopy")
            .arg("--flush")
            .arg(&image)
            .arg(site.uri("disk")))
        .success();
        let point = site.cut();
        let copy = site.path(&format!("copy-{point}"));
        std::fs::rename(&image, &copy).unwrap();
        points.push((point, copy));
    }
    for (point, copy) in &points {
        let restored = site.restore(point, "disk", &format!("restored-{point}"));
        assert_same(copy, &restored);
        fsck(&restored);
    }
    let newest = site.restore("latest", "disk", "restored-latest");
    assert_same(&points.last().unwrap().1, &newest);
    site.shipper(&["verify", "--data"]).success();
    shipper.stop();
    tracker.stop();
}

/// A disk mounted through nbdfuse and a loop device; dropping it takes everything apart.
struct Mounted {
    fuse: Child,
    fuse_folder: PathBuf,
    device: Option<String>,
    folder: PathBuf,
}

impl Mounted {
    fn attach(site: &Site) -> Self {
        let fuse_folder = site.path("fuse");
        let folder = site.path("mnt");
        std::fs::create_dir_all(&fuse_folder).unwrap();
        std::fs::create_dir_all(&folder).unwrap();
        let fuse = Command::new("nbdfuse")
            .arg(&fuse_folder)
            .arg(site.uri("disk"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut mounted = Self {
            fuse,
            fuse_folder,
            device: None,
            folder,
        };
        let file = mounted.fuse_folder.join("nbd");
        let deadline = Instant::now() + DEADLINE;
        while !file.exists() {
            assert!(Instant::now() < deadline, "nbdfuse does not mount");
            std::thread::yield_now();
        }
        let device = run(Command::new("losetup")
            .env("PATH", path())
            .args(["--find", "--show"])
            .arg(&file))
        .success();
        mounted.device = Some(device.trim().to_owned());
        mounted
    }

    fn device(&self) -> &str {
        self.device.as_deref().unwrap()
    }

    fn mount(&self) {
        run(Command::new("mount").arg(self.device()).arg(&self.folder)).success();
    }

    /// Takes everything apart in good order, so that all writes have arrived.
    fn unmount(&self) {
        run(Command::new("umount").arg(&self.folder)).success();
        run(Command::new("losetup")
            .env("PATH", path())
            .args(["--detach", self.device()]))
        .success();
        run(Command::new("umount").arg(&self.fuse_folder)).success();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let quietly = |command: &mut Command| {
            let _not_there = command
                .env("PATH", path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        };
        quietly(Command::new("umount").arg("--lazy").arg(&self.folder));
        if let Some(device) = &self.device {
            quietly(Command::new("losetup").arg("--detach").arg(device));
        }
        quietly(Command::new("umount").arg("--lazy").arg(&self.fuse_folder));
        let _gone = self.fuse.kill();
        let _reaped = self.fuse.wait();
    }
}

fn can_mount() -> bool {
    nix::unistd::geteuid().is_root()
        && Path::new("/dev/fuse").exists()
        && Path::new("/dev/loop-control").exists()
}

fn copy_tree(from: &str, to: &Path) {
    run(Command::new("cp")
        .arg("-a")
        .arg(workspace().join(from))
        .arg(to))
    .success();
    run(Command::new("sync").arg("--file-system").arg(to)).success();
}

#[test]
fn a_mounted_file_system_survives_kills() {
    if !can_mount() {
        println!("not run: mounting needs root, /dev/fuse and loop devices");
        return;
    }
    require(&["nbdfuse", "losetup", "mkfs.ext4", "e2fsck"]);
    let mut site = Site::new(&[("disk", 128 * MIB)]);
    site.interval = "200ms".to_owned();
    let tracker = site.start_tracker();
    site.protect();
    let shipper = site.start_shipper();

    let mounted = Mounted::attach(&site);
    run(Command::new("mkfs.ext4")
        .env("PATH", path())
        .args(["-q", mounted.device()]))
    .success();
    mounted.mount();
    copy_tree("tracker/src", &mounted.folder.join("before"));
    site.cut();
    // Both die under the mounted file system; what was synced must be there afterwards.
    tracker.kill();
    shipper.kill();
    drop(mounted);

    let tracker = site.start_tracker();
    let shipper = site.start_shipper();
    let mounted = Mounted::attach(&site);
    mounted.mount();
    run(Command::new("diff")
        .arg("-r")
        .arg(workspace().join("tracker/src"))
        .arg(mounted.folder.join("before")))
    .success();
    copy_tree("shipper/src", &mounted.folder.join("after"));
    mounted.unmount();
    let point = site.cut();
    let restored = site.restore(&point, "disk", "restored");
    assert_same(&site.image("disk"), &restored);
    fsck(&restored);
    shipper.stop();
    tracker.stop();
}
