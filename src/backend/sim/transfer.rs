//! Transfers between the double's memory and the tiers below, and how long they and steps take.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::super::{KvLayout, Landing, LandingBlock, StreamKind, Transfer};
use super::device::{SimBuffer, SimEvent, SimStream};
use super::payload::{PAYLOAD_BYTES, mix};
use crate::Result;

/// The longest a transfer waits at one point.
const MAX_DELAY: Duration = Duration::from_micros(300);

/// What a token costs in doubles that are slow to compute: more than most copies of its KV.
const TOKEN_TIME: Duration = Duration::from_micros(5);

/// How long transfers wait before and after they touch device memory, and how long steps take.
pub(super) struct Delays {
    seed: u64,
    num_drawn: AtomicU64,
}

impl Delays {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, num_drawn: AtomicU64::new(0) }
    }

    /// Of a step. Every other double takes its time, so that copies are worth waiting for and go on beside steps.
    pub(super) fn compute(&self, num_tokens: usize) {
        if self.seed.is_multiple_of(2) {
            thread::sleep(TOKEN_TIME * num_tokens as u32);
        }
    }

    /// Whether blocks of the host land layer by layer: two in three doubles have that form.
    fn lands_by_layer(&self) -> bool {
        !self.seed.is_multiple_of(3)
    }

    /// Of a transfer. Most often hardly at all.
    fn wait(&self) {
        let drawn = mix(self.seed, self.num_drawn.fetch_add(1, Ordering::Relaxed));
        if drawn.is_multiple_of(4) {
            thread::sleep(MAX_DELAY.mul_f64((drawn >> 40) as f64 / (1u64 << 24) as f64));
        }
    }
}

/// Transfers of the double.
pub struct SimTransfer {
    delays: Option<Arc<Delays>>,
    /// Copies of blocks that land layer by layer: each runs when somebody waits for it, or in its own time.
    landing: SimStream,
}

impl SimTransfer {
    pub(super) fn new(delays: Option<Arc<Delays>>) -> Self {
        Self { delays, landing: SimStream::new(StreamKind::Copy) }
    }

    /// Whether steps may begin on blocks of the host that are still on their way.
    fn lands_by_layer(&self) -> bool {
        self.delays.as_ref().is_none_or(|delays| delays.lands_by_layer())
    }

    fn wait(&self) {
        self.delays.iter().for_each(|delays| delays.wait());
    }
}

impl Transfer for SimTransfer {
    type Buffer = SimBuffer;
    type HostBuffer = Vec<u8>;
    type Event = SimEvent;

    fn allocate_host_blocks(&self, num_blocks: usize, block_bytes: usize) -> Result<Option<Vec<Vec<u8>>>> {
        let blocks = || (0..num_blocks).map(|_| vec![0; block_bytes]).collect();
        Ok(self.lands_by_layer().then(blocks))
    }

    fn fill(
        &mut self,
        target: &SimBuffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // Not under the lock: a slow file must not hold up a step.
        let mut staging = vec![0; bytes];
        self.wait();
        write(&mut staging)?;
        self.wait();
        target.lock()[offset..offset + bytes].copy_from_slice(&staging);
        Ok(())
    }

    /// Each layer has an event of its own.
    fn land(
        &mut self,
        target: &SimBuffer,
        layout: &KvLayout,
        blocks: &[LandingBlock<'_, Vec<u8>>],
    ) -> Result<Landing<SimEvent>> {
        let layer_bytes = layout.block_size() * PAYLOAD_BYTES;
        Landing::queue(layout, layout.num_layers(), |first, end| {
            for LandingBlock { source, target_offset } in blocks {
                let end = if end == layout.num_layers() { source.len() } else { end * layer_bytes };
                let start = first * layer_bytes;
                self.landing.push(source[start..end].to_vec(), target, target_offset + start);
            }
            Ok(self.landing.record())
        })
    }

    fn finish(&mut self) -> Result<()> {
        self.wait();
        while self.landing.run_one() {
            self.wait();
        }
        Ok(())
    }

    /// A token's payloads are one per layer.
    fn clear_behind(layout: &KvLayout, block: &mut [u8], num_tokens: usize) {
        let block_size = layout.block_size();
        for (layer, token) in
            (0..layout.num_layers()).flat_map(|layer| (num_tokens..block_size).map(move |at| (layer, at)))
        {
            let start = (layer * block_size + token) * PAYLOAD_BYTES;
            block[start..start + PAYLOAD_BYTES].fill(0);
        }
    }

    fn show(
        &mut self,
        source: &SimBuffer,
        offset: usize,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.wait();
        let staging = source.lock()[offset..offset + bytes].to_vec();
        self.wait();
        read(&staging)
    }
}
