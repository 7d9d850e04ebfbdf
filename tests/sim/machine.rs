//! What a simulated engine runs on: how large and how slow everything is.

use std::time::Duration;

use mneme::backend::DType;
use mneme::engine::{MergeConfig, SchedulerLimits, TierConfig};

use super::adapters::{Checkpoints, merge_config};
use super::device::Device;
use super::disk::Disk;
use crate::support::engine::{Setup, TestEngine, limits};
use crate::support::random::Random;

pub struct Machine {
    pub limits: SchedulerLimits,
    num_host_blocks: usize,
    adapter_host_bytes: usize,
    num_io_threads: usize,
    fetch_wait: Option<Duration>,
    /// Of the delays of transfers, where there are any.
    slow_seed: Option<u64>,
    merge: MergeConfig,
}

impl Machine {
    pub fn draw(seed: u64, random: &mut Random) -> Self {
        let limits = draw_limits(random);
        // Often so few that copies up and down want the same slot.
        let num_host_blocks = match random.below(4) {
            0 => 0,
            1 => random.within(1, 3 * limits.num_blocks),
            _ => random.within(1, 4),
        };
        Self {
            limits,
            // None, one or two, all.
            adapter_host_bytes: [0, 20_000, 1 << 20][random.below(3)],
            num_host_blocks,
            num_io_threads: random.within(1, 4),
            fetch_wait: random.once_in(3).then(|| Duration::from_micros(random.below(3) as u64 * 100)),
            slow_seed: (!random.once_in(3)).then_some(seed),
            merge: merge_config(random),
        }
    }

    /// Whether an engine on it may merge adapters.
    pub fn merges(&self) -> bool {
        self.merge.is_enabled
    }

    /// Starts an engine on it, over `disk` where there is one.
    pub fn start(
        &self,
        device: &Device,
        disk: Option<&Disk>,
        checkpoints: &Checkpoints,
        random: &mut Random,
    ) -> TestEngine {
        let Self { limits, merge, adapter_host_bytes, .. } = *self;
        let setup = Setup { limits, merge, adapter_host_bytes, ..Setup::default() };
        let delay = Duration::from_micros(random.below(2) as u64 * random.below(1000) as u64);
        let block_bytes = checkpoints.family().block_bytes(DType::BF16, limits.block_size);
        let host_bytes = self.num_host_blocks * block_bytes;
        let tiers = TierConfig {
            host_bytes,
            host_slab_bytes: host_bytes.div_ceil(3),
            num_io_threads: self.num_io_threads,
            open_vault: disk.map(|disk| disk.opener(delay)),
            fetch_wait: self.fetch_wait,
        };
        device.start(self.slow_seed, checkpoints.model(), setup, tiers)
    }
}

fn draw_limits(random: &mut Random) -> SchedulerLimits {
    let block_size = [16, 16, 32][random.below(3)];
    let max_model_len = random.within(40, 200);
    let least_blocks = max_model_len.div_ceil(block_size);
    SchedulerLimits {
        max_num_seqs: random.within(1, 10),
        max_num_batched_tokens: random.within(10, 100),
        max_num_waiting: random.within(1, 30),
        max_model_len,
        block_size,
        num_blocks: least_blocks + random.below(2 * least_blocks) + random.below(8),
        prefix_caching: !random.once_in(5),
        ..limits()
    }
}
