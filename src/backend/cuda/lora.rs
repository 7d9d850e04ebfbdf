//! Low-rank updates of a projection's output: the launches for all adapters of a step.
//!
//! `kernels/lora_shrink.cu` says what a piece is; many rows are computed by clusters on Hopper (`_sm90a`), with the same bits.
//! Pieces travel as arguments of the first kernel, which leaves them on the device for the second: so any number of adapters
//! takes no copy of its own.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::CudaContext;

use super::backend::{CudaBackend, CudaTensor, expect_vectors};
use super::launch::{Arguments, ints};
use super::lora_kernels::{ExpandGrid, LoraShape, ShrinkKernel, ShrinkTile};
use super::lora_loader::{CudaLora, CudaLoraPart, FACTOR_WORDS};
use super::memory::CudaBuffer;
use super::stream::CudaStream;
use crate::backend::{LoraBatch, LoraSite};
use crate::{Result, invalid, unsupported};

/// Pieces in the arguments of one launch, as in `lora_shrink.cu`.
const LAUNCH_PIECES: usize = 32;
/// 64-bit words of a piece.
const PIECE_WORDS: usize = FACTOR_WORDS + 2;

/// The most pieces of a step: some thousands of adapters.
const MAX_PIECES: usize = 16 * 1024;
/// Memory for shrunk rows. A step that needs more goes through its rows in several rounds, with the same bits.
const SHRUNK_BYTES: usize = 16 << 20;

/// What stands between the two kernels.
pub(super) struct LoraScratch(Mutex<Between>);

struct Between {
    table: CudaBuffer,
    shrunk: CudaBuffer,
}

impl LoraScratch {
    pub(super) fn allocate(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self(Mutex::new(Between {
            table: CudaBuffer::allocate(context, MAX_PIECES * PIECE_WORDS * 8)?,
            shrunk: CudaBuffer::allocate(context, SHRUNK_BYTES)?,
        })))
    }

    /// For the launches of a call, which nobody else's may come between.
    fn lock(&self) -> MutexGuard<'_, Between> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// See [`Backend::add_lora`](crate::backend::Backend::add_lora).
pub(super) fn add_lora(
    backend: &CudaBackend,
    stream: &CudaStream,
    x: &CudaTensor,
    batch: &LoraBatch<'_, CudaBackend>,
    site: LoraSite,
    out: &CudaTensor,
) -> Result<()> {
    batch.check()?;
    x.expect("projection input", x.rows(), x.columns(), backend.dtype())?;
    out.expect("projection output", x.rows(), out.columns(), backend.dtype())?;
    let between = &backend.lora().lock();
    let call = Call { backend, stream, x, batch, site, out, between };
    let Measure { shape, shrunk_stride, page_bytes } = call.measure()?;
    let num_pieces = shape.num_pieces;
    if num_pieces == 0 {
        return Ok(());
    }
    let most_rows = SHRUNK_BYTES / 4 / shrunk_stride;
    if num_pieces > MAX_PIECES || most_rows == 0 {
        return Err(unsupported!(
            "{num_pieces} updates with {shrunk_stride} ranks in one step; CUDA takes {MAX_PIECES} updates and {} ranks",
            SHRUNK_BYTES / 4
        ));
    }
    for first_row in (0..x.rows()).step_by(most_rows) {
        let num_rows = most_rows.min(x.rows() - first_row);
        let round = Round { first_row, num_rows, shrunk_stride, shape, page_bytes };
        call.shrink(&round)?;
        call.expand(&round)?;
    }
    Ok(())
}

struct Call<'a> {
    backend: &'a CudaBackend,
    stream: &'a CudaStream,
    x: &'a CudaTensor,
    batch: &'a LoraBatch<'a, CudaBackend>,
    site: LoraSite,
    out: &'a CudaTensor,
    between: &'a Between,
}

/// Some rows of the step.
struct Round {
    first_row: usize,
    num_rows: usize,
    /// Shrunk numbers of a row.
    shrunk_stride: usize,
    shape: LoraShape,
    page_bytes: usize,
}

/// What all pieces of a call come to.
#[derive(Default)]
struct Measure {
    shape: LoraShape,
    /// Shrunk numbers of a row.
    shrunk_stride: usize,
    /// Of every adapter's pages.
    page_bytes: usize,
}

