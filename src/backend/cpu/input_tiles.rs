//! The rows of x, cut into tiles and laid out as the kernels read them.

#![allow(unsafe_code)]

use super::ThreadPool;
#[cfg(target_arch = "x86_64")]
use super::bf16_rounding::store_pairs;
use super::disjoint::DisjointSlice;

/// Rows of f32 in memory: row `i` is `data[i * stride..][..num_columns]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// How many rows.
    pub num_rows: usize,
    /// From one row to the next.
    pub stride: usize,
}

/// Rows of f32 to write.
pub struct RowsMut<'a> {
    /// The numbers.
    pub data: &'a mut [f32],
    /// From one row to the next.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn row(self, row: usize, num_columns: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..num_columns]
    }
}

/// `num_rows` rows in as few tiles as the kernels' height allows, as even as can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TilePlan {
    pub(super) num_rows: usize,
    pub(super) num_tiles: usize,
}

impl TilePlan {
    pub(super) fn new(num_rows: usize, max_rows: usize) -> Self {
        Self { num_rows, num_tiles: num_rows.div_ceil(max_rows) }
    }

    /// The first row of `tile`.
    pub(super) fn start(self, tile: usize) -> usize {
        tile * self.num_rows / self.num_tiles
    }

    pub(super) fn rows(self, tile: usize) -> usize {
        self.start(tile + 1) - self.start(tile)
    }
}

/// Lays x out tile by tile as `[2 * num_pairs][rows]`, zeros after the last column when their number is odd.
/// Tile `t` begins at `plan.start(t) * 2 * num_pairs`.
pub(super) fn pack_tiles(pool: &mut ThreadPool, x: Rows, num_columns: usize, plan: TilePlan, target: &mut [f32]) {
    let padded = num_columns.next_multiple_of(2);
    let shared = DisjointSlice::new(target);
    for_each_tile(pool, plan, |tile| {
        let (start, rows) = (plan.start(tile), plan.rows(tile));
        // SAFETY: tiles are disjoint ranges of rows.
        let target = unsafe { shared.part(start * padded, rows * padded) };
        let mut row = 0;
        while row < rows {
            // Four rows at a time; at the end four once more that overlap the ones before.
            if rows >= 4 {
                let first = row.min(rows - 4);
                let group = [0, 1, 2, 3].map(|index| x.row(start + first + index, num_columns));
                interleave_four(group, first, rows, target);
                row += 4;
            } else {
                interleave([x.row(start + row, num_columns)], row, rows, target);
                row += 1;
            }
        }
        target[num_columns * rows..].fill(0.0);
    });
}

/// Writes `source[i][k]` to `target[k * rows + first + i]`.
fn interleave<const COUNT: usize>(source: [&[f32]; COUNT], first: usize, rows: usize, target: &mut [f32]) {
    for k in 0..source[0].len() {
        let at = k * rows + first;
        target[at..at + COUNT].copy_from_slice(&source.map(|source| source[k]));
    }
}

/// The same for four rows, four `k` at a time.
fn interleave_four(source: [&[f32]; 4], first: usize, rows: usize, target: &mut [f32]) {
    let quads = source.map(|row| row.as_chunks::<4>().0);
    let whole = quads[0].len();
    for (index, target) in target.chunks_exact_mut(4 * rows).take(whole).enumerate() {
        let columns = transpose(quads.map(|quads| quads[index]));
        for (next, column) in columns.iter().enumerate() {
            target[next * rows + first..][..4].copy_from_slice(column);
        }
    }
    let rest = source.map(|row| &row[4 * whole..]);
    interleave(rest, first, rows, &mut target[4 * whole * rows..]);
}

#[cfg(target_arch = "x86_64")]
fn transpose(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::x86_64::{_MM_TRANSPOSE4_PS, _mm_loadu_ps, _mm_storeu_ps};
    let mut columns = [[0.0; 4]; 4];
    // SAFETY: every x86-64 has SSE; each array holds the four numbers that are read or written.
    unsafe {
        let [mut a, mut b, mut c, mut d] = rows.map(|row| _mm_loadu_ps(row.as_ptr()));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        for (column, vector) in columns.iter_mut().zip([a, b, c, d]) {
            _mm_storeu_ps(column.as_mut_ptr(), vector);
        }
    }
    columns
}

#[cfg(not(target_arch = "x86_64"))]
fn transpose(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    [0, 1, 2, 3].map(|column| rows.map(|row| row[column]))
}

/// The same rounded to bf16, pairs of `k` in one word: `[num_pairs][rows]`, the even `k` in the low half.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and BF16.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn pack_bf16_tiles(
    pool: &mut ThreadPool,
    x: Rows,
    num_columns: usize,
    plan: TilePlan,
    target: &mut [f32],
) {
    let num_pairs = num_columns.div_ceil(2);
    let shared = DisjointSlice::new(target);
    for_each_tile(pool, plan, |tile| {
        let (start, rows) = (plan.start(tile), plan.rows(tile));
        // SAFETY: tiles are disjoint ranges of rows.
        let target = unsafe { shared.part(start * num_pairs, rows * num_pairs) };
        let row_of = |row: usize| x.row(start + row, num_columns).as_ptr();
        // SAFETY: the caller's promise; the rows have their columns, and there is a word for each pair of each.
        unsafe { store_pairs(row_of, rows, num_columns, 1.0, target.as_mut_ptr(), rows) };
    });
}

/// Runs `task` for every tile, in parallel.
pub(super) fn for_each_tile(pool: &mut ThreadPool, plan: TilePlan, task: impl Fn(usize) + Sync) {
    let tiles_per_task = plan.num_tiles.div_ceil(super::pool::MAX_TASKS);
    pool.run(plan.num_tiles.div_ceil(tiles_per_task.max(1)), |index, _| {
        let first = index * tiles_per_task;
        (first..plan.num_tiles.min(first + tiles_per_task)).for_each(&task);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_even_and_cover_every_row_once() {
        for num_rows in 1..100 {
            for max_rows in [1, 4, 6, 12] {
                let plan = TilePlan::new(num_rows, max_rows);
                let rows: Vec<usize> = (0..plan.num_tiles).map(|tile| plan.rows(tile)).collect();
                assert_eq!(rows.iter().sum::<usize>(), num_rows);
                let (least, most) = (rows.iter().min().unwrap(), rows.iter().max().unwrap());
                assert!(*most <= max_rows && most - least <= 1, "{num_rows} rows: {rows:?}");
            }
        }
    }
}
