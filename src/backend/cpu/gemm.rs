//! The matrix multiply: cuts it into tasks for the threads and register tiles for the kernels.
//!
//! Threads share the outputs, never the sum: each output is one chain of additions in the order of `k`, whatever the
//! number of rows, the tile a row falls in or the number of threads. So the bits of a row depend only on its x, the
//! weights and the instruction set. With many rows, a block of x stays in the second-level cache while the panels
//! stream past.

#![allow(unsafe_code)]

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::amx_feed_forward;
#[cfg(target_arch = "x86_64")]
use super::amx_gemm::{self, amx_gemm};
use super::float_gemm::{self, float_gemm};
use super::input_tiles::{Rows, RowsMut};
use super::line::Line;
use super::packed::{PANEL_ROWS, PackedMatrix, Segment};
use super::quant_feed_forward;
use super::quant_gemm::{self, quant_gemm};
use super::{Isa, ThreadPool, pool};
use crate::backend::DType;

/// Bytes of x that stay in the second-level cache beside a panel.
pub(super) const BLOCK_BYTES: usize = 128 << 10;
/// Weights of one task when there are few rows: enough to make claiming it cheap.
const TASK_BYTES: usize = 64 << 10;

/// Memory a multiply works in. It grows to the largest sizes seen, unless it was reserved, and is then reused.
#[derive(Default)]
pub struct GemmScratch {
    pub(super) float: float_gemm::Scratch,
    pub(super) quantised: Vec<u32>,
    pub(super) rounded: Vec<Line>,
    /// Gates and ups of a task of a feed-forward layer, for each thread.
    pub(super) sums: Vec<Line>,
    /// What comes of them, rounded.
    pub(super) activated: Vec<Line>,
    /// The same, quantised.
    pub(super) activated_records: Vec<u32>,
    /// What a row of x takes in each of them.
    row_lens: RowLens,
}

/// What a row of the widest x takes, laid out for the weights that were noted.
#[derive(Default)]
struct RowLens {
    float: float_gemm::RowLens,
    quantised: usize,
    /// Of one row alone, which is laid out less densely, and of a row among others.
    rounded: (usize, usize),
    /// Gates and ups of a thread, whatever the rows.
    sums: usize,
}

impl GemmScratch {
    /// Remembers that x will be multiplied by `weights`.
    pub(super) fn note(&mut self, isa: Isa, weights: &PackedMatrix) {
        let has = |family| segments(weights, isa, family).next().is_some();
        if has(Family::Plain) {
            self.row_lens.float.note(isa, weights);
        }
        if has(Family::Quantised) {
            self.row_lens.quantised = self.row_lens.quantised.max(quant_gemm::row_words(weights));
            if halves_are_panels(weights, isa, Family::Quantised) {
                self.row_lens.sums = self.row_lens.sums.max(quant_feed_forward::THREAD_LINES);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if has(Family::Tiles) {
            let (alone, among) = (amx_gemm::row_lines(weights, 1), amx_gemm::row_lines(weights, 2));
            self.row_lens.rounded = (self.row_lens.rounded.0.max(alone), self.row_lens.rounded.1.max(among));
            if halves_are_panels(weights, isa, Family::Tiles) {
                self.row_lens.sums = self.row_lens.sums.max(amx_feed_forward::THREAD_LINES);
            }
        }
    }

    /// Takes the memory for products of up to `max_rows` rows with the weights noted. Pages are touched when used.
    pub(super) fn reserve(&mut self, max_rows: usize, num_threads: usize) {
        self.sums.reserve_exact(num_threads * self.row_lens.sums);
        if self.row_lens.sums > 0 {
            // What is between products of a feed-forward layer is an x of the second one.
            self.activated.reserve_exact(max_rows * self.row_lens.rounded.1);
            self.activated_records.reserve_exact(max_rows * self.row_lens.quantised);
        }
        self.float.reserve(&self.row_lens.float, max_rows);
        self.quantised.reserve_exact(max_rows * self.row_lens.quantised);
        self.rounded.reserve_exact(self.row_lens.rounded.0.max(max_rows * self.row_lens.rounded.1));
    }
}

/// The first `len` elements, after making the buffer that long.
pub(super) fn grown<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
    &mut buffer[..len]
}

/// `out[m, n] = sum over k of x[m, k] * w[n, k], plus bias[n]` for the rows `m` of x.
///
/// # Panics
/// When x, the bias or `out` are too short for the sizes.
pub fn gemm(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: &PackedMatrix,
    bias: Option<&[f32]>,
    out: RowsMut,
    scratch: &mut GemmScratch,
) {
    let num_rows = x.num_rows;
    if num_rows == 0 {
        return;
    }
    check_rows("x", x.data.len(), x.stride, num_rows, weights.num_columns());
    check_rows("out", out.data.len(), out.stride, num_rows, weights.num_rows());
    assert!(isa.is_available(), "{isa} is not available here");
    assert!(bias.is_none_or(|bias| bias.len() == weights.num_rows()), "one bias for each of {}", weights.num_rows());
    let target =
        Target { out: out.data.as_mut_ptr(), stride: out.stride, bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr) };
    #[cfg(target_arch = "x86_64")]
    amx_gemm(pool, isa, x, weights, &target, &mut scratch.rounded);
    float_gemm(pool, isa, x, weights, &target, &mut scratch.float);
    quant_gemm(pool, isa, x, weights, &target, &mut scratch.quantised);
}

