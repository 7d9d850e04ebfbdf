//! Weights as the matrix multiply reads them: panels of 32 output rows, one stream of memory each.
//!
//! A panel keeps its 32 rows side by side, so that vector lanes are output rows and a product needs no horizontal sum.
//! `h` below is the half of the panel (16 rows each), `r` the row within it.
//!
//! - Plain types, K padded to even (bf16 to 32s), by pairs of `k`: bf16 `[K/2][h][r][k % 2]`, f16 and f32 `[K/2][h][k % 2][r]`.
//! - Quantised types, by blocks as in the file. A block of 32 (256 for K-quants) begins with the 32 rows' f16 scales,
//!   then their f16 offsets where the format has them. K-quants follow with 8 sub-blocks of 32, each opening with
//!   `[2][32 rows]` bytes of sub-scales. Codes of 32 elements: `[h][k / 4][r][k % 4]`, one byte a weight for Q5, Q6 and
//!   Q8 (5 and 6 bits are widened: decoding them costs more than it saves), half a byte for Q4, where the low nibbles
//!   of a vector are `k / 4` in `[0, 4)` and the high ones `[4, 8)`.

#![allow(unsafe_code)]

use half::{bf16, f16};

use super::super::{DType, HostTensor};
use super::dequantize::{Block, Term, code_bias, dequantize_row};
use super::disjoint::DisjointSlice;
use super::weight_memory::{WeightArena, WeightMemory};
use super::{ThreadPool, pool};
use crate::{Error, Result, invalid, unsupported};

/// Output rows of one panel.
pub(super) const PANEL_ROWS: usize = 32;
/// K of a bf16 panel is a multiple of this, zeros at its end: what a tile of AMX takes at once.
const TILE_COLUMNS: usize = 32;
/// Rows of half a panel: the lanes of a 512-bit vector.
pub(super) const HALF_ROWS: usize = 16;

/// A `[num_rows, num_columns]` matrix of weights, in panels. Several tensors may be stacked along the rows.
pub struct PackedMatrix {
    num_rows: usize,
    num_columns: usize,
    segments: Vec<Segment>,
    storage: WeightMemory,
}

/// Rows of one type that lie together.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) dtype: DType,
    pub(super) first_row: usize,
    pub(super) num_rows: usize,
    /// Where its first panel begins in the storage.
    pub(super) offset: usize,
    pub(super) panel_bytes: usize,
}

/// How a quantised format lies in a panel.
#[derive(Debug, Clone, Copy)]
struct QuantLayout {
    block_elements: usize,
    header_bytes: usize,
    sub_header_bytes: usize,
    code_bytes: usize,
}

impl Segment {
    pub(super) fn num_panels(&self) -> usize {
        self.num_rows.div_ceil(PANEL_ROWS)
    }
}

impl QuantLayout {
    fn new(dtype: DType) -> Self {
        let has_offset = matches!(dtype, DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K);
        let nibbles = matches!(dtype, DType::Q4_0 | DType::Q4_1 | DType::Q4K);
        Self {
            block_elements: dtype.block_elements(),
            header_bytes: if has_offset { 4 * PANEL_ROWS } else { 2 * PANEL_ROWS },
            sub_header_bytes: if dtype.block_elements() == 256 { 2 * PANEL_ROWS } else { 0 },
            code_bytes: if nibbles { 16 * PANEL_ROWS } else { 32 * PANEL_ROWS },
        }
    }

    fn sub_bytes(self) -> usize {
        self.sub_header_bytes + self.code_bytes
    }

    fn block_bytes(self) -> usize {
        self.header_bytes + self.block_elements / 32 * self.sub_bytes()
    }

    /// Where the code of element `k` of 32 lies, from the start of the codes, and the shift of its bits.
    fn code_at(self, row: usize, k: usize) -> (usize, u32) {
        let (half, lane) = (row / HALF_ROWS, row % HALF_ROWS);
        let nibbles = self.code_bytes == 16 * PANEL_ROWS;
        let (vector, shift) = if nibbles { (k / 4 % 4, (k / 16) as u32 * 4) } else { (k / 4, 0) };
        (half * self.code_bytes / 2 + vector * 64 + lane * 4 + k % 4, shift)
    }
}

/// Bytes of a panel of `columns` elements a row.
fn panel_bytes(dtype: DType, columns: usize) -> Option<usize> {
    if dtype.is_quantised() {
        let layout = QuantLayout::new(dtype);
        return (columns / layout.block_elements).checked_mul(layout.block_bytes());
    }
    let multiple = if dtype == DType::BF16 { TILE_COLUMNS } else { 2 };
    columns.checked_next_multiple_of(multiple)?.checked_mul(dtype.block_bytes() * PANEL_ROWS)
}

