//! Copies that stand still: waits for them have an end, and once one has come to it nothing on the device is sure, because
//! nobody knows what such a copy will still write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::DriverError;

use super::driver::driver_error;
use crate::{Error, Result};

/// A wait asks again and again at first, because copies are short.
const BUSY_WAIT: Duration = Duration::from_millis(1);

/// And then once in so long.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// Many times what all blocks of a device take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Copies of the software GPU stand behind kernels that take minutes.
const SOFTWARE_PATIENCE: Duration = Duration::from_secs(1200);

/// How long copies may take; waits under way go by it as well. A clone is the same.
#[derive(Clone)]
pub struct CopyPatience(Arc<CopyWatch>);

impl CopyPatience {
    /// Has copies take so long from now on.
    pub fn set(&self, patience: Duration) {
        self.0.set_patience(patience);
    }
}

/// How long copies may take, and whether some took longer.
pub(super) struct CopyWatch {
    patience_ms: AtomicU64,
    has_stalled: AtomicBool,
}

impl CopyWatch {
    pub(super) fn new(is_software: bool) -> Self {
        let watch = Self { patience_ms: AtomicU64::new(0), has_stalled: AtomicBool::new(false) };
        watch.set_patience(if is_software { SOFTWARE_PATIENCE } else { PATIENCE });
        watch
    }

    /// What sets how long they may take.
    pub(super) fn patience_of(watch: &Arc<Self>) -> CopyPatience {
        CopyPatience(Arc::clone(watch))
    }

    fn set_patience(&self, patience: Duration) {
        self.patience_ms.store(patience.as_millis() as u64, Ordering::Relaxed);
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.patience_ms.load(Ordering::Relaxed))
    }

    pub(super) fn has_stalled(&self) -> bool {
        self.has_stalled.load(Ordering::Acquire)
    }

    /// An error once copies have stood still.
    pub(super) fn check(&self) -> Result<()> {
        match self.has_stalled() {
            true => Err(self.stalled()),
            false => Ok(()),
        }
    }

    /// Waits until `is_done`, which is asked of the driver while doing `action`: its own waits have no end.
    pub(super) fn wait(
        &self,
        action: &str,
        mut is_done: impl FnMut() -> std::result::Result<bool, DriverError>,
    ) -> Result<()> {
        self.check()?;
        let started_at = Instant::now();
        while !is_done().map_err(driver_error(action))? {
            match started_at.elapsed() {
                waited if waited >= self.patience() => {
                    self.has_stalled.store(true, Ordering::Release);
                    return Err(self.stalled());
                }
                waited if waited < BUSY_WAIT => thread::yield_now(),
                _ => thread::sleep(POLL_INTERVAL),
            }
        }
        Ok(())
    }

    fn stalled(&self) -> Error {
        let seconds = self.patience().as_secs_f64();
        Error::Device(format!("copies between the host and the device have not ended in {seconds} s; start again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_comes_to_its_end_is_the_last() {
        let watch = CopyWatch::new(false);
        let mut polls = 0;
        let is_done = || {
            polls += 1;
            Ok(polls == 3)
        };
        watch.wait("copy", is_done).unwrap();
        assert!(watch.check().is_ok());
        watch.set_patience(Duration::ZERO);
        assert!(watch.wait("copy", || Ok(false)).is_err());
        assert!(watch.has_stalled() && watch.check().is_err());
        assert!(watch.wait("copy", || Ok(true)).is_err());
    }
}
