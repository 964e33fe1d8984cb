//! Files and folders of the storage, and its switch: once frozen it answers nothing any more.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};

use super::image::{Fate, Image, PAGE_BYTES};
use super::names::{Names, NodeId, ROOT};

/// A file, a folder or a socket.
#[derive(Clone, Debug)]
pub struct Node {
    kind: FileType,
    /// Content of a file.
    pub image: Option<Image>,
    permissions: u16,
    modified: SystemTime,
    modified_durable: SystemTime,
    opens: u64,
}

impl Node {
    fn new(kind: FileType, permissions: u16) -> Self {
        let now = SystemTime::now();
        Self {
            kind,
            image: (kind == FileType::RegularFile).then(Image::default),
            permissions,
            modified: now,
            modified_durable: now,
            opens: 0,
        }
    }

    /// The times are durable, as after a sync.
    pub fn sync(&mut self) {
        self.modified_durable = self.modified;
        if let Some(image) = &mut self.image {
            image.sync();
        }
    }

    /// Its content changes now.
    pub fn touch(&mut self) {
        self.modified = SystemTime::now();
    }

    /// Sets permissions and time, where they are given.
    pub fn set(&mut self, mode: Option<u32>, modified: Option<TimeOrNow>) {
        if let Some(mode) = mode {
            self.permissions = (mode & 0o7777) as u16;
        }
        match modified {
            Some(TimeOrNow::SpecificTime(time)) => self.modified = time,
            Some(TimeOrNow::Now) => self.touch(),
            None => {}
        }
    }

    fn attributes(&self, number: NodeId) -> FileAttr {
        let size = self.image.as_ref().map_or(PAGE_BYTES, Image::size);
        let allocated = self.image.as_ref().map_or(0, Image::allocated_bytes);
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: allocated / 512,
            atime: self.modified,
            mtime: self.modified,
            ctime: self.modified,
            crtime: self.modified,
            kind: self.kind,
            perm: self.permissions,
            nlink: if self.kind == FileType::Directory {
                2
            } else {
                1
            },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: PAGE_BYTES as u32,
            flags: 0,
        }
    }

    fn after_power_cut(&self, fate: &mut Fate<'_>) -> Self {
        let image = self.image.as_ref().map(|image| image.after_power_cut(fate));
        let is_late = match fate {
            Fate::Lost => false,
            Fate::Kept => true,
            Fate::Mixed(random) => random.chance(1, 2),
        };
        let modified = if is_late {
            self.modified
        } else {
            self.modified_durable
        };
        Self {
            image,
            modified,
            modified_durable: modified,
            opens: 0,
            ..*self
        }
    }
}

/// All files and folders.
#[derive(Debug)]
pub struct Tree {
    /// Their names.
    pub names: Names,
    nodes: HashMap<NodeId, Node>,
    next: NodeId,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            names: Names::default(),
            nodes: HashMap::from([(ROOT, Node::new(FileType::Directory, 0o755))]),
            next: ROOT + 1,
        }
    }
}