impl PackedMatrix {
    /// Packs `tensors`, stacked along their rows; all have the same number of columns. With a `target` (a plain type)
    /// every tensor is dequantised and rounded to it, to the nearest and ties to even; without, each keeps its type.
    pub fn pack(tensors: &[HostTensor], target: Option<DType>, pool: &mut ThreadPool) -> Result<Self> {
        Self::pack_in(&mut WeightArena::default(), tensors, target, pool)
    }

    /// The same, with its memory from `arena`.
    pub(super) fn pack_in(
        arena: &mut WeightArena,
        tensors: &[HostTensor],
        target: Option<DType>,
        pool: &mut ThreadPool,
    ) -> Result<Self> {
        let num_columns = tensors.first().map_or(0, HostTensor::columns);
        let segments = plan_segments(tensors, target)?;
        let num_bytes = segments.last().map_or(0, |last| last.offset + last.num_panels() * last.panel_bytes);
        let num_rows = tensors.iter().map(HostTensor::rows).sum();
        let mut storage = arena.take(num_bytes)?;
        for segment in &segments {
            let end = segment.offset + segment.num_panels() * segment.panel_bytes;
            fill_segment(segment, tensors, num_columns, &mut storage[segment.offset..end], pool);
        }
        Ok(Self { num_rows, num_columns, segments, storage })
    }

    /// A matrix of the same shape and types, all zeros.
    pub(super) fn zeroed_like(&self, arena: &mut WeightArena) -> Result<Self> {
        let storage = arena.take(self.storage.len())?;
        Ok(Self { num_rows: self.num_rows, num_columns: self.num_columns, segments: self.segments.clone(), storage })
    }

    /// Output features.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Input features.
    pub fn num_columns(&self) -> usize {
        self.num_columns
    }

    /// Memory the packed weights take.
    pub fn num_bytes(&self) -> usize {
        self.storage.len()
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The bytes of a segment's panels.
    pub(super) fn panels(&self, segment: &Segment) -> &[u8] {
        &self.storage[segment.offset..segment.offset + segment.num_panels() * segment.panel_bytes]
    }

    /// The same, to be written.
    pub(super) fn panels_mut(&mut self, segment: &Segment) -> &mut [u8] {
        &mut self.storage[segment.offset..segment.offset + segment.num_panels() * segment.panel_bytes]
    }

    /// Writes the numbers of row `row`, exactly as [`dequantize_row`] gives them, to `out[0..num_columns]`.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.num_rows, "row {row} of a matrix of {}", self.num_rows);
        assert_eq!(out.len(), self.num_columns, "a row has {} columns", self.num_columns);
        let after = self.segments.partition_point(|segment| segment.first_row <= row);
        let segment = &self.segments[after - 1];
        let row = row - segment.first_row;
        let panel = &self.panels(segment)[row / PANEL_ROWS * segment.panel_bytes..][..segment.panel_bytes];
        match segment.dtype {
            DType::F32 | DType::F16 | DType::BF16 => unpack_plain(segment.dtype, panel, row % PANEL_ROWS, out),
            dtype => unpack_quantised(dtype, panel, row % PANEL_ROWS, out),
        }
    }
}

/// Groups neighbouring tensors of one type and gives each group its place.
fn plan_segments(tensors: &[HostTensor], target: Option<DType>) -> Result<Vec<Segment>> {
    let first = tensors.first().ok_or_else(|| invalid!("a packed matrix needs at least one tensor"))?;
    let mut segments: Vec<Segment> = Vec::new();
    let mut num_rows = 0usize;
    for tensor in tensors {
        let dtype = packed_dtype(tensor, target)?;
        if tensor.columns() != first.columns() || tensor.columns() == 0 || tensor.rows() == 0 {
            let (name, rows, columns) = (tensor.name(), tensor.rows(), tensor.columns());
            let wanted = first.columns();
            return Err(invalid!("tensor {name}: wanted rows of {wanted} columns to pack, found [{rows}, {columns}]"));
        }
        match segments.last_mut() {
            Some(last) if last.dtype == dtype => last.num_rows += tensor.rows(),
            _ => {
                let panel_bytes = panel_bytes(dtype, tensor.columns()).ok_or_else(|| too_large(tensor))?;
                segments.push(Segment { dtype, first_row: num_rows, num_rows: tensor.rows(), offset: 0, panel_bytes });
            }
        }
        num_rows = num_rows.checked_add(tensor.rows()).ok_or_else(|| too_large(tensor))?;
    }
    let mut offset = 0usize;
    for segment in &mut segments {
        segment.offset = offset;
        let bytes = segment.num_panels().checked_mul(segment.panel_bytes);
        offset = bytes.and_then(|bytes| offset.checked_add(bytes)).ok_or_else(|| too_large(first))?;
    }
    Ok(segments)
}

