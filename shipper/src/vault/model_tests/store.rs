//! A store in memory, and an actor's door to it: every request waits for its turn.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{Created, Listed, Store};

/// An object, and what stands for its content where states are compared: times and random names differ from run to run.
#[derive(Clone, Debug)]
struct Object {
    content: Bytes,
    origin: u64,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Object>,
    /// Counts changes.
    changes: u64,
}

/// The store.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<Inner>>);

fn hash_of(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A key without what is random in it.
fn stable(key: &str) -> &str {
    match key.contains("/pins/") {
        true => &key[..key.len() - 8],
        false => key,
    }
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// How often it was changed.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Stands for everything in it.
    pub fn hash(&self) -> u64 {
        let inner = self.lock();
        let all = inner.objects.iter();
        hash_of(
            all.map(|(key, object)| (stable(key), object.origin))
                .collect::<Vec<_>>(),
        )
    }

    /// A copy that goes its own ways.
    pub fn fork(&self) -> Self {
        let inner = self.lock();
        Self(Arc::new(Mutex::new(Inner {
            objects: inner.objects.clone(),
            changes: 0,
        })))
    }

    fn present(&self, key: &str) -> bool {
        self.lock().objects.contains_key(key)
    }

    fn create_as(&self, key: &str, content: Bytes, origin: u64) -> Created {
        let mut inner = self.lock();
        if inner.objects.contains_key(key) {
            return Created::Exists;
        }
        inner
            .objects
            .insert(key.to_owned(), Object { content, origin });
        inner.changes += 1;
        Created::New
    }
}

impl Store for Memory {
    fn create(&self, key: &str, content: Bytes) -> Result<Created> {
        Ok(self.create_as(key, content, hash_of(key)))
    }

    fn replace(&self, key: &str, _content: Bytes) -> Result<()> {
        panic!("{key} is replaced, which nobody may do");
    }

    fn delete(&self, key: &str) -> Result<bool> {
        let mut inner = self.lock();
        let removed = inner.objects.remove(key).is_some();
        inner.changes += u64::from(removed);
        Ok(removed)
    }

    fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        assert!(range.is_none(), "no part of {key} is read here");
        let inner = self.lock();
        let missing = || Error::new(ErrorKind::Missing, format!("No object {key}"));
        Ok(inner.objects.get(key).ok_or_else(missing)?.content.clone())
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        let inner = self.lock();
        let found = inner.objects.get(key);
        Ok(found.map(|object| object.content.len() as u64))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        let below = format!("{prefix}/");
        let inner = self.lock();
        let listed = inner.objects.iter();
        let listed = listed.filter(|(key, _)| key.starts_with(&below));
        Ok(listed
            .map(|(key, object)| Listed {
                key: key.clone(),
                size_bytes: object.content.len() as u64,
            })
            .collect())
    }
}

/// What an actor waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Its turn.
    Turn,
    /// That nobody reads any more who began before.
    Readers,
}

/// What an actor tells.
#[derive(Debug)]
pub enum Told {
    /// It waits, and this stands for all that it has seen.
    Waits(Wait, u64),
    /// It has ended.
    Ended,
}

/// An actor's answer to its wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Go on.
    Turn,
    /// The actor is dead: nothing it does reaches the store.
    Death,
}

/// An actor's way to the store.
#[derive(Debug)]
pub struct Door {
    pub memory: Memory,
    pub actor: usize,
    pub told: Sender<(usize, Told)>,
    pub grants: Receiver<Grant>,
    seen: Mutex<u64>,
    dead: Mutex<bool>,
}

impl Door {
    pub fn new(
        memory: Memory,
        actor: usize,
        told: Sender<(usize, Told)>,
        grants: Receiver<Grant>,
    ) -> Self {
        Self {
            memory,
            actor,
            told,
            grants,
            seen: Mutex::new(0),
            dead: Mutex::new(false),
        }
    }

    /// Waits; an error is the actor's death.
    pub fn wait(&self, wait: Wait) -> Result<()> {
        let mut dead = self.dead.lock().unwrap();
        if !*dead {
            let seen = *self.seen.lock().unwrap();
            self.told
                .send((self.actor, Told::Waits(wait, seen)))
                .unwrap();
            *dead = self.grants.recv() != Ok(Grant::Turn);
        }
        match *dead {
            true => Err(Error::new(ErrorKind::Stopped, "The actor is dead")),
            false => Ok(()),
        }
    }

    fn saw(&self, what: impl Hash) {
        let mut seen = self.seen.lock().unwrap();
        *seen = hash_of((*seen, what));
    }

    /// Objects that are never removed and never change: who looks at one after it was made sees the same whenever it does.
    fn is_settled(&self, key: &str) -> bool {
        let lasting =
            key == "vault.json" || key.contains("/generation/") || key.contains("/boundaries/");
        lasting && self.memory.present(key)
    }

    fn origin(&self, key: &str) -> u64 {
        self.memory.lock().objects[key].origin
    }
}

impl Store for Door {
    fn create(&self, key: &str, content: Bytes) -> Result<Created> {
        self.wait(Wait::Turn)?;
        let origin = hash_of((self.actor, *self.seen.lock().unwrap(), stable(key)));
        let created = self.memory.create_as(key, content, origin);
        self.saw((1, stable(key), created == Created::New));
        Ok(created)
    }

    fn replace(&self, key: &str, content: Bytes) -> Result<()> {
        self.memory.replace(key, content)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        self.wait(Wait::Turn)?;
        let removed = self.memory.delete(key)?;
        self.saw((2, stable(key), removed));
        Ok(removed)
    }

    fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        if !self.is_settled(key) {
            self.wait(Wait::Turn)?;
        }
        let found = self.memory.read(key, range);
        let origin = found.is_ok().then(|| self.origin(key));
        self.saw((3, stable(key), origin));
        found
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        if !self.is_settled(key) {
            self.wait(Wait::Turn)?;
        }
        let found = self.memory.size(key)?;
        self.saw((4, stable(key), found.is_some()));
        Ok(found)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.wait(Wait::Turn)?;
        let listed = self.memory.list(prefix)?;
        let keys: Vec<&str> = listed.iter().map(|object| stable(&object.key)).collect();
        self.saw((5, keys));
        Ok(listed)
    }
}
