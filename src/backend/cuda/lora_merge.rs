//! Low-rank updates merged into a copy of weights: the launches for some of its rows.
//!
//! Rows are cut where an update begins or ends, so that each of a launch's pieces changes all its rows.

#![allow(unsafe_code)]

use std::ops::Range;

use super::backend::{CudaBackend, CudaTensor};
use super::launch::Arguments;
use super::lora_loader::{CudaLora, CudaLoraPart, FACTOR_WORDS};
use super::stream::CudaStream;
use super::weights::CudaMatrix;
use crate::backend::ScaledUpdate;
use crate::{Result, invalid, unsupported};

/// Pieces in the arguments of one launch, as in `lora_merge.cu`.
const LAUNCH_PIECES: usize = 32;
/// Rows that a block goes down at a time, and its inputs.
const TILE: (usize, usize) = (32, 256);
/// Rows of a vector of `B`.
const VECTOR_ROWS: usize = 8;
/// Blocks that are enough for a large GPU. With more, each with fewer rows, `A` would be read more often.
const WANTED_BLOCKS: usize = 128;
/// The most rows of a block: beyond, hardly anything is read less often.
const MAX_BLOCK_ROWS: usize = 512;

/// See [`Backend::merge_rows`](crate::backend::Backend::merge_rows).
pub(super) fn merge_rows(
    backend: &CudaBackend,
    stream: &CudaStream,
    weight: &CudaMatrix,
    updates: &[ScaledUpdate<'_, CudaLora>],
    rows: Range<usize>,
    target: &CudaMatrix,
) -> Result<()> {
    let (weight, target) = (weight.plain()?, target.plain()?);
    target.expect("a copy of weights", weight.rows(), weight.columns(), weight.dtype())?;
    if rows.end > weight.rows() {
        return Err(invalid!("rows {rows:?} are to be merged of weights with {}", weight.rows()));
    }
    let pieces = pieces(weight, updates)?;
    let call = Call { backend, stream, weight, target, pieces };
    cut(&call.pieces, rows).into_iter().try_for_each(|rows| call.launch(rows))
}

/// An adapter's update of some rows of the weights.
struct Piece<'a> {
    update: &'a CudaLora,
    part: &'a CudaLoraPart,
    factor: f32,
}

impl Piece<'_> {
    fn rows(&self) -> Range<usize> {
        self.part.first_column..self.part.first_column + self.part.num_columns
    }
}

/// All pieces, in the order in which they are added. An error unless they fit the weights and lie in pages of one size.
fn pieces<'a>(weight: &CudaTensor, updates: &'a [ScaledUpdate<'a, CudaLora>]) -> Result<Vec<Piece<'a>>> {
    let piece = |update: &'a CudaLora, part: &'a CudaLoraPart, scale: f32| {
        let piece = Piece { update, part, factor: scale * part.scaling };
        let (rows, inputs) = (piece.rows(), part.num_inputs);
        match inputs == weight.columns() && rows.end <= weight.rows() {
            true => Ok(piece),
            false => Err(invalid!(
                "an update of rows {rows:?} with {inputs} inputs does not fit weights of [{}, {}]",
                weight.rows(),
                weight.columns()
            )),
        }
    };
    let page_bytes = updates.first().map_or(0, |scaled| scaled.update.page_bytes);
    if let Some(other) = updates.iter().find(|scaled| scaled.update.page_bytes != page_bytes) {
        let found = other.update.page_bytes;
        return Err(invalid!("an adapter lies in pages of {found} bytes, another one in pages of {page_bytes}"));
    }
    let parts = updates.iter().flat_map(|scaled| scaled.update.parts.iter().map(move |part| (scaled, part)));
    parts.map(|(scaled, part)| piece(scaled.update, part, scaled.scale)).collect()
}

/// The rows, cut where a piece begins or ends.
fn cut(pieces: &[Piece<'_>], rows: Range<usize>) -> Vec<Range<usize>> {
    let inner = pieces.iter().flat_map(|piece| [piece.rows().start, piece.rows().end]);
    let mut edges: Vec<usize> = inner.filter(|edge| rows.contains(edge)).chain([rows.start, rows.end]).collect();
    edges.sort_unstable();
    edges.dedup();
    edges.windows(2).map(|edges| edges[0]..edges[1]).collect()
}

struct Call<'a> {
    backend: &'a CudaBackend,
    stream: &'a CudaStream,
    weight: &'a CudaTensor,
    target: &'a CudaTensor,
    pieces: Vec<Piece<'a>>,
}

impl Call<'_> {
    /// Writes rows that all have the same pieces.
    fn launch(&self, rows: Range<usize>) -> Result<()> {
        let own: Vec<&Piece<'_>> = self.pieces.iter().filter(|piece| piece.rows().contains(&rows.start)).collect();
        if own.len() > LAUNCH_PIECES {
            let found = own.len();
            return Err(unsupported!("{found} adapters at once are not merged on CUDA, which takes {LAUNCH_PIECES}"));
        }
        let mut words = [0; LAUNCH_PIECES * FACTOR_WORDS];
        for (words, piece) in words.chunks_exact_mut(FACTOR_WORDS).zip(&own) {
            words.copy_from_slice(&piece.update.factor_words(piece.part, piece.factor)?);
        }
        let num_rows = rows.end - rows.start / VECTOR_ROWS * VECTOR_ROWS;
        let num_tiles = self.weight.columns().div_ceil(TILE.1);
        let block_rows = (num_rows * num_tiles).div_ceil(WANTED_BLOCKS).next_multiple_of(TILE.0).min(MAX_BLOCK_ROWS);
        let arguments = Arguments::new()
            .tensor(self.target)?
            .tensor(self.weight)?
            .int(self.weight.columns())?
            .int(rows.start)?
            .int(rows.end)?
            .int(block_rows)?
            .int(own.len())?
            .long(own.first().map_or(0, |piece| piece.update.page_bytes))
            .structure(&words);
        let blocks = (num_tiles, num_rows.div_ceil(block_rows), 1);
        let kernel = &self.backend.kernels().lora.merge;
        // SAFETY: lora_merge(target, weight, num_inputs, first_row, end_row, block_rows, num_pieces, page_bytes, pieces),
        // shapes as checked; pieces are of all the rows and lie in arenas that live as long as the updates.
        unsafe { self.backend.launch(self.stream, kernel, blocks, 256, arguments) }
    }
}
