//! What attention moves and multiplies, against what it must by the shape of the step: keys and values that are seen, once for
//! all heads that share them, queries and results. What numbers they are does not matter.

use std::ops::Range;

use super::*;
use crate::support::softgpu;
use crate::traffic::{check_limit, check_moved};

/// Sequences of one length that go on by one token each.
struct Decode {
    cache: DType,
    shape: Shape,
    num_seqs: usize,
    context_len: usize,
    is_split: bool,
}

impl Decode {
    fn run(&self, gpu: &Gpu) {
        attend_to_anything(gpu, self.cache, self.shape, &vec![(1, self.context_len); self.num_seqs]);
    }

    fn kernel(&self, dtype: DType) -> String {
        kernel_name("decode", (dtype, self.cache), self.shape.head_dim)
    }

    /// Positions that a new token sees.
    fn seen(&self) -> Range<usize> {
        self.shape.window.map_or(0, |window| self.context_len - window)..self.context_len
    }

    /// Bytes of queries, or of the step's output: both are of 16 bits.
    fn row_bytes(&self) -> usize {
        self.num_seqs * self.shape.num_heads() * self.shape.head_dim * 2
    }

    /// Bytes of what single chunks give: a number for each dimension, a maximum and a sum.
    fn partial_bytes(&self) -> usize {
        let num_chunks = self.context_len.div_ceil(256) - self.seen().start / 256;
        self.num_seqs * self.shape.num_heads() * num_chunks * (self.shape.head_dim + 2) * 4
    }

    /// Products and sums of tiles that somebody sees, for 16 rows of queries as the tensor cores take them.
    fn flops(&self) -> usize {
        self.num_seqs * self.shape.num_kv_heads * tile_flops(16, self.seen(), self.shape.head_dim)
    }

    /// What the kernel has to read and write.
    fn least(&self) -> usize {
        let numbers = 2 * self.num_seqs * self.seen().len() * self.shape.num_kv_heads * self.shape.head_dim;
        let results = if self.is_split { self.partial_bytes() } else { self.row_bytes() };
        numbers * self.cache.block_bytes() + self.row_bytes() + results
    }
}

/// Products and sums of so many query rows with the tiles of 64 keys and values that hold positions of `seen`.
fn tile_flops(num_rows: usize, seen: Range<usize>, head_dim: usize) -> usize {
    let num_tiles = seen.end.div_ceil(64) - seen.start / 64;
    2 * 2 * num_rows * num_tiles * 64 * head_dim
}

/// Runs the cases in a process of their own and checks both kernels of each type of activations: none is another's.
fn check(test: &str, cases: &[(DType, Decode)]) {
    let dtypes = [DType::BF16, DType::F16];
    let of = |dtype: DType| cases.iter().filter(move |case| case.0 == dtype).map(|case| &case.1);
    let counted = softgpu::count(test, || {
        for dtype in dtypes {
            let gpu = Gpu::new(dtype);
            of(dtype).for_each(|case| case.run(&gpu));
        }
    });
    let Some(counted) = counted else { return };
    for dtype in dtypes {
        for case in of(dtype) {
            check_moved(&counted, &case.kernel(dtype), case.least());
            assert_eq!(counted[case.kernel(dtype)]["mma_flops"], case.flops(), "{}", case.kernel(dtype));
            // Numbers of fp8 take instructions to turn into others.
            if case.cache == dtype {
                check_limit(&case.kernel(dtype), &counted[case.kernel(dtype)]);
            }
        }
        let split = || of(dtype).filter(|case| case.is_split);
        let kernel = format!("attention_combine_{dtype}");
        assert_eq!(counted[&kernel]["launches"].as_u64().unwrap_or(0), split().count() as u64, "{kernel}");
        if split().count() > 0 {
            let least = split().map(|case| case.partial_bytes() + case.row_bytes()).sum();
            check_moved(&counted, &kernel, least);
        }
    }
}

/// A few sequences, whose contexts are split among blocks.
fn few(cache: DType, shape: Shape) -> Decode {
    Decode { cache, shape, num_seqs: 2, context_len: 1024, is_split: true }
}

#[test]
fn heads_that_share_keys_read_them_once() {
    let shapes = [64, 80, 96, 128, 256].map(|head_dim| Shape { head_dim, ..LARGE });
    let each = shapes.iter().flat_map(|shape| CACHES.map(|(dtype, cache)| (dtype, few(cache, *shape))));
    let cases: Vec<_> = each.collect();
    check("attention::traffic::heads_that_share_keys_read_them_once", &cases);
}

/// A model of 7 billion weights, in which every head has keys of its own.
#[test]
fn heads_with_keys_of_their_own_read_no_others() {
    let shape = Shape { num_kv_heads: 32, group: 1, ..LARGE };
    let cases = CACHES.map(|(dtype, cache)| (dtype, Decode { num_seqs: 1, ..few(cache, shape) }));
    check("attention::traffic::heads_with_keys_of_their_own_read_no_others", &cases);
}

#[test]
fn what_lies_before_a_window_is_not_read() {
    let shape = Shape { window: Some(1024), ..LARGE };
    let cases = CACHES.map(|(dtype, cache)| (dtype, Decode { context_len: 3000, ..few(cache, shape) }));
    check("attention::traffic::what_lies_before_a_window_is_not_read", &cases);
}

/// So many sequences that whole contexts keep enough of the device busy: none is split.
#[test]
fn contexts_of_many_sequences_are_not_split() {
    let many = |cache, shape| Decode { num_seqs: 24, context_len: 512, is_split: false, ..few(cache, shape) };
    let cases = CACHES.map(|(dtype, cache)| (dtype, many(cache, LARGE)));
    check("attention::traffic::contexts_of_many_sequences_are_not_split", &cases);
}

/// Each block of 64 rows reads and multiplies what lies between the beginning of its first row's window and its last row.
#[test]
fn prompts_skip_what_lies_before_their_windows() {
    const PART: Lengths = (128, 1024);
    let shape = Shape { window: Some(512), num_kv_heads: 2, head_dim: 64, ..LARGE };
    let counted = softgpu::count("attention::traffic::prompts_skip_what_lies_before_their_windows", || {
        CACHES.iter().for_each(|(dtype, cache)| attend_to_anything(&Gpu::new(*dtype), *cache, shape, &[PART]));
    });
    let Some(counted) = counted else { return };
    let block_tokens = 64 / shape.group;
    let seen: Vec<Range<usize>> = (PART.1 - PART.0..PART.1)
        .step_by(block_tokens)
        .map(|first| first + 1 - shape.window.unwrap()..first + block_tokens)
        .collect();
    let num_positions: usize = seen.iter().map(ExactSizeIterator::len).sum();
    for (dtype, cache) in CACHES {
        let kernel = kernel_name("prefill", (dtype, cache), shape.head_dim);
        let keys_and_values = 2 * num_positions * shape.num_kv_heads * shape.head_dim * cache.block_bytes();
        check_moved(&counted, &kernel, keys_and_values + 2 * 2 * PART.0 * shape.num_heads() * shape.head_dim);
        let per_head: usize = seen.iter().map(|seen| tile_flops(64, seen.clone(), shape.head_dim)).sum();
        assert_eq!(counted[&kernel]["mma_flops"], shape.num_kv_heads * per_head, "{kernel}");
    }
}
