//! The tilings of the matrix product, and which one a product takes. No choice changes a bit of the result.

use super::kernels::Kernel;
use super::modules::Modules;
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
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) threads: usize,
    shared_bytes: usize,
    /// Microseconds of a block with 4096 inputs that has a multiprocessor for itself.
    alone: f32,
    /// Microseconds that each of several takes of it.
    each: f32,
}

/// Measured on an H100 (docs/benchmarks.md). Other devices are slower in all of it; what counts is which tile is faster.
const GEMM_TILES: [GemmTile; 5] = [
    GemmTile { tokens: 16, outputs: 32, threads: 64, shared_bytes: 73728, alone: 12.5, each: 5.3 },
    GemmTile { tokens: 32, outputs: 64, threads: 128, shared_bytes: 98304, alone: 17.7, each: 11.5 },
    GemmTile { tokens: 64, outputs: 64, threads: 128, shared_bytes: 98304, alone: 25.4, each: 16.5 },
    GemmTile { tokens: 128, outputs: 128, threads: 128, shared_bytes: 98304, alone: 56.0, each: 47.0 },
    GemmTile { tokens: 128, outputs: 256, threads: 256, shared_bytes: 147456, alone: 87.0, each: 87.0 },
];

/// Microseconds that a multiprocessor takes for its share of the bytes of one output's 4096 weights, times the number of
/// multiprocessors.
const OUTPUT_READING: f32 = 0.363;

/// How much longer that takes for every further row of tiles, which has them from the cache.
const READ_AGAIN: f32 = 0.05;

/// The tilings that a device has the shared memory for.
pub(super) struct GemmKernels(Vec<GemmKernel>);

impl GemmKernels {
    /// Products of `input` that give `output`.
    pub(super) fn find(modules: &Modules, input: DType, output: DType) -> Result<Self> {
        let most = modules.max_shared_bytes()?;
        let fitting = GEMM_TILES.into_iter().filter(|tile| tile.shared_bytes <= most);
        fitting.map(|tile| GemmKernel::find(modules, input, output, tile)).collect::<Result<_>>().map(Self)
    }

    /// The one for so many rows and outputs, on a device with so many multiprocessors.
    pub(super) fn choose(&self, num_tokens: usize, outputs: usize, multiprocessors: usize) -> Result<&GemmKernel> {
        let cost = |gemm: &&GemmKernel| gemm.tile.cost(num_tokens, outputs, multiprocessors, gemm.blocks_at_a_time);
        let best = self.0.iter().min_by(|one, other| cost(one).total_cmp(&cost(other)));
        best.ok_or_else(|| unsupported!("this device has too little shared memory for matrix products"))
    }

    /// Leaves one tile of all.
    pub(super) fn keep(&mut self, tokens: usize, outputs: usize) {
        self.0.retain(|gemm| (gemm.tile.tokens, gemm.tile.outputs) == (tokens, outputs));
    }
}

impl GemmTile {
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
        let name = format!("gemm_{input}_{output}_t{}x{}", tile.tokens, tile.outputs);
        let kernel = Kernel::find(modules, "gemm", name, tile.shared_bytes)?;
        Ok(Self { blocks_at_a_time: kernel.blocks_at_a_time(tile.threads)?, kernel, tile })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tile that an H100, or a device with so much less shared memory, takes.
    fn chosen(num_tokens: usize, outputs: usize, most_shared_bytes: usize) -> (usize, usize) {
        let tiles = GEMM_TILES.into_iter().filter(|tile| tile.shared_bytes <= most_shared_bytes);
        let cost = |tile: &GemmTile| {
            let blocks_at_a_time = (most_shared_bytes / tile.shared_bytes).max(1);
            tile.cost(num_tokens, outputs, 132, blocks_at_a_time)
        };
        let best = tiles.min_by(|one, other| cost(one).total_cmp(&cost(other))).unwrap();
        (best.tokens, best.outputs)
    }

    /// Those that were measured as the fastest, or nearly.
    #[test]
    fn products_take_the_tile_that_was_fastest() {
        let h100 = 227 << 10;
        for (num_tokens, outputs, wanted) in [
            (1, 4096, (16, 32)),
            (16, 28672, (16, 32)),
            (32, 28672, (32, 64)),
            (32, 4096, (16, 32)),
            (64, 28672, (64, 64)),
            (64, 4096, (32, 64)),
            (128, 28672, (128, 256)),
            (128, 4096, (32, 64)),
            (256, 6144, (64, 64)),
            (512, 28672, (128, 128)),
            (512, 4096, (128, 128)),
            (1024, 6144, (128, 128)),
            (1024, 28672, (128, 256)),
            (4096, 4096, (128, 256)),
        ] {
            assert_eq!(chosen(num_tokens, outputs, h100), wanted, "[{num_tokens}] x [{outputs}]");
        }
    }

    #[test]
    fn a_device_with_less_shared_memory_goes_without_the_largest_tile() {
        assert_eq!(chosen(4096, 28672, 99 << 10), (128, 128));
        assert_eq!(chosen(1, 4096, 99 << 10), (16, 32));
    }
}
