//! The KV blocks of an engine: as many as were asked for or, where the device gives no such memory, fewer.

use crate::backend::{Backend, KvLayout};
use crate::engine::SchedulerLimits;
use crate::models::KvCache;
use crate::telemetry::Degradation;
use crate::{Error, Result};

/// Of a pool that the device did not give, so much is asked for next.
const NEXT_SHARE: (usize, usize) = (7, 8);

/// The blocks, and `limits` with as many as there are. They hold `min_tokens` at the least.
///
/// # Errors
/// The device's own, when it does not give the least.
pub(super) fn allocate<B: Backend>(
    backend: &B,
    layout: KvLayout,
    limits: &SchedulerLimits,
    min_tokens: usize,
) -> Result<(KvCache<B::Buffer>, SchedulerLimits)> {
    let least = min_tokens.div_ceil(limits.block_size).max(1);
    let mut num_blocks = limits.num_blocks;
    let kv = loop {
        match KvCache::new(backend, layout, num_blocks) {
            Err(Error::Exhausted(_)) if num_blocks > least => {
                num_blocks = (num_blocks * NEXT_SHARE.0 / NEXT_SHARE.1).max(least);
            }
            kv => break kv?,
        }
    };
    if num_blocks < limits.num_blocks {
        let mib = |num_blocks: usize| (num_blocks * layout.block_bytes()) as f64 / f64::from(1 << 20);
        let (wanted, given) = (mib(limits.num_blocks), mib(num_blocks));
        let text = format!("the device gives no {wanted:.1} MiB at once for the KV cache, which gets {given:.1} MiB");
        backend.degradations().report(Degradation::KvPool, text);
    }
    let max_model_len = limits.max_model_len.min(num_blocks * limits.block_size);
    Ok((kv, SchedulerLimits { num_blocks, max_model_len, ..*limits }))
}