fn too_large(tensor: &HostTensor) -> Error {
    invalid!("tensor {}: [{}, {}] does not fit into memory", tensor.name(), tensor.rows(), tensor.columns())
}

fn packed_dtype(tensor: &HostTensor, target: Option<DType>) -> Result<DType> {
    match target.unwrap_or(tensor.dtype()) {
        dtype @ (DType::I32 | DType::F8E4M3) => {
            Err(unsupported!("tensor {}: {dtype} weights cannot be multiplied", tensor.name()))
        }
        dtype if target.is_some() && dtype.is_quantised() => {
            Err(unsupported!("weights can be converted to f32, f16 or bf16 when loaded, not to {dtype}"))
        }
        dtype => Ok(dtype),
    }
}

fn fill_segment(
    segment: &Segment,
    tensors: &[HostTensor],
    num_columns: usize,
    target: &mut [u8],
    pool: &mut ThreadPool,
) {
    let panels_per_task = segment.num_panels().div_ceil(pool::MAX_TASKS);
    let task_bytes = panels_per_task * segment.panel_bytes;
    let num_bytes = target.len();
    let shared = DisjointSlice::new(target);
    pool.run(segment.num_panels().div_ceil(panels_per_task), |task, _| {
        // SAFETY: tasks get disjoint parts of `target`, which is borrowed for the whole region.
        let part = unsafe { shared.part(task * task_bytes, task_bytes.min(num_bytes - task * task_bytes)) };
        let mut staging = Staging::new(segment.dtype, num_columns);
        for (index, panel) in part.chunks_exact_mut(segment.panel_bytes).enumerate() {
            let first_row = (task * panels_per_task + index) * PANEL_ROWS;
            for row in 0..PANEL_ROWS.min(segment.num_rows - first_row) {
                let (tensor, tensor_row) = locate_row(tensors, segment.first_row + first_row + row);
                staging.fill(tensor, tensor_row, row, panel);
            }
        }
    });
}

/// The tensor that has row `row` of the stack, and which of its rows that is.
fn locate_row(tensors: &[HostTensor], mut row: usize) -> (&HostTensor, usize) {
    for tensor in tensors {
        if row < tensor.rows() {
            return (tensor, row);
        }
        row -= tensor.rows();
    }
    unreachable!("segments cover exactly the rows of their tensors")
}

/// Room for one row on its way into a panel.
struct Staging {
    dtype: DType,
    values: Vec<f32>,
    block: Block,
}

impl Staging {
    fn new(dtype: DType, num_columns: usize) -> Self {
        let values = if dtype.is_quantised() { Vec::new() } else { vec![0.0; num_columns] };
        Self { dtype, values, block: Block::new() }
    }

    /// Puts a tensor's row at `row` of `panel`.
    fn fill(&mut self, tensor: &HostTensor, tensor_row: usize, row: usize, panel: &mut [u8]) {
        let bytes = tensor.row_bytes(tensor_row);
        if self.dtype.is_quantised() {
            return self.fill_quantised(bytes, row, panel);
        }
        if tensor.dtype() == DType::BF16 && self.dtype == DType::BF16 {
            return fill_bf16(bytes.as_chunks::<2>().0.iter().copied(), row, panel);
        }
        dequantize_row(tensor.dtype(), bytes, &mut self.values);
        let values = self.values.iter();
        match self.dtype {
            DType::BF16 => fill_bf16(values.map(|value| bf16::from_f32(*value).to_le_bytes()), row, panel),
            DType::F16 => fill_by_column(values.map(|value| f16::from_f32(*value).to_le_bytes()), row, panel),
            _ => fill_by_column(values.map(|value| value.to_le_bytes()), row, panel),
        }
    }

    fn fill_quantised(&mut self, bytes: &[u8], row: usize, panel: &mut [u8]) {
        let layout = QuantLayout::new(self.dtype);
        let blocks = bytes.chunks_exact(self.dtype.block_bytes());
        for (target, bytes) in panel.chunks_exact_mut(layout.block_bytes()).zip(blocks) {
            self.block.read(self.dtype, bytes);
            let (header, subs) = target.split_at_mut(layout.header_bytes);
            header[2 * row..2 * row + 2].copy_from_slice(&self.block.scale.to_le_bytes());
            if layout.header_bytes > 2 * PANEL_ROWS {
                let at = 2 * (PANEL_ROWS + row);
                header[at..at + 2].copy_from_slice(&self.block.offset.to_le_bytes());
            }
            for (index, sub) in subs.chunks_exact_mut(layout.sub_bytes()).enumerate() {
                let (sub_header, codes) = sub.split_at_mut(layout.sub_header_bytes);
                if layout.sub_header_bytes > 0 {
                    let [first, second] = self.block.sub_scales[index];
                    (sub_header[row], sub_header[PANEL_ROWS + row]) = (first, second);
                }
                for k in 0..32 {
                    let (at, shift) = layout.code_at(row, k);
                    codes[at] |= self.block.codes[index * 32 + k] << shift;
                }
            }
        }
    }
}

