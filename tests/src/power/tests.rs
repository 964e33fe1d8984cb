//! The storage by itself: what a power cut takes, what it leaves, and that programs can use it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, Flock, FlockArg, OFlag, fallocate};
use nix::sys::signal::Signal;

use super::{Fate, Machine, with_machine};
use crate::process::{Daemon, run};
use crate::seed::Random;
use crate::site::data_ranges;

const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);
/// Enough for each of two outcomes with a chance of one in four.
const SEEDS: u64 = 60;

/// A durable file of two pages.
fn make_file(machine: &Machine) -> std::path::PathBuf {
    let path = machine.storage().join("file");
    let file = File::create_new(&path).unwrap();
    file.write_all_at(&[1; 2 * PAGE], 0).unwrap();
    file.sync_all().unwrap();
    sync_folder(machine);
    path
}

fn sync_folder(machine: &Machine) {
    File::open(machine.storage()).unwrap().sync_all().unwrap();
}

/// Content of the file, and of a second and a third try: what each fate makes of the same changes.
fn after(machine: &mut Machine, fate: Fate<'_>) {
    machine.power_off();
    machine.power_on(fate);
}

/// First bytes of both pages.
fn first_bytes(path: &Path) -> [u8; 2] {
    let bytes = fs::read(path).unwrap();
    [bytes[0], bytes[PAGE]]
}

/// A program in Python that has done what `script` says to the file and its mapping, and waits.
fn python(path: &Path, script: &str) -> Daemon {
    let head = "import sys, os, mmap, signal\n\
                fd = os.open(sys.argv[1], os.O_RDWR)\n\
                m = mmap.mmap(fd, 8192)\n";
    let tail = "\nprint('Ready', flush=True)\nsignal.pause()\n";
    let mut command = Command::new("python3");
    command.arg("-c").arg(format!("{head}{script}{tail}"));
    Daemon::start("python", command.arg(path))
}

#[test]
fn unsynced_data_can_vanish_and_survive() {
    with_machine(|machine| {
        let path = make_file(machine);
        let write = |byte: u8| {
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[byte; PAGE], 0).unwrap();
        };
        write(2);
        assert_eq!(first_bytes(&path), [2, 1]);
        after(machine, Fate::Lost);
        assert_eq!(first_bytes(&path), [1, 1]);
        write(3);
        after(machine, Fate::Kept);
        assert_eq!(first_bytes(&path), [3, 1]);
        let mut seen = [false; 2];
        for seed in 0..SEEDS {
            write(3);
            File::open(&path).unwrap().sync_all().unwrap();
            write(4);
            after(machine, Fate::Mixed(&mut Random::new(seed)));
            let [first, second] = first_bytes(&path);
            assert!((3..=4).contains(&first) && second == 1);
            seen[usize::from(first - 3)] = true;
        }
        assert_eq!(seen, [true; 2]);
    });
}

#[test]
fn synced_data_never_vanish() {
    with_machine(|machine| {
        let path = make_file(machine);
        for seed in 0..SEEDS {
            let byte = 10 + seed as u8;
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[byte; PAGE], PAGE as u64).unwrap();
            if seed % 2 == 0 {
                file.sync_data().unwrap();
            } else {
                file.sync_all().unwrap();
            }
            drop(file);
            after(machine, Fate::Mixed(&mut Random::new(seed)));
            assert_eq!(first_bytes(&path), [1, byte]);
        }
    });
}

