//! Adapters: added to rows, and merged into a copy of a matrix.

use std::sync::{Arc, Mutex};

use mneme::Result;
use mneme::backend::{
    Backend, LoraAdapter, LoraBatch, LoraGroup, LoraLoader, LoraPart, LoraSite, PageImage, Projection, ScaledUpdate,
};

use super::bench::{Bench, Sink, Work};
use super::measure::Effort;

const NUM_ADAPTERS: usize = 4;
const RANK: usize = 16;
const SITE: LoraSite = LoraSite { layer: 0, projection: Projection::Output };

/// Bytes of a page: those of a KV block of a model of 8 billion weights.
const PAGE_BYTES: usize = 2 << 20;

type Lora<B> = <<B as Backend>::LoraLoader as LoraLoader>::Lora;

impl<B: Backend> Bench<B> {
    /// Numbers in and out of the projection that is changed.
    fn sizes(&self) -> (usize, usize) {
        (self.dimensions.q_size(), self.dimensions.hidden_size)
    }

    fn adapter_bytes(&self) -> usize {
        let (inputs, outputs) = self.sizes();
        RANK * (inputs + outputs) * self.weight_dtype().block_bytes()
    }

    /// Four adapters, each for a quarter of the rows.
    pub(super) fn lora(&self, num_tokens: usize, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let num_adapters = NUM_ADAPTERS.min(num_tokens);
        let adapters = (0..num_adapters).map(|_| Ok(Arc::new(self.adapter()?))).collect::<Result<Vec<_>>>()?;
        let (inputs, outputs) = self.sizes();
        let (x, out) = (self.activations(num_tokens, inputs)?, self.activations(num_tokens, outputs)?);
        let first = |adapter: usize| adapter * num_tokens / num_adapters;
        let group = |(at, adapter): (usize, &Arc<_>)| LoraGroup {
            adapter: Arc::clone(adapter),
            entries: first(at)..first(at + 1),
        };
        let groups: Vec<LoraGroup<Lora<B>>> = adapters.iter().enumerate().map(group).collect();
        let batch = LoraBatch {
            rows: self.indices(&(0..num_tokens).collect::<Vec<_>>())?,
            scales: self.tensor(1, num_tokens, mneme::backend::DType::F32)?,
            groups: &groups,
        };
        let work = Work {
            name: "add_lora",
            shape: format!("{num_tokens} rows, {num_adapters} of rank {RANK}"),
            bytes: num_adapters * self.adapter_bytes() + x.num_bytes() + 2 * out.num_bytes(),
            flops: 2 * num_tokens * RANK * (inputs + outputs),
        };
        self.measure(effort, work, &|_| self.backend.add_lora(&self.stream, &x, &batch, SITE, &out), sink)
    }

    /// One adapter into all rows of a matrix.
    pub(super) fn merge(&self, effort: &Effort, sink: Sink<'_>) -> Result<()> {
        let (inputs, outputs) = self.sizes();
        let matrices = self.matrices(outputs, inputs)?;
        let adapter = self.adapter()?;
        let Some(update) = adapter.get(SITE) else { return Ok(()) };
        let target = Mutex::new(self.backend.allocate_merged(&matrices[0])?);
        let work = Work {
            name: "merge_rows",
            shape: format!("[{outputs}, {inputs}], rank {RANK}"),
            bytes: 2 * self.backend.merged_bytes(&matrices[0])? + self.adapter_bytes(),
            flops: 2 * outputs * inputs * RANK,
        };
        let launch = |turn: usize| {
            let updates = [ScaledUpdate { update, scale: 1.0 }];
            let mut target = target.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let matrix = &matrices[turn % matrices.len()];
            self.backend.merge_rows(&self.stream, matrix, &updates, 0..outputs, &mut target)
        };
        self.measure(effort, work, &launch, sink)
    }

    fn adapter(&self) -> Result<LoraAdapter<Lora<B>>> {
        let (inputs, outputs) = self.sizes();
        let dtype = self.weight_dtype();
        let part = LoraPart {
            a: Self::host_tensor(RANK, inputs, dtype)?,
            b: Self::host_tensor(outputs, RANK, dtype)?,
            scaling: 1.0,
            first_column: 0,
        };
        let loader = self.backend.create_lora_loader()?;
        let mut image = PageImage::new(PAGE_BYTES);
        let packed = loader.pack(&[part], &mut image)?;
        let image = image.finish()?;
        let pages: Vec<u32> = (0..image.num_pages() as u32).collect();
        let arena = self.backend.allocate(image.num_bytes())?;
        image.upload(&mut self.backend.create_transfer()?, &arena, &pages)?;
        let mut adapter = LoraAdapter::new(1);
        adapter.insert(SITE, loader.place(&packed, &image.placed(arena, pages))?);
        Ok(adapter)
    }
}
