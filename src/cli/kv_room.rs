//! How many KV blocks there is room for beside the weights.

use mneme::Result;
use mneme::backend::{Backend, KvLayout};
use mneme::engine::SchedulerLimits;
use mneme::models::{KvCache, ModelConfig, StepLimits, Workspace};
use mneme::telemetry::{Degradation, Degradations};

/// One byte in so many is left free: memory is given out in pieces, and adapters may be merged later.
const SHARE_LEFT_FREE: usize = 32;

/// Of what is left, so much is a pool's that was not told its size: adapters are merged into memory of the device, too.
const DEFAULT_SHARE: (usize, usize) = (9, 10);

/// What a pool has to fit into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvRoom {
    /// Bytes of a block.
    block_bytes: usize,
    /// Bytes of device memory that blocks may take.
    free_bytes: usize,
}

impl KvRoom {
    /// What `backend` has left, now that the weights are loaded; `None` where blocks lie in the host's memory.
    pub(crate) fn of<B: Backend>(
        backend: &B,
        config: &ModelConfig,
        limits: &SchedulerLimits,
        layout: &KvLayout,
    ) -> Result<Option<Self>> {
        let Some(free_bytes) = backend.free_bytes()? else { return Ok(None) };
        let step = StepLimits {
            max_tokens: limits.max_num_batched_tokens,
            max_logits: limits.max_num_seqs + limits.max_prompt_logits,
        };
        let step_bytes = Workspace::num_bytes(config, step, backend.activation_dtype());
        let tables_bytes = limits.max_num_seqs * limits.max_model_len.div_ceil(limits.block_size) * 4;
        let taken = step_bytes.saturating_add(tables_bytes).saturating_add(free_bytes / SHARE_LEFT_FREE);
        Ok(Some(Self { block_bytes: layout.block_bytes(), free_bytes: free_bytes.saturating_sub(taken) }))
    }

    /// The limits with a pool that takes most of the room, where none was asked for. The longest sequence is cut to it, unless
    /// its length was asked for.
    pub(crate) fn fill(
        self,
        limits: SchedulerLimits,
        is_len_given: bool,
        degradations: &Degradations,
    ) -> anyhow::Result<SchedulerLimits> {
        let most = KvCache::<()>::MAX_TOKENS / limits.block_size;
        let num_blocks = (self.free_bytes / DEFAULT_SHARE.1 * DEFAULT_SHARE.0 / self.block_bytes).min(most);
        let (num_tokens, least) = (num_blocks * limits.block_size, if is_len_given { limits.max_model_len } else { 2 });
        match least <= num_tokens {
            true => Ok(SchedulerLimits { num_blocks, max_model_len: limits.max_model_len.min(num_tokens), ..limits }),
            // It may still fit, with nothing left.
            false => {
                let num_blocks = least.div_ceil(limits.block_size);
                self.fit(SchedulerLimits { num_blocks, ..limits }, is_len_given, degradations)
            }
        }
    }

    /// The limits with a pool that fits, and says so where that is a smaller one. The longest sequence is cut to it, unless
    /// its length was asked for.
    pub(crate) fn fit(
        self,
        limits: SchedulerLimits,
        is_len_given: bool,
        degradations: &Degradations,
    ) -> anyhow::Result<SchedulerLimits> {
        let num_blocks = self.free_bytes / self.block_bytes;
        if limits.num_blocks <= num_blocks {
            return Ok(limits);
        }
        let (num_tokens, mib) = (num_blocks * limits.block_size, |bytes: usize| bytes >> 20);
        let wanted = mib(limits.num_blocks * self.block_bytes);
        let found = format!(
            "the KV cache of {wanted} MiB does not fit: the weights and a step leave {} MiB of device memory, room for \
             {num_tokens} tokens",
            mib(self.free_bytes)
        );
        anyhow::ensure!(
            num_tokens >= 2 && (!is_len_given || limits.max_model_len <= num_tokens),
            "{found}, and one sequence may have {}; give a smaller --max-model-len or --max-num-batched-tokens, or take a \
             smaller model",
            limits.max_model_len
        );
        let given = mib(num_blocks * self.block_bytes);
        let text = format!("{found}; it gets that, and --kv-cache-memory-bytes {given}M asks for it");
        degradations.report(Degradation::KvPool, text);
        Ok(SchedulerLimits { num_blocks, max_model_len: limits.max_model_len.min(num_tokens), ..limits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(num_blocks: usize, max_model_len: usize) -> SchedulerLimits {
        SchedulerLimits {
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            max_num_waiting: 4,
            max_prompt_logits: 4,
            max_model_len,
            block_size: 16,
            num_blocks,
            prefix_caching: true,
        }
    }

    #[test]
    fn a_pool_is_cut_to_what_is_free() {
        let (room, degradations) = (KvRoom { block_bytes: 1 << 20, free_bytes: 10 << 20 }, Degradations::default());
        assert_eq!(room.fit(limits(10, 160), true, &degradations).unwrap().num_blocks, 10);
        assert!(degradations.lines().is_empty());
        let cut = room.fit(limits(40, 640), false, &degradations).unwrap();
        assert_eq!((cut.num_blocks, cut.max_model_len), (10, 160));
        let cut = room.fit(limits(40, 100), true, &degradations).unwrap();
        assert_eq!((cut.num_blocks, cut.max_model_len), (10, 100));
        assert!(degradations.lines()[0].contains("--kv-cache-memory-bytes 10M"), "{:?}", degradations.lines());
    }

    #[test]
    fn a_pool_of_no_size_takes_most_of_what_is_free() {
        let (room, degradations) = (KvRoom { block_bytes: 1 << 20, free_bytes: 100 << 20 }, Degradations::default());
        let filled = room.fill(limits(4, 10_000), false, &degradations).unwrap();
        assert_eq!((filled.num_blocks, filled.max_model_len), (90, 1440));
        let long = room.fill(limits(4, 1600), true, &degradations).unwrap();
        assert_eq!((long.num_blocks, long.max_model_len), (100, 1600));
        assert!(degradations.lines().is_empty());
        assert!(room.fill(limits(4, 1601), true, &degradations).is_err());
        // No more than steps can number, of however small blocks.
        let room = KvRoom { block_bytes: 32, free_bytes: 80 << 30 };
        assert_eq!(room.fill(limits(4, 1600), true, &degradations).unwrap().num_blocks, i32::MAX as usize / 16);
    }

    #[test]
    fn what_cannot_be_cut_is_refused_with_what_to_do() {
        let (room, degradations) = (KvRoom { block_bytes: 1 << 20, free_bytes: 10 << 20 }, Degradations::default());
        let error = room.fit(limits(40, 161), true, &degradations).unwrap_err().to_string();
        assert!(error.contains("room for 160 tokens") && error.contains("--max-model-len"), "{error}");
        let none = KvRoom { block_bytes: 1 << 20, free_bytes: 0 };
        assert!(none.fit(limits(40, 640), false, &degradations).is_err());
    }
}
