//! The thread that brings adapters onto the device: it alone reads their files again and copies into their pages. Loads come
//! in over a bounded queue, what became of them goes back over another one that has room for all.

use std::any::Any;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::adapter_store::AdapterStore;
use super::adapters::LoadedAdapter;
use crate::backend::{Device, LoraLoader};
use crate::kv::GroupId;
use crate::paging::Tier;
use crate::planted::{self, Bug};
use crate::{Error, Result};

/// Loads under way; further ones wait with the requests that want them.
const MAX_LOADS: usize = 64;

/// A `LoraAdapter` of the engine's backend, which schedulers do not know.
pub(super) type DeviceAdapter = Arc<dyn Any + Send + Sync>;

/// An adapter to bring up.
pub(super) struct AdapterLoad {
    pub(super) adapter: LoadedAdapter,
    /// For whoever asked for it.
    pub(super) group: GroupId,
    /// Which pages it goes to, in order. Nobody else touches them before it has arrived.
    pub(super) pages: Vec<u32>,
}

/// What became of a load.
pub(super) struct AdapterArrival {
    pub(super) group: GroupId,
    /// What is on the device now, and where it was before.
    pub(super) result: Result<(DeviceAdapter, Tier)>,
    pub(super) took: Duration,
}

/// The engine's way to the thread.
pub(super) struct AdapterIo {
    loads: Option<Sender<AdapterLoad>>,
    arrivals: Receiver<AdapterArrival>,
    thread: Option<JoinHandle<()>>,
}

impl AdapterIo {
    /// Starts the thread, which takes adapters from `store` into pages of `arena` and ends the engine's wait when one is
    /// there.
    ///
    /// # Errors
    /// When the device gives no way to its memory, or the system no thread.
    pub(super) fn start<D: Device, L: LoraLoader<Buffer = D::Buffer>>(
        device: &D,
        arena: &D::Buffer,
        store: Arc<AdapterStore<L>>,
        waker: &Sender<()>,
    ) -> Result<Self> {
        let (sender, loads) = bounded(MAX_LOADS);
        let (done, arrivals) = bounded(MAX_LOADS + 1);
        let mut carrier = Carrier::<D, L> { transfer: device.create_transfer()?, arena: arena.clone(), store };
        let waker = waker.clone();
        let serve = move || {
            for load in loads {
                carrier.carry(&load, |arrival| {
                    let _ = done.send(arrival);
                    let _ = waker.try_send(());
                });
            }
        };
        let thread = thread::Builder::new()
            .name("mneme-adapters".into())
            .spawn(serve)
            .map_err(|source| Error::Io { context: "cannot start the thread mneme-adapters".into(), source })?;
        Ok(Self { loads: Some(sender), arrivals, thread: Some(thread) })
    }

    /// Both ends of the queues, for tests that are the thread.
    #[cfg(test)]
    pub(super) fn manual(max_loads: usize) -> (Self, Receiver<AdapterLoad>, Sender<AdapterArrival>) {
        let (sender, loads) = bounded(max_loads);
        let (done, arrivals) = bounded(MAX_LOADS);
        (Self { loads: Some(sender), arrivals, thread: None }, loads, done)
    }

    /// Asks for a load; `false` when too many are under way.
    pub(super) fn send(&self, load: AdapterLoad) -> bool {
        self.loads.as_ref().is_some_and(|loads| loads.try_send(load).is_ok())
    }

    /// What has come of loads since the last call, one at a time.
    pub(super) fn poll(&self) -> Option<AdapterArrival> {
        self.arrivals.try_recv().ok()
    }
}

impl Drop for AdapterIo {
    /// The thread touches device memory: it ends before that does.
    fn drop(&mut self) {
        self.loads = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook, and the engine ends anyway.
            let _ = thread.join();
        }
    }
}

/// What the thread works with.
struct Carrier<D: Device, L: LoraLoader<Buffer = D::Buffer>> {
    transfer: D::Transfer,
    arena: D::Buffer,
    store: Arc<AdapterStore<L>>,
}

impl<D: Device, L: LoraLoader<Buffer = D::Buffer>> Carrier<D, L> {
    fn carry(&mut self, load: &AdapterLoad, mut tell: impl FnMut(AdapterArrival)) {
        let started_at = Instant::now();
        let fetched = self.store.fetch(&load.adapter);
        let result = fetched.and_then(|(packed, source)| {
            let device: DeviceAdapter = Arc::new(packed.place(self.store.loader(), &self.arena, &load.pages)?);
            if planted::is(Bug::AdapterReadEarly) {
                let result = Ok((Arc::clone(&device), source));
                tell(AdapterArrival { group: load.group, result, took: started_at.elapsed() });
            }
            packed.upload(&mut self.transfer, &self.arena, &load.pages)?;
            Ok((device, source))
        });
        if !(planted::is(Bug::AdapterReadEarly) && result.is_ok()) {
            tell(AdapterArrival { group: load.group, result, took: started_at.elapsed() });
        }
    }
}
