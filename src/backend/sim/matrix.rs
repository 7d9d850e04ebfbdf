//! Projections of the double: shapes, and in copies the updates that are merged into them.

use std::ops::Range;

use super::payload::mix;
use crate::{Result, invalid};

/// What is mixed in last where updates are merged: rounding the sum is not adding to what was rounded.
pub const MERGED: u64 = 0x6d65_7267_6564;

/// Shape of a projection; its numbers do not matter.
pub struct SimMatrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// What is merged into it, when it is a copy.
    merged: Option<SimMerged>,
}

/// Updates, and the rows that have them.
#[derive(Default)]
struct SimMerged {
    /// Tags, and the bits of their scales.
    updates: Vec<(u64, u32)>,
    num_rows: usize,
}

impl SimMatrix {
    pub(super) fn base(rows: usize, columns: usize) -> Self {
        Self { rows, columns, merged: None }
    }

    /// A copy of its shape, of which no row is written.
    pub(super) fn empty_copy(&self) -> Self {
        Self { merged: Some(SimMerged::default()), ..Self::base(self.rows, self.columns) }
    }

    /// Takes note that `rows`, which follow those before, have been written into this copy of `base` with `updates`, each
    /// with its scale's bits.
    pub(super) fn merge(&mut self, base: &Self, updates: Vec<(u64, u32)>, rows: Range<usize>) -> Result<()> {
        let Some(merged) = self.merged.as_mut().filter(|_| base.merged.is_none()) else {
            return Err(invalid!("updates are merged into a copy of the base weights"));
        };
        let is_next = merged.num_rows == rows.start && rows.end <= self.rows;
        if !is_next || !(rows.start == 0 || merged.updates == updates) {
            return Err(invalid!("rows {rows:?} do not follow the {} that are merged", merged.num_rows));
        }
        (merged.updates, merged.num_rows) = (updates, rows.end);
        Ok(())
    }

    /// What a row's payload is behind the product.
    pub(super) fn apply(&self, payload: u64) -> Result<u64> {
        let Some(SimMerged { updates, num_rows }) = &self.merged else { return Ok(payload) };
        if *num_rows != self.rows {
            return Err(invalid!("{num_rows} of {} rows of a merged copy are written", self.rows));
        }
        let added = updates.iter().fold(payload, |row, (tag, scale)| mix(row, mix(*tag, u64::from(*scale))));
        Ok(mix(added, MERGED))
    }
}