#[test]
fn stores_to_a_mapping_can_vanish_and_survive() {
    with_machine(|machine| {
        let path = make_file(machine);
        let store = "m[0] = m[4096] = 2";
        python(&path, store).kill();
        // The kernel has written them back by now; that is no sync.
        assert_eq!(first_bytes(&path), [2, 2]);
        after(machine, Fate::Lost);
        assert_eq!(first_bytes(&path), [1, 1]);
        python(&path, store).kill();
        after(machine, Fate::Kept);
        assert_eq!(first_bytes(&path), [2, 2]);
        // Where the power goes first, nobody has written them back.
        let program = python(&path, "m[0] = 3");
        machine.power_off();
        program.kill();
        machine.power_on(Fate::Kept);
        assert_eq!(first_bytes(&path), [2, 2]);
        let program = python(&path, "m[0] = 3");
        machine.write_back(&path);
        machine.power_off();
        program.kill();
        machine.power_on(Fate::Kept);
        assert_eq!(first_bytes(&path), [3, 2]);
    });
}

#[test]
fn syncs_of_a_mapping_keep_its_stores() {
    with_machine(|machine| {
        let path = make_file(machine);
        let cases = [
            ("m[0] = m[4096] = 2; m.flush()", [2, 2]),
            ("m[0] = m[4096] = 3; m.flush(0, 4096)", [3, 2]),
            ("m[4096] = 4; os.fdatasync(fd)", [3, 4]),
            ("m[0] = 5; os.fsync(fd); m[4096] = 6", [5, 4]),
        ];
        for (script, expected) in cases {
            let program = python(&path, script);
            machine.freeze();
            program.signal(Signal::SIGKILL);
            machine.power_off();
            program.kill();
            machine.power_on(Fate::Lost);
            assert_eq!(first_bytes(&path), expected, "{script}");
        }
    });
}

#[test]
fn writes_that_are_durable_by_their_flags_are_kept() {
    with_machine(|machine| {
        let path = make_file(machine);
        let open = |flag: OFlag| {
            let mut options = OpenOptions::new();
            options
                .write(true)
                .custom_flags(flag.bits())
                .open(&path)
                .unwrap()
        };
        open(OFlag::O_DSYNC).write_all_at(&[2; PAGE], 0).unwrap();
        after(machine, Fate::Lost);
        assert_eq!(first_bytes(&path), [2, 1]);
        open(OFlag::O_SYNC).write_all_at(&[3; 512], 0).unwrap();
        after(machine, Fate::Lost);
        assert_eq!(first_bytes(&path), [3, 1]);
        let page = "b = mmap.mmap(-1, 4096); b.write(bytes([N]) * 4096); ";
        let direct = "os.close(fd); fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT); ";
        let cases = [
            ("os.pwritev(fd, [b], 4096, os.RWF_DSYNC)", [3, 4]),
            ("os.pwritev(fd, [b], 0)", [3, 4]),
            ("DIRECT os.pwritev(fd, [b], 0)", [3, 4]),
            ("DIRECT os.pwritev(fd, [b], 0, os.RWF_DSYNC)", [8, 4]),
            ("DIRECT os.pwritev(fd, [b], 4096); os.fdatasync(fd)", [8, 8]),
        ];
        for (script, expected) in cases {
            let number = if expected[0] == 8 { "8" } else { "4" };
            let script = script.replace("DIRECT ", direct);
            python(&path, &format!("{}{script}", page.replace('N', number))).kill();
            after(machine, Fate::Lost);
            assert_eq!(first_bytes(&path), expected, "{script}");
        }
    });
}

#[test]
fn a_rename_without_a_sync_of_its_folder_comes_out_either_way() {
    with_machine(|machine| {
        let mut seen = [false; 2];
        let path = machine.storage().join("file");
        let beside = machine.storage().join("file.new");
        let write = |path: &Path, byte: u8| {
            fs::write(path, [byte; PAGE]).unwrap();
            File::open(path).unwrap().sync_all().unwrap();
        };
        for seed in 0..SEEDS {
            write(&path, 1);
            write(&beside, 2);
            sync_folder(machine);
            fs::rename(&beside, &path).unwrap();
            after(machine, Fate::Mixed(&mut Random::new(seed)));
            let content = fs::read(&path).unwrap();
            assert!(content == [1; PAGE] || content == [2; PAGE]);
            let is_new = content[0] == 2;
            assert_eq!(beside.exists(), !is_new);
            seen[usize::from(is_new)] = true;
        }
        assert_eq!(seen, [true; 2]);
        write(&beside, 3);
        fs::rename(&beside, &path).unwrap();
        sync_folder(machine);
        after(machine, Fate::Lost);
        assert_eq!(fs::read(&path).unwrap(), [3; PAGE]);
    });
}

