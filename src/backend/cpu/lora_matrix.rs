//! An adapter as the kernels read it, and its `A`: a run of rows of 32-number groups, in bf16 or f32, in pages. `B` is
//! laid out by `lora_panels`, the `A` of an
//! embedding by `lora_tokens`.
//!
//! Of bf16, word `i` of a group holds number `i` in its low half and number `16 + i` in its high half, so that two vectors
//! of neighbours come out of one load. Rows are filled up with zeros.

#![allow(unsafe_code)]

use half::bf16;

use super::dequantize::dequantize_row;
use super::lora_panels::{PackedPanels, RankPanels};
use super::lora_tokens::{PackedTokens, TokenTable};
use super::memory::CpuBuffer;
use super::simd::{LANES, Simd};
use crate::backend::{DType, HostTensor, LoraLoader, LoraPages, LoraPart, PageImage, RowRun};
use crate::{Result, invalid};

/// Numbers of a group.
pub(super) const GROUP: usize = 2 * LANES;

/// Numbers that a row is filled up to a multiple of.
const STRIDE: usize = 2 * GROUP;

/// A matrix in groups, its rows somewhere in an arena.
pub(super) struct GroupedMatrix {
    arena: CpuBuffer,
    /// Where each row begins.
    rows: Box<[usize]>,
    is_bf16: bool,
}

/// An adapter's update of one projection.
pub struct CpuLora {
    pub(super) parts: Vec<CpuLoraPart>,
}

/// `A`.
pub(super) enum ShrinkMatrix {
    /// Of a projection: a row per rank.
    Multiplied(GroupedMatrix),
    /// Of the embedding.
    LookedUp(TokenTable),
}

impl CpuLora {
    /// Numbers that go into it.
    pub(super) fn num_inputs(&self) -> usize {
        self.parts.first().map_or(0, |part| part.num_inputs)
    }
}

/// An update of some columns.
pub(super) struct CpuLoraPart {
    pub(super) shrink: ShrinkMatrix,
    /// `B`.
    pub(super) expand: RankPanels,
    pub(super) rank: usize,
    pub(super) num_inputs: usize,
    pub(super) num_outputs: usize,
    pub(super) first_column: usize,
    pub(super) scaling: f32,
}

impl CpuLoraPart {
    /// Whether both matrices are kept as bf16.
    pub(super) fn is_bf16(&self) -> bool {
        self.expand.is_bf16()
    }
}

/// An update of one projection, arranged.
pub struct PackedCpuLora {
    parts: Vec<PackedPart>,
}

enum PackedShrink {
    Multiplied(RowRun),
    LookedUp(PackedTokens),
}

struct PackedPart {
    shrink: PackedShrink,
    expand: PackedPanels,
    rank: usize,
    is_bf16: bool,
    num_inputs: usize,
    num_outputs: usize,
    first_column: usize,
    scaling: f32,
}

/// Arranges adapters; needs nothing of the backend.
pub struct CpuLoraLoader;

impl LoraLoader for CpuLoraLoader {
    type Buffer = CpuBuffer;
    type Packed = PackedCpuLora;
    type Lora = CpuLora;

    fn pack(&self, parts: &[LoraPart], image: &mut PageImage) -> Result<PackedCpuLora> {
        let pack = |part: &LoraPart| PackedPart::new(part, pack_rows, image);
        Ok(PackedCpuLora { parts: parts.iter().map(pack).collect::<Result<_>>()? })
    }

    fn pack_embedding(&self, part: &LoraPart, image: &mut PageImage) -> Result<PackedCpuLora> {
        Ok(PackedCpuLora { parts: vec![PackedPart::new(part, pack_tokens, image)?] })
    }

    fn pack_head(&self, part: &LoraPart, image: &mut PageImage) -> Result<PackedCpuLora> {
        self.pack(std::slice::from_ref(part), image)
    }