impl Tree {
    /// A file or folder that the kernel knows.
    pub fn node(&mut self, number: NodeId) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&number).ok_or(Errno::ESTALE)
    }

    /// A file's content.
    pub fn image(&mut self, number: NodeId) -> Result<&mut Image, Errno> {
        self.node(number)?.image.as_mut().ok_or(Errno::EISDIR)
    }

    /// What the kernel is told of it.
    pub fn attributes(&mut self, number: NodeId) -> Result<FileAttr, Errno> {
        Ok(self.node(number)?.attributes(number))
    }

    /// What a name stands for.
    pub fn find(&self, folder: NodeId, name: &OsStr) -> Result<NodeId, Errno> {
        self.names.find(folder, name).ok_or(Errno::ENOENT)
    }

    /// Makes a file, folder or socket.
    pub fn create(
        &mut self,
        folder: NodeId,
        name: &OsStr,
        kind: FileType,
        permissions: u16,
    ) -> Result<FileAttr, Errno> {
        if self.names.find(folder, name).is_some() {
            return Err(Errno::EEXIST);
        }
        if self.names.entries(folder).is_none() {
            return Err(Errno::ENOENT);
        }
        let number = self.next;
        self.next += 1;
        if kind == FileType::Directory {
            self.names.add_folder(number);
        }
        self.nodes.insert(number, Node::new(kind, permissions));
        let place = (folder, name.to_owned());
        self.names.step(number, None, Some(place));
        self.attributes(number)
    }

    /// Takes a name away; of a folder it must be empty.
    pub fn remove(&mut self, folder: NodeId, name: &OsStr) -> Result<(), Errno> {
        let number = self.find(folder, name)?;
        self.check_empty(number)?;
        let place = (folder, name.to_owned());
        self.names.step(number, Some(place), None);
        Ok(())
    }

    /// Changes a name; what the new one stood for loses it.
    pub fn rename(
        &mut self,
        from: (NodeId, OsString),
        to: (NodeId, OsString),
        replaces: bool,
    ) -> Result<(), Errno> {
        let number = self.find(from.0, &from.1)?;
        if let Some(replaced) = self.names.find(to.0, &to.1) {
            if !replaces {
                return Err(Errno::EEXIST);
            }
            self.check_empty(replaced)?;
        }
        self.names.step(number, Some(from), Some(to));
        Ok(())
    }

    fn check_empty(&self, number: NodeId) -> Result<(), Errno> {
        match self.names.entries(number) {
            Some(entries) if !entries.is_empty() => Err(Errno::ENOTEMPTY),
            _ => Ok(()),
        }
    }

    /// Makes the names in a folder durable, and forgets what cannot come back.
    pub fn sync_names(&mut self, folder: NodeId) {
        self.names.sync(folder);
        let reachable = self.names.reachable();
        self.nodes
            .retain(|number, node| node.opens > 0 || reachable.contains(number));
        let nodes = self.nodes.keys().copied().collect();
        self.names.retain(&nodes);
    }

    /// Notes that a file was opened.
    pub fn open(&mut self, number: NodeId) -> Result<(), Errno> {
        self.node(number)?.opens += 1;
        Ok(())
    }

    /// Notes that a file was closed, by all that had it open or mapped.
    pub fn release(&mut self, number: NodeId) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.opens = node.opens.saturating_sub(1);
        }
    }

    /// What is left after a power cut.
    #[must_use]
    pub fn after_power_cut(&self, fate: &mut Fate<'_>) -> Self {
        let names = self.names.after_power_cut(fate);
        let mut numbers: Vec<NodeId> = names.reachable().into_iter().collect();
        // The order of the choices must not depend on that of a hash map.
        numbers.sort_unstable();
        let nodes = numbers
            .into_iter()
            .filter_map(|number| Some((number, self.nodes.get(&number)?.after_power_cut(fate))))
            .collect();
        Self {
            names,
            nodes,
            next: self.next,
        }
    }
}

/// What the switch guards.
#[derive(Default)]
struct Inner {
    tree: Tree,
    is_frozen: bool,
    /// Requests that still may change something before the storage freezes by itself.
    changes_left: Option<u64>,
    changes: u64,
    /// Replies that are never sent: a process without power does not wait for an error.
    withheld: Vec<Box<dyn Any + Send>>,
}

/// The tree behind a switch.
#[derive(Default)]
pub struct Storehouse {
    inner: Mutex<Inner>,
    froze: Condvar,
}

impl Storehouse {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out a request, or none if the power is gone: then its reply is withheld.
    ///
    /// A request that makes a change counts. The last one before the storage freezes is carried out or
    /// not; in neither case is it answered.
    pub fn serve<R: Any + Send, T>(
        &self,
        reply: R,
        changes: bool,
        work: impl FnOnce(&mut Tree) -> T,
    ) -> Option<(R, T)> {
        let mut inner = self.lock();
        if inner.is_frozen {
            inner.withheld.push(Box::new(reply));
            return None;
        }
        if changes {
            inner.changes += 1;
            match &mut inner.changes_left {
                Some(0) => {
                    inner.is_frozen = true;
                    if inner.changes.is_multiple_of(2) {
                        work(&mut inner.tree);
                    }
                    inner.withheld.push(Box::new(reply));
                    self.froze.notify_all();
                    return None;
                }
                Some(left) => *left -= 1,
                None => {}
            }
        }
        let done = work(&mut inner.tree);
        Some((reply, done))
    }

    /// Stops at once.
    pub fn freeze(&self) {
        self.lock().is_frozen = true;
        self.froze.notify_all();
    }

    /// Will stop at a request to come, after so many that change something.
    pub fn freeze_after(&self, changes: u64) {
        self.lock().changes_left = Some(changes);
    }

    /// Waits until it has stopped; false if it has not within the time.
    pub fn await_frozen(&self, limit: Duration) -> bool {
        let inner = self.lock();
        let (inner, _timeout) = self
            .froze
            .wait_timeout_while(inner, limit, |inner| !inner.is_frozen)
            .unwrap_or_else(PoisonError::into_inner);
        inner.is_frozen
    }

    /// Requests so far that changed something or made it durable.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// What survives takes the place of what was there; nobody may use it meanwhile.
    pub fn cut(&self, fate: &mut Fate<'_>) {
        let withheld = {
            let mut inner = self.lock();
            inner.tree = inner.tree.after_power_cut(fate);
            inner.is_frozen = false;
            inner.changes_left = None;
            std::mem::take(&mut inner.withheld)
        };
        drop(withheld);
    }
}
