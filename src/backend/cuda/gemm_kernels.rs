//! The tilings of the matrix product, and which one a product takes. No choice changes a bit of the result.

use super::kernels::Kernel;
use super::modules::{HOPPER, Modules};
use crate::backend::DType;
use crate::{Result, unsupported};

/// One tiling.
pub(super) struct GemmKernel {
    pub(super) kernel: Kernel,
    pub(super) tile: GemmTile,
    /// Blocks that a multiprocessor has at a time.
    blocks_at_a_time: usize,
}

/// Rows and columns of the output that one block computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct GemmTile {
    /// How names of its kernels end.
    name: &'static str,
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) threads: usize,
    shared_bytes: usize,
    /// Microseconds of a block with 4096 inputs that has a multiprocessor for itself.
    alone: f32,
    /// Microseconds that each of several takes of it.
    each: f32,
}

/// One line of a table of tiles.
const fn tile(
    name: &'static str,
    (tokens, outputs): (usize, usize),
    threads: usize,
    shared_bytes: usize,
    (alone, each): (f32, f32),
) -> GemmTile {
    GemmTile { name, tokens, outputs, threads, shared_bytes, alone, each }
}

/// What is multiplied by warps, on any GPU. Measured on an H100 (docs/benchmarks.md). Other devices are slower in all of it;
/// what counts is which tile is faster.
const WARP_TILES: [GemmTile; 5] = [
    tile("t16x32", (16, 32), 64, 72 << 10, (12.5, 5.3)),
    tile("t32x64", (32, 64), 128, 96 << 10, (17.7, 11.5)),
    tile("t64x64", (64, 64), 128, 96 << 10, (25.4, 16.5)),
    tile("t128x128", (128, 128), 128, 96 << 10, (56.0, 47.0)),
    tile("t128x256", (128, 256), 256, 144 << 10, (87.0, 87.0)),
];

/// What is multiplied by warpgroups, on Hopper; measured in the same way.
const WARPGROUP_TILES: [GemmTile; 5] = [
    tile("w64x64", (64, 64), 128, 97 << 10, (18.2, 13.4)),
    tile("w128x128s3", (128, 128), 256, 97 << 10, (38.5, 28.6)),
    tile("w128x128s6", (128, 128), 256, 193 << 10, (31.5, 31.5)),
    tile("w128x192", (128, 192), 256, 201 << 10, (42.0, 41.7)),
    tile("w128x256", (128, 256), 256, 193 << 10, (58.5, 58.5)),
];

/// Microseconds that a multiprocessor takes for its share of the bytes of one output's 4096 weights, times the number of
/// multiprocessors.
const OUTPUT_READING: f32 = 0.363;

/// How much longer that takes for every further row of tiles, which has them from the cache.
const READ_AGAIN: f32 = 0.05;

/// The tilings that a device has the instructions and the shared memory for.
pub(super) struct GemmKernels(Vec<GemmKernel>);

impl GemmKernels {
    /// Products of `input` that give `output`.
    pub(super) fn find(modules: &Modules, input: DType, output: DType) -> Result<Self> {
        let (most, capability) = (modules.max_shared_bytes()?, modules.compute_capability()?);
        let find = |tile| GemmKernel::find(modules, input, output, tile);
        tiles(capability, most).map(find).collect::<Result<_>>().map(Self)
    }

    /// The one for so many rows and outputs, on a device with so many multiprocessors.
    pub(super) fn choose(&self, num_tokens: usize, outputs: usize, multiprocessors: usize) -> Result<&GemmKernel> {
        let cost = |gemm: &&GemmKernel| gemm.tile.cost(num_tokens, outputs, multiprocessors, gemm.blocks_at_a_time);
        let best = self.0.iter().min_by(|one, other| cost(one).total_cmp(&cost(other)));
        best.ok_or_else(|| unsupported!("this device has too little shared memory for matrix products"))
    }

    /// Leaves one tile of all, by the end of its kernels' names.
    pub(super) fn keep(&mut self, name: &str) {
        self.0.retain(|gemm| gemm.tile.name == name);
    }

    /// Ends of the kernels' names.
    pub(super) fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|gemm| gemm.tile.name).collect()
    }
}

