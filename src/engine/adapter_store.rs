//! The adapters of an engine below its device: read and checked when somebody brings them, kept in the host's memory as far
//! as a budget goes, read again from their files otherwise.
//!
//! Of an adapter that is in use nowhere no more stays than its digest and the name of its folder or file, so there may be
//! thousands. Files are read rather than mapped: a mapped file that somebody cuts short would end the process. Used by
//! threads that may wait; the engine's own is none of them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use uuid::Uuid;

use super::adapters::{AdapterLoader, Loaded, LoadedAdapter};
use crate::adapters::{Adapter, AdapterDigest, BaseShapes, HostCopies, MAX_ADAPTER_BYTES, PackedAdapter};
use crate::backend::LoraLoader;
use crate::paging::Tier;
use crate::planted::{self, Bug};
use crate::telemetry::EngineMetrics;
use crate::{Error, Result, malformed};

/// Host memory for adapters unless told otherwise.
pub const DEFAULT_ADAPTER_HOST_BYTES: usize = 4 << 30;

/// What an adapter has to fit.
#[derive(Debug, Clone, Copy)]
pub struct AdapterSpace {
    /// The modules of the model.
    pub shapes: BaseShapes,
    /// Bytes of a page on the device.
    pub page_bytes: usize,
    /// Pages that there are.
    pub num_pages: usize,
    /// Host memory for adapters that are arranged for the device.
    pub host_bytes: usize,
}

/// An [`AdapterLoader`] for one kind of device.
pub struct AdapterStore<L: LoraLoader> {
    id: Uuid,
    loader: L,
    space: AdapterSpace,
    kept: Mutex<Kept<L>>,
    metrics: Arc<EngineMetrics>,
}

struct Kept<L: LoraLoader> {
    copies: HostCopies<PackedAdapter<L>>,
    /// Adapters that were read, to see whose copies nobody can ask for any more.
    known: HashMap<AdapterDigest, Weak<Loaded>>,
}

impl<L: LoraLoader> AdapterStore<L> {
    /// Nothing yet, arranged by `loader`.
    pub fn new(loader: L, space: AdapterSpace, metrics: Arc<EngineMetrics>) -> Self {
        let kept = Kept { copies: HostCopies::new(space.host_bytes), known: HashMap::new() };
        Self { id: Uuid::new_v4(), loader, space, kept: Mutex::new(kept), metrics }
    }

    /// Which of all stores this is.
    pub(super) fn id(&self) -> Uuid {
        self.id
    }

    /// What arranges adapters.
    pub(super) fn loader(&self) -> &L {
        &self.loader
    }

    /// An adapter as it lies in pages, and where it was.
    ///
    /// # Errors
    /// Those of reading it; `Format` when it is another one by now.
    pub(super) fn fetch(&self, wanted: &LoadedAdapter) -> Result<(Arc<PackedAdapter<L>>, Tier)> {
        if let Some(packed) = self.lock().copies.find(&wanted.digest()) {
            return Ok((packed, Tier::Host));
        }
        let path = wanted.path();
        let adapter = self.read(path).map_err(|error| at_path(path, error))?;
        if adapter.digest() != wanted.digest() && !planted::is(Bug::AdapterChangeIgnored) {
            return Err(malformed!(
                "the adapter in {} has changed since it was loaded: it is {:?}, wanted {:?}; load it again to use what is \
                 there now",
                path.display(),
                adapter.digest(),
                wanted.digest()
            ));
        }
        let packed = self.pack(&adapter)?;
        if packed.num_pages() != wanted.num_pages() {
            return Err(malformed!("the adapter in {} takes other pages than before", path.display()));
        }
        self.keep(wanted, &packed);
        Ok((packed, Tier::Disk))
    }

    fn read(&self, path: &Path) -> Result<Adapter> {
        Adapter::read(path, &self.space.shapes, MAX_ADAPTER_BYTES)
    }

    fn pack(&self, adapter: &Adapter) -> Result<Arc<PackedAdapter<L>>> {
        PackedAdapter::new(&self.loader, adapter, &self.space.shapes, self.space.page_bytes).map(Arc::new)
    }

    fn keep(&self, adapter: &LoadedAdapter, packed: &Arc<PackedAdapter<L>>) {
        let Kept { copies, known } = &mut *self.lock();
        known.insert(adapter.digest(), adapter.downgrade());
        known.retain(|_, loaded| loaded.strong_count() > 0);
        copies.retain(|digest| known.contains_key(digest));
        copies.insert(adapter.digest(), Arc::clone(packed), packed.num_bytes());
        self.metrics.adapters.set_host(copies.len(), copies.num_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Kept<L>> {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<L: LoraLoader> AdapterLoader for AdapterStore<L> {
    fn load(&self, path: &Path) -> Result<LoadedAdapter> {
        let adapter = self.read(path)?;
        let packed = self.pack(&adapter)?;
        let (wanted, found) = (packed.num_pages(), self.space.num_pages);
        if wanted > found {
            let page_bytes = self.space.page_bytes;
            return Err(Error::Exhausted(format!(
                "the adapter takes {wanted} pages of {page_bytes} bytes and the KV memory, in which adapters are kept, has \
                 {found}; give more --kv-cache-memory-bytes"
            )));
        }
        let loaded = LoadedAdapter::new(&adapter, wanted, path, self.id);
        self.keep(&loaded, &packed);
        Ok(loaded)
    }
}

/// The same error, which says which adapter it is about.
fn at_path(path: &Path, error: Error) -> Error {
    match error {
        Error::Format(why) => malformed!("the adapter in {} cannot be read again: {why}", path.display()),
        Error::NotFound(why) => Error::NotFound(format!("an adapter is gone since it was loaded: {why}")),
        other => other,
    }
}
