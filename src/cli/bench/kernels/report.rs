//! What was measured, as a table and as JSON.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::bench::{COPY, Work};
use crate::cli::bench::statistics::Samples;
use crate::cli::bench::timestamp;

/// A kernel on one shape.
pub(super) struct Measured {
    pub(super) work: Work,
    /// Seconds of a launch.
    pub(super) seconds: Samples,
}

/// All of a run.
pub(super) struct Report {
    device: String,
    backend: String,
    shape: String,
    is_software: bool,
    date: String,
    kernels: Vec<Measured>,
}

impl Measured {
    fn bytes_per_second(&self) -> f64 {
        self.work.bytes as f64 / self.seconds.median()
    }

    fn flops_per_second(&self) -> f64 {
        self.work.flops as f64 / self.seconds.median()
    }
}

impl Report {
    pub(super) fn new(device: String, backend: String, shape: String, is_software: bool) -> Self {
        Self { device, backend, shape, is_software, date: timestamp::now(), kernels: Vec::new() }
    }

    pub(super) fn push(&mut self, measured: Measured) {
        self.kernels.push(measured);
    }

    /// Bytes per second that copies moved, read and written.
    fn copy_rate(&self) -> Option<f64> {
        self.kernels.iter().find(|measured| measured.work.name == COPY).map(Measured::bytes_per_second)
    }

    /// Of the fastest matrix product.
    fn product_rate(&self) -> f64 {
        self.kernels.iter().map(Measured::flops_per_second).fold(0.0, f64::max)
    }

    /// The time that copies or the fastest product would take, over that it took.
    fn share(&self, measured: &Measured) -> Option<f64> {
        let by_bytes = measured.work.bytes as f64 / self.copy_rate()?;
        let by_products = match self.product_rate() {
            0.0 => 0.0,
            rate => measured.work.flops as f64 / rate,
        };
        Some(by_bytes.max(by_products) / measured.seconds.median())
    }

    pub(super) fn json(&self) -> Value {
        let kernels = self.kernels.iter().map(|measured| {
            let Measured { work, seconds } = measured;
            let micros = |seconds: f64| seconds * 1e6;
            json!({
                "kernel": work.name,
                "shape": work.shape,
                "bytes": work.bytes,
                "flops": work.flops,
                "us": {
                    "median": micros(seconds.median()),
                    "lowest": micros(seconds.percentile(0.0)),
                    "highest": micros(seconds.percentile(100.0)),
                },
                "gb_per_second": measured.bytes_per_second() / 1e9,
                "tflop_per_second": measured.flops_per_second() / 1e12,
                "share": self.share(measured),
            })
        });
        json!({
            "date": self.date,
            "device": self.device,
            "backend": self.backend,
            "model_shape": self.shape,
            "times_mean_nothing": self.is_software,
            "kernels": kernels.collect::<Vec<_>>(),
        })
    }

    pub(super) fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}, shapes of {}", self.device, self.shape)?;
        if self.is_software {
            writeln!(out, "This is a program that stands for a GPU: its times mean nothing.")?;
        }
        writeln!(out, "{:<24} {:<30} {:>11} {:>9} {:>9} {:>6}", "kernel", "shape", "us", "GB/s", "TFLOP/s", "share")?;
        for measured in &self.kernels {
            let Work { name, shape, .. } = &measured.work;
            let share = self.share(measured).map_or_else(|| "-".to_owned(), |share| format!("{share:.2}"));
            let (micros, bytes) = (measured.seconds.median() * 1e6, measured.bytes_per_second() / 1e9);
            let flops = measured.flops_per_second() / 1e12;
            writeln!(out, "{name:<24} {shape:<30} {micros:>11.1} {bytes:>9.1} {flops:>9.2} {share:>6}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(name: &'static str, bytes: usize, flops: usize, seconds: f64) -> Measured {
        let work = Work { name, shape: "any".into(), bytes, flops };
        Measured { work, seconds: Samples::new(vec![seconds]) }
    }

    #[test]
    fn a_share_is_that_of_what_holds_a_kernel_back() {
        let mut report = Report::new("it".into(), "cuda".into(), "tiny".into(), false);
        assert_eq!(report.share(&measured("norm", 8, 0, 1.0)), None);
        report.push(measured(COPY, 1000, 0, 1.0));
        report.push(measured("linear", 10, 4000, 2.0));
        // By its bytes, by its multiply-adds.
        assert_eq!(report.share(&measured("norm", 500, 0, 1.0)), Some(0.5));
        assert_eq!(report.share(&measured("linear", 10, 1000, 1.0)), Some(0.5));
        let json = report.json();
        assert_eq!(json["kernels"][1]["share"], 1.0);
        let mut text = Vec::new();
        report.write_table(&mut text).unwrap();
        assert_eq!(String::from_utf8(text).unwrap().lines().count(), 4);
    }
}
