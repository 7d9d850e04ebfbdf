//! A second copy of a model's projections, with adapters merged into them: written a slice at a time while the model
//! runs, used whole or not at all. The model's own weights are never written.

use std::sync::Arc;

use super::config::ModelConfig;
use super::model::Model;
use crate::backend::{Backend, LoraAdapter, LoraBatch, LoraLoader, LoraSite, Projection, ScaledUpdate};
use crate::{Result, unsupported};

/// An adapter on the device of `B`, and its scale.
pub type ScaledAdapter<B> = (Arc<LoraAdapter<<<B as Backend>::LoraLoader as LoraLoader>::Lora>>, f32);

/// The fewest rows that are written at a time: devices keep weights in groups of rows.
const MIN_ROWS: usize = 32;

/// The copy. Projections that no adapter changes are not in it.
pub struct MergedCopy<B: Backend> {
    /// What is merged, until all is written.
    adapters: Vec<ScaledAdapter<B>>,
    /// Projections that are changed, in the order in which they are written.
    sites: Vec<LoraSite>,
    /// By [`LoraSite::index`].
    matrices: Vec<Option<B::Matrix>>,
    num_bytes: usize,
    /// How many of `sites` are written.
    num_written: usize,
    /// Rows written of the one behind them.
    num_rows: usize,
}

/// The rows of a step that go through a copy: all behind the first ones.
pub struct MergedRows<'a, B: Backend> {
    /// A whole one.
    pub copy: &'a MergedCopy<B>,
    /// The first of them.
    pub first_row: usize,
}

/// What adapters do to the rows of a step.
pub struct Adapted<'a, B: Backend> {
    /// Added to some rows of every projection.
    pub lora: Option<LoraBatch<'a, B>>,
    /// Added to some rows of logits; rows are theirs. Of adapters with an update of the output projection.
    pub head: Option<LoraBatch<'a, B>>,
    /// Rows that use a copy of the projections in which it is contained.
    pub merged: Option<MergedRows<'a, B>>,
}

impl<B: Backend> MergedCopy<B> {
    /// Plans a copy, without taking memory for it.
    ///
    /// # Errors
    /// `Unsupported` when one of the projections cannot be merged into, or an adapter updates more than those.
    pub fn plan(backend: &B, model: &Model<B>, adapters: Vec<ScaledAdapter<B>>) -> Result<Self> {
        if adapters.iter().any(|(adapter, _)| adapter.embedding().is_some() || adapter.head().is_some()) {
            return Err(unsupported!(
                "an adapter of the embedding or the output projection cannot be merged: the copy is of the layers alone"
            ));
        }
        let num_layers = model.config().num_layers;
        let all = (0..num_layers).flat_map(|layer| Projection::ALL.map(|projection| LoraSite { layer, projection }));
        let sites: Vec<LoraSite> =
            all.filter(|site| adapters.iter().any(|(adapter, _)| adapter.get(*site).is_some())).collect();
        let mut num_bytes = 0;
        for site in &sites {
            num_bytes += backend.merged_bytes(model.projection(*site))?;
        }
        let matrices = std::iter::repeat_with(|| None).take(num_layers * Projection::ALL.len()).collect();
        Ok(Self { adapters, sites, matrices, num_bytes, num_written: 0, num_rows: 0 })
    }

    /// What the whole copy takes.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Whether all of it is written.
    pub fn is_whole(&self) -> bool {
        self.num_written == self.sites.len()
    }

    /// Queues the writing of the next rows, about `max_numbers` numbers of one projection, and says how many they are.
    pub fn write(&mut self, backend: &B, stream: &B::Stream, model: &Model<B>, max_numbers: usize) -> Result<usize> {
        let Some(&site) = self.sites.get(self.num_written) else { return Ok(0) };
        let (num_rows, num_columns) = shape(model.config(), site.projection);
        let wanted = (max_numbers / num_columns / MIN_ROWS).max(1) * MIN_ROWS;
        let rows = self.num_rows..num_rows.min(self.num_rows + wanted);
        let weight = model.projection(site);
        if self.matrices[site.index()].is_none() {
            self.matrices[site.index()] = Some(backend.allocate_merged(weight)?);
        }
        let updates: Vec<_> = self
            .adapters
            .iter()
            .filter_map(|(adapter, scale)| Some(ScaledUpdate { update: adapter.get(site)?, scale: *scale }))
            .collect();
        if let Some(target) = &mut self.matrices[site.index()] {
            backend.merge_rows(stream, weight, &updates, rows.clone(), target)?;
        }
        self.num_rows = rows.end;
        if rows.end == num_rows {
            self.num_rows = 0;
            self.num_written += 1;
        }
        if self.is_whole() {
            self.adapters = Vec::new();
        }
        Ok(rows.len() * num_columns)
    }

    /// Gives back the memory of one projection, which makes the copy useless; `false` when none is left. The device must
    /// be done with it.
    pub fn free_one(&mut self) -> bool {
        self.matrices.iter_mut().find_map(Option::take).is_some()
    }

    /// The copy of a projection, if it is changed.
    pub(super) fn get(&self, site: LoraSite) -> Option<&B::Matrix> {
        debug_assert!(self.is_whole(), "a copy is used when it is whole");
        self.matrices[site.index()].as_ref()
    }
}

/// Output and input features of a projection.
fn shape(config: &ModelConfig, projection: Projection) -> (usize, usize) {
    let (q_size, kv_size) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    match projection {
        Projection::Qkv => (q_size + 2 * kv_size, config.hidden_size),
        Projection::Output => (config.hidden_size, q_size),
        Projection::GateUp => (2 * config.intermediate_size, config.hidden_size),
        Projection::Down => (config.hidden_size, config.intermediate_size),
    }
}
