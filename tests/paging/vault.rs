//! A disk tier for tests, over a file system that breaks when told to.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mneme::engine::{Task, TierConfig};
use mneme::paging::faulty::FaultyFiles;
use mneme::paging::{BlockFormat, BlockStore, Files, OpenedVault, StoreConfig};

use crate::support::engine::{PATIENCE, Setup, TestEngine, collect, request};
use crate::support::tiny_model::Family;

const FOLDER: &str = "/vault/segments";

/// A tiny model's engine over tiers.
pub struct Tiers {
    pub files: FaultyFiles,
    pub host_bytes: usize,
    pub family: Family,
    pub setup: Setup,
    pub fetch_wait: Duration,
}

impl Tiers {
    pub fn new(family: Family) -> Self {
        Self { files: FaultyFiles::new(1), host_bytes: 0, family, setup: Setup::default(), fetch_wait: PATIENCE }
    }

    /// Bytes of a block, as the engine lays it out.
    pub fn block_bytes(&self) -> usize {
        self.family.block_bytes(self.setup.kv_dtype, self.setup.limits.block_size)
    }

    /// The disk tier alone.
    pub fn open_store(&self) -> BlockStore {
        self.open_store_on(self.files.clone())
    }

    /// The same over other files.
    pub fn open_store_on(&self, files: impl Files) -> BlockStore {
        let block_size = self.setup.limits.block_size;
        let format = BlockFormat { block_bytes: self.block_bytes(), block_size, layout: "test".into() };
        let config = StoreConfig { format, max_bytes: 64 << 20, segment_bytes: 4 << 20 };
        BlockStore::open(Arc::new(files), Path::new(FOLDER), config).unwrap().0
    }

    /// An engine with a host tier if there is one, and with the disk tier; the vault is open when this returns.
    pub fn start(&self, model: &Path) -> TestEngine {
        let engine = self.start_closed(model, b"test", || ());
        wait_until_open(&engine);
        engine
    }

    /// The same, whose vault opens for this model once `wait` returns.
    pub fn start_closed(&self, model: &Path, identity: &[u8], wait: impl FnOnce() + Send + 'static) -> TestEngine {
        self.start_over(model, identity, Arc::new(self.open_store()), wait)
    }

    /// The same over a store that others use as well.
    pub fn start_over(
        &self,
        model: &Path,
        identity: &[u8],
        store: Arc<BlockStore>,
        wait: impl FnOnce() + Send + 'static,
    ) -> TestEngine {
        let identity = identity.to_vec();
        let open = move || {
            wait();
            Ok(OpenedVault { identity, store: Some(store) })
        };
        let tiers = TierConfig {
            host_bytes: self.host_bytes,
            host_slab_bytes: self.host_bytes.div_ceil(3),
            num_io_threads: 2,
            fetch_wait: Some(self.fetch_wait),
            open_vault: Some(Box::new(open)),
        };
        crate::start_with_tiers(model, self.setup.clone(), tiers)
    }
}

/// The vault opens beside the first requests: one that asks for it is refused until then.
pub fn wait_until_open(engine: &TestEngine) {
    let ask = || engine.handle.submit(request(&[1], Task::Deposit { is_durable: true, kept_in: None })).unwrap();
    while collect(ask()).deposited.is_none() {}
}
