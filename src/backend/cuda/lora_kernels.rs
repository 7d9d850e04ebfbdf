//! The kernels of low-rank updates, and which tile a step takes. No choice changes a bit of the result.

use super::kernels::Kernel;
use super::modules::Modules;
use crate::Result;
use crate::backend::DType;

/// One tiling of the first kernel.
pub(super) struct ShrinkKernel {
    pub(super) kernel: Kernel,
    pub(super) tile: ShrinkTile,
}

/// Entries and ranks of a piece that one block computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShrinkTile {
    name: &'static str,
    pub(super) entries: usize,
    pub(super) ranks: usize,
    pub(super) threads: usize,
    shared_bytes: usize,
}

/// By number of entries: the first whose tile holds them all. Each warp has a part of the inputs.
const FEW_ENTRIES: [ShrinkTile; 3] = [
    ShrinkTile { name: "t16", entries: 16, ranks: 16, threads: 256, shared_bytes: 80 << 10 },
    ShrinkTile { name: "t32", entries: 32, ranks: 16, threads: 256, shared_bytes: 96 << 10 },
    ShrinkTile { name: "t64", entries: 64, ranks: 16, threads: 256, shared_bytes: 80 << 10 },
];

/// For more: each warp has a part of the entries. In pairs, for ranks up to 16 and for more.
const MANY_ENTRIES: [[ShrinkTile; 2]; 2] = [
    [
        ShrinkTile { name: "t64_r16", entries: 64, ranks: 16, threads: 128, shared_bytes: 60 << 10 },
        ShrinkTile { name: "t64_r64", entries: 64, ranks: 64, threads: 128, shared_bytes: 80 << 10 },
    ],
    [
        ShrinkTile { name: "t128_r16", entries: 128, ranks: 16, threads: 256, shared_bytes: 72 << 10 },
        ShrinkTile { name: "t128_r64", entries: 128, ranks: 64, threads: 256, shared_bytes: 96 << 10 },
    ],
];

/// Entries from which on there are enough blocks of 128: with fewer, more of the device reads.
const WIDE_ENTRIES: usize = 1024;

/// The second kernel, with so many columns a block.
pub(super) struct ExpandKernel {
    pub(super) kernel: Kernel,
    pub(super) columns: usize,
    pub(super) threads: usize,
}

/// How a step is cut into blocks of the second kernel.
pub(super) struct ExpandGrid<'a> {
    pub(super) expand: &'a ExpandKernel,
    pub(super) block_rows: usize,
}

/// What a choice goes by.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LoraShape {
    pub(super) num_pieces: usize,
    /// Of all pieces together.
    pub(super) ranks: usize,
    /// The largest of a piece.
    pub(super) most_entries: usize,
    /// The same.
    pub(super) most_rank: usize,
}

/// Rows of a strip.
const STRIP_ROWS: usize = 16;
/// Up to so many rows are one block's, so that factors are read once.
const FEW_ROWS: usize = 64;
/// Rows of a block where there are more.
const MIN_BLOCK_ROWS: usize = 128;
const MAX_BLOCK_ROWS: usize = 512;
/// Up to so many, blocks have fewer columns: shrunk numbers, which each of them reads, are few.
const NARROW_ROWS: usize = 16;
/// The ranks that stay in shared memory in wide blocks.
const WIDE_RANKS: usize = 32;
/// Pieces that a block with several strips may have.
const MAX_STRIP_PIECES: usize = 32;
/// Blocks that keep memory busy: each has two strips on the way while it computes and writes others. With more, each with
/// fewer rows, factors would be read more often.
const WANTED_BLOCKS: usize = 48;

/// Low-rank updates in one type.
pub(super) struct LoraKernels {
    few: Vec<ShrinkKernel>,
    many: Vec<[ShrinkKernel; 2]>,
    narrow: ExpandKernel,
    wide: ExpandKernel,
    pub(super) merge: Kernel,
}

impl LoraKernels {
    pub(super) fn find(modules: &Modules, dtype: DType) -> Result<Self> {
        let shrink = |tile: ShrinkTile| ShrinkKernel::find(modules, dtype, tile);
        Ok(Self {
            few: FEW_ENTRIES.into_iter().map(shrink).collect::<Result<_>>()?,
            many: MANY_ENTRIES
                .into_iter()
                .map(|[low, high]| Ok([shrink(low)?, shrink(high)?]))
                .collect::<Result<_>>()?,
            narrow: ExpandKernel::find(modules, dtype, 4, 4)?,
            wide: ExpandKernel::find(modules, dtype, 8, 2)?,
            merge: Kernel::find(modules, "lora_merge", format!("lora_merge_{dtype}"), 0)?,
        })
    }

    /// The tiling of the first kernel.
    pub(super) fn shrink(&self, shape: LoraShape) -> &ShrinkKernel {
        if let Some(few) = self.few.iter().find(|few| shape.most_entries <= few.tile.entries) {
            return few;
        }
        let [narrow, wide] = &self.many[usize::from(shape.most_entries > WIDE_ENTRIES)];
        if shape.most_rank <= narrow.tile.ranks { narrow } else { wide }
    }

    /// The tiling of the second.
    pub(super) fn expand(&self, shape: LoraShape, num_rows: usize, num_outputs: usize) -> ExpandGrid<'_> {
        // Of few rows each may have any adapter.
        let strip_ranks = if num_rows <= FEW_ROWS { shape.ranks } else { shape.most_rank };
        let is_narrow = num_rows <= NARROW_ROWS || strip_ranks > WIDE_RANKS || shape.num_pieces > MAX_STRIP_PIECES;
        let expand = if is_narrow { &self.narrow } else { &self.wide };
        let block_rows = match num_rows {
            _ if shape.num_pieces > MAX_STRIP_PIECES => STRIP_ROWS,
            ..=FEW_ROWS => num_rows.next_multiple_of(STRIP_ROWS),
            _ => {
                let num_parts = WANTED_BLOCKS.div_ceil(num_outputs.div_ceil(expand.columns));
                num_rows.div_ceil(num_parts).next_multiple_of(STRIP_ROWS).clamp(MIN_BLOCK_ROWS, MAX_BLOCK_ROWS)
            }
        };
        ExpandGrid { expand, block_rows }
    }
}

impl ShrinkKernel {
    fn find(modules: &Modules, dtype: DType, tile: ShrinkTile) -> Result<Self> {
        let name = format!("lora_shrink_{dtype}_{}", tile.name);
        Ok(Self { kernel: Kernel::find(modules, "lora_shrink", name, tile.shared_bytes)?, tile })
    }
}

impl ExpandKernel {
    fn find(modules: &Modules, dtype: DType, warps: usize, b_slots: usize) -> Result<Self> {
        // Rings of three stages of shrunk numbers and, for each warp, of three strips and of what it has of b.
        let shared_bytes = (3 << 10) + warps * ((3 + b_slots) << 11);
        let name = format!("lora_expand_{dtype}_w{warps}");
        let kernel = Kernel::find(modules, "lora_expand", name, shared_bytes)?;
        Ok(Self { kernel, columns: 64 * warps, threads: 32 * warps })
    }
}
