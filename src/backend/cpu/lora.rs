//! Low-rank updates of a projection's output, or of embeddings, for all adapters of a step at once.
//!
//! Two passes. Shrink: `y = x A^T` for every row of every group, a task per group, few ranks and up to 64 rows. Expand:
//! `out += scale y B^T`, a task per stripe of columns, which walks the groups in their order, so that no two threads
//! write one number and a row's sums do not depend on how the work was cut. Where no two groups have a row in common, and
//! there are enough of them, one task does both for a group, and threads meet once. Ranks are never filled up to those of
//! another adapter. The products are made by `lora_pairs` where adapters are bf16 and the machine multiplies pairs of
//! that, for which x is rounded beforehand, as the products with the weights round it; by `lora_plain` elsewhere. Of an embedding
//! the first pass only looks numbers up.

#![allow(unsafe_code)]

use std::ops::Range;

use half::bf16;

use super::disjoint::DisjointSlice;
use super::gemm::grown;
use super::line::Line;
use super::lora_matrix::{CpuLora, CpuLoraPart, GROUP, GroupedMatrix, ShrinkMatrix};
#[cfg(target_arch = "x86_64")]
use super::lora_pairs;
use super::lora_plain;
use super::lora_tokens::TokenTable;
use super::simd::dispatch;
use super::{Isa, ThreadPool};

/// Rows that are shrunk together.
const PIECE_ROWS: usize = 64;
/// Ranks that a task of the first pass takes: whole words of pairs.
const TASK_RANKS: usize = 8;
/// The most pieces between two expansions; keeps the tasks of a pass countable.
const MAX_PIECES: usize = 256;
/// The most shrunk numbers between two expansions: every piece of the largest rank fits.
const MAX_SHRUNK: usize = 256 * 1024;
/// Work below this many multiplications is not worth waking other threads.
const MIN_PARALLEL_PRODUCTS: usize = 64 * 1024;

/// Numbers of x that are not worth waking other threads to round.
const MIN_PARALLEL_NUMBERS: usize = 32 * 1024;
/// Rows that a task rounds.
const ROUNDED_ROWS: usize = 16;

/// What stands between the passes; taken once and kept.
#[derive(Default)]
pub struct LoraScratch {
    /// f32, or words of two bf16.
    shrunk: Vec<f32>,
    /// The rows of x as bf16, where these are multiplied.
    rounded: Vec<Line>,
    /// What the widest of them takes.
    row_lines: usize,
    pieces: Vec<Piece>,
    /// By row of the step, the group that has it.
    owners: Vec<usize>,
}

/// Some rows of a group, under one part of its adapter.
struct Piece {
    group: usize,
    part: usize,
    /// Entries of the batch.
    entries: Range<usize>,
    /// Where its shrunk rows begin.
    shrunk_at: usize,
    /// The first of its tasks in the first pass.
    first_task: usize,
    /// Which columns of the output it adds to.
    columns: Range<usize>,
}

/// One adapter and the entries of its rows.
pub struct LoraRows<'a> {
    /// The adapter's update of this projection.
    pub update: &'a CpuLora,
    /// Which entries of `rows` and `scales`.
    pub entries: Range<usize>,
}

/// What updates are applied to.
#[derive(Clone, Copy)]
pub enum LoraInput<'a> {
    /// What a projection was given.
    Rows {
        /// `[T, num_inputs]`.
        x: &'a [f32],
        /// Numbers in a row.
        num_inputs: usize,
    },
    /// What an embedding was given: rows that would be zeros but for one number.
    Tokens {
        /// Where that is, by row.
        ids: &'a [i32],
        /// What it is.
        factor: f32,
        /// Tokens there are.
        vocab_size: usize,
    },
}

