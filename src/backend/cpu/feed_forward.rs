//! The gated feed-forward layer: a product with gates and ups, the activation, and a product with what comes of them.

use super::activation::{GateKind, gated};
#[cfg(target_arch = "x86_64")]
use super::amx_feed_forward::amx_feed_forward;
use super::gemm::{Family, GemmScratch, check_rows, gemm, halves_are_panels, is_of};
use super::input_tiles::{Rows, RowsMut};
use super::packed::PackedMatrix;
use super::quant_feed_forward::quant_feed_forward;
use super::{Isa, ThreadPool};

/// With no more rows than this what is between the products stays in the cache by itself.
const MANY_ROWS: usize = 64;

/// The weights of a layer.
#[derive(Clone, Copy)]
pub struct FeedForwardWeights<'a> {
    /// The rows of G with those of U, as many, behind them.
    pub gate_up: &'a PackedMatrix,
    /// What gates go through.
    pub kind: GateKind,
    /// D.
    pub down: &'a PackedMatrix,
}

impl FeedForwardWeights<'_> {
    /// The family that multiplies all of them, with gates and ups in panels of their own.
    fn family(&self, isa: Isa) -> Option<Family> {
        let is_whole =
            |family: &Family| halves_are_panels(self.gate_up, isa, *family) && is_of(self.down, isa, *family);
        [Family::Tiles, Family::Quantised].into_iter().find(is_whole)
    }
}

/// `out = (kind(x G^T) * x U^T) D^T`. `buffers` are room for `[rows of x, gate | up]` and `[rows of x, features]`, which
/// hold anything afterwards, and `out`.
///
/// # Panics
/// When x or a buffer is not of its size.
pub fn feed_forward(
    pool: &mut ThreadPool,
    isa: Isa,
    x: Rows,
    weights: FeedForwardWeights,
    buffers: [&mut [f32]; 3],
    scratch: &mut GemmScratch,
) {
    let FeedForwardWeights { gate_up, kind, down } = weights;
    let [sums, activated, out] = buffers;
    let num_features = down.num_columns();
    assert_eq!(gate_up.num_rows(), 2 * num_features, "a gate and an up for each input of down");
    let sizes = [(sums.len(), 2 * num_features), (activated.len(), num_features), (out.len(), down.num_rows())];
    assert!(sizes.into_iter().all(|(len, columns)| len == x.num_rows * columns), "buffers have the rows of x");
    assert!(isa.is_available(), "{isa} is not available here");
    if x.num_rows > MANY_ROWS {
        check_rows("x", x.data.len(), x.stride, x.num_rows, gate_up.num_columns());
        match weights.family(isa) {
            #[cfg(target_arch = "x86_64")]
            Some(Family::Tiles) => return amx_feed_forward(pool, isa, x, &weights, out, scratch),
            Some(Family::Quantised) => return quant_feed_forward(pool, isa, x, &weights, out, scratch),
            _ => {}
        }
    }
    gemm(pool, isa, x, gate_up, None, RowsMut { data: &mut *sums, stride: 2 * num_features }, scratch);
    gated(pool, isa, sums, kind, num_features, activated);
    let activated = Rows { data: activated, num_rows: x.num_rows, stride: num_features };
    gemm(pool, isa, activated, down, None, RowsMut { data: out, stride: down.num_rows() }, scratch);
}
