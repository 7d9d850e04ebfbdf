//! A tensor of a checkpoint, still where the file's bytes are.

use std::ops::Range;
use std::sync::Arc;

use super::DType;
use crate::{Result, malformed};

/// Bytes that stay where they are as long as someone holds them; a mapped file, usually.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A row-major tensor `[rows, columns]` inside a checkpoint. Vectors have one row.
#[derive(Clone)]
pub struct HostTensor {
    name: String,
    source: SharedBytes,
    range: Range<usize>,
    dtype: DType,
    rows: usize,
    columns: usize,
    row_order: RowOrder,
}

/// In which order a checkpoint keeps the rows of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As the model defines them.
    Natural,
    /// Per head, row `j` of the first half and row `j` of the second half of the head alternate: how GGUF files keep
    /// the q and k projections of the Llama architecture (ggml's "normal" RoPE).
    InterleavedHalves {
        /// Number of heads the rows divide into.
        num_heads: usize,
    },
}

impl HostTensor {
    /// Describes `range` of `source` as a `[rows, columns]` tensor; the sizes must agree.
    pub fn new(
        name: impl Into<String>,
        source: SharedBytes,
        range: Range<usize>,
        dtype: DType,
        rows: usize,
        columns: usize,
    ) -> Result<Self> {
        let name = name.into();
        let wanted = dtype.row_bytes(columns).and_then(|bytes| bytes.checked_mul(rows));
        let available = (*source).as_ref().len();
        if range.start > range.end || range.end > available {
            return Err(malformed!("tensor {name}: bytes {range:?} lie outside a file of {available} bytes"));
        }
        if wanted != Some(range.len()) {
            let found = range.len();
            return Err(malformed!("tensor {name}: [{rows}, {columns}] {dtype} needs {wanted:?} bytes, found {found}"));
        }
        Ok(Self { name, source, range, dtype, rows, columns, row_order: RowOrder::Natural })
    }

    /// The same tensor, its rows known to be kept in `order`.
    pub fn with_row_order(mut self, order: RowOrder) -> Self {
        self.row_order = order;
        self
    }

    /// The checkpoint's name for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How its numbers are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows: output features of a projection.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: input features of a projection.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All bytes, row-major, in the file's row order.
    pub fn bytes(&self) -> &[u8] {
        &(*self.source).as_ref()[self.range.clone()]
    }

    /// The bytes of the model's row `row`, wherever the checkpoint keeps it.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        let stride = self.range.len() / self.rows;
        let stored = self.stored_row(row);
        &self.bytes()[stored * stride..(stored + 1) * stride]
    }

    fn stored_row(&self, row: usize) -> usize {
        match self.row_order {
            RowOrder::Natural => row,
            RowOrder::InterleavedHalves { num_heads } => {
                let head_rows = self.rows / num_heads;
                let (head, within) = (row / head_rows, row % head_rows);
                let (half, pair) = (within / (head_rows / 2), within % (head_rows / 2));
                head * head_rows + pair * 2 + half
            }
        }
    }
}