impl LoraInput<'_> {
    fn num_rows(&self) -> usize {
        match self {
            Self::Rows { x, num_inputs } => x.len() / num_inputs,
            Self::Tokens { ids, .. } => ids.len(),
        }
    }

    /// Whether a part is made for it.
    fn suits(&self, part: &CpuLoraPart) -> bool {
        match (self, &part.shrink) {
            (Self::Rows { num_inputs, .. }, ShrinkMatrix::Multiplied(_)) => part.num_inputs == *num_inputs,
            (Self::Tokens { vocab_size, .. }, ShrinkMatrix::LookedUp(_)) => part.num_inputs == *vocab_size,
            _ => false,
        }
    }

    /// Products that a rank of a part takes of a row.
    fn products_per_rank(&self, part: &CpuLoraPart) -> usize {
        match self {
            Self::Rows { .. } => part.num_inputs + part.num_outputs,
            Self::Tokens { .. } => part.num_outputs,
        }
    }
}

/// What is added to the output of one projection, or to embeddings.
pub struct LoraWork<'a, G> {
    /// What went into it.
    pub input: LoraInput<'a>,
    /// Rows of the step.
    pub rows: &'a [i32],
    /// What multiplies their updates.
    pub scales: &'a [f32],
    /// The groups, by number; `None` for those without an update here.
    pub group: G,
    /// How many there are.
    pub num_groups: usize,
}

impl LoraScratch {
    /// Remembers that rows of `num_inputs` numbers will be multiplied.
    pub(super) fn note(&mut self, isa: Isa, num_inputs: usize) {
        if multiplies_pairs(isa) {
            self.row_lines = self.row_lines.max(row_lines(num_inputs));
        }
    }

    /// Takes the memory for steps of up to `max_rows` rows.
    pub(super) fn reserve(&mut self, max_rows: usize) {
        self.rounded.reserve_exact((max_rows * self.row_lines).saturating_sub(self.rounded.len()));
        self.owners.reserve_exact(max_rows.saturating_sub(self.owners.len()));
        self.shrunk.resize(MAX_SHRUNK, 0.0);
        self.pieces.reserve_exact(MAX_PIECES.saturating_sub(self.pieces.capacity()));
    }
}

/// `out[row] += scale * scaling * (x[row] A^T) B^T` for every group's entries; `out` has rows of `num_outputs`.
pub fn add_lora<'a, G: Fn(usize) -> Option<LoraRows<'a>> + Sync>(
    pool: &mut ThreadPool,
    isa: Isa,
    scratch: &mut LoraScratch,
    work: &LoraWork<'_, G>,
    out: &mut [f32],
    num_outputs: usize,
) {
    scratch.reserve(work.input.num_rows());
    if let LoraInput::Rows { x, num_inputs } = work.input
        && multiplies_pairs(isa)
        && (0..work.num_groups).any(|group| (work.group)(group).is_some_and(has_pairs))
    {
        round_rows(pool, x, num_inputs, &mut scratch.rounded);
    }
    let mut run = Run { pool, isa, scratch, work, out, num_outputs, num_tasks: 0, num_shrunk: 0, num_products: 0 };
    for group in 0..work.num_groups {
        let Some(LoraRows { update, entries }) = (work.group)(group) else { continue };
        for (index, part) in update.parts.iter().enumerate() {
            assert!(work.input.suits(part), "an adapter takes what its projection takes");
            assert!(part.first_column + part.num_outputs <= num_outputs, "an adapter gives what its projection gives");
            for start in entries.clone().step_by(PIECE_ROWS) {
                run.push(group, index, part, start..entries.end.min(start + PIECE_ROWS));
            }
        }
    }
    run.flush();
}

/// Whether `isa` has dot products of bf16 pairs.
fn multiplies_pairs(isa: Isa) -> bool {
    cfg!(target_arch = "x86_64") && isa >= Isa::Avx512Bf16
}

fn has_pairs(rows: LoraRows<'_>) -> bool {
    rows.update.parts.iter().any(CpuLoraPart::is_bf16)
}

