//! The closest product of two thin matrices to a sum of products, or to a dense matrix.
//!
//! Singular values by one-sided Jacobi rotations (Hestenes 1958) of what orthonormal bases leave: matrices as small as the
//! rank. A dense matrix is first projected on the span of its products with random signs, twice iterated (Halko,
//! Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). All in f64, in a fixed order.

/// Columns of one height.
pub(super) type Columns = Vec<Vec<f64>>;

/// `outputs[j]` times the transpose of `inputs[j]`, summed over `j`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Factors {
    pub(super) outputs: Columns,
    pub(super) inputs: Columns,
}

/// Directions beyond the wanted rank that a dense matrix is projected on.
const OVERSAMPLING: usize = 8;

/// A column whose remainder is this small beside it depends on those before.
const DEPENDENT: f64 = 1e-12;

/// Pairs of columns this close to a right angle are left alone.
const ORTHOGONAL: f64 = 1e-14;

/// Rounds of rotations at most; ten are usual.
const MAX_SWEEPS: usize = 60;

impl Factors {
    /// The closest product of at most `rank` columns, by the sum of squares, and the part of that norm that is lost.
    pub(super) fn truncated(&self, rank: usize) -> (Self, f64) {
        let (left, left_parts) = orthonormal(&self.outputs);
        let (right, right_parts) = orthonormal(&self.inputs);
        let mut core: Columns = vec![vec![0.0; left.len()]; right.len()];
        for (outputs, inputs) in left_parts.iter().zip(&right_parts) {
            for (column, input) in core.iter_mut().zip(inputs) {
                column.iter_mut().zip(outputs).for_each(|(sum, output)| *sum += output * input);
            }
        }
        let singular = singular_vectors(core);
        let total: f64 = singular.iter().map(|(value, ..)| value * value).sum();
        let lost: f64 = singular.iter().skip(rank).map(|(value, ..)| value * value).sum();
        // What is left of products that take each other away is rounding.
        let sizes = self.outputs.iter().zip(&self.inputs).map(|(a, b)| (dot(a, a) * dot(b, b)).sqrt());
        let least = DEPENDENT * sizes.sum::<f64>();
        let kept = || singular.iter().take(rank).filter(|(value, ..)| *value > least);
        let scaled = |basis: &Columns, parts: &[f64], value: f64| combine(basis, parts, value.sqrt());
        let factors = Self {
            outputs: kept().map(|(value, outputs, _)| scaled(&left, outputs, *value)).collect(),
            inputs: kept().map(|(value, _, inputs)| scaled(&right, inputs, *value)).collect(),
        };
        (factors, if total > 0.0 { (lost / total).sqrt() } else { 0.0 })
    }
}

/// A matrix of `num_columns` columns, row after row, as a product of at most `rank` columns, and the part of its norm that
/// is lost. `sign` gives 1 or -1 at random.
pub(super) fn approximate(
    matrix: &[f32],
    num_columns: usize,
    rank: usize,
    mut sign: impl FnMut() -> f64,
) -> (Factors, f64) {
    let num_rows = matrix.len() / num_columns;
    let width = (rank + OVERSAMPLING).min(num_rows).min(num_columns);
    let probes: Columns = (0..width).map(|_| (0..num_columns).map(|_| sign()).collect()).collect();
    let mut basis = orthonormal(&times(matrix, num_columns, &probes)).0;
    for _ in 0..2 {
        let inputs = orthonormal(&transposed_times(matrix, num_columns, &basis)).0;
        basis = orthonormal(&times(matrix, num_columns, &inputs)).0;
    }
    let inputs = transposed_times(matrix, num_columns, &basis);
    let (factors, _) = Factors { outputs: basis, inputs }.truncated(rank);
    let total: f64 = matrix.iter().map(|x| f64::from(*x).powi(2)).sum();
    let kept: f64 = factors.inputs.iter().map(|column| dot(column, column).powi(2)).sum();
    (factors, if total > 0.0 { ((total - kept).max(0.0) / total).sqrt() } else { 0.0 })
}

/// An orthonormal basis of the columns, and every column's coordinates in it.
fn orthonormal(columns: &Columns) -> (Columns, Columns) {
    let mut basis: Columns = Vec::with_capacity(columns.len());
    let mut parts: Columns = Vec::with_capacity(columns.len());
    for column in columns {
        let mut rest = column.clone();
        let mut coordinates = vec![0.0; basis.len()];
        // Twice is enough (Giraud, Langou and Rozloznik 2005).
        for _ in 0..2 {
            for (direction, coordinate) in basis.iter().zip(&mut coordinates) {
                let part = dot(direction, &rest);
                *coordinate += part;
                rest.iter_mut().zip(direction).for_each(|(rest, x)| *rest -= part * x);
            }
        }
        let (norm, whole) = (dot(&rest, &rest).sqrt(), dot(column, column).sqrt());
        if norm > DEPENDENT * whole && norm > 0.0 {
            rest.iter_mut().for_each(|x| *x /= norm);
            basis.push(rest);
            coordinates.push(norm);
        }
        parts.push(coordinates);
    }
    parts.iter_mut().for_each(|coordinates| coordinates.resize(basis.len(), 0.0));
    (basis, parts)
}

