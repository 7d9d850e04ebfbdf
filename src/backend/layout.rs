//! Where the numbers of a KV block lie. The only place that decides it; who owns a block is `kv`'s business.
//!
//! A block is `[layer][kv_head][K tile | V tile]`, so one head of one layer reads one run of bytes. With `B` tokens in
//! a block and `D` numbers in a head, a tile is
//!
//! | order, type | K tile | V tile |
//! | --- | --- | --- |
//! | pairs, bf16 | `[D/2][B][2]`, innermost dimensions `2i, 2i + 1` | `[B/2][D][2]`, innermost tokens `2i, 2i + 1` |
//! | pairs, f32 | `[D][B]` | `[B][D]` |
//! | rows, bf16, f16 or fp8 | `[B][D]` | `[B][D]` |
//!
//! Rows are for GPUs, whose `ldmatrix` transposes on the way into registers. Pairs are for the CPU: a vector of K holds
//! consecutive tokens and a vector of V consecutive dimensions, so that neither scores nor weighted sums need a sum
//! across lanes. In bf16 a 32-bit word is a pair: its low half becomes an f32 by a shift, its high half by a mask, and
//! dot-product instructions take the word as it is. The f32 tiles are the same pairs, apart.

use std::ops::Range;

use super::DType;
use crate::{Result, invalid};

/// Blocks begin and end on this boundary, in memory and in files.
pub(super) const BLOCK_ALIGNMENT: usize = 4096;

/// Tokens that one vector of K spans; a block holds a multiple of it.
pub(super) const LANE_TOKENS: usize = 16;

/// How the numbers of a tile follow each other (the table above).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvOrder {
    /// Consecutive numbers of K are tokens, in bf16 two dimensions of each; those of V dimensions.
    Pairs,
    /// A token's numbers are one run.
    Rows,
}

/// Shape of the KV cache of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    order: KvOrder,
    num_layers: usize,
    num_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    dtype: DType,
}

impl KvLayout {
    /// A cache of `num_layers` layers with `num_kv_heads` heads of `head_dim` numbers (a multiple of 16) in blocks of
    /// `block_size` tokens (a multiple of 16), in pairs, as bf16 or f32.
    pub fn new(
        num_layers: usize,
        num_kv_heads: usize,
        head_dim: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<Self> {
        Self::with_order(KvOrder::Pairs, num_layers, num_kv_heads, head_dim, block_size, dtype)
    }

    /// The same in any order; pairs are bf16 or f32, rows bf16, f16 or fp8.
    pub fn with_order(
        order: KvOrder,
        num_layers: usize,
        num_kv_heads: usize,
        head_dim: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(16) {
            return Err(invalid!("the KV cache needs a head size that is a multiple of 16, not {head_dim}"));
        }
        if block_size == 0 || !block_size.is_multiple_of(LANE_TOKENS) {
            return Err(invalid!("a KV block holds a multiple of {LANE_TOKENS} tokens, not {block_size}"));
        }
        match (order, dtype) {
            (KvOrder::Pairs, DType::BF16 | DType::F32) | (KvOrder::Rows, DType::BF16 | DType::F16 | DType::F8E4M3) => {}
            (KvOrder::Pairs, _) => {
                return Err(invalid!("the CPU keeps the KV cache as bf16 or f32, not {dtype} (--kv-cache-dtype)"));
            }
            (KvOrder::Rows, _) => {
                return Err(invalid!("a GPU keeps the KV cache as bf16, f16 or fp8, not {dtype} (--kv-cache-dtype)"));
            }
        }
        let bytes = [num_layers, num_kv_heads, head_dim, block_size, 2, dtype.block_bytes()];
        let bytes = bytes.into_iter().try_fold(1usize, usize::checked_mul);
        if bytes.is_none_or(|bytes| bytes == 0 || bytes > isize::MAX as usize - BLOCK_ALIGNMENT) {
            return Err(invalid!(
                "a KV block of {num_layers} layers, {num_kv_heads} heads of {head_dim} and {block_size} tokens cannot exist"
            ));
        }
        Ok(Self { order, num_layers, num_kv_heads, head_dim, block_size, dtype })
    }

    /// Where every number of a block lies, in words: blocks of one name can stand for each other.
    pub fn name(&self) -> String {
        let Self { order, num_layers, num_kv_heads, head_dim, block_size, dtype } = self;
        format!("{order:?} {dtype} {num_layers}x{num_kv_heads}x{block_size}x{head_dim}").to_lowercase()
    }

    /// How the numbers of a tile follow each other.
    pub fn order(&self) -> KvOrder {
        self.order
    }

    /// Layers that keep keys and values.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// Heads of keys and values.
    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads
    }

