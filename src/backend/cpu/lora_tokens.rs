//! The `A` of an embedding's update: for each token as many numbers as there are ranks, which are looked up.
//!
//! Some tokens share a row of the adapter's pages, so that no page has to hold a number of every token.

#![allow(unsafe_code)]

use half::bf16;

use super::lora_matrix::rows_in_arena;
use super::memory::CpuBuffer;
use crate::Result;
use crate::backend::{LoraPages, PageImage, RowRun};

/// Bytes of a row, unless one token takes more.
const ROW_BYTES: usize = 1024;

/// Rows begin and end at multiples of this.
const ROW_ALIGNMENT: usize = 16;

/// How the numbers are divided.
#[derive(Debug, Clone, Copy)]
struct Cut {
    rank: usize,
    tokens_per_row: usize,
    is_bf16: bool,
}

/// A table that is arranged in pages, wherever these are to be.
pub(super) struct PackedTokens {
    run: RowRun,
    cut: Cut,
}

/// A table in an arena.
pub(super) struct TokenTable {
    arena: CpuBuffer,
    /// Where each row begins.
    rows: Box<[usize]>,
    cut: Cut,
}

impl Cut {
    fn token_bytes(&self) -> usize {
        self.rank * if self.is_bf16 { 2 } else { 4 }
    }
}

impl PackedTokens {
    /// Arranges `numbers`, `[rank, num_tokens]` row by row and called `name`; bf16 holds them exactly when `is_bf16`.
    pub(super) fn new(
        name: &str,
        numbers: &[f32],
        num_tokens: usize,
        is_bf16: bool,
        image: &mut PageImage,
    ) -> Result<Self> {
        let mut cut = Cut { rank: numbers.len() / num_tokens, tokens_per_row: 1, is_bf16 };
        cut.tokens_per_row = (ROW_BYTES / cut.token_bytes()).max(1);
        let row_bytes = (cut.tokens_per_row * cut.token_bytes()).next_multiple_of(ROW_ALIGNMENT);
        let run = image.reserve(name, num_tokens.div_ceil(cut.tokens_per_row), row_bytes)?;
        for token in 0..num_tokens {
            let row = image.row_mut(&run, token / cut.tokens_per_row);
            let target = &mut row[token % cut.tokens_per_row * cut.token_bytes()..][..cut.token_bytes()];
            let numbers = (0..cut.rank).map(|rank| numbers[rank * num_tokens + token]);
            match is_bf16 {
                true => target.chunks_exact_mut(2).zip(numbers).for_each(|(target, number)| {
                    target.copy_from_slice(&bf16::from_f32(number).to_le_bytes());
                }),
                false => target.chunks_exact_mut(4).zip(numbers).for_each(|(target, number)| {
                    target.copy_from_slice(&number.to_le_bytes());
                }),
            }
        }
        Ok(Self { run, cut })
    }

    /// The table in its pages.
    pub(super) fn place(&self, pages: &LoraPages<CpuBuffer>) -> Result<TokenTable> {
        let rows = rows_in_arena(&self.run, pages)?;
        Ok(TokenTable { arena: pages.arena().clone(), rows, cut: self.cut })
    }
}

impl TokenTable {
    /// One number.
    ///
    /// # Safety
    /// Nobody writes to the adapter's pages.
    pub(super) unsafe fn number(&self, token: usize, rank: usize) -> f32 {
        let Cut { tokens_per_row, is_bf16, .. } = self.cut;
        assert!(rank < self.cut.rank, "rank {rank} of {}", self.cut.rank);
        let row = self.rows[token / tokens_per_row] + token % tokens_per_row * self.cut.token_bytes();
        // SAFETY: rows lie in the arena, which was looked at when they were placed, the token in its row and the number among
        // those of the token; and the caller's promise.
        unsafe {
            let numbers = self.arena.start().add(row);
            match is_bf16 {
                true => bf16::from_le_bytes(numbers.cast::<[u8; 2]>().add(rank).read()).to_f32(),
                false => f32::from_le_bytes(numbers.cast::<[u8; 4]>().add(rank).read()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::transfer::CpuTransfer;
    use super::*;

    #[test]
    fn every_number_is_found_again_whatever_the_rank_and_the_pages() {
        for (rank, num_tokens) in [(1, 1), (3, 700), (16, 97), (512, 5)] {
            for (is_bf16, page_bytes) in [(true, 1024), (true, 4096), (false, 2560)] {
                let numbers: Vec<f32> = (0..rank * num_tokens).map(|at| ((at * 37) % 251) as f32 - 125.0).collect();
                let mut image = PageImage::new(page_bytes);
                let packed = PackedTokens::new("it", &numbers, num_tokens, is_bf16, &mut image).unwrap();
                let image = image.finish().unwrap();
                let pages: Vec<u32> = (0..image.num_pages() as u32).rev().collect();
                let arena = CpuBuffer::allocate(image.num_bytes()).unwrap();
                image.upload(&mut CpuTransfer, &arena, &pages).unwrap();
                let table = packed.place(&image.placed(arena, pages)).unwrap();
                for (at, number) in numbers.iter().enumerate() {
                    let (rank, token) = (at / num_tokens, at % num_tokens);
                    // SAFETY: nobody writes.
                    assert_eq!(unsafe { table.number(token, rank) }, *number, "rank {rank} of token {token}");
                }
            }
        }
    }
}
