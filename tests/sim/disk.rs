//! The disk of a simulated life: what is done to it, and what has to be on it whatever was.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mneme::backend::DType;
use mneme::engine::{Deposited, SchedulerLimits};
use mneme::kv::BlockHash;
use mneme::paging::faulty::{Fault, FaultyFiles};
use mneme::paging::{BlockFormat, BlockStore, Found, OpenedVault, PinnedBlocks, StoreConfig, Stored, VaultOpener};

use super::oracle::{NUM_LAYERS, Oracle};
use super::sharing::Asked;
use crate::support::random::Random;
use crate::support::tiny_model::Family;

/// More blocks than two lives compute.
const ENOUGH_BLOCKS: usize = 4096;

/// Operations before a crash at most.
const MAX_OPERATIONS: usize = 60;

/// A deposit that was acknowledged as durable.
pub struct Kept {
    pub asked: Asked,
    pub deposited: Deposited,
}

pub struct Disk {
    pub files: FaultyFiles,
    pub kept: Vec<Kept>,
    /// Stands for weights, kernels and all else.
    pub identity: Vec<u8>,
    /// Whether it may have refused to write.
    pub has_failed: bool,
    /// Whether it may have lost what was durable: something was damaged or could not be read.
    may_have_lost: bool,
    max_blocks: usize,
    block_size: usize,
    block_bytes: usize,
    /// Whether what is stored is the double's, of which the oracle knows every byte.
    is_of_double: bool,
    /// The store of this life, once it is open.
    open: Arc<OnceLock<Arc<BlockStore>>>,
}

impl Disk {
    pub fn new(seed: u64, random: &mut Random, limits: &SchedulerLimits, family: Family, is_of_double: bool) -> Self {
        let few_blocks = random.within(8, 4 * limits.num_blocks + 8);
        let max_blocks = if random.once_in(2) { few_blocks } else { ENOUGH_BLOCKS };
        Self {
            files: FaultyFiles::new(seed),
            kept: vec![],
            identity: b"model".to_vec(),
            has_failed: false,
            may_have_lost: false,
            max_blocks,
            block_size: limits.block_size,
            block_bytes: family.block_bytes(DType::BF16, limits.block_size),
            is_of_double,
            open: Arc::default(),
        }
    }

    /// Whether all that was acknowledged has to be there.
    pub fn must_keep(&self) -> bool {
        self.max_blocks == ENOUGH_BLOCKS && !self.may_have_lost
    }

    /// Whether there is no reason to refuse a deposit.
    pub fn must_accept(&self) -> bool {
        self.must_keep() && !self.has_failed
    }

    fn store(&self) -> impl FnOnce() -> mneme::Result<BlockStore> + Send + use<> {
        let format = BlockFormat { block_bytes: self.block_bytes, block_size: self.block_size, layout: "sim".into() };
        let max_bytes = (self.max_blocks * (self.block_bytes + 4096)) as u64 + (64 << 10);
        let config = StoreConfig { format, max_bytes, segment_bytes: max_bytes / 4 };
        let files = Arc::new(self.files.clone());
        move || Ok(BlockStore::open(files, Path::new("/vault/segments"), config)?.0)
    }

    /// Opens the vault after a while, so that requests come before it is there.
    pub fn opener(&self, delay: Duration) -> VaultOpener {
        let (identity, open, shared) = (self.identity.clone(), self.store(), Arc::clone(&self.open));
        Box::new(move || {
            std::thread::sleep(delay);
            let store = Arc::new(open()?);
            let _ = shared.set(Arc::clone(&store));
            Ok(OpenedVault { identity, store: Some(store) })
        })
    }

    /// Stores the KV of `asked` beside the engine, as it comes in a cube's file; `false` when that is not possible now.
    pub fn import(&self, asked: &Asked) -> bool {
        let Some(store) = self.open.get().filter(|_| self.is_of_double) else { return false };
        let root = BlockHash::root(&self.identity, asked.domain.as_bytes());
        let (full, tail) = root.blocks_of(asked.prompt(), self.block_size);
        let stored = Oracle::stored(asked.prompt());
        let mut pins = PinnedBlocks::new(Arc::clone(store));
        for (number, hash) in full.iter().chain(&tail).enumerate() {
            let range = number * self.block_size..asked.num_prompt.min((number + 1) * self.block_size);
            let mut bytes = vec![0; self.block_bytes];
            for (token, payloads) in stored[range.clone()].iter().enumerate() {
                for (layer, payload) in payloads.iter().enumerate() {
                    let start = 8 * (layer * self.block_size + token);
                    bytes[start..start + 8].copy_from_slice(&payload.to_le_bytes());
                }
            }
            pins.add(*hash);
            if store.write(*hash, &asked.prompt()[range], &bytes).unwrap() == Stored::NoRoom {
                return false;
            }
        }
        store.announce(pins.hashes());
        true
    }

    /// It breaks, or works again with some of it wrong, or the machine is about to go down.
    pub fn harm(&mut self, random: &mut Random) {
        const FAULTS: [Fault; 6] =
            [Fault::NoSpace, Fault::ReadOnly, Fault::WriteError, Fault::SyncError, Fault::ReadError, Fault::ShortRead];
        match random.below(6) {
            0..=1 => {
                let fault = FAULTS[random.below(FAULTS.len())];
                self.files.inject(Some(fault));
                self.has_failed = true;
                self.may_have_lost |= matches!(fault, Fault::ReadError | Fault::ShortRead);
            }
            2 => self.files.inject(None),
            3 => {
                self.files.inject(None);
                self.may_have_lost |= self.files.damage(random.next(), 200);
            }
            _ => {
                self.files.stop_at(random.within(1, MAX_OPERATIONS) as u64);
                self.has_failed = true;
            }
        }
    }

    /// What becomes of it between two lives. How many blocks were found that had to be there.
    ///
    /// # Panics
    /// When something that was acknowledged is not there.
    pub fn restart(&mut self) -> usize {
        self.files.restart();
        self.open = Arc::default();
        self.has_failed = false;
        if !self.must_keep() {
            self.kept.clear();
        }
        let store = self.store()().unwrap();
        self.kept.iter().map(|kept| self.check_kept(&store, kept)).sum()
    }

    fn check_kept(&self, store: &BlockStore, kept: &Kept) -> usize {
        let Kept { asked, deposited } = kept;
        let prompt = asked.prompt();
        let wanted = Oracle::stored(prompt);
        let mut bytes = vec![0; self.block_bytes];
        for (number, hash) in deposited.blocks.iter().chain(&deposited.tail).enumerate() {
            let range = number * self.block_size..prompt.len().min((number + 1) * self.block_size);
            let found = store.read(hash, &prompt[range.clone()], &mut bytes);
            assert_eq!(found, Found::Whole, "block {number} of a durable deposit of {} tokens", prompt.len());
            for (token, wanted) in wanted[range].iter().enumerate().filter(|_| self.is_of_double) {
                let found = std::array::from_fn(|layer| payload(&bytes, layer * self.block_size + token));
                assert_eq!(&found as &[u64; NUM_LAYERS], wanted, "token {token} of block {number} on disk");
            }
        }
        prompt.len().div_ceil(self.block_size)
    }
}

fn payload(bytes: &[u8], number: usize) -> u64 {
    u64::from_le_bytes(bytes[8 * number..8 * number + 8].try_into().unwrap())
}