    /// Numbers in one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens in one block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// How the numbers are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of a block, all layers, rounded up to [`BLOCK_ALIGNMENT`].
    pub fn block_bytes(&self) -> usize {
        (self.num_layers * self.num_kv_heads * 2 * self.tile_bytes()).next_multiple_of(BLOCK_ALIGNMENT)
    }

    /// Bytes of the K (or the V) of one head and layer in a block.
    pub fn tile_bytes(&self) -> usize {
        self.block_size * self.head_dim * self.dtype.block_bytes()
    }

    /// Byte offset in a block of the K tile of a head.
    pub fn k_tile_offset(&self, layer: usize, kv_head: usize) -> usize {
        debug_assert!(layer < self.num_layers && kv_head < self.num_kv_heads);
        (layer * self.num_kv_heads + kv_head) * 2 * self.tile_bytes()
    }

    /// Byte offset in a block of the V tile of a head.
    pub fn v_tile_offset(&self, layer: usize, kv_head: usize) -> usize {
        self.k_tile_offset(layer, kv_head) + self.tile_bytes()
    }

    /// The bytes in a block of layers `[first, end)`; what a block is rounded up by belongs to the last one.
    pub fn layer_bytes(&self, first: usize, end: usize) -> Range<usize> {
        let start = |layer: usize| layer * self.num_kv_heads * 2 * self.tile_bytes();
        start(first)..if end == self.num_layers { self.block_bytes() } else { start(end) }
    }

    /// Byte offset in a K tile of one number.
    pub fn k_offset(&self, token: usize, dim: usize) -> usize {
        match self.order {
            KvOrder::Pairs => self.offset(dim, token, self.block_size),
            KvOrder::Rows => (token * self.head_dim + dim) * self.dtype.block_bytes(),
        }
    }

    /// Byte offset in a V tile of one number.
    pub fn v_offset(&self, token: usize, dim: usize) -> usize {
        match self.order {
            KvOrder::Pairs => self.offset(token, dim, self.head_dim),
            KvOrder::Rows => (token * self.head_dim + dim) * self.dtype.block_bytes(),
        }
    }

    /// Zeroes what a block holds behind its first `num_tokens` tokens: whatever lay there before.
    ///
    /// # Panics
    /// When `block` is no block of this layout.
    pub fn clear_behind(&self, block: &mut [u8], num_tokens: usize) {
        let heads = (0..self.num_layers).flat_map(|layer| (0..self.num_kv_heads).map(move |head| (layer, head)));
        for (layer, head) in heads {
            let (k_tile, v_tile) = (self.k_tile_offset(layer, head), self.v_tile_offset(layer, head));
            for token in num_tokens..self.block_size {
                for dim in 0..self.head_dim {
                    for offset in [k_tile + self.k_offset(token, dim), v_tile + self.v_offset(token, dim)] {
                        block[offset..offset + self.dtype.block_bytes()].fill(0);
                    }
                }
            }
        }
    }

    /// Bytes from one pair of dimensions to the next in a K tile in pairs.
    pub fn k_pair_bytes(&self) -> usize {
        2 * self.block_size * self.dtype.block_bytes()
    }

    /// Bytes from one pair of tokens to the next in a V tile in pairs.
    pub fn v_pair_bytes(&self) -> usize {
        2 * self.head_dim * self.dtype.block_bytes()
    }