impl Call<'_> {
    /// The updates that are added to any row, in order, with the entries they are added to.
    fn pieces(&self) -> impl Iterator<Item = (&CudaLora, &CudaLoraPart, &Range<usize>)> {
        let site = self.site;
        let groups = self.batch.groups.iter().filter(|group| !group.entries.is_empty());
        let updates = groups.filter_map(move |group| Some((group.adapter.get(site)?, &group.entries)));
        updates.flat_map(|(update, entries)| update.parts.iter().map(move |part| (update, part, entries)))
    }

    /// An error unless all pieces fit the projection.
    fn measure(&self) -> Result<Measure> {
        let (inputs, outputs) = (self.x.columns(), self.out.columns());
        let mut measure = Measure::default();
        for (update, part, entries) in self.pieces() {
            let columns = part.first_column..part.first_column + part.num_columns;
            if part.num_inputs != inputs || columns.end > outputs {
                let found = part.num_inputs;
                return Err(invalid!(
                    "an adapter takes {found} inputs and adds to the columns {columns:?} of a projection of {inputs} \
                     inputs and {outputs} outputs"
                ));
            }
            if measure.shape.num_pieces > 0 && measure.page_bytes != update.page_bytes {
                let (found, wanted) = (update.page_bytes, measure.page_bytes);
                return Err(invalid!("an adapter lies in pages of {found} bytes, another one in pages of {wanted}"));
            }
            measure.page_bytes = update.page_bytes;
            measure.shape.num_pieces += 1;
            measure.shape.ranks += part.a.num_rows;
            measure.shape.most_entries = measure.shape.most_entries.max(entries.len());
            measure.shape.most_rank = measure.shape.most_rank.max(part.a.num_rows);
            measure.shrunk_stride += stride(part);
        }
        if measure.shape.num_pieces > 0 {
            expect_vectors("a projection with adapters", outputs)?;
        }
        Ok(measure)
    }

    fn shrink(&self, round: &Round) -> Result<()> {
        let tile = self.backend.kernels().lora.shrink(round.shape).tile;
        let mut pieces = LaunchPieces::new(0);
        let mut shrunk_at = 0;
        for (update, part, entries) in self.pieces() {
            if pieces.len == LAUNCH_PIECES {
                self.launch_shrink(round, &pieces)?;
                pieces = LaunchPieces::new(pieces.first + pieces.len);
            }
            pieces.push(update, part, entries, shrunk_at, tile)?;
            shrunk_at += stride(part);
        }
        self.launch_shrink(round, &pieces)
    }

    fn launch_shrink(&self, round: &Round, pieces: &LaunchPieces) -> Result<()> {
        let Between { table, shrunk } = self.between;
        let arguments = Arguments::new()
            .buffer(shrunk)?
            .buffer(table)?
            .tensor(self.x)?
            .tensor(&self.batch.rows)?
            .tensor(&self.batch.scales)?
            .int(self.x.columns())?
            .int(round.first_row)?
            .int(round.num_rows)?
            .int(round.shrunk_stride)?
            .int(pieces.len)?
            .int(pieces.first)?
            .long(round.page_bytes)
            .structure(&pieces.words);
        let ShrinkKernel { kernel, tile } = self.backend.kernels().lora.shrink(round.shape);
        let blocks = (pieces.num_tiles * tile.blocks, 1, 1);
        // SAFETY: lora_shrink(shrunk, table, x, rows, scales, num_inputs, first_row, num_rows, shrunk_stride, num_pieces,
        // first_piece, page_bytes, pieces), shapes as checked; `shrunk` and `table` hold the round's rows and all pieces, whose
        // pages lie in an arena that lives as long as the batch; entries are rows of x. Every tile has all of its blocks.
        unsafe { self.backend.launch(self.stream, kernel, blocks, tile.threads, arguments) }
    }

    fn expand(&self, round: &Round) -> Result<()> {
        let Between { table, shrunk } = self.between;
        let num_outputs = self.out.columns();
        let multiprocessors = self.backend.info().multiprocessors;
        let ExpandGrid { expand, block_rows, blocks: (row_blocks, column_blocks) } =
            self.backend.kernels().lora.expand(round.shape, round.num_rows, num_outputs, multiprocessors);
        let arguments = Arguments::new()
            .tensor(self.out)?
            .buffer(shrunk)?
            .buffer(table)?
            .tensor(&self.batch.rows)?
            .int(num_outputs)?
            .int(round.first_row)?
            .int(round.num_rows)?
            .int(round.shrunk_stride)?
            .int(round.shape.num_pieces)?
            .int(block_rows)?
            .long(round.page_bytes);
        let blocks = (row_blocks, column_blocks, 1);
        // SAFETY: lora_expand(out, shrunk, table, rows, num_outputs, first_row, num_rows, shrunk_stride, num_pieces,
        // block_rows, page_bytes), shapes as checked, whole clusters, behind the first kernel on the same stream.
        unsafe { self.backend.launch(self.stream, &expand.kernel, blocks, expand.threads, arguments) }
    }
}

/// Shrunk numbers of a row under one part, filled up to whole vectors.
fn stride(part: &CudaLoraPart) -> usize {
    part.a.num_rows.next_multiple_of(4)
}

/// `LoraPieces` of `lora_shrink.cu`.
struct LaunchPieces {
    words: [u64; LAUNCH_PIECES * PIECE_WORDS],
    len: usize,
    /// The place of the first among all pieces.
    first: usize,
    num_tiles: usize,
}

impl LaunchPieces {
    fn new(first: usize) -> Self {
        Self { words: [0; LAUNCH_PIECES * PIECE_WORDS], len: 0, first, num_tiles: 0 }
    }

    fn push(
        &mut self,
        update: &CudaLora,
        part: &CudaLoraPart,
        entries: &Range<usize>,
        shrunk_at: usize,
        tile: ShrinkTile,
    ) -> Result<()> {
        let piece = &mut self.words[self.len * PIECE_WORDS..][..PIECE_WORDS];
        piece[..FACTOR_WORDS].copy_from_slice(&update.factor_words(part, part.scaling)?);
        piece[FACTOR_WORDS] = ints(entries.start, entries.end)?;
        piece[FACTOR_WORDS + 1] = ints(shrunk_at, self.num_tiles)?;
        self.len += 1;
        self.num_tiles += entries.len().div_ceil(tile.entries) * part.a.num_rows.div_ceil(tile.ranks);
        Ok(())
    }
}