#[test]
fn names_need_a_sync_of_their_folder() {
    with_machine(|machine| {
        let synced = make_file(machine);
        let folder = machine.storage().join("folder");
        fs::create_dir(&folder).unwrap();
        File::create(folder.join("file"))
            .unwrap()
            .sync_all()
            .unwrap();
        fs::remove_file(&synced).unwrap();
        after(machine, Fate::Lost);
        assert!(synced.exists() && !folder.exists());
        fs::create_dir(&folder).unwrap();
        File::create(folder.join("file")).unwrap();
        File::open(&folder).unwrap().sync_all().unwrap();
        fs::remove_file(&synced).unwrap();
        sync_folder(machine);
        after(machine, Fate::Lost);
        assert!(!synced.exists() && folder.join("file").exists());
        assert_eq!(fs::read_dir(machine.storage()).unwrap().count(), 1);
    });
}

#[test]
fn nothing_arrives_once_the_power_is_gone() {
    with_machine(|machine| {
        let path = make_file(machine);
        // It stores and syncs for ever.
        let program = python(&path, "m[0] = 2");
        let busy = python(
            &path,
            "import threading\ndef work():\n while True:\n  m[4096] = (m[4096] + 1) % 256; m.flush()\n\
             threading.Thread(target=work).start()",
        );
        machine.freeze_after(20);
        assert!(
            machine.await_frozen(PATIENCE),
            "{} changes",
            machine.changes()
        );
        let changes = machine.changes();
        program.signal(Signal::SIGKILL);
        busy.signal(Signal::SIGKILL);
        machine.power_off();
        program.kill();
        busy.kill();
        assert_eq!(machine.changes(), changes);
        machine.power_on(Fate::Lost);
        let second = first_bytes(&path)[1];
        assert!(second > 5, "{second}");
    });
}

#[test]
fn programs_find_what_they_need() {
    with_machine(|machine| {
        let path = machine.storage().join("sparse");
        let file = File::create_new(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4 * PAGE], 8 * PAGE as u64).unwrap();
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let page = PAGE as i64;
        fallocate(&file, punch, 9 * page, page).unwrap();
        let page = PAGE as u64;
        let expected = [(8 * page, 9 * page), (10 * page, 12 * page)];
        assert_eq!(data_ranges(&path), expected);
        fallocate(
            &file,
            FallocateFlags::FALLOC_FL_ZERO_RANGE,
            (8 * page) as i64,
            512,
        )
        .unwrap();
        let mut sectors = [9; 1024];
        file.read_exact_at(&mut sectors, 8 * page).unwrap();
        assert_eq!((sectors[511], sectors[512]), (0, 1));
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        let other = File::open(&path).unwrap();
        let (_, refused) = Flock::lock(other, FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(refused, nix::errno::Errno::EWOULDBLOCK);
        drop(locked);
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        let room = nix::sys::statvfs::statvfs(&machine.storage()).unwrap();
        assert!(room.blocks_available() > 1 << 20);
    });
}

#[test]
fn each_boot_has_its_own_number() {
    let outside = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let inside = with_machine(|machine| {
        let read = || run(Command::new("cat").arg("/proc/sys/kernel/random/boot_id")).success();
        let first = read();
        after(machine, Fate::Kept);
        [first, read()]
    });
    let Some([first, second]) = inside else {
        return;
    };
    assert_ne!(first, second);
    assert!(first.len() == outside.len() && first != outside && second != outside);
    let still = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(still, outside);
}
