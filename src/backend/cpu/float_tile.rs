//! The work of one floating-point register tile, and its kernel in plain Rust.
//!
//! A tile is `num_rows` rows of x by whole panels of weights. Every kernel keeps one accumulator per output and adds
//! `x[k] * w[k]` to it in the order of `k`, so an output has the same bits in whatever tile its row falls.

#![allow(unsafe_code)]

use half::{bf16, f16};

use super::super::DType;
use super::packed::{HALF_ROWS, PANEL_ROWS};

/// What a kernel works on. The number of rows and panels is part of the kernel's type.
pub(super) struct FloatTile {
    /// `[2 * num_pairs][rows]`: the tile's rows of x, `k` by `k`. For bf16 dot products `[num_pairs][rows][2]` bf16.
    pub(super) x: *const f32,
    /// The first panel, from the first `k` on.
    pub(super) weights: *const u8,
    /// From one panel to the next.
    pub(super) panel_bytes: usize,
    /// Pairs of `k`.
    pub(super) num_pairs: usize,
    /// The output of the tile's first row and the first panel's first column.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Columns of `out` to write, from the first panel on; less than the panels' width at the end of a segment.
    pub(super) num_columns: usize,
    /// Added at the end; null for none.
    pub(super) bias: *const f32,
    /// Whether `out` holds the sum over the `k` before the first.
    pub(super) resume: bool,
}

/// A kernel for a fixed number of rows and panels.
///
/// # Safety
/// The machine has the kernel's instructions, and every pointer of the tile is good for the sizes beside it.
pub(super) type FloatKernel = unsafe fn(&FloatTile);

/// Most rows a portable tile has.
pub(super) const PORTABLE_ROWS: usize = 4;

/// The kernel for `num_rows` rows and one panel of `dtype`.
pub(super) fn portable_kernel(dtype: DType, num_rows: usize) -> FloatKernel {
    match (dtype, num_rows) {
        (DType::BF16, 1) => tile::<Bf16Pairs, 1>,
        (DType::BF16, 2) => tile::<Bf16Pairs, 2>,
        (DType::BF16, 3) => tile::<Bf16Pairs, 3>,
        (DType::BF16, 4) => tile::<Bf16Pairs, 4>,
        (DType::F16, 1) => tile::<F16Pairs, 1>,
        (DType::F16, 2) => tile::<F16Pairs, 2>,
        (DType::F16, 3) => tile::<F16Pairs, 3>,
        (DType::F16, 4) => tile::<F16Pairs, 4>,
        (DType::F32, 1) => tile::<F32Pairs, 1>,
        (DType::F32, 2) => tile::<F32Pairs, 2>,
        (DType::F32, 3) => tile::<F32Pairs, 3>,
        (DType::F32, 4) => tile::<F32Pairs, 4>,
        _ => unreachable!("no portable tile of {num_rows} rows of {dtype}"),
    }
}

/// How 16 rows of a pair of `k` are stored.
trait Pairs {
    /// Bytes of 16 rows.
    const BYTES: usize;
    /// The rows' weights at the even and at the odd `k`.
    fn decode(bytes: &[u8]) -> [[f32; HALF_ROWS]; 2];
}

struct Bf16Pairs;
struct F16Pairs;
struct F32Pairs;

impl Pairs for Bf16Pairs {
    const BYTES: usize = 64;

    fn decode(bytes: &[u8]) -> [[f32; HALF_ROWS]; 2] {
        let at = |index: usize| bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32();
        [0, 1].map(|odd| std::array::from_fn(|row| at(2 * row + odd)))
    }
}

impl Pairs for F16Pairs {
    const BYTES: usize = 64;

    fn decode(bytes: &[u8]) -> [[f32; HALF_ROWS]; 2] {
        let at = |index: usize| f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32();
        [0, 1].map(|odd| std::array::from_fn(|row| at(HALF_ROWS * odd + row)))
    }
}

impl Pairs for F32Pairs {
    const BYTES: usize = 128;

    fn decode(bytes: &[u8]) -> [[f32; HALF_ROWS]; 2] {
        let (values, _) = bytes.as_chunks::<4>();
        [0, 1].map(|odd| std::array::from_fn(|row| f32::from_le_bytes(values[HALF_ROWS * odd + row])))
    }
}

/// `a * b + c`, fused where the target always can: a fused multiply in software is very slow.
pub(super) fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// # Safety
/// As for [`FloatKernel`].
unsafe fn tile<P: Pairs, const ROWS: usize>(tile: &FloatTile) {
    // SAFETY: `num_pairs` pairs of `k` of 32 rows are there, and `ROWS` rows of x.
    let (weights, x) = unsafe {
        let weights = std::slice::from_raw_parts(tile.weights, tile.num_pairs * 2 * P::BYTES);
        (weights, std::slice::from_raw_parts(tile.x, tile.num_pairs * 2 * ROWS))
    };
    let mut sums = [[0.0f32; PANEL_ROWS]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate().filter(|_| tile.resume) {
        // SAFETY: `out` has `num_columns` columns in each of the tile's rows.
        let out = unsafe { std::slice::from_raw_parts(tile.out.add(row * tile.out_stride), tile.num_columns) };
        sums[..tile.num_columns].copy_from_slice(out);
    }
    for (halves, x) in weights.chunks_exact(2 * P::BYTES).zip(x.chunks_exact(2 * ROWS)) {
        let halves = [P::decode(&halves[..P::BYTES]), P::decode(&halves[P::BYTES..])];
        for (odd, x) in x.chunks_exact(ROWS).enumerate() {
            for (sums, &x) in sums.iter_mut().zip(x) {
                for (sums, half) in sums.chunks_exact_mut(HALF_ROWS).zip(&halves) {
                    for (sum, &weight) in sums.iter_mut().zip(&half[odd]) {
                        *sum = multiply_add(x, weight, *sum);
                    }
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (column, sum) in sums[..tile.num_columns].iter().enumerate() {
            // SAFETY: `out` and a bias have `num_columns` columns.
            unsafe {
                let bias = if tile.bias.is_null() { 0.0 } else { *tile.bias.add(column) };
                *tile.out.add(row * tile.out_stride + column) = if tile.bias.is_null() { *sum } else { sum + bias };
            }
        }
    }
}
