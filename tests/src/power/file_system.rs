//! The storage as a file system: requests of the kernel, carried out on the tree.
//!
//! Files go through the page cache, so that they can be mapped; what is stored to a mapping arrives as
//! an ordinary WRITE when the kernel writes it back. A WRITE is not durable, except with `O_DSYNC`
//! or `O_SYNC` among its flags, which the kernel also sets for a single write with `RWF_DSYNC`.
//! Locks are the kernel's own affair. Nothing changes but through this mount, so the kernel may keep
//! what it knows for as long as it likes.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use nix::fcntl::{FallocateFlags, OFlag};
use nix::sys::stat::SFlag;
use nix::unistd::Whence;

use super::image::Image;
use super::state::{Storehouse, Tree};

/// How long the kernel may believe what it was told.
const VALID: Duration = Duration::from_secs(24 * 60 * 60);
/// Room that the file system says it has, in blocks of 4 KiB: 64 GiB.
const BLOCKS: u64 = 1 << 24;

/// A session's view of the storage.
pub struct PowerFs(pub Arc<Storehouse>);

impl PowerFs {
    fn change(&self, reply: ReplyEmpty, work: impl FnOnce(&mut Tree) -> Result<(), Errno>) {
        match self.0.serve(reply, true, work) {
            Some((reply, Ok(()))) => reply.ok(),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }
}

fn permissions(mode: u32, umask: u32) -> u16 {
    (mode & !umask & 0o7777) as u16
}

fn write(
    tree: &mut Tree,
    node: INodeNo,
    offset: u64,
    data: &[u8],
    flags: OpenFlags,
) -> Result<u32, Errno> {
    let image = tree.image(node.0)?;
    image.write(offset, data);
    if OFlag::from_bits_truncate(flags.0).intersects(OFlag::O_DSYNC | OFlag::O_SYNC) {
        image.sync_range(offset, data.len() as u64);
    }
    tree.node(node.0)?.touch();
    Ok(data.len() as u32)
}

fn allocate(
    image: &mut Image,
    offset: u64,
    length: u64,
    mode: FallocateFlags,
) -> Result<(), Errno> {
    let punches = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE;
    let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
    if !mode.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE) && end > image.size() {
        image.truncate(end);
    }
    if mode.intersects(punches) {
        image.punch(offset, length);
    }
    Ok(())
}

fn seek(image: &Image, offset: u64, whence: i32) -> Result<u64, Errno> {
    if whence == Whence::SeekData as i32 {
        image.next_data(offset).ok_or(Errno::ENXIO)
    } else if whence == Whence::SeekHole as i32 {
        image.next_hole(offset).ok_or(Errno::ENXIO)
    } else {
        Err(Errno::EINVAL)
    }
}

