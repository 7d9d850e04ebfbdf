//! Attention over the paged KV cache, prefill and decode mixed: what a call is given, and how its work is divided.
//! The arithmetic is in `attention_tile`.
//!
//! A row's result has the same bits however it is batched, chunked, tiled or spread over threads.

#![allow(unsafe_code)]

use std::cmp::Reverse;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::attention_amx::{self, AmxTileKernel};
#[cfg(target_arch = "x86_64")]
use super::attention_dot::{self, DotTileKernel};
use super::attention_fold::{MergeKernel, TileTarget, partial_stride};
use super::attention_tile::{
    Bf16, CHUNK, F32, HeadRows, KvElement, MAX_ROWS, MAX_ROWS_WIDE, Tile, TileKernel, TileScratch,
};
use super::disjoint::DisjointSlice;
use super::line::Line;
use super::pool::MAX_TASKS;
use super::simd::{LANES, dispatch};
use super::{Isa, KvArena, ThreadPool};
use crate::backend::{DType, KvLayout, StepBounds};

/// Work below this many products is not worth waking other threads.
const MIN_PARALLEL_PRODUCTS: usize = 128 * 1024;

/// Tiles of rows that one task takes.
const TILES_PER_TASK: usize = 4;

/// Tasks for each thread when heads are divided into runs of chunks.
const TASKS_PER_THREAD: usize = 4;

/// Most lines of partial results, 32 MiB: heads for which there is no room are not divided, which changes no bits.
const MAX_PARTIAL_LINES: usize = (32 << 20) / size_of::<Line>();

/// The sequences of a step. `S` sequences, `T` query tokens in all.
#[derive(Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// `[T, (num_q_heads + 2 * num_kv_heads) * head_dim]`, the queries first in each row.
    pub qkv: &'a [f32],
    /// Query heads: a multiple of the KV heads of the cache.
    pub num_q_heads: usize,
    /// Row of the first query of each sequence, and `T`: `[S + 1]`.
    pub cu_seqlens_q: &'a [i32],
    /// Position of each query in its sequence, `[T]`: it sees the keys up to there, its own included. Ascending in a
    /// sequence, not necessarily without gaps.
    pub positions: &'a [i32],
    /// One past the last query's position, for each sequence that has queries: `[S]`. Keys and values up to there are in
    /// the cache.
    pub context_lens: &'a [i32],
    /// Blocks of each sequence, `[S, max_blocks]`; entries that no query needs may hold anything.
    pub block_tables: &'a [i32],
    /// Length of a row of `block_tables`.
    pub max_blocks: usize,
    /// Layer of the cache.
    pub layer: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// What scores stay inside of: `cap tanh(score / cap)` is weighed in place of a score.
    pub softcap: Option<f32>,
    /// How many positions, its own included, a query sees; all before it when `None`.
    pub window: Option<usize>,
}

/// Memory that calls share. Unless it was reserved it grows to the largest shape seen.
#[derive(Default)]
pub struct AttentionScratch {
    threads: Vec<TileScratch>,
    tasks: Vec<Task>,
    merges: Vec<Merge>,
    partials: Vec<Line>,
}

/// Rows of one head of one sequence and a run of chunks.
#[derive(Clone)]
struct Task {
    sequence: usize,
    kv_head: usize,
    rows: Range<usize>,
    chunks: Range<usize>,
    /// First line of its partial results, when others have the other chunks.
    partials: Option<usize>,
    cost: usize,
}

/// The chunks of all rows of one head of one sequence, to be folded.
struct Merge {
    sequence: usize,
    kv_head: usize,
    num_rows: usize,
    lines: Range<usize>,
}

/// The queries of one sequence. Row `r` is query token `r / group`, head `r % group` of a KV head.
#[derive(Clone, Copy)]
pub(super) struct SequenceRows<'a> {
    first_token: usize,
    positions: &'a [i32],
    group: usize,
    block_table: &'a [i32],
}

