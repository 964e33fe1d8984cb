//! Recovery points as a reader sees them: those that no boundary has made void.
//!
//! Order: manifests are listed or read first, then the newest boundary. So what is given out was a recovery point at a moment
//! after it was found, and whoever removes it later waits for those who have it.

use std::sync::Arc;

use tracker::extent::Epoch;

use super::boundary::{self, Boundary};
use super::manifest::{DiskPoint, Manifest};
use super::{Vault, aside, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::segment::frame::damaged;
use crate::segment::reference::SegmentRef;

impl Vault {
    /// Numbers of all manifests of a machine, void ones among them, in ascending order.
    ///
    /// # Errors
    ///
    /// The store cannot be listed.
    pub fn listed_manifests(&self, machine: &str) -> Result<Vec<Epoch>> {
        let prefix = layout::points_prefix(&self.keys.machine_in_keys(machine));
        let listed = self.store.list(&prefix)?;
        let mut points: Vec<_> = listed
            .iter()
            .filter_map(|object| layout::point_of(&object.key))
            .collect();
        points.sort_unstable();
        Ok(points)
    }

    /// The newest boundary of a machine.
    ///
    /// # Errors
    ///
    /// It is damaged, or the store cannot be read.
    pub fn boundary(&self, machine: &str) -> Result<Option<Arc<Boundary>>> {
        boundary::newest(self, machine)
    }

    /// Numbers of the recovery points of a machine, in ascending order.
    ///
    /// # Errors
    ///
    /// The store cannot be listed, or the newest boundary is damaged.
    pub fn points(&self, machine: &str) -> Result<Vec<Epoch>> {
        let listed = self.listed_manifests(machine)?;
        let Some(boundary) = self.boundary(machine)? else {
            return Ok(listed);
        };
        let mut points = Vec::new();
        for epoch in listed {
            if self.is_point(machine, epoch, &boundary)? {
                points.push(epoch);
            }
        }
        Ok(points)
    }

    /// Whether a listed manifest is that of a recovery point. A damaged one is, and whoever opens it is told.
    fn is_point(&self, machine: &str, epoch: Epoch, boundary: &Boundary) -> Result<bool> {
        if let Some(kept) = boundary.keeps(epoch) {
            return Ok(kept);
        }
        match self.read_manifest(machine, epoch) {
            Ok(manifest) => Ok(boundary.accepts(&manifest)),
            Err(error) if error.kind() == ErrorKind::Missing => Ok(false),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Reads and checks a manifest, void or not.
    ///
    /// # Errors
    ///
    /// `Missing`: there is none. `Corrupt`: it is damaged or another one's.
    pub fn read_manifest(&self, machine: &str, epoch: Epoch) -> Result<Manifest> {
        let key = self.manifest_key(machine, epoch);
        let bytes = self.store.read(&key, None).map_err(|error| {
            if error.kind() != ErrorKind::Missing {
                return error;
            }
            let what = format!("Machine {machine} has no recovery point {epoch}");
            Error::new(ErrorKind::Missing, what).with_source(error)
        })?;
        Manifest::decode(&bytes, &self.keys, &self.point_id(machine, epoch))
            .map_err(|what| damaged(&key, &what))
    }

    /// Opens a recovery point: reads and checks its manifest, and that no boundary has made it void.
    ///
    /// # Errors
    ///
    /// `Missing`: there is no such point, or it has been removed. `Corrupt`: the manifest is damaged or another one's.
    pub fn manifest(&self, machine: &str, epoch: Epoch) -> Result<Manifest> {
        let manifest = self.read_manifest(machine, epoch);
        let boundary = match &manifest {
            Err(error) if error.kind() != ErrorKind::Corrupt => None,
            _ => self.boundary(machine)?,
        };
        let accepts = |boundary: &Boundary| match &manifest {
            Ok(manifest) => boundary.accepts(manifest),
            Err(_) => boundary.keeps(epoch) != Some(false),
        };
        if boundary.is_some_and(|boundary| !accepts(&boundary)) {
            let what = format!(
                "Machine {machine} has no recovery point {epoch} any more: it has been removed, or was never completed"
            );
            return Err(Error::new(ErrorKind::Missing, what));
        }
        manifest
    }

    /// The newest recovery point of a machine that is not set aside; `None` if it has none.
    ///
    /// # Errors
    ///
    /// The store cannot be read, or the manifest is damaged.
    pub fn newest(&self, machine: &str) -> Result<Option<Manifest>> {
        let set_aside = aside::epochs(self, machine)?;
        let listed = self.listed_manifests(machine)?.into_iter().rev();
        for epoch in listed.filter(|epoch| !set_aside.contains(epoch)) {
            match self.manifest(machine, epoch) {
                Err(error) if error.kind() == ErrorKind::Missing => {}
                result => return result.map(Some),
            }
        }
        Ok(None)
    }

    /// All segments that a disk of a recovery point is made of, oldest first.
    ///
    /// # Errors
    ///
    /// What names them cannot be read.
    pub fn segments_of(&self, _machine: &str, disk: &DiskPoint) -> Result<Vec<SegmentRef>> {
        Ok(disk.segments.clone())
    }
}
