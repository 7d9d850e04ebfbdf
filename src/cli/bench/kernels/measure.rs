//! How long a launch takes: many are queued, and the device is waited for once.

use std::time::{Duration, Instant};

use mneme::Result;
use mneme::backend::Device;

use crate::cli::bench::statistics::Samples;

/// Most launches in one sample: the queue of a device is not endless.
const MAX_LAUNCHES: usize = 4096;

/// Samples of one kernel.
const NUM_SAMPLES: usize = 5;

/// How long each kernel is measured for.
pub(super) struct Effort {
    duration: Duration,
    num_samples: usize,
}

impl Effort {
    /// So long, in several samples.
    pub(super) fn lasting(milliseconds: usize) -> Self {
        Self { duration: Duration::from_millis(milliseconds as u64), num_samples: NUM_SAMPLES }
    }

    /// One launch.
    pub(super) fn once() -> Self {
        Self { duration: Duration::ZERO, num_samples: 1 }
    }

    /// Whether one launch is all.
    pub(super) fn is_once(&self) -> bool {
        self.duration.is_zero()
    }

    /// Seconds of one launch. `launch` is told how often it was called.
    pub(super) fn time<D: Device>(
        &self,
        device: &D,
        stream: &D::Stream,
        launch: &dyn Fn(usize) -> Result<()>,
    ) -> Result<Samples> {
        let mut num_launched = 0;
        let mut run = |num_launches: usize| {
            let started_at = Instant::now();
            for _ in 0..num_launches {
                launch(num_launched)?;
                num_launched += 1;
            }
            device.synchronize(&device.record(stream)?)?;
            Ok::<_, mneme::Error>(started_at.elapsed())
        };
        if self.is_once() {
            return Ok(Samples::new(vec![run(1)?.as_secs_f64()]));
        }
        // The first launches load code and memory; the second run says how many there is time for.
        run(3)?;
        let one = (run(4)? / 4).max(Duration::from_nanos(100));
        let per_sample = self.duration.as_secs_f64() / self.num_samples as f64;
        let num_launches = ((per_sample / one.as_secs_f64()) as usize).clamp(1, MAX_LAUNCHES);
        let samples = (0..self.num_samples).map(|_| Ok(run(num_launches)?.as_secs_f64() / num_launches as f64));
        Ok(Samples::new(samples.collect::<Result<_>>()?))
    }
}