    fn place(&self, packed: &PackedCpuLora, pages: &LoraPages<CpuBuffer>) -> Result<CpuLora> {
        let place = |part: &PackedPart| part.place(pages);
        Ok(CpuLora { parts: packed.parts.iter().map(place).collect::<Result<_>>()? })
    }
}

/// Arranges `A` as a row per rank; bf16 holds its numbers exactly when `is_bf16`.
fn pack_rows(a: &HostTensor, is_bf16: bool, image: &mut PageImage) -> Result<PackedShrink> {
    let row_bytes = a.columns().next_multiple_of(STRIDE) * if is_bf16 { 2 } else { 4 };
    let run = image.reserve(a.name(), a.rows(), row_bytes)?;
    for (row, numbers) in numbers(a).chunks_exact(a.columns()).enumerate() {
        write_row(image.row_mut(&run, row), is_bf16, |column| numbers.get(column).copied());
    }
    Ok(PackedShrink::Multiplied(run))
}

/// Arranges `A` as a row per token.
fn pack_tokens(a: &HostTensor, is_bf16: bool, image: &mut PageImage) -> Result<PackedShrink> {
    Ok(PackedShrink::LookedUp(PackedTokens::new(a.name(), &numbers(a), a.columns(), is_bf16, image)?))
}

impl PackedPart {
    fn new(
        part: &LoraPart,
        pack_a: impl Fn(&HostTensor, bool, &mut PageImage) -> Result<PackedShrink>,
        image: &mut PageImage,
    ) -> Result<Self> {
        part.check()?;
        let LoraPart { a, b, scaling, first_column } = part;
        let (rank, num_inputs, num_outputs) = (a.rows(), a.columns(), b.rows());
        let is_bf16 = a.dtype() == DType::BF16 && b.dtype() == DType::BF16;
        let shrink = pack_a(a, is_bf16, image)?;
        let expand = PackedPanels::new(b.name(), &numbers(b), rank, is_bf16, image)?;
        let (first_column, scaling) = (*first_column, *scaling);
        Ok(Self { shrink, expand, rank, is_bf16, num_inputs, num_outputs, first_column, scaling })
    }

    fn place(&self, pages: &LoraPages<CpuBuffer>) -> Result<CpuLoraPart> {
        let shrink = match &self.shrink {
            PackedShrink::Multiplied(run) => ShrinkMatrix::Multiplied(GroupedMatrix::new(run, self.is_bf16, pages)?),
            PackedShrink::LookedUp(tokens) => ShrinkMatrix::LookedUp(tokens.place(pages)?),
        };
        Ok(CpuLoraPart {
            shrink,
            expand: self.expand.place(pages)?,
            rank: self.rank,
            num_inputs: self.num_inputs,
            num_outputs: self.num_outputs,
            first_column: self.first_column,
            scaling: self.scaling,
        })
    }
}

fn numbers(tensor: &HostTensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows() * tensor.columns()];
    dequantize_row(tensor.dtype(), tensor.bytes(), &mut values);
    values
}

/// Arranges a row in groups; bf16 holds its numbers exactly when `is_bf16`. What is not there is 0.
fn write_row(target: &mut [u8], is_bf16: bool, number: impl Fn(usize) -> Option<f32>) {
    let number = |column: usize| number(column).unwrap_or(0.0);
    for (at, word) in target.chunks_exact_mut(4).enumerate() {
        let bits = match is_bf16 {
            false => number(at).to_bits(),
            true => {
                let first = at / LANES * GROUP + at % LANES;
                let bits = |column: usize| u32::from(bf16::from_f32(number(column)).to_bits());
                bits(first) | bits(first + LANES) << 16
            }
        };
        word.copy_from_slice(&bits.to_le_bytes());
    }
}

impl GroupedMatrix {
    fn new(run: &RowRun, is_bf16: bool, pages: &LoraPages<CpuBuffer>) -> Result<Self> {
        Ok(Self { arena: pages.arena().clone(), rows: rows_in_arena(run, pages)?, is_bf16 })
    }