impl SequenceRows<'_> {
    fn num_rows(&self) -> usize {
        self.positions.len() * self.group
    }

    /// Positions a row sees.
    pub(super) fn key_range(&self, batch: &AttentionBatch, row: usize) -> Range<usize> {
        let end = self.positions[row / self.group] as usize + 1;
        batch.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Chunks that some of `rows` see.
    fn chunks(&self, batch: &AttentionBatch, rows: &Range<usize>) -> Range<usize> {
        let start = self.key_range(batch, rows.start).start;
        let end = self.key_range(batch, rows.end - 1).end;
        start / CHUNK..end.div_ceil(CHUNK)
    }

    /// The block with the positions from `index * block_size` on.
    pub(super) fn block(&self, index: usize) -> usize {
        usize::try_from(self.block_table[index]).expect("a block that a query needs is in the table")
    }

    pub(super) fn query_start(&self, batch: &AttentionBatch, layout: &KvLayout, kv_head: usize, row: usize) -> usize {
        let token = self.first_token + row / self.group;
        let num_heads = batch.num_q_heads + 2 * layout.num_kv_heads();
        (token * num_heads + kv_head * self.group + row % self.group) * layout.head_dim()
    }

    pub(super) fn output_start(&self, batch: &AttentionBatch, kv_head: usize, row: usize, head_dim: usize) -> usize {
        let token = self.first_token + row / self.group;
        (token * batch.num_q_heads + kv_head * self.group + row % self.group) * head_dim
    }
}

impl<'a> AttentionBatch<'a> {
    fn num_sequences(&self) -> usize {
        self.context_lens.len()
    }

    fn sequence(&self, layout: &KvLayout, index: usize) -> SequenceRows<'a> {
        let number = |x: i32| usize::try_from(x).expect("lengths are not negative");
        let (start, end) = (number(self.cu_seqlens_q[index]), number(self.cu_seqlens_q[index + 1]));
        SequenceRows {
            first_token: start,
            positions: &self.positions[start..end],
            group: self.num_q_heads / layout.num_kv_heads(),
            block_table: &self.block_tables[index * self.max_blocks..(index + 1) * self.max_blocks],
        }
    }

    fn check(&self, layout: &KvLayout, out_len: usize) {
        let (heads, head_dim) = (self.num_q_heads, layout.head_dim());
        assert!(heads > 0 && heads.is_multiple_of(layout.num_kv_heads()), "query heads come in groups");
        assert_eq!(self.cu_seqlens_q.len(), self.num_sequences() + 1, "each sequence has its queries");
        assert_eq!(self.block_tables.len(), self.num_sequences() * self.max_blocks, "each sequence has its blocks");
        assert!(self.layer < layout.num_layers(), "layer {} of {}", self.layer, layout.num_layers());
        assert_ne!(self.window, Some(0), "a query sees itself");
        assert!(self.softcap.is_none_or(|cap| cap > 0.0), "a cap is positive, not {:?}", self.softcap);
        assert!(self.cu_seqlens_q.is_sorted() && self.cu_seqlens_q.first() == Some(&0), "queries are in order");
        let num_tokens = self.cu_seqlens_q.last().map_or(0, |last| *last as usize);
        assert_eq!(self.qkv.len(), num_tokens * (heads + 2 * layout.num_kv_heads()) * head_dim, "qkv has T rows");
        assert_eq!(out_len, num_tokens * heads * head_dim, "the output has T rows");
        assert_eq!(self.positions.len(), num_tokens, "each query has a position");
        for (queries, context_len) in self.cu_seqlens_q.windows(2).zip(self.context_lens) {
            let positions = &self.positions[queries[0] as usize..queries[1] as usize];
            assert!(positions.first().is_none_or(|first| *first >= 0), "positions are not negative");
            assert!(positions.is_sorted_by(|a, b| a < b), "queries of a sequence are in order of position");
            assert!(positions.last().is_none_or(|last| last + 1 == *context_len), "a context ends with its last query");
        }
    }
}