impl Filesystem for PowerFs {
    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.0.serve(reply, false, |tree| {
            let node = tree.find(parent.0, name)?;
            tree.attributes(node)
        });
        match found {
            Some((reply, Ok(attributes))) => reply.entry(&VALID, &attributes, Generation(0)),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.0.serve(reply, false, |tree| tree.attributes(node.0)) {
            Some((reply, Ok(attributes))) => reply.attr(&VALID, &attributes),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        _user: Option<u32>,
        _group: Option<u32>,
        size: Option<u64>,
        _accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _changed_too: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let done = self.0.serve(reply, true, |tree| {
            if let Some(size) = size {
                tree.image(node.0)?.truncate(size);
                tree.node(node.0)?.touch();
            }
            tree.node(node.0)?.set(mode, modified);
            tree.attributes(node.0)
        });
        match done {
            Some((reply, Ok(attributes))) => reply.attr(&VALID, &attributes),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn mknod(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        let kind = SFlag::from_bits_truncate(mode) & SFlag::S_IFMT;
        let made = self.0.serve(reply, true, |tree| {
            let kind = match kind {
                SFlag::S_IFSOCK => FileType::Socket,
                SFlag::S_IFREG => FileType::RegularFile,
                _ => return Err(Errno::EOPNOTSUPP),
            };
            tree.create(parent.0, name, kind, permissions(mode, umask))
        });
        match made {
            Some((reply, Ok(attributes))) => reply.entry(&VALID, &attributes, Generation(0)),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.0.serve(reply, true, |tree| {
            let kind = FileType::Directory;
            tree.create(parent.0, name, kind, permissions(mode, umask))
        });
        match made {
            Some((reply, Ok(attributes))) => reply.entry(&VALID, &attributes, Generation(0)),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.change(reply, |tree| tree.remove(parent.0, name));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.change(reply, |tree| tree.remove(parent.0, name));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let replaces = !flags.contains(RenameFlags::RENAME_NOREPLACE);
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = (
            (parent.0, name.to_owned()),
            (new_parent.0, new_name.to_owned()),
        );
        self.change(reply, |tree| tree.rename(from, to, replaces));
    }

    fn open(&self, _request: &Request, node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.0.serve(reply, false, |tree| tree.open(node.0)) {
            Some((reply, Ok(()))) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.0.serve(reply, true, |tree| {
            let kind = FileType::RegularFile;
            let attributes = tree.create(parent.0, name, kind, permissions(mode, umask))?;
            tree.open(attributes.ino.0)?;
            Ok::<_, Errno>(attributes)
        });
        match made {
            Some((reply, Ok(attributes))) => reply.created(
                &VALID,
                &attributes,
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn read(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.0.serve(reply, false, |tree| {
            Ok::<_, Errno>(tree.image(node.0)?.read(offset, size as usize))
        });
        match read {
            Some((reply, Ok(bytes))) => reply.data(&bytes),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    fn write(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let work = |tree: &mut Tree| write(tree, node, offset, data, flags);
        match self.0.serve(reply, true, work) {
            Some((reply, Ok(count))) => reply.written(count),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }

    /// Sent by every close, and promises nothing.
    fn flush(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        if let Some((reply, ())) = self.0.serve(reply, false, |_tree| ()) {
            reply.ok();
        }
    }

    fn release(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some((reply, ())) = self.0.serve(reply, false, |tree| tree.release(node.0)) {
            reply.ok();
        }
    }

    fn fsync(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.change(reply, |tree| {
            tree.node(node.0)?.sync();
            Ok(())
        });
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.change(reply, |tree| {
            tree.sync_names(node.0);
            Ok(())
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let listed = self.0.serve(reply, false, |tree| {
            let names = tree.names.entries(node.0).ok_or(Errno::ENOTDIR)?.clone();
            let mut found = vec![
                (node.0, FileType::Directory, ".".into()),
                (node.0, FileType::Directory, "..".into()),
            ];
            for (name, number) in names {
                let kind = tree.attributes(number)?.kind;
                found.push((number, kind, name));
            }
            Ok::<_, Errno>(found)
        });
        let (mut reply, found) = match listed {
            Some((reply, Ok(found))) => (reply, found),
            Some((reply, Err(errno))) => return reply.error(errno),
            None => return,
        };
        for (index, (number, kind, name)) in found.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*number), index as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _node: INodeNo, reply: ReplyStatfs) {
        if let Some((reply, ())) = self.0.serve(reply, false, |_tree| ()) {
            reply.statfs(
                BLOCKS,
                BLOCKS / 2,
                BLOCKS / 2,
                1 << 20,
                1 << 19,
                4096,
                255,
                4096,
            );
        }
    }

    fn fallocate(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode);
        self.change(reply, |tree| {
            allocate(tree.image(node.0)?, offset, length, mode)?;
            tree.node(node.0)?.touch();
            Ok(())
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.0.serve(reply, false, |tree| {
            let offset = u64::try_from(offset).map_err(|_| Errno::EINVAL)?;
            seek(tree.image(node.0)?, offset, whence)
        });
        match found {
            Some((reply, Ok(offset))) => reply.offset(offset as i64),
            Some((reply, Err(errno))) => reply.error(errno),
            None => {}
        }
    }
}