    pub(super) fn is_bf16(&self) -> bool {
        self.is_bf16
    }

    /// A row. What lies there is the adapter's as long as its pages are.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> GroupedRow {
        // SAFETY: rows lie in the arena, which was looked at when they were placed.
        GroupedRow(unsafe { self.arena.start().add(self.rows[row]) })
    }
}

/// Where the rows of a run begin, all of them inside the arena.
pub(super) fn rows_in_arena(run: &RowRun, pages: &LoraPages<CpuBuffer>) -> Result<Box<[usize]>> {
    let rows: Box<[usize]> = (0..run.num_rows).map(|row| pages.offset(run, row)).collect();
    let len = pages.arena().len();
    match rows.iter().find(|row| **row + run.row_bytes > len) {
        Some(row) => Err(invalid!("a row at byte {row} lies outside an arena of {len}")),
        None => Ok(rows),
    }
}

/// A row of a [`GroupedMatrix`].
#[derive(Clone, Copy)]
pub(super) struct GroupedRow(*const u8);

impl GroupedRow {
    /// Its first byte.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn start(self) -> *const u8 {
        self.0
    }

    /// Asks for the lines of `num_groups` groups from `column` on. They need not exist.
    #[inline(always)]
    pub(super) fn prefetch<const BF16: bool>(self, column: usize, num_groups: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let number_bytes = if BF16 { 2 } else { 4 };
            for line in 0..(num_groups * GROUP * number_bytes).div_ceil(64) {
                let at = self.0.wrapping_add(column * number_bytes + line * 64);
                // SAFETY: prefetching never faults, and every x86-64 has it.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (column, num_groups);
    }

    /// Numbers `[column, column + 32)`; `column` is a multiple of 32 and `BF16` says how they are kept.
    ///
    /// # Safety
    /// `column` lies before the end of the stride of the row's matrix, and nobody writes to the adapter's pages.
    #[inline(always)]
    pub(super) unsafe fn group<S: Simd, const BF16: bool>(self, s: S, column: usize) -> [S::F32; 2] {
        debug_assert!(column.is_multiple_of(GROUP));
        // SAFETY: the group lies inside the row, by the caller's promise.
        unsafe {
            if BF16 {
                let group = self.0.add(column * 2);
                [s.load_bf16_low(group), s.load_bf16_high(group)]
            } else {
                let group = self.0.add(column * 4).cast::<f32>();
                [s.load(group), s.load(group.add(LANES))]
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::transfer::CpuTransfer;
    use super::*;

    /// Of few rows.
    pub(in super::super) const PAGE_BYTES: usize = 4096;

    /// Pages of `page_bytes` that lie here and there, in another order.
    pub(in super::super) fn load_into_pages(parts: &[LoraPart], page_bytes: usize) -> CpuLora {
        load_packed(page_bytes, |image| CpuLoraLoader.pack(parts, image))
    }

    /// The same of an embedding's update.
    pub(in super::super) fn load_embedding(part: &LoraPart) -> CpuLora {
        load_packed(PAGE_BYTES, |image| CpuLoraLoader.pack_embedding(part, image))
    }

    fn load_packed(page_bytes: usize, pack: impl Fn(&mut PageImage) -> Result<PackedCpuLora>) -> CpuLora {
        let mut image = PageImage::new(page_bytes);
        let packed = pack(&mut image).unwrap();
        let image = image.finish().unwrap();
        let num_pages = image.num_pages();
        let pages: Vec<u32> = (0..num_pages as u32).rev().map(|page| 2 * page + 1).collect();
        let arena = CpuBuffer::allocate(2 * num_pages * page_bytes).unwrap();
        image.upload(&mut CpuTransfer, &arena, &pages).unwrap();
        CpuLoraLoader.place(&packed, &image.placed(arena, pages)).unwrap()
    }
}