/// Those for a compute capability and so much shared memory of a block.
fn tiles(capability: (i32, i32), most_shared_bytes: usize) -> impl Iterator<Item = GemmTile> {
    let of_warpgroups = if capability == HOPPER { &WARPGROUP_TILES[..] } else { &[] };
    let all = WARP_TILES.iter().chain(of_warpgroups);
    all.copied().filter(move |tile| tile.shared_bytes <= most_shared_bytes)
}

impl GemmTile {
    /// The file that has its kernels.
    fn file(&self) -> &'static str {
        if self.name.starts_with('w') { "gemm_sm90a" } else { "gemm" }
    }

    /// Microseconds for 4096 inputs: what the multiprocessor with most blocks computes, or what all read.
    fn cost(&self, num_tokens: usize, outputs: usize, multiprocessors: usize, blocks_at_a_time: usize) -> f32 {
        let token_tiles = num_tokens.div_ceil(self.tokens);
        let blocks = token_tiles * outputs.div_ceil(self.outputs);
        let most_blocks = blocks.div_ceil(multiprocessors);
        let rounds = most_blocks.div_ceil(blocks_at_a_time.max(1));
        let computing = (rounds as f32 * self.alone).max(most_blocks as f32 * self.each);
        let read_again = 1.0 + READ_AGAIN * token_tiles.saturating_sub(1) as f32;
        computing.max(OUTPUT_READING * outputs as f32 / multiprocessors as f32 * read_again)
    }
}

impl GemmKernel {
    fn find(modules: &Modules, input: DType, output: DType, tile: GemmTile) -> Result<Self> {
        let name = format!("gemm_{input}_{output}_{}", tile.name);
        let kernel = Kernel::find(modules, tile.file(), name, tile.shared_bytes)?;
        Ok(Self { blocks_at_a_time: kernel.blocks_at_a_time(tile.threads)?, kernel, tile })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: usize = 227 << 10;

    /// The tile that a device with an H100's multiprocessors takes.
    fn chosen(num_tokens: usize, outputs: usize, capability: (i32, i32), most_shared_bytes: usize) -> &'static str {
        let cost = |tile: &GemmTile| {
            let blocks_at_a_time = (most_shared_bytes / tile.shared_bytes).max(1);
            tile.cost(num_tokens, outputs, 132, blocks_at_a_time)
        };
        let best = tiles(capability, most_shared_bytes).min_by(|one, other| cost(one).total_cmp(&cost(other)));
        best.unwrap().name
    }

    /// Those that were measured as the fastest, or nearly.
    #[test]
    fn products_take_the_tile_that_was_fastest() {
        for (num_tokens, outputs, of_warps, of_all) in [
            (1, 4096, "t16x32", "t16x32"),
            (16, 28672, "t16x32", "t16x32"),
            (32, 28672, "t32x64", "t32x64"),
            (32, 4096, "t16x32", "t16x32"),
            (64, 28672, "t64x64", "t64x64"),
            (64, 4096, "t32x64", "t32x64"),
            (128, 28672, "t128x256", "w128x128s3"),
            (128, 4096, "t32x64", "w64x64"),
            (256, 6144, "t64x64", "w128x128s6"),
            (512, 28672, "t128x128", "w128x128s3"),
            (512, 4096, "t128x128", "w128x128s6"),
            (1024, 6144, "t128x128", "w128x192"),
            (1024, 28672, "t128x256", "w128x128s3"),
            (4096, 4096, "t128x256", "w128x128s3"),
        ] {
            let found = [(8, 0), HOPPER].map(|capability| chosen(num_tokens, outputs, capability, H100));
            assert_eq!(found, [of_warps, of_all], "[{num_tokens}] x [{outputs}]");
        }
    }

    #[test]
    fn a_device_with_less_shared_memory_goes_without_the_largest_tile() {
        assert_eq!(chosen(4096, 28672, (8, 9), 99 << 10), "t128x128");
        assert_eq!(chosen(1, 4096, (8, 9), 99 << 10), "t16x32");
    }

    /// Newer GPUs run machine code of older ones, but not Hopper's own instructions.
    #[test]
    fn only_hopper_has_tiles_of_warpgroups() {
        for (capability, wanted) in [((8, 0), 5), ((8, 9), 5), (HOPPER, 10), ((10, 0), 5), ((12, 0), 5)] {
            assert_eq!(tiles(capability, H100).count(), wanted, "{capability:?}");
        }
    }
}
