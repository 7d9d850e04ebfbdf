//! One adapter out of several: their weighted sum, exactly or at a smaller rank, or what TIES and DARE make of it.
//!
//! What a fused adapter is depends on the parts, their scales and the method alone: random choices follow from the seed
//! and from what is chosen, in f64 or f32 and in a fixed order.

use std::collections::BTreeMap;

use super::base::{BaseShapes, Module};
use super::format::{Adapter, MAX_RANK, Update};
use super::low_rank::{Columns, Factors, approximate};
use crate::backend::{HostTensor, dequantize_row};
use crate::{Result, invalid};

/// Adapters that are fused at most.
pub const MAX_PARTS: usize = 64;

/// An adapter and how much of it.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The adapter, which fits the model.
    pub adapter: &'a Adapter,
    /// Its weight; negative takes it away.
    pub scale: f32,
}

/// How several updates become one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FuseMethod {
    /// The sum, exactly: the factors side by side, so that ranks add up.
    Concatenate,
    /// The closest update of this rank to the sum.
    Truncate {
        /// Of every module.
        rank: usize,
    },
    /// TIES (Yadav et al., arXiv 2306.01708): of each update the largest numbers are kept, each place takes the sign that
    /// has more weight, and the mean of those that have it. Then as [`FuseMethod::Truncate`].
    Ties {
        /// Of every module.
        rank: usize,
        /// Part of the numbers that is kept.
        density: f32,
    },
    /// DARE (Yu et al., arXiv 2311.03099): of each update numbers are kept at random and enlarged, then added. Then as
    /// [`FuseMethod::Truncate`].
    Dare {
        /// Of every module.
        rank: usize,
        /// Part of the numbers that is kept.
        density: f32,
        /// Of the choice.
        seed: u64,
    },
}

/// An update `B A` without a factor of its own.
pub(super) struct FusedUpdate {
    /// `[rank, inputs]`.
    pub(super) a: Vec<f32>,
    /// `[outputs, rank]`.
    pub(super) b: Vec<f32>,
    pub(super) rank: usize,
}

/// What came of it.
pub struct Fused {
    pub(super) updates: BTreeMap<(usize, Module), FusedUpdate>,
    pub(super) shapes: BaseShapes,
    largest_loss: f64,
}

impl Fused {
    /// The largest part of a module's update, by the square root of the sum of squares, that its rank has no room for.
    pub fn largest_loss(&self) -> f64 {
        self.largest_loss
    }

    /// The largest rank of its updates.
    pub fn max_rank(&self) -> usize {
        self.updates.values().map(|update| update.rank).max().unwrap_or(0)
    }
}

/// Fuses adapters of one model.
///
/// # Errors
/// `Invalid` when there are no parts or too many, or when a rank, a density or a scale cannot be.
pub fn fuse(parts: &[Part], shapes: &BaseShapes, method: FuseMethod) -> Result<Fused> {
    check(parts, method)?;
    let mut fused = Fused { updates: BTreeMap::new(), shapes: *shapes, largest_loss: 0.0 };
    for (layer, module) in shapes.places() {
        let mut updates: Vec<(Part, Update)> = Vec::with_capacity(parts.len());
        for part in parts {
            updates.extend(part.adapter.update(layer, module).map(|update| (*part, update.clone())));
        }
        if updates.is_empty() {
            continue;
        }
        let size = (shapes.outputs(module), shapes.inputs(module));
        let (factors, loss) = fuse_module(&updates, size, method, (layer, module));
        fused.largest_loss = fused.largest_loss.max(loss);
        let update = FusedUpdate::new(&factors, size);
        if update.rank > MAX_RANK {
            let rank = update.rank;
            return Err(invalid!("the sum has rank {rank}, more than {MAX_RANK}; name a smaller rank to cut it to"));
        }
        fused.updates.insert((layer, module), update);
    }
    Ok(fused)
}

fn check(parts: &[Part], method: FuseMethod) -> Result<()> {
    if parts.is_empty() || parts.len() > MAX_PARTS {
        return Err(invalid!("1 to {MAX_PARTS} adapters can be fused, {} were named", parts.len()));
    }
    if let Some(part) = parts.iter().find(|part| !part.scale.is_finite()) {
        return Err(invalid!("an adapter is to be fused {} times; wanted a finite number", part.scale));
    }
    let (rank, density) = match method {
        FuseMethod::Concatenate => (1, 1.0),
        FuseMethod::Truncate { rank } => (rank, 1.0),
        FuseMethod::Ties { rank, density } | FuseMethod::Dare { rank, density, .. } => (rank, density),
    };
    match (1..=MAX_RANK).contains(&rank) && density > 0.0 && density <= 1.0 {
        true => Ok(()),
        false => Err(invalid!("rank {rank} and density {density}: wanted 1 to {MAX_RANK}, and more than 0 up to 1")),
    }
}

/// The update of one module, `(outputs, inputs)` large, and the part of it that is lost.
fn fuse_module(
    updates: &[(Part, Update)],
    size: (usize, usize),
    method: FuseMethod,
    place: (usize, Module),
) -> (Factors, f64) {
    let sum = || side_by_side(updates);
    match method {
        FuseMethod::Concatenate => (sum(), 0.0),
        FuseMethod::Truncate { rank } => sum().truncated(rank),
        FuseMethod::Ties { rank, density } => {
            let trimmed: Vec<_> = updates.iter().map(|update| trim(dense(update, size), density)).collect();
            let signs = random_signs(place);
            approximate(&elect(&trimmed), size.1, rank, signs)
        }
        FuseMethod::Dare { rank, density, seed } => {
            let mut total = vec![0.0f32; size.0 * size.1];
            for update in updates {
                let kept = drop_at_random(dense(update, size), density, choice(seed, update.0.adapter, place));
                total.iter_mut().zip(kept).for_each(|(total, x)| *total += x);
            }
            approximate(&total, size.1, rank, random_signs(place))
        }
    }
}

