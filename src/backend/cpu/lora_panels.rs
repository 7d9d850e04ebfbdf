//! The `B` of an adapter as the kernels read it: panels of 64 outputs, each a run of steps along the ranks.
//!
//! A step is 64 words, one for each output of the panel: two ranks of it in bf16, the even one in the low half, or one
//! in f32. A few steps make a strip, which is a row of the adapter's pages, so that a panel is read from front to end and
//! panels follow each other. Outputs are filled up to whole panels and ranks to whole steps, with zeros.

#![allow(unsafe_code)]

use half::bf16;

use super::memory::CpuBuffer;
use super::simd::LANES;
use crate::Result;
use crate::backend::{LoraPages, PageImage, RowRun};

/// Outputs of a panel.
pub(super) const PANEL_COLUMNS: usize = 4 * LANES;

/// Bytes of a step.
pub(super) const STEP_BYTES: usize = PANEL_COLUMNS * 4;

/// The most steps of a strip: pages are a whole number of strips.
const MAX_STRIP_STEPS: usize = 4;

/// How a matrix is divided.
#[derive(Debug, Clone, Copy)]
struct Cut {
    rank: usize,
    num_panels: usize,
    strips_per_panel: usize,
    steps_per_strip: usize,
    is_bf16: bool,
}

/// A matrix that is arranged in pages, wherever these are to be.
pub(super) struct PackedPanels {
    run: RowRun,
    cut: Cut,
}

/// A matrix in an arena.
pub(super) struct RankPanels {
    arena: CpuBuffer,
    /// Where each strip begins, those of a panel one after the other.
    strips: Box<[usize]>,
    cut: Cut,
}

/// Some steps of a panel, one after the other.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) words: *const u8,
    pub(super) num_steps: usize,
}

impl Cut {
    fn new(rank: usize, num_outputs: usize, is_bf16: bool) -> Self {
        let num_steps = if is_bf16 { rank.div_ceil(2) } else { rank };
        let strips_per_panel = num_steps.div_ceil(MAX_STRIP_STEPS);
        let steps_per_strip = num_steps.div_ceil(strips_per_panel);
        Self { rank, num_panels: num_outputs.div_ceil(PANEL_COLUMNS), strips_per_panel, steps_per_strip, is_bf16 }
    }

    fn num_steps(&self) -> usize {
        if self.is_bf16 { self.rank.div_ceil(2) } else { self.rank }
    }

    fn strip_bytes(&self) -> usize {
        self.steps_per_strip * STEP_BYTES
    }

    /// What stands in the word of output `column` in step `step`.
    fn word(&self, step: usize, number: impl Fn(usize) -> f32) -> u32 {
        let number = |rank: usize| if rank < self.rank { number(rank) } else { 0.0 };
        match self.is_bf16 {
            false => number(step).to_bits(),
            true => {
                let bits = |rank: usize| u32::from(bf16::from_f32(number(rank)).to_bits());
                bits(2 * step) | bits(2 * step + 1) << 16
            }
        }
    }
}

impl PackedPanels {
    /// Arranges `numbers`, `[num_outputs, rank]` row by row and called `name`; bf16 holds them exactly when `is_bf16`.
    pub(super) fn new(name: &str, numbers: &[f32], rank: usize, is_bf16: bool, image: &mut PageImage) -> Result<Self> {
        let cut = Cut::new(rank, numbers.len() / rank, is_bf16);
        let run = image.reserve(name, cut.num_panels * cut.strips_per_panel, cut.strip_bytes())?;
        for row in 0..run.num_rows {
            let (panel, strip) = (row / cut.strips_per_panel, row % cut.strips_per_panel);
            let columns = numbers[panel * PANEL_COLUMNS * rank..].chunks_exact(rank).take(PANEL_COLUMNS);
            let steps = image.row_mut(&run, row).chunks_exact_mut(STEP_BYTES);
            for (step, words) in steps.enumerate() {
                let step = strip * cut.steps_per_strip + step;
                for (word, column) in words.chunks_exact_mut(4).zip(columns.clone()) {
                    word.copy_from_slice(&cut.word(step, |rank| column[rank]).to_le_bytes());
                }
            }
        }
        Ok(Self { run, cut })
    }