/// Causal attention of every query over its sequence's keys and values, which must be in the cache. `out` is
/// `[T, num_q_heads * head_dim]`.
pub fn attention(
    pool: &mut ThreadPool,
    isa: Isa,
    scratch: &mut AttentionScratch,
    batch: &AttentionBatch,
    cache: &KvArena,
    out: &mut [f32],
) {
    batch.check(cache.layout(), out.len());
    let head_dim = cache.layout().head_dim();
    let max_rows = max_rows(isa, cache.layout());
    scratch.plan(batch, cache.layout(), max_rows, pool.num_threads());
    scratch.prepare_threads(isa, pool.num_threads(), cache.layout());
    let AttentionScratch { threads, tasks, merges, partials } = scratch;
    let (out, partials) = (DisjointSlice::new(out), DisjointSlice::new(partials));
    let threads = DisjointSlice::new(threads);
    let products = tasks.iter().map(|task| task.cost).sum::<usize>() * head_dim;
    let run = |pool: &mut ThreadPool, num_tasks: usize, task: &(dyn Fn(usize, &mut TileScratch) + Sync)| {
        // SAFETY: a thread runs one task at a time.
        let scratch_of = |thread: usize| unsafe { &mut threads.part(thread, 1)[0] };
        if products < MIN_PARALLEL_PRODUCTS {
            return (0..num_tasks).for_each(|index| task(index, scratch_of(0)));
        }
        for first in (0..num_tasks).step_by(MAX_TASKS) {
            pool.run(MAX_TASKS.min(num_tasks - first), |index, thread| task(first + index, scratch_of(thread)));
        }
    };
    run(pool, tasks.len(), &|index, scratch| {
        let context = TaskContext { isa, max_rows, batch, cache, out: &out, partials: &partials };
        match cache.layout().dtype() {
            DType::BF16 => context.run::<Bf16>(&tasks[index], scratch),
            _ => context.run::<F32>(&tasks[index], scratch),
        }
    });
    run(pool, merges.len(), &|index, scratch| {
        let merge = &merges[index];
        let sequence = batch.sequence(cache.layout(), merge.sequence);
        let output_start = |row: usize| sequence.output_start(batch, merge.kv_head, row, head_dim);
        // SAFETY: all tasks that wrote partial results are done, and each merge has its own.
        let partials = unsafe { partials.part(merge.lines.start, merge.lines.len()) };
        let num_rows = merge.num_rows;
        dispatch(isa, MergeKernel { partials, num_rows, head_dim, scratch, output_start: &output_start, out: &out });
    });
}

impl AttentionScratch {
    /// Takes the memory for calls within `bounds`; pages are touched when used.
    ///
    /// As `plan` divides, runs of rows make `T group / (rows of a task) + S` tasks for each head at most. A head that is
    /// divided by chunks makes at most `1 + 2 cost / task_cost`, and all heads together cost no more than
    /// `2 TASKS_PER_THREAD num_threads` times `task_cost`, which was rounded down. Only heads that cost more than
    /// `task_cost` are divided: fewer than `TASKS_PER_THREAD num_threads`.
    pub(super) fn reserve(&mut self, isa: Isa, num_threads: usize, bounds: &StepBounds) {
        let (layout, max_rows) = (bounds.layout, max_rows(isa, bounds.layout));
        let (num_kv_heads, head_dim) = (layout.num_kv_heads(), layout.head_dim());
        let num_rows = bounds.max_tokens * (bounds.num_heads / num_kv_heads);
        let num_runs = num_rows.div_ceil(TILES_PER_TASK * max_rows) + bounds.max_sequences;
        self.tasks.reserve_exact(num_kv_heads * num_runs + 4 * TASKS_PER_THREAD * num_threads);
        let num_divided = (bounds.max_sequences * num_kv_heads).min(TASKS_PER_THREAD * num_threads);
        self.merges.reserve_exact(num_divided);
        let head_lines = bounds.max_context_len.div_ceil(CHUNK) * max_rows * partial_stride(head_dim) / LANES;
        self.partials.reserve_exact((num_divided * head_lines).min(MAX_PARTIAL_LINES));
        self.prepare_threads(isa, num_threads, layout);
    }

