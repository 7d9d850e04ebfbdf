//! Rows of the embedding table.

#![allow(unsafe_code)]

use super::disjoint::DisjointSlice;
use super::packed::PackedMatrix;
use super::{ThreadPool, pool};

/// Rows of a task: each waits for memory, for its numbers lie far apart in panels.
const TASK_ROWS: usize = 16;

/// `out[i] = scale * table[ids[i]]`; `out` is `[ids, columns]`.
///
/// # Panics
/// When `out` has another size, or an id is no row of the table.
pub fn embed(pool: &mut ThreadPool, table: &PackedMatrix, ids: &[i32], scale: f32, out: &mut [f32]) {
    let num_columns = table.num_columns();
    assert_eq!(out.len(), ids.len() * num_columns, "the output has a row for each id");
    let out = DisjointSlice::new(out);
    let task_rows = TASK_ROWS.max(ids.len().div_ceil(pool::MAX_TASKS));
    pool.run(ids.len().div_ceil(task_rows), |task, _| {
        let first = task * task_rows;
        let ids = &ids[first..ids.len().min(first + task_rows)];
        // SAFETY: tasks have different rows.
        let rows = unsafe { out.part(first * num_columns, ids.len() * num_columns) };
        for (&id, row) in ids.iter().zip(rows.chunks_exact_mut(num_columns)) {
            table.unpack_row(usize::try_from(id).expect("an id is a row of the table"), row);
            if scale != 1.0 {
                row.iter_mut().for_each(|value| *value *= scale);
            }
        }
    });
}