    fn offset(&self, row: usize, lane: usize, num_lanes: usize) -> usize {
        match self.dtype {
            DType::BF16 => ((row / 2 * num_lanes + lane) * 2 + row % 2) * 2,
            _ => (row * num_lanes + lane) * 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_own_place() {
        for (order, dtype) in [
            (KvOrder::Pairs, DType::BF16),
            (KvOrder::Pairs, DType::F32),
            (KvOrder::Rows, DType::BF16),
            (KvOrder::Rows, DType::F16),
            (KvOrder::Rows, DType::F8E4M3),
        ] {
            let layout = KvLayout::with_order(order, 2, 3, 48, 32, dtype).unwrap();
            let element_bytes = dtype.block_bytes();
            let mut taken = vec![false; layout.block_bytes() / element_bytes];
            let mut take = |offset: usize| {
                assert_eq!(offset % element_bytes, 0);
                assert!(!std::mem::replace(&mut taken[offset / element_bytes], true));
            };
            for (layer, head) in (0..2).flat_map(|layer| (0..3).map(move |head| (layer, head))) {
                for (token, dim) in (0..32).flat_map(|token| (0..48).map(move |dim| (token, dim))) {
                    take(layout.k_tile_offset(layer, head) + layout.k_offset(token, dim));
                    take(layout.v_tile_offset(layer, head) + layout.v_offset(token, dim));
                }
            }
            assert_eq!(taken.iter().filter(|taken| **taken).count(), 2 * 3 * 2 * 32 * 48);
        }
    }

    #[test]
    fn what_lies_behind_the_tokens_is_cleared_and_nothing_else() {
        for (order, dtype) in [(KvOrder::Pairs, DType::BF16), (KvOrder::Pairs, DType::F32), (KvOrder::Rows, DType::F16)]
        {
            let layout = KvLayout::with_order(order, 2, 2, 16, 16, dtype).unwrap();
            for num_tokens in [0, 1, 15, 16] {
                let mut block = vec![1; layout.block_bytes()];
                layout.clear_behind(&mut block, num_tokens);
                let is_set = |offset: usize| block[offset..offset + dtype.block_bytes()].iter().all(|byte| *byte == 1);
                for (layer, head, token) in (0..64).map(|at| (at / 32, at / 16 % 2, at % 16)) {
                    let k = layout.k_tile_offset(layer, head) + layout.k_offset(token, 3);
                    let v = layout.v_tile_offset(layer, head) + layout.v_offset(token, 3);
                    assert_eq!((is_set(k), is_set(v)), (token < num_tokens, token < num_tokens));
                }
            }
        }
    }

    #[test]
    fn blocks_are_whole_pages() {
        let layout = KvLayout::new(1, 1, 64, 16, DType::BF16).unwrap();
        assert_eq!((layout.tile_bytes(), layout.block_bytes()), (2048, 4096));
        assert_eq!(KvLayout::new(1, 1, 80, 16, DType::BF16).unwrap().block_bytes(), 8192);
    }

    #[test]
    fn the_bytes_of_all_layers_are_those_of_the_block() {
        let layout = KvLayout::new(3, 1, 48, 16, DType::BF16).unwrap();
        let ranges = [0, 1, 2].map(|layer| layout.layer_bytes(layer, layer + 1));
        assert_eq!(ranges, [0..3072, 3072..6144, 6144..12288]);
        assert_eq!((layout.layer_bytes(0, 2), layout.layer_bytes(1, 3)), (0..6144, 3072..12288));
        assert_eq!(layout.block_bytes(), 12288);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (layers, head_dim, block_size, dtype) in [
            (1, 40, 16, DType::BF16),
            (1, 0, 16, DType::BF16),
            (1, 64, 8, DType::BF16),
            (1, 64, 16, DType::F16),
            (1, 64, 16, DType::F8E4M3),
            (0, 64, 16, DType::F32),
            (usize::MAX / 64, 64, 16, DType::F32),
        ] {
            assert!(KvLayout::new(layers, 1, head_dim, block_size, dtype).is_err());
        }
        for (order, dtype) in [(KvOrder::Pairs, DType::F16), (KvOrder::Rows, DType::F32)] {
            assert!(KvLayout::with_order(order, 1, 1, 64, 16, dtype).is_err());
        }
    }
}