    /// Makes room for the tiles of every thread.
    fn prepare_threads(&mut self, isa: Isa, num_threads: usize, layout: &KvLayout) {
        self.threads.resize_with(num_threads.max(self.threads.len()), TileScratch::default);
        let lines = scratch_lines(isa, layout);
        self.threads.iter_mut().for_each(|thread| thread.reserve(layout.head_dim(), lines));
    }

    /// Divides the batch into tasks, the costly ones first.
    fn plan(&mut self, batch: &AttentionBatch, layout: &KvLayout, max_rows: usize, num_threads: usize) {
        self.tasks.clear();
        self.merges.clear();
        let mut num_lines = 0;
        let task_cost = total_cost(batch, layout) / (TASKS_PER_THREAD * num_threads);
        for index in 0..batch.num_sequences() {
            let sequence = batch.sequence(layout, index);
            let num_rows = sequence.num_rows();
            for kv_head in 0..layout.num_kv_heads() {
                if num_threads > 1 && num_rows > 0 && num_rows <= max_rows {
                    self.plan_few_rows(batch, layout, index, kv_head, task_cost.max(1), &mut num_lines);
                    continue;
                }
                for start in (0..num_rows).step_by(TILES_PER_TASK * max_rows) {
                    let rows = start..num_rows.min(start + TILES_PER_TASK * max_rows);
                    let chunks = sequence.chunks(batch, &rows);
                    let cost = rows.len() * chunks.len() * CHUNK;
                    self.tasks.push(Task { sequence: index, kv_head, rows, chunks, partials: None, cost });
                }
            }
        }
        self.tasks.sort_unstable_by_key(|task| Reverse(task.cost));
        if self.partials.len() < num_lines {
            self.partials.resize(num_lines, Line::ZERO);
        }
    }

    /// Rows of one tile: divided by chunks when they cost more than a task should.
    fn plan_few_rows(
        &mut self,
        batch: &AttentionBatch,
        layout: &KvLayout,
        index: usize,
        kv_head: usize,
        task_cost: usize,
        num_lines: &mut usize,
    ) {
        let sequence = batch.sequence(layout, index);
        let rows = 0..sequence.num_rows();
        let chunks = sequence.chunks(batch, &rows);
        let chunk_cost = rows.len() * CHUNK;
        let step = (task_cost / chunk_cost).max(1);
        let chunk_lines = rows.len() * partial_stride(layout.head_dim()) / LANES;
        let first_line = *num_lines;
        let has_room = first_line + chunks.len() * chunk_lines <= MAX_PARTIAL_LINES;
        let is_split = step < chunks.len() && has_room;
        let step = if is_split { step } else { chunks.len() };
        for start in chunks.clone().step_by(step) {
            let part = start..chunks.end.min(start + step);
            let cost = part.len() * chunk_cost;
            let partials = is_split.then_some(first_line + (start - chunks.start) * chunk_lines);
            self.tasks.push(Task { sequence: index, kv_head, rows: rows.clone(), chunks: part, partials, cost });
        }
        if is_split {
            *num_lines += chunks.len() * chunk_lines;
            let lines = first_line..*num_lines;
            self.merges.push(Merge { sequence: index, kv_head, num_rows: rows.len(), lines });
        }
    }
}

/// Rows times positions of all heads, roughly.
fn total_cost(batch: &AttentionBatch, layout: &KvLayout) -> usize {
    let cost = |index: usize| {
        let sequence = batch.sequence(layout, index);
        let num_rows = sequence.num_rows();
        if num_rows == 0 { 0 } else { num_rows * sequence.chunks(batch, &(0..num_rows)).len() * CHUNK }
    };
    (0..batch.num_sequences()).map(cost).sum::<usize>() * layout.num_kv_heads()
}

/// What all tasks of a call share.
struct TaskContext<'a> {
    isa: Isa,
    max_rows: usize,
    batch: &'a AttentionBatch<'a>,
    cache: &'a KvArena<'a>,
    out: &'a DisjointSlice<'a, f32>,
    partials: &'a DisjointSlice<'a, Line>,
}