/// Lines of a rounded row.
fn row_lines(num_inputs: usize) -> usize {
    num_inputs.div_ceil(GROUP)
}

/// Rounds every row of x to bf16.
fn round_rows(pool: &mut ThreadPool, x: &[f32], num_inputs: usize, target: &mut Vec<Line>) {
    #[cfg(target_arch = "x86_64")]
    {
        assert!(Isa::Avx512Bf16.is_available(), "only machines that multiply pairs round to them");
        let (num_rows, row_lines) = (x.len() / num_inputs, row_lines(num_inputs));
        let shared = DisjointSlice::new(grown(target, num_rows * row_lines, Line::ZERO));
        in_tasks(pool, num_rows.div_ceil(ROUNDED_ROWS), x.len() < MIN_PARALLEL_NUMBERS, |task| {
            for row in task * ROUNDED_ROWS..num_rows.min((task + 1) * ROUNDED_ROWS) {
                // SAFETY: rows are disjoint, and the instructions are there.
                unsafe {
                    lora_pairs::round(&x[row * num_inputs..][..num_inputs], shared.part(row * row_lines, row_lines))
                };
            }
        });
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("no other machine multiplies pairs");
}

struct Run<'a, 'w, G> {
    pool: &'a mut ThreadPool,
    isa: Isa,
    scratch: &'a mut LoraScratch,
    work: &'a LoraWork<'w, G>,
    out: &'a mut [f32],
    num_outputs: usize,
    num_tasks: usize,
    num_shrunk: usize,
    num_products: usize,
}

impl<'u, G: Fn(usize) -> Option<LoraRows<'u>> + Sync> Run<'_, '_, G> {
    fn push(&mut self, group: usize, part: usize, found: &CpuLoraPart, entries: Range<usize>) {
        let num_shrunk = entries.len() * found.rank;
        if self.scratch.pieces.len() == MAX_PIECES || self.num_shrunk + num_shrunk > MAX_SHRUNK {
            self.flush();
        }
        let (shrunk_at, first_task) = (self.num_shrunk, self.num_tasks);
        self.num_shrunk += num_shrunk;
        self.num_tasks += found.rank.div_ceil(TASK_RANKS);
        self.num_products += num_shrunk * self.work.input.products_per_rank(found);
        let columns = found.first_column..found.first_column + found.num_outputs;
        // A stripe of the second pass is the same columns of every part that writes there.
        let agrees =
            |other: &Range<usize>| *other == columns || other.end <= columns.start || columns.end <= other.start;
        let pieces = &mut self.scratch.pieces;
        assert!(
            pieces.iter().all(|other| agrees(&other.columns)),
            "adapters divide a projection into the same modules"
        );
        pieces.push(Piece { group, part, entries, shrunk_at, first_task, columns });
    }

    /// Runs both passes over the pieces so far.
    fn flush(&mut self) {
        match self.scratch.pieces.len() >= 2 * self.pool.num_threads() && self.rows_are_disjoint() {
            true => self.run_by_piece(),
            false => self.run_by_pass(),
        }
        self.scratch.pieces.clear();
        (self.num_tasks, self.num_shrunk, self.num_products) = (0, 0, 0);
    }

    /// Whether no row stands in two groups.
    fn rows_are_disjoint(&mut self) -> bool {
        let LoraScratch { pieces, owners, .. } = &mut *self.scratch;
        owners.clear();
        owners.resize(self.work.input.num_rows(), usize::MAX);
        pieces.iter().all(|piece| {
            self.work.rows[piece.entries.clone()].iter().all(|row| {
                let owner = &mut owners[*row as usize];
                let is_free = *owner == usize::MAX || *owner == piece.group;
                *owner = piece.group;
                is_free
            })
        })
    }

    /// Both passes of a piece in one task: it has its columns of its rows to itself.
    fn run_by_piece(&mut self) {
        let LoraScratch { shrunk, rounded, pieces, .. } = &mut *self.scratch;
        let shrunk = &mut shrunk[..self.num_shrunk];
        let passes = Passes::new(self.work, self.isa, rounded, shrunk, self.out, self.num_outputs);
        in_tasks(self.pool, pieces.len(), self.num_products < MIN_PARALLEL_PRODUCTS, |task| {
            let piece = &pieces[task];
            let Some(part) = passes.part_of(piece) else { return };
            passes.shrink(piece, part, 0..part.rank);
            passes.expand(piece, part, 0..part.expand.num_panels());
        });
    }

    /// All groups through one pass, then through the other.
    fn run_by_pass(&mut self) {
        let LoraScratch { shrunk, rounded, pieces, .. } = &mut *self.scratch;
        let is_small = self.num_products < MIN_PARALLEL_PRODUCTS;
        let shrunk = &mut shrunk[..self.num_shrunk];
        let passes = Passes::new(self.work, self.isa, rounded, shrunk, self.out, self.num_outputs);
        in_tasks(self.pool, self.num_tasks, is_small, |task| {
            let piece = &pieces[pieces.partition_point(|piece| piece.first_task <= task) - 1];
            let Some(part) = passes.part_of(piece) else { return };
            let first = (task - piece.first_task) * TASK_RANKS;
            passes.shrink(piece, part, first..part.rank.min(first + TASK_RANKS));
        });
        let widths = pieces.iter().filter_map(|piece| passes.part_of(piece)).map(|part| part.expand.num_panels());
        let num_panels = widths.max().unwrap_or(0);
        let per_task = num_panels.div_ceil(4 * self.pool.num_threads()).max(1);
        in_tasks(self.pool, num_panels.div_ceil(per_task), is_small, |task| {
            for piece in pieces.iter() {
                let Some(part) = passes.part_of(piece) else { continue };
                passes.expand(piece, part, task * per_task..part.expand.num_panels().min((task + 1) * per_task));
            }
        });
    }
}

/// What tasks of either pass work on.
struct Passes<'a, 'w, G> {
    work: &'a LoraWork<'w, G>,
    isa: Isa,
    /// Empty where no pairs are multiplied.
    rounded: &'a [Line],
    shrunk: DisjointSlice<'a, f32>,
    out: DisjointSlice<'a, f32>,
    num_outputs: usize,
}

impl<'a, 'u, 'w, G: Fn(usize) -> Option<LoraRows<'u>> + Sync> Passes<'a, 'w, G> {
    fn new(
        work: &'a LoraWork<'w, G>,
        isa: Isa,
        rounded: &'a [Line],
        shrunk: &'a mut [f32],
        out: &'a mut [f32],
        num_outputs: usize,
    ) -> Self {
        Self { work, isa, rounded, shrunk: DisjointSlice::new(shrunk), out: DisjointSlice::new(out), num_outputs }
    }

    fn part_of(&self, piece: &Piece) -> Option<&'u CpuLoraPart> {
        (self.work.group)(piece.group).map(|found| &found.update.parts[piece.part])
    }

    /// Whether a part is multiplied in pairs.
    fn uses_pairs(&self, part: &CpuLoraPart) -> bool {
        multiplies_pairs(self.isa) && part.is_bf16()
    }

    /// Some ranks of a piece, which no other task has.
    fn shrink(&self, piece: &Piece, part: &CpuLoraPart, ranks: Range<usize>) {
        match (&self.work.input, &part.shrink) {
            (LoraInput::Rows { x, num_inputs }, ShrinkMatrix::Multiplied(a)) => {
                self.multiply(piece, part, (x, *num_inputs), a, ranks);
            }
            (LoraInput::Tokens { ids, factor, .. }, ShrinkMatrix::LookedUp(a)) => {
                self.look_up(piece, part, (ids, *factor), a, ranks);
            }
            _ => unreachable!("a part suits its input"),
        }
    }

    fn multiply(
        &self,
        piece: &Piece,
        part: &CpuLoraPart,
        (work_x, num_inputs): (&[f32], usize),
        a: &GroupedMatrix,
        ranks: Range<usize>,
    ) {
        let rows = &self.work.rows[piece.entries.clone()];
        let (target, target_at) = (&self.shrunk, piece.shrunk_at);
        #[cfg(target_arch = "x86_64")]
        if self.uses_pairs(part) {
            let (x, scales) = (self.rounded, &self.work.scales[piece.entries.clone()]);
            let row_lines = row_lines(num_inputs);
            // SAFETY: the instructions are there, and every row was rounded; tasks have different ranks or pieces.
            unsafe { lora_pairs::Shrink { x, row_lines, rows, scales, part, a, ranks, target, target_at }.run() };
            return;
        }
        dispatch(self.isa, lora_plain::Shrink { work_x, rows, part, a, ranks, target, target_at });
    }

    /// The same of tokens. What follows reads pairs where `multiply` would have written them.
    fn look_up(
        &self,
        piece: &Piece,
        part: &CpuLoraPart,
        (ids, factor): (&[i32], f32),
        a: &TokenTable,
        ranks: Range<usize>,
    ) {
        for (at, entry) in piece.entries.clone().enumerate() {
            let token = ids[self.work.rows[entry] as usize] as usize;
            // SAFETY: who schedules keeps an adapter's pages while it is used.
            let number = |rank: usize| factor * unsafe { a.number(token, rank) };
            if self.uses_pairs(part) {
                let factor = self.work.scales[entry] * part.scaling;
                let bits = |rank: usize| match rank < part.rank {
                    true => u32::from(bf16::from_f32(number(rank) * factor).to_bits()),
                    false => 0,
                };
                let start = piece.shrunk_at + at * part.rank.div_ceil(2) + ranks.start / 2;
                // SAFETY: tasks have different ranks or pieces.
                let words = unsafe { self.shrunk.part(start, ranks.len().div_ceil(2)) };
                for (word, rank) in words.iter_mut().zip(ranks.clone().step_by(2)) {
                    *word = f32::from_bits(bits(rank) | bits(rank + 1) << 16);
                }
            } else {
                let start = piece.shrunk_at + at * part.rank + ranks.start;
                // SAFETY: as above.
                let shrunk = unsafe { self.shrunk.part(start, ranks.len()) };
                shrunk.iter_mut().zip(ranks.clone()).for_each(|(shrunk, rank)| *shrunk = number(rank));
            }
        }
    }

    /// Some panels of a piece's part, in rows where no other task has them; all its ranks are shrunk.
    fn expand(&self, piece: &Piece, part: &CpuLoraPart, panels: Range<usize>) {
        // SAFETY: whoever shrank the piece is done, and nobody writes there now.
        let shrunk = unsafe { self.shrunk.read(piece.shrunk_at, piece.entries.len() * part.rank) };
        let rows = &self.work.rows[piece.entries.clone()];
        let (out, out_row) = (&self.out, self.num_outputs);
        #[cfg(target_arch = "x86_64")]
        if self.uses_pairs(part) {
            // SAFETY: the instructions are there; tasks have different columns of a row.
            unsafe { lora_pairs::Expand { shrunk, rows, part, panels, out, out_row }.run() };
            return;
        }
        let scales = &self.work.scales[piece.entries.clone()];
        dispatch(self.isa, lora_plain::Expand { shrunk, rows, scales, part, panels, out, out_row });
    }
}

pub(super) fn in_tasks(pool: &mut ThreadPool, num_tasks: usize, is_small: bool, task: impl Fn(usize) + Sync) {
    match is_small {
        true => (0..num_tasks).for_each(task),
        false => pool.run(num_tasks, |index, _| task(index)),
    }
}

#[cfg(test)]
#[path = "lora_tests.rs"]
mod tests;