/// Singular values of the matrix with these columns, the largest first, each with its left and right vector.
fn singular_vectors(mut columns: Columns) -> Vec<(f64, Vec<f64>, Vec<f64>)> {
    let count = columns.len();
    let mut right: Columns = (0..count).map(|at| (0..count).map(|row| f64::from(row == at)).collect()).collect();
    for _ in 0..MAX_SWEEPS {
        let mut is_done = true;
        for second in 1..count {
            for first in 0..second {
                if let Some((cosine, sine)) = rotation(&columns[first], &columns[second]) {
                    is_done = false;
                    rotate(&mut columns, first, second, cosine, sine);
                    rotate(&mut right, first, second, cosine, sine);
                }
            }
        }
        if is_done {
            break;
        }
    }
    let mut found: Vec<_> = columns
        .into_iter()
        .zip(right)
        .map(|(mut left, right)| {
            let value = dot(&left, &left).sqrt();
            left.iter_mut().for_each(|x| *x /= if value > 0.0 { value } else { 1.0 });
            (value, left, right)
        })
        .collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found
}

/// Cosine and sine of the rotation that makes two columns orthogonal, unless they are.
fn rotation(first: &[f64], second: &[f64]) -> Option<(f64, f64)> {
    let (a, b, product) = (dot(first, first), dot(second, second), dot(first, second));
    if product.abs() <= ORTHOGONAL * (a * b).sqrt() {
        return None;
    }
    let ratio = (b - a) / (2.0 * product);
    let tangent = ratio.signum() / (ratio.abs() + (1.0 + ratio * ratio).sqrt());
    let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
    Some((cosine, cosine * tangent))
}

fn rotate(columns: &mut Columns, first: usize, second: usize, cosine: f64, sine: f64) {
    let (before, after) = columns.split_at_mut(second);
    for (a, b) in before[first].iter_mut().zip(&mut after[0]) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

fn combine(basis: &Columns, parts: &[f64], factor: f64) -> Vec<f64> {
    let mut sum = vec![0.0; basis.first().map_or(0, Vec::len)];
    for (direction, part) in basis.iter().zip(parts) {
        sum.iter_mut().zip(direction).for_each(|(sum, x)| *sum += factor * part * x);
    }
    sum
}

/// The matrix times each of the columns.
fn times(matrix: &[f32], num_columns: usize, columns: &Columns) -> Columns {
    let product = |column: &Vec<f64>| {
        let rows = matrix.chunks_exact(num_columns);
        rows.map(|row| row.iter().zip(column).map(|(x, y)| f64::from(*x) * y).sum()).collect()
    };
    columns.iter().map(product).collect()
}

/// The transposed matrix times each of the columns.
fn transposed_times(matrix: &[f32], num_columns: usize, columns: &Columns) -> Columns {
    let product = |column: &Vec<f64>| {
        let mut sums = vec![0.0; num_columns];
        for (row, factor) in matrix.chunks_exact(num_columns).zip(column) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) * factor);
        }
        sums
    };
    columns.iter().map(product).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(at: usize) -> f64 {
        ((at * 2_654_435_761) % 1000) as f64 / 500.0 - 1.0
    }

    fn columns(count: usize, height: usize, seed: usize) -> Columns {
        (0..count).map(|j| (0..height).map(|i| number(seed + 97 * j + i)).collect()).collect()
    }

    fn dense(factors: &Factors, height: usize, width: usize) -> Vec<f32> {
        let entry = |i: usize, j: usize| {
            factors.outputs.iter().zip(&factors.inputs).map(|(output, input)| output[i] * input[j]).sum::<f64>() as f32
        };
        (0..height).flat_map(|i| (0..width).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect()
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b))) / norm(&mut a.iter().map(|a| f64::from(*a)))
    }

    #[test]
    fn the_full_rank_is_exact_and_truncation_loses_what_it_says() {
        let factors = Factors { outputs: columns(6, 20, 1), inputs: columns(6, 13, 5) };
        let whole = dense(&factors, 20, 13);
        let (same, lost) = factors.truncated(6);
        assert!(lost < 1e-7 && distance(&whole, &dense(&same, 20, 13)) < 1e-6);
        let (cut, lost) = factors.truncated(3);
        assert_eq!((cut.outputs.len(), cut.inputs.len()), (3, 3));
        let found = distance(&whole, &dense(&cut, 20, 13));
        assert!(lost > 0.01 && (found - lost).abs() < 1e-6, "{found} {lost}");
    }

    #[test]
    fn more_columns_than_rows_and_equal_columns_are_fine() {
        let mut outputs = columns(9, 4, 3);
        outputs[8] = outputs[0].clone();
        let factors = Factors { outputs, inputs: columns(9, 5, 8) };
        let (same, lost) = factors.truncated(9);
        assert!(same.outputs.len() <= 4 && lost < 1e-7);
        assert!(distance(&dense(&factors, 4, 5), &dense(&same, 4, 5)) < 1e-6);
        let nothing = Factors { outputs: vec![vec![0.0; 4]], inputs: vec![vec![0.0; 5]] };
        assert_eq!(nothing.truncated(1), (Factors { outputs: vec![], inputs: vec![] }, 0.0));
    }

    #[test]
    fn a_dense_matrix_of_low_rank_is_found_again() {
        let factors = Factors { outputs: columns(4, 40, 2), inputs: columns(4, 30, 9) };
        let matrix = dense(&factors, 40, 30);
        let mut at = 0usize;
        let mut sign = || {
            at += 1;
            if number(at) < 0.0 { -1.0 } else { 1.0 }
        };
        let (found, lost) = approximate(&matrix, 30, 4, &mut sign);
        assert!(lost < 1e-5 && distance(&matrix, &dense(&found, 40, 30)) < 1e-5, "{lost}");
        let (best, best_lost) = factors.truncated(2);
        let (found, lost) = approximate(&matrix, 30, 2, &mut sign);
        assert!((lost - best_lost).abs() < 1e-4, "{lost} {best_lost}");
        assert!(distance(&dense(&best, 40, 30), &dense(&found, 40, 30)) < 1e-3);
    }
}