impl TaskContext<'_> {
    fn run<E: KvElement>(&self, task: &Task, scratch: &mut TileScratch) {
        let (layout, sequence) = (self.cache.layout(), self.batch.sequence(self.cache.layout(), task.sequence));
        for start in task.rows.clone().step_by(self.max_rows) {
            let rows = start..task.rows.end.min(start + self.max_rows);
            let (chunks, target) = match task.partials {
                None => (sequence.chunks(self.batch, &rows), TileTarget::Output(self.out)),
                Some(first) => {
                    let chunk_lines = rows.len() * partial_stride(layout.head_dim()) / LANES;
                    // SAFETY: each task has its own chunks of its head's partial results.
                    let lines = unsafe { self.partials.part(first, task.chunks.len() * chunk_lines) };
                    (task.chunks.clone(), TileTarget::Partials(lines))
                }
            };
            let head = HeadRows { batch: self.batch, cache: self.cache, sequence, kv_head: task.kv_head, rows };
            attend_tile::<E>(self.isa, Tile { head, chunks, scratch: &mut *scratch, target });
        }
    }
}

/// Whether tiles are products of tile registers.
fn uses_tile_registers(isa: Isa, layout: &KvLayout) -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa == Isa::Amx && attention_amx::can_read(layout);
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether tiles are dot products of bf16 pairs.
fn uses_bf16_dot(isa: Isa, layout: &KvLayout) -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa == Isa::Avx512Bf16 && attention_dot::can_read(layout);
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Most rows of a tile.
fn max_rows(isa: Isa, layout: &KvLayout) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        _ if uses_tile_registers(isa, layout) => attention_amx::MAX_ROWS,
        _ if isa >= Isa::Avx512 => MAX_ROWS_WIDE,
        _ => MAX_ROWS,
    }
}

/// Scratch of a tile beyond what every instruction set needs.
fn scratch_lines(isa: Isa, layout: &KvLayout) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        _ if uses_tile_registers(isa, layout) => attention_amx::scratch_lines(layout.head_dim()),
        #[cfg(target_arch = "x86_64")]
        _ if uses_bf16_dot(isa, layout) => attention_dot::scratch_lines(layout.head_dim()),
        _ => 0,
    }
}

/// Picks the kernel for the number of rows. Its shape changes nothing but speed: what fits into registers.
fn attend_tile<E: KvElement>(isa: Isa, tile: Tile) {
    #[cfg(target_arch = "x86_64")]
    if uses_tile_registers(isa, tile.head.cache.layout()) {
        return dispatch(isa, AmxTileKernel(tile));
    }
    #[cfg(target_arch = "x86_64")]
    if uses_bf16_dot(isa, tile.head.cache.layout()) {
        return match tile.head.rows.len() {
            1 => dispatch(isa, DotTileKernel::<1, 4, 4>(tile)),
            2 => dispatch(isa, DotTileKernel::<2, 4, 4>(tile)),
            3 => dispatch(isa, DotTileKernel::<3, 4, 4>(tile)),
            4 => dispatch(isa, DotTileKernel::<4, 4, 4>(tile)),
            5 | 6 => dispatch(isa, DotTileKernel::<6, 4, 4>(tile)),
            7 | 8 => dispatch(isa, DotTileKernel::<8, 2, 2>(tile)),
            _ => dispatch(isa, DotTileKernel::<12, 2, 2>(tile)),
        };
    }
    match tile.head.rows.len() {
        1 => dispatch(isa, TileKernel::<E, 1, 8, 4, 4, 4>::new(tile)),
        2 => dispatch(isa, TileKernel::<E, 2, 8, 4, 2, 2>::new(tile)),
        3 => dispatch(isa, TileKernel::<E, 3, 4, 4, 2, 2>::new(tile)),
        4 => dispatch(isa, TileKernel::<E, 4, 4, 4, 1, 1>::new(tile)),
        5 | 6 => dispatch(isa, TileKernel::<E, 6, 4, 4, 1, 1>::new(tile)),
        7 | 8 => dispatch(isa, TileKernel::<E, 8, 2, 2, 1, 1>::new(tile)),
        _ => dispatch(isa, TileKernel::<E, 12, 2, 2, 1, 1>::new(tile)),
    }
}

#[cfg(test)]
mod tests;
