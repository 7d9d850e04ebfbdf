//! What attention over a bf16 cache does alike with tile registers and with dot products: weights rounded to bf16, and
//! values that nobody sees taken away.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::attention_tile::{Groups, HeadRows};
use super::bf16_rounding::store_rounded;
use super::line::Line;
use super::simd::LANES;

/// Numbers in a line of bf16.
const LINE_NUMBERS: usize = 2 * LANES;

/// Rounds the weights of the groups, in rows of `stride` numbers, to bf16.
///
/// # Safety
/// The machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn round_weights(
    num_rows: usize,
    num_groups: usize,
    scores: &[f32],
    weights: &mut [Line],
    stride: usize,
) {
    let rows = scores.chunks_exact(stride).zip(weights.chunks_exact_mut(stride / LINE_NUMBERS));
    for (scores, weights) in rows.take(num_rows) {
        let pairs = scores.chunks_exact(LINE_NUMBERS).zip(weights).take(num_groups.div_ceil(2));
        for (numbers, target) in pairs {
            // SAFETY: 32 numbers.
            let low = unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
            // SAFETY: as above.
            let high = unsafe { _mm512_loadu_ps(numbers.as_ptr().add(LANES)) };
            store_rounded(low, high, target);
        }
    }
}

/// Lines of the tail that [`cut_tail`] writes: `[8][head_dim][2]` bf16.
pub(super) fn tail_lines(head_dim: usize) -> usize {
    head_dim / 2
}

/// Values after the last position that any row sees may be anything, even NaN, which a weight of zero does not take
/// away: the last group is replaced by a copy with zeros there.
pub(super) fn cut_tail(head: &HeadRows, chunk: usize, groups: &mut Groups, tail: &mut [Line]) {
    let num_tokens = (head.keys_of(chunk).end - groups.first_position) % LANES;
    if num_tokens == 0 {
        return;
    }
    let pair_bytes = head.cache.layout().v_pair_bytes();
    let last = groups.num_groups - 1;
    let kept = num_tokens.div_ceil(2) * pair_bytes;
    let target = tail.as_mut_ptr().cast::<u8>();
    // SAFETY: a group is 8 pairs of tokens, as is the tail; a pair is whole words whose high halves are its second token.
    unsafe {
        std::ptr::copy_nonoverlapping(groups.values[last], target, kept);
        std::ptr::write_bytes(target.add(kept), 0, size_of_val(tail) - kept);
        if num_tokens % 2 == 1 {
            let words = std::slice::from_raw_parts_mut(target.add(kept - pair_bytes).cast::<u32>(), pair_bytes / 4);
            words.iter_mut().for_each(|word| *word &= 0xffff);
        }
    }
    groups.values[last] = target;
}
