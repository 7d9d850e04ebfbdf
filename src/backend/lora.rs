//! Low-rank updates of linear projections (LoRA, arXiv 2106.09685): what an adapter is on a device, and which rows of a
//! step it is added to.
//!
//! Where adapters come from, and whose rows they are, is for others to know.

use std::ops::Range;
use std::sync::Arc;

use super::{Backend, DType, HostTensor, LoraPages, PageImage, Tensor};
use crate::{Error, Result, invalid, unsupported};

/// A matrix product of a decoder layer. Some stack several projections of a checkpoint along their output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// Queries, keys and values.
    Qkv,
    /// The output of attention.
    Output,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
}

impl Projection {
    /// All of a layer.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];
}

/// Which projection of which layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraSite {
    /// The layer.
    pub layer: usize,
    /// Its projection.
    pub projection: Projection,
}

impl LoraSite {
    /// Its number among the projections of a model.
    pub(crate) fn index(self) -> usize {
        self.layer * Projection::ALL.len() + self.projection as usize
    }
}

/// An update of some columns of a projection's output: `out += scaling * (x A^T) B^T`.
#[derive(Clone)]
pub struct LoraPart {
    /// `A`, `[rank, inputs]`, in bf16, f16 or f32.
    pub a: HostTensor,
    /// `B`, `[outputs, rank]`, in bf16, f16 or f32.
    pub b: HostTensor,
    /// The adapter's own factor, `alpha / rank` usually.
    pub scaling: f32,
    /// The column of the stacked output that `B`'s first row belongs to.
    pub first_column: usize,
}

impl LoraPart {
    /// An error unless `A` and `B` have one rank.
    pub(super) fn check(&self) -> Result<()> {
        let (rank, found) = (self.a.rows(), self.b.columns());
        match rank == found && rank > 0 {
            true => Ok(()),
            false => Err(invalid!("{} has rank {rank}, {} has rank {found}", self.a.name(), self.b.name())),
        }
    }
}

/// Arranges adapters as a device's kernels read them, on any thread, while the device computes.
pub trait LoraLoader: Send + Sync + 'static {
    /// Device memory.
    type Buffer: Clone + Send + Sync + 'static;
    /// Where the rows of an adapter's update of one projection lie in its pages, and what else kernels need of it.
    type Packed: Send + Sync + 'static;
    /// The same on the device.
    type Lora: Send + Sync + 'static;

    /// Puts the parts of one projection, whose columns do not overlap, behind what is in the image.
    ///
    /// # Errors
    /// `Unsupported` where the device cannot apply them.
    fn pack(&self, parts: &[LoraPart], image: &mut PageImage) -> Result<Self::Packed>;

    /// The same of the embedding's update, whose `A` has a column for each token and is looked up.
    ///
    /// # Errors
    /// `Unsupported` where the device has no kernels for it.
    fn pack_embedding(&self, _part: &LoraPart, _image: &mut PageImage) -> Result<Self::Packed> {
        Err(no_kernels("embed_tokens"))
    }

    /// The same of the output projection's update.
    ///
    /// # Errors
    /// `Unsupported` where the device has no kernels for it.
    fn pack_head(&self, _part: &LoraPart, _image: &mut PageImage) -> Result<Self::Packed> {
        Err(no_kernels("lm_head"))
    }

    /// The update in pages that hold the image.
    ///
    /// # Errors
    /// `Invalid` when these do not lie in their arena.
    fn place(&self, packed: &Self::Packed, pages: &LoraPages<Self::Buffer>) -> Result<Self::Lora>;
}

/// That a device cannot apply updates of a module.
pub(super) fn no_kernels(module: &str) -> Error {
    unsupported!(
        "the adapter updates {module}, for which this device has no kernels: serve it with --device cpu, or train it without \
         {module} among its target_modules"
    )
}

/// An adapter on a device, or arranged for one.
pub struct LoraAdapter<L> {
    sites: Vec<Option<L>>,
    embedding: Option<L>,
    head: Option<L>,
}

impl<L> LoraAdapter<L> {
    /// An adapter for `num_layers` layers that changes nothing yet.
    pub fn new(num_layers: usize) -> Self {
        let num_sites = num_layers * Projection::ALL.len();
        let sites = std::iter::repeat_with(|| None).take(num_sites).collect();
        Self { sites, embedding: None, head: None }
    }

    /// Adds the update of one projection.
    pub fn insert(&mut self, site: LoraSite, update: L) {
        self.sites[site.index()] = Some(update);
    }

    /// Adds the updates of the embedding and of the output projection, where there are any.
    pub fn set_vocabulary(&mut self, embedding: Option<L>, head: Option<L>) {
        (self.embedding, self.head) = (embedding, head);
    }

    /// The update of the embedding, if the adapter has one.
    pub fn embedding(&self) -> Option<&L> {
        self.embedding.as_ref()
    }

    /// The update of the output projection, if the adapter has one.
    pub fn head(&self) -> Option<&L> {
        self.head.as_ref()
    }

    /// The update of a projection, if the adapter has one.
    pub fn get(&self, site: LoraSite) -> Option<&L> {
        self.sites.get(site.index())?.as_ref()
    }

    /// The same adapter with other updates, site by site.
    pub fn try_map<M>(&self, map: impl Fn(&L) -> Result<M>) -> Result<LoraAdapter<M>> {
        let mapped = |update: &Option<L>| update.as_ref().map(&map).transpose();
        let sites = self.sites.iter().map(mapped).collect::<Result<_>>()?;
        Ok(LoraAdapter { sites, embedding: mapped(&self.embedding)?, head: mapped(&self.head)? })
    }
}

/// An update of one projection that is merged into a copy of its weights.
pub struct ScaledUpdate<'a, L> {
    /// What is added.
    pub update: &'a L,
    /// Multiplies it.
    pub scale: f32,
}

/// An adapter and the rows of a step it is added to.
pub struct LoraGroup<L> {
    /// What is added.
    pub adapter: Arc<LoraAdapter<L>>,
    /// Which of the [`LoraBatch`]'s rows.
    pub entries: Range<usize>,
}

/// What is added to which rows of a step. Arrays are on the device; a row stands in as many groups as its request has
/// adapters, once in each.
pub struct LoraBatch<'a, B: Backend> {
    /// `[1, M]` i32: rows of the step, those of one group one after the other and ascending.
    pub rows: Tensor<B::Buffer>,
    /// `[1, M]` f32: what multiplies the update of that row.
    pub scales: Tensor<B::Buffer>,
    /// In the order in which they are added. It must be the same for every batch a row may stand in, or the row's sums
    /// would be rounded differently.
    pub groups: &'a [LoraGroup<<B::LoraLoader as LoraLoader>::Lora>],
}

impl<B: Backend> LoraBatch<'_, B> {
    /// An error unless the arrays are equally long and hold what the groups name.
    pub(super) fn check(&self) -> Result<()> {
        let len = self.rows.columns();
        self.rows.expect("adapted rows", 1, len, DType::I32)?;
        self.scales.expect("scales of adapters", 1, len, DType::F32)?;
        match self.groups.iter().find(|group| group.entries.end > len) {
            Some(group) => Err(invalid!("a group has the entries {:?} of {len}", group.entries)),
            None => Ok(()),
        }
    }
}