pub(super) fn check_rows(name: &str, len: usize, stride: usize, num_rows: usize, num_columns: usize) {
    assert!(stride >= num_columns, "{name}: rows of {num_columns} with a stride of {stride}");
    let wanted = (num_rows - 1) * stride + num_columns;
    assert!(len >= wanted, "{name}: wanted {wanted} numbers for {num_rows} rows of {num_columns}, found {len}");
}

/// Panels of weights, counted over the segments of a family, and where their results go.
pub(super) struct Part<'a> {
    pub(super) panels: Range<usize>,
    pub(super) target: &'a Target,
    /// The row of x and the row of the weights whose result is the first of the target.
    pub(super) origin: (usize, usize),
}

/// Where results go.
pub(super) struct Target {
    pub(super) out: *mut f32,
    pub(super) stride: usize,
    bias: *const f32,
}

// SAFETY: tasks write disjoint columns or rows of `out`, which is borrowed for the whole multiply.
unsafe impl Sync for Target {}

impl Target {
    /// Without a bias.
    pub(super) fn new(out: *mut f32, stride: usize) -> Self {
        Self { out, stride, bias: std::ptr::null() }
    }

    /// Adds the bias from `column` on to rows of `num_columns` results.
    ///
    /// # Safety
    /// `out` has these rows, a stride apart.
    pub(super) unsafe fn add_bias(&self, column: usize, out: *mut f32, num_rows: usize, num_columns: usize) {
        if self.bias.is_null() {
            return;
        }
        for row in 0..num_rows {
            // SAFETY: the caller's promise; the bias has every column of the weights.
            let (out, bias) = unsafe {
                let out = std::slice::from_raw_parts_mut(out.add(row * self.stride), num_columns);
                (out, std::slice::from_raw_parts(self.bias.add(column), num_columns))
            };
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        }
    }

    /// The bias from `column` on; null when there is none.
    pub(super) fn bias(&self, column: usize) -> *const f32 {
        if self.bias.is_null() { self.bias } else { self.bias.wrapping_add(column) }
    }
}

/// Which kernels multiply a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Lanes of f32, or pairs of bf16.
    Plain,
    /// Tiles of bf16.
    Tiles,
    /// Codes and scales.
    Quantised,
}

impl Family {
    fn of(isa: Isa, dtype: DType) -> Self {
        match dtype {
            dtype if dtype.is_quantised() => Family::Quantised,
            DType::BF16 if isa == Isa::Amx => Family::Tiles,
            _ => Family::Plain,
        }
    }
}

/// The segments that a family multiplies.
pub(super) fn segments(weights: &PackedMatrix, isa: Isa, family: Family) -> impl Iterator<Item = &Segment> {
    weights.segments().iter().filter(move |segment| Family::of(isa, segment.dtype) == family)
}

/// Whether a family multiplies all rows, and no panel has rows of both halves: gates and ups of a feed-forward layer.
pub(super) fn halves_are_panels(weights: &PackedMatrix, isa: Isa, family: Family) -> bool {
    let is_whole = |rows: usize| rows.is_multiple_of(PANEL_ROWS);
    let has_whole_segments = segments(weights, isa, family).all(|segment| is_whole(segment.num_rows));
    is_of(weights, isa, family) && has_whole_segments && is_whole(weights.num_rows() / 2)
}

/// Whether a family multiplies all rows.
pub(super) fn is_of(weights: &PackedMatrix, isa: Isa, family: Family) -> bool {
    segments(weights, isa, family).map(|segment| segment.num_rows).sum::<usize>() == weights.num_rows()
}

/// Cuts `panels`, counted over such segments, at the segments' borders.
pub(super) fn panels_of_segments(
    weights: &PackedMatrix,
    isa: Isa,
    family: Family,
    panels: Range<usize>,
) -> impl Iterator<Item = (&Segment, Range<usize>)> {
    let mut first = 0;
    segments(weights, isa, family).filter_map(move |segment| {
        let before = first;
        first += segment.num_panels();
        let (start, end) = (panels.start.max(before), panels.end.min(first));
        (start < end).then(|| (segment, start - before..end - before))
    })
}

/// Panels shared out to tasks: groups first, single panels last, so that threads finish together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grouping {
    num_panels: usize,
    group: usize,
    num_groups: usize,
}

impl Grouping {
    /// For `num_blocks` blocks of rows, each by `num_panels` panels of about `panel_bytes` bytes. When there is one
    /// block a task gets enough bytes to be worth claiming, in multiples of `streams` panels.
    pub(super) fn new(
        num_panels: usize,
        panel_bytes: usize,
        streams: usize,
        num_blocks: usize,
        num_threads: usize,
    ) -> Self {
        let wanted = if num_blocks == 1 { TASK_BYTES.div_ceil(panel_bytes) } else { 1 };
        let least = (num_panels * num_blocks).div_ceil(pool::MAX_TASKS / 2);
        let fair = num_panels / (4 * num_threads);
        let group = wanted.min(fair).max(least).max(1).next_multiple_of(streams);
        let tail = num_panels.min(if num_threads > 1 { 2 * num_threads } else { 0 });
        Self { num_panels, group, num_groups: (num_panels - tail) / group }
    }

    pub(super) fn num_tasks(self) -> usize {
        self.num_groups + self.num_panels - self.num_groups * self.group
    }

    pub(super) fn panels(self, task: usize) -> Range<usize> {
        if task < self.num_groups {
            return task * self.group..(task + 1) * self.group;
        }
        let panel = self.num_groups * self.group + task - self.num_groups;
        panel..panel + 1
    }
}
