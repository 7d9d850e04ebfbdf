//! Mean, deviation and percentiles of a set of samples, as numpy computes them.

/// Samples of one quantity, in ascending order.
#[derive(Debug, Default, Clone)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    /// Sorts the samples.
    pub(super) fn new(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        Self(values)
    }

    /// The arithmetic mean; 0 of no samples.
    pub(super) fn mean(&self) -> f64 {
        if self.0.is_empty() { 0.0 } else { self.0.iter().sum::<f64>() / self.0.len() as f64 }
    }

    /// The standard deviation of the samples themselves (`numpy.std`, divisor n); 0 of no samples.
    pub(super) fn std(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.0.iter().map(|value| (value - mean).powi(2)).sum();
        if self.0.is_empty() { 0.0 } else { (squares / self.0.len() as f64).sqrt() }
    }

    /// The middle sample, or the mean of the two in the middle.
    pub(super) fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// The value below which `percent` of the samples lie, interpolated linearly between neighbours as
    /// `numpy.percentile` does. `percent` is cut to 0..=100; 0 of no samples.
    pub(super) fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return 0.0 };
        let place = percent.clamp(0.0, 100.0) / 100.0 * last as f64;
        let below = place.floor() as usize;
        let above = (below + 1).min(last);
        self.0[below] + (self.0[above] - self.0[below]) * (place - below as f64)
    }

    /// All of them, ascending.
    pub(super) fn as_slice(&self) -> &[f64] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_numpys() {
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(samples.mean(), 2.5);
        assert!((samples.std() - 1.25f64.sqrt()).abs() < 1e-12);
        assert_eq!(samples.median(), 2.5);
        assert_eq!(samples.as_slice(), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn percentiles_are_interpolated() {
        let samples = Samples::new((1..=101).map(f64::from).collect());
        for (percent, wanted) in [(0.0, 1.0), (50.0, 51.0), (99.0, 100.0), (99.5, 100.5), (100.0, 101.0)] {
            assert!((samples.percentile(percent) - wanted).abs() < 1e-9, "p{percent}");
        }
        let pair = Samples::new(vec![10.0, 20.0]);
        assert!((pair.percentile(99.0) - 19.9).abs() < 1e-9);
    }

    #[test]
    fn few_samples_are_no_trouble() {
        let none = Samples::default();
        assert_eq!((none.mean(), none.std(), none.median(), none.percentile(99.0)), (0.0, 0.0, 0.0, 0.0));
        let one = Samples::new(vec![7.0]);
        assert_eq!((one.mean(), one.std(), one.median(), one.percentile(99.0)), (7.0, 0.0, 7.0, 7.0));
        assert_eq!(one.percentile(1000.0), 7.0);
    }
}
