//! The kernels of low-rank updates, and which tile a step takes. No choice changes a bit of the result.

use super::kernels::Kernel;
use super::modules::{HOPPER, Modules};
use crate::Result;
use crate::backend::DType;

/// One tiling of the first kernel.
pub(super) struct ShrinkKernel {
    pub(super) kernel: Kernel,
    pub(super) tile: ShrinkTile,
}

/// Entries and ranks of a piece that one block computes, or the blocks of a cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShrinkTile {
    name: &'static str,
    pub(super) entries: usize,
    pub(super) ranks: usize,
    pub(super) blocks: usize,
    pub(super) threads: usize,
    shared_bytes: usize,
}

/// One line of a table of tiles of one block.
const fn tile(name: &'static str, (entries, ranks): (usize, usize), threads: usize, shared_bytes: usize) -> ShrinkTile {
    ShrinkTile { name, entries, ranks, blocks: 1, threads, shared_bytes }
}

/// The same of tiles of a cluster, with so many stages in the ring.
const fn cluster_tile(name: &'static str, (entries, ranks): (usize, usize), stages: usize) -> ShrinkTile {
    let shared_bytes = stages * (entries + ranks) * 128;
    ShrinkTile { name, entries, ranks, blocks: CLUSTER, threads: 256, shared_bytes }
}

/// By number of entries: the first whose tile holds them all. Each warp has a part of the inputs.
const FEW_ENTRIES: [ShrinkTile; 3] =
    [tile("t16", (16, 16), 256, 80 << 10), tile("t32", (32, 16), 256, 96 << 10), tile("t64", (64, 16), 256, 80 << 10)];

/// For more: each warp has a part of the entries. In pairs, for ranks up to 16 and for more.
const MANY_ENTRIES: [[ShrinkTile; 2]; 2] = [
    [tile("t64_r16", (64, 16), 128, 60 << 10), tile("t64_r64", (64, 64), 128, 80 << 10)],
    [tile("t128_r16", (128, 16), 256, 72 << 10), tile("t128_r64", (128, 64), 256, 96 << 10)],
];

/// Entries from which on there are enough blocks of 128: with fewer, more of the device reads.
const WIDE_ENTRIES: usize = 1024;

/// For more on Hopper: each block of a cluster has a part of the inputs. In pairs as well, up to [`NARROW_ENTRIES`], up to
/// [`WIDE_ENTRIES`] and for more.
const CLUSTER_ENTRIES: [[ShrinkTile; 2]; 3] = [
    [cluster_tile("c128_r16", (128, 16), 6), cluster_tile("c128_r64", (128, 64), 4)],
    [cluster_tile("c256_r16", (256, 16), 5), cluster_tile("c256_r64", (256, 64), 5)],
    [cluster_tile("c384_r16", (384, 16), 4), cluster_tile("c256_r64", (256, 64), 5)],
];

/// Entries up to which one cluster of 128 has them all.
const NARROW_ENTRIES: usize = 128;

/// Blocks of a cluster.
const CLUSTER: usize = 8;

/// The second kernel, with so many columns a block.
pub(super) struct ExpandKernel {
    pub(super) kernel: Kernel,
    pub(super) columns: usize,
    pub(super) threads: usize,
    /// Blocks of other rows that share b.
    cluster: usize,
}

/// How a step is cut into blocks of the second kernel.
pub(super) struct ExpandGrid<'a> {
    pub(super) expand: &'a ExpandKernel,
    pub(super) block_rows: usize,
    /// Blocks by rows and by columns.
    pub(super) blocks: (usize, usize),
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

/// Rows of a strip, and ranks of a stage of b.
const STRIP_ROWS: usize = 16;
const STAGE_RANKS: usize = 16;
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
/// The ranks that stay in shared memory in blocks of a cluster.
const CLUSTER_RANKS: usize = 128;
/// Rows of a block of a cluster where there are few: enough that b is little beside them.
const MIN_CLUSTER_ROWS: usize = 64;
/// Blocks that keep memory busy: each has two strips on the way while it computes and writes others. With more, each with
/// fewer rows, factors would be read more often.
const WANTED_BLOCKS: usize = 48;

/// Low-rank updates in one type.
pub(super) struct LoraKernels {
    few: Vec<ShrinkKernel>,
    many: Vec<[ShrinkKernel; 2]>,
    narrow: ExpandKernel,
    wide: ExpandKernel,
    /// On Hopper.
    clusters: Option<ClusterKernels>,
    pub(super) merge: Kernel,
}

/// What many rows are computed by where blocks can be clusters.
struct ClusterKernels {
    shrink: Vec<[ShrinkKernel; 2]>,
    expand: ExpandKernel,
}

impl LoraKernels {
    pub(super) fn find(modules: &Modules, dtype: DType) -> Result<Self> {
        let shrink = |tile: ShrinkTile| ShrinkKernel::find(modules, dtype, tile);
        let is_hopper = modules.compute_capability()? == HOPPER;
        Ok(Self {
            few: FEW_ENTRIES.into_iter().map(shrink).collect::<Result<_>>()?,
            many: ShrinkKernel::find_pairs(modules, dtype, &MANY_ENTRIES)?,
            narrow: ExpandKernel::find(modules, dtype, "w4", (4, 4), 1)?,
            wide: ExpandKernel::find(modules, dtype, "w8", (8, 2), 1)?,
            clusters: is_hopper.then(|| ClusterKernels::find(modules, dtype)).transpose()?,
            merge: Kernel::find(modules, "lora_merge", format!("lora_merge_{dtype}"), 0)?,
        })
    }