    /// The matrix in its pages.
    pub(super) fn place(&self, pages: &LoraPages<CpuBuffer>) -> Result<RankPanels> {
        let strips = super::lora_matrix::rows_in_arena(&self.run, pages)?;
        Ok(RankPanels { arena: pages.arena().clone(), strips, cut: self.cut })
    }
}

impl RankPanels {
    pub(super) fn is_bf16(&self) -> bool {
        self.cut.is_bf16
    }

    pub(super) fn num_panels(&self) -> usize {
        self.cut.num_panels
    }

    /// Bytes that the sums of a panel read.
    pub(super) fn panel_bytes(&self) -> usize {
        self.cut.num_steps() * STEP_BYTES
    }

    /// The steps of a panel, in order of rank. What lies there is the adapter's as long as its pages are.
    #[inline(always)]
    pub(super) fn strips(&self, panel: usize) -> impl Iterator<Item = Strip> {
        let Cut { strips_per_panel, steps_per_strip, .. } = self.cut;
        let mut left = self.cut.num_steps();
        self.strips[panel * strips_per_panel..][..strips_per_panel].iter().map(move |start| {
            let num_steps = steps_per_strip.min(left);
            left -= num_steps;
            // SAFETY: strips lie in the arena, which was looked at when they were placed.
            Strip { words: unsafe { self.arena.start().add(*start) }, num_steps }
        })
    }

    /// One number.
    ///
    /// # Safety
    /// Nobody writes to the adapter's pages.
    pub(super) unsafe fn number(&self, rank: usize, column: usize) -> f32 {
        assert!(rank < self.cut.rank && column < self.num_panels() * PANEL_COLUMNS, "no number {rank} of {column}");
        let step = if self.is_bf16() { rank / 2 } else { rank };
        let (strip, within) = (step / self.cut.steps_per_strip, step % self.cut.steps_per_strip);
        let start = self.strips[column / PANEL_COLUMNS * self.cut.strips_per_panel + strip];
        let at = start + within * STEP_BYTES + column % PANEL_COLUMNS * 4;
        // SAFETY: the word lies inside the strip, and the caller's promise.
        let word = unsafe { self.arena.start().add(at).cast::<u32>().read_unaligned() };
        match self.is_bf16() {
            false => f32::from_bits(word),
            true => bf16::from_bits(if rank.is_multiple_of(2) { word } else { word >> 16 } as u16).to_f32(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::transfer::CpuTransfer;
    use super::*;

    #[test]
    fn every_number_is_found_again_whatever_the_rank_and_the_pages() {
        for (rank, num_outputs) in [(1, 1), (2, 64), (3, 65), (8, 200), (9, 64), (33, 70), (512, 130)] {
            for (is_bf16, page_bytes) in [(true, 1024), (true, 4096), (false, 2560)] {
                let numbers: Vec<f32> = (0..rank * num_outputs).map(|at| ((at * 37) % 251) as f32 - 125.0).collect();
                let mut image = PageImage::new(page_bytes);
                let packed = PackedPanels::new("it", &numbers, rank, is_bf16, &mut image).unwrap();
                let image = image.finish().unwrap();
                let pages: Vec<u32> = (0..image.num_pages() as u32).rev().collect();
                let arena = CpuBuffer::allocate(image.num_bytes()).unwrap();
                image.upload(&mut CpuTransfer, &arena, &pages).unwrap();
                let panels = packed.place(&image.placed(arena, pages)).unwrap();
                for (at, number) in numbers.iter().enumerate() {
                    // SAFETY: nobody writes.
                    assert_eq!(unsafe { panels.number(at % rank, at / rank) }, *number, "{rank} x {num_outputs}");
                }
                let steps: usize = panels.strips(panels.num_panels() - 1).map(|strip| strip.num_steps).sum();
                assert_eq!(steps, if is_bf16 { rank.div_ceil(2) } else { rank });
            }
        }
    }
}