/// Pairs of `k` side by side.
fn fill_bf16(values: impl Iterator<Item = [u8; 2]>, row: usize, panel: &mut [u8]) {
    for (k, value) in values.enumerate() {
        let at = (k / 2 * PANEL_ROWS + row) * 4 + k % 2 * 2;
        panel[at..at + 2].copy_from_slice(&value);
    }
}

/// Each half of each `k` by itself.
fn fill_by_column<const BYTES: usize>(values: impl Iterator<Item = [u8; BYTES]>, row: usize, panel: &mut [u8]) {
    for (k, value) in values.enumerate() {
        let at = plain_index(k, row) * BYTES;
        panel[at..at + BYTES].copy_from_slice(&value);
    }
}

/// Which element of an f16 or f32 panel is `(row, k)`: `[k / 2][half][k % 2][16]`.
#[inline(always)]
fn plain_index(k: usize, row: usize) -> usize {
    ((k / 2 * 2 + row / HALF_ROWS) * 2 + k % 2) * HALF_ROWS + row % HALF_ROWS
}

fn unpack_plain(dtype: DType, panel: &[u8], row: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        *out = read_plain(dtype, panel, row, k);
    }
}

/// Number `(row, k)` of a panel of a plain type, or of a part of one that begins at an even `k`.
#[inline(always)]
pub(super) fn read_plain(dtype: DType, panel: &[u8], row: usize, k: usize) -> f32 {
    match dtype {
        DType::BF16 => {
            let at = (k / 2 * PANEL_ROWS + row) * 4 + k % 2 * 2;
            bf16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
        }
        DType::F16 => {
            let at = plain_index(k, row) * 2;
            f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
        }
        _ => {
            let at = plain_index(k, row) * 4;
            f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]])
        }
    }
}

/// Rounds `value` to the panel's type, to the nearest and ties to even, and puts it at `(row, k)`.
#[inline(always)]
pub(super) fn write_plain(dtype: DType, panel: &mut [u8], row: usize, k: usize, value: f32) {
    match dtype {
        DType::BF16 => {
            let at = (k / 2 * PANEL_ROWS + row) * 4 + k % 2 * 2;
            panel[at..at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
        DType::F16 => {
            let at = plain_index(k, row) * 2;
            panel[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        }
        _ => {
            let at = plain_index(k, row) * 4;
            panel[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn unpack_quantised(dtype: DType, panel: &[u8], row: usize, out: &mut [f32]) {
    for_each_sub_block(dtype, panel, row, |index, codes, terms| {
        for (k, &code) in codes.iter().enumerate() {
            out[index * 32 + k] = terms[k / 16].value(i32::from(code) - code_bias(dtype));
        }
    });
}

/// Calls `visit(index, codes, [term of the first 16, of the last 16])` for every 32 elements of a packed row.
pub(super) fn for_each_sub_block(
    dtype: DType,
    panel: &[u8],
    row: usize,
    mut visit: impl FnMut(usize, [u8; 32], [Term; 2]),
) {
    let layout = QuantLayout::new(dtype);
    let subs_per_block = layout.block_elements / 32;
    let half_at = |header: &[u8], at: usize| f16::from_le_bytes([header[2 * at], header[2 * at + 1]]);
    for (block, bytes) in panel.chunks_exact(layout.block_bytes()).enumerate() {
        let (header, subs) = bytes.split_at(layout.header_bytes);
        let has_offset = layout.header_bytes > 2 * PANEL_ROWS;
        let (scale, offset) =
            (half_at(header, row), if has_offset { half_at(header, PANEL_ROWS + row) } else { f16::ZERO });
        for (index, sub) in subs.chunks_exact(layout.sub_bytes()).enumerate() {
            let (sub_header, codes) = sub.split_at(layout.sub_header_bytes);
            let sub_scales =
                if sub_header.is_empty() { [0; 2] } else { [sub_header[row], sub_header[PANEL_ROWS + row]] };
            let mask = if layout.code_bytes == 16 * PANEL_ROWS { 15 } else { 255 };
            let codes = std::array::from_fn(|k| {
                let (at, shift) = layout.code_at(row, k);
                codes[at] >> shift & mask
            });
            let terms = [0, 1].map(|half| Term::new(dtype, scale, offset, sub_scales, half));
            visit(block * subs_per_block + index, codes, terms);
        }
    }
}