    /// The tiling of the first kernel.
    pub(super) fn shrink(&self, shape: LoraShape) -> &ShrinkKernel {
        if let Some(few) = self.few.iter().find(|few| shape.most_entries <= few.tile.entries) {
            return few;
        }
        let is_wide = usize::from(shape.most_entries > WIDE_ENTRIES);
        let [narrow, wide] = match &self.clusters {
            Some(clusters) => &clusters.shrink[usize::from(shape.most_entries > NARROW_ENTRIES) + is_wide],
            None => &self.many[is_wide],
        };
        if shape.most_rank <= narrow.tile.ranks { narrow } else { wide }
    }

    /// The tiling of the second, on a device with so many multiprocessors.
    pub(super) fn expand(
        &self,
        shape: LoraShape,
        num_rows: usize,
        num_outputs: usize,
        multiprocessors: usize,
    ) -> ExpandGrid<'_> {
        if let Some(ClusterKernels { expand, .. }) = &self.clusters
            && num_rows > FEW_ROWS
            && shape.num_pieces <= MAX_STRIP_PIECES
            && shape.most_rank <= CLUSTER_RANKS
        {
            let block_rows = cluster_rows(num_rows, num_outputs.div_ceil(expand.columns), multiprocessors);
            return expand.grid(block_rows, num_rows, num_outputs);
        }
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
        expand.grid(block_rows, num_rows, num_outputs)
    }

    /// Leaves what every device has.
    pub(super) fn forget_clusters(&mut self) {
        self.clusters = None;
    }
}

/// Rows of a block of a cluster: about as many blocks as multiprocessors, which have one at a time.
fn cluster_rows(num_rows: usize, column_blocks: usize, multiprocessors: usize) -> usize {
    let clusters = (multiprocessors / (column_blocks * CLUSTER)).max(1);
    let rows = num_rows.div_ceil(clusters * CLUSTER).next_multiple_of(STRIP_ROWS);
    rows.clamp(MIN_CLUSTER_ROWS, MAX_BLOCK_ROWS)
}

impl ClusterKernels {
    fn find(modules: &Modules, dtype: DType) -> Result<Self> {
        let shrink = ShrinkKernel::find_pairs(modules, dtype, &CLUSTER_ENTRIES)?;
        Ok(Self {
            shrink,
            expand: ExpandKernel::find(modules, dtype, "c8", (8, CLUSTER_RANKS / STAGE_RANKS), CLUSTER)?,
        })
    }
}

impl ShrinkKernel {
    fn find(modules: &Modules, dtype: DType, tile: ShrinkTile) -> Result<Self> {
        let name = format!("lora_shrink_{dtype}_{}", tile.name);
        let file = if tile.blocks > 1 { "lora_shrink_sm90a" } else { "lora_shrink" };
        Ok(Self { kernel: Kernel::find(modules, file, name, tile.shared_bytes)?, tile })
    }

    fn find_pairs(modules: &Modules, dtype: DType, tiles: &[[ShrinkTile; 2]]) -> Result<Vec<[Self; 2]>> {
        let find = |tile: ShrinkTile| Self::find(modules, dtype, tile);
        tiles.iter().map(|[low, high]| Ok([find(*low)?, find(*high)?])).collect()
    }
}

impl ExpandKernel {
    fn find(
        modules: &Modules,
        dtype: DType,
        name: &str,
        (warps, b_slots): (usize, usize),
        cluster: usize,
    ) -> Result<Self> {
        // Rings of three stages of shrunk numbers and, for each warp, of three strips and of what it has of b.
        let shared_bytes = (3 << 10) + warps * ((3 + b_slots) << 11);
        let file = if cluster > 1 { "lora_expand_sm90a" } else { "lora_expand" };
        let kernel = Kernel::find(modules, file, format!("lora_expand_{dtype}_{name}"), shared_bytes)?;
        Ok(Self { kernel, columns: 64 * warps, threads: 32 * warps, cluster })
    }

    /// Whole clusters: blocks behind the last row read their share of b for others.
    fn grid(&self, block_rows: usize, num_rows: usize, num_outputs: usize) -> ExpandGrid<'_> {
        let row_blocks = num_rows.div_ceil(block_rows).next_multiple_of(self.cluster);
        ExpandGrid { expand: self, block_rows, blocks: (row_blocks, num_outputs.div_ceil(self.columns)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many blocks as an H100 has multiprocessors, but none of few rows.
    #[test]
    fn clusters_divide_rows_among_multiprocessors() {
        for (num_rows, outputs, wanted) in [
            (65, 4096, 64),
            (512, 4096, 64),
            (2000, 4096, 128),
            (2048, 4096, 128),
            (2048, 28672, 256),
            (2048, 64, 64),
            (16384, 4096, 512),
        ] {
            assert_eq!(cluster_rows(num_rows, usize::div_ceil(outputs, 512), 132), wanted, "[{num_rows}] to {outputs}");
        }
    }

    /// A block of Hopper may have 227 KiB.
    #[test]
    fn tiles_of_clusters_have_room() {
        for tile in CLUSTER_ENTRIES.iter().flatten() {
            assert!(tile.shared_bytes <= 227 << 10, "{tile:?}");
        }
    }
}