/// All factors, the scales in those of the outputs.
fn side_by_side(updates: &[(Part, Update)]) -> Factors {
    let mut factors = Factors { outputs: Columns::new(), inputs: Columns::new() };
    for (part, update) in updates {
        let scale = f64::from(part.scale) * f64::from(update.scaling);
        let b = rows_of(&update.b);
        for (at, row) in rows_of(&update.a).into_iter().enumerate() {
            factors.outputs.push(b.iter().map(|row| f64::from(row[at]) * scale).collect());
            factors.inputs.push(row.into_iter().map(f64::from).collect());
        }
    }
    factors
}

fn rows_of(tensor: &HostTensor) -> Vec<Vec<f32>> {
    let row_bytes = tensor.bytes().len() / tensor.rows();
    let read = |bytes: &[u8]| {
        let mut row = vec![0.0; tensor.columns()];
        dequantize_row(tensor.dtype(), bytes, &mut row);
        row
    };
    tensor.bytes().chunks_exact(row_bytes).map(read).collect()
}

/// The whole update, scaled, row after row.
fn dense(update: &(Part, Update), (outputs, inputs): (usize, usize)) -> Vec<f32> {
    let Factors { outputs: b, inputs: a } = side_by_side(std::slice::from_ref(update));
    let mut matrix = vec![0.0f32; outputs * inputs];
    for (index, row) in matrix.chunks_exact_mut(inputs).enumerate() {
        for (b, a) in b.iter().zip(&a) {
            row.iter_mut().zip(a).for_each(|(sum, x)| *sum += (b[index] * x) as f32);
        }
    }
    matrix
}

/// Zero where a number is not among the largest.
fn trim(mut matrix: Vec<f32>, density: f32) -> Vec<f32> {
    let num_dropped = matrix.len() - ((matrix.len() as f64 * f64::from(density)).ceil() as usize).min(matrix.len());
    if let Some(last) = num_dropped.checked_sub(1) {
        let mut sizes: Vec<f32> = matrix.iter().map(|x| x.abs()).collect();
        let (_, limit, _) = sizes.select_nth_unstable_by(last, f32::total_cmp);
        let limit = *limit;
        matrix.iter_mut().filter(|x| x.abs() <= limit).for_each(|x| *x = 0.0);
    }
    matrix
}

/// The mean of those numbers of each place that have the sign of the sum.
fn elect(updates: &[Vec<f32>]) -> Vec<f32> {
    let place = |at: usize| {
        let sum: f32 = updates.iter().map(|update| update[at]).sum();
        let agreeing = || updates.iter().map(|update| update[at]).filter(|x| x * sum > 0.0);
        agreeing().sum::<f32>() / agreeing().count().max(1) as f32
    };
    (0..updates.first().map_or(0, Vec::len)).map(place).collect()
}

/// Keeps each number with the probability `density`, and makes up for the others.
fn drop_at_random(mut matrix: Vec<f32>, density: f32, mut bits: blake3::OutputReader) -> Vec<f32> {
    let limit = (f64::from(density) * 2f64.powi(32)) as u64;
    let mut chunk = [0u8; 4096];
    for numbers in matrix.chunks_mut(chunk.len() / 4) {
        bits.fill(&mut chunk);
        for (x, word) in numbers.iter_mut().zip(chunk.as_chunks::<4>().0) {
            *x = if u64::from(u32::from_le_bytes(*word)) < limit { *x / density } else { 0.0 };
        }
    }
    matrix
}

/// Random bits for one module of one adapter.
fn choice(seed: u64, adapter: &Adapter, (layer, module): (usize, Module)) -> blake3::OutputReader {
    let mut hasher = blake3::Hasher::new_derive_key("mneme fused adapter v1");
    hasher.update(&seed.to_le_bytes()).update(&adapter.digest().0);
    hasher.update(format!("{layer} {}", module.name()).as_bytes());
    hasher.finalize_xof()
}

fn random_signs((layer, module): (usize, Module)) -> impl FnMut() -> f64 {
    let mut hasher = blake3::Hasher::new_derive_key("mneme fused adapter v1, directions");
    hasher.update(format!("{layer} {}", module.name()).as_bytes());
    let mut bits = hasher.finalize_xof();
    move || {
        let mut byte = [0];
        bits.fill(&mut byte);
        if byte[0] & 1 == 0 { 1.0 } else { -1.0 }
    }
}

impl FusedUpdate {
    /// A module whose updates cancel keeps one column of zeros: an update has a rank.
    fn new(factors: &Factors, (outputs, inputs): (usize, usize)) -> Self {
        let rank = factors.outputs.len().max(1);
        let mut update = Self { a: vec![0.0; rank * inputs], b: vec![0.0; outputs * rank], rank };
        for (at, (column, row)) in factors.outputs.iter().zip(&factors.inputs).enumerate() {
            update.a[at * inputs..(at + 1) * inputs].iter_mut().zip(row).for_each(|(to, x)| *to = *x as f32);
            column.iter().enumerate().for_each(|(output, x)| update.b[output * rank + at] = *x as f32);
        }
        update
    }
}

#[cfg(test)]
#[path = "fuse_tests.rs"]
mod tests;
