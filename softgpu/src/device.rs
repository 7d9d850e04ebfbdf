//! The one device of the process.

use crate::exec::simd::{Simd, detect};
use crate::memory::Memory;
use crate::module::{Function, Module};
use crate::pinned::Pinned;
use crate::stream::{Mode, Streams};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

/// Device memory unless `SOFTGPU_MEMORY_MIB` says otherwise.
const DEFAULT_MEMORY_MIB: u64 = 8 << 10;

/// The device: memory, streams, modules.
pub struct Device {
    /// Device memory.
    pub memory: Memory,
    /// Page-locked host memory.
    pub pinned: Pinned,
    /// Streams and events.
    pub streams: Streams,
    /// Loaded modules by handle.
    pub modules: Mutex<HashMap<usize, Module>>,
    /// Functions by handle.
    pub functions: Mutex<HashMap<usize, Arc<Function>>>,
    /// Lane loops.
    pub simd: &'static Simd,
    seed: u64,
    launches: AtomicU64,
    handles: AtomicU64,
}

impl Device {
    /// A device as the environment describes it: `SOFTGPU_MEMORY_MIB`, `SOFTGPU_PIECE_MIB`, `SOFTGPU_PINNED_MIB`,
    /// `SOFTGPU_STREAMS=eager|lazy`, `SOFTGPU_SEED`.
    fn from_env() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let mode = match std::env::var("SOFTGPU_STREAMS").as_deref() {
            Ok("lazy") => Mode::Lazy,
            _ => Mode::Eager,
        };
        let seed = number("SOFTGPU_SEED").unwrap_or(0);
        Self {
            memory: Memory::new(number("SOFTGPU_MEMORY_MIB").unwrap_or(DEFAULT_MEMORY_MIB) << 20)
                .in_pieces(number("SOFTGPU_PIECE_MIB").map_or(u64::MAX, |mib| mib << 20)),
            pinned: Pinned::new(number("SOFTGPU_PINNED_MIB").map_or(u64::MAX, |mib| mib << 20)),
            streams: Streams::new(mode, seed),
            modules: Mutex::default(),
            functions: Mutex::default(),
            simd: detect(),
            seed,
            launches: AtomicU64::new(0),
            handles: AtomicU64::new(0x10_0000),
        }
    }

    /// The seed of the next launch: 0 (natural order) unless `SOFTGPU_SEED` is set, then another each time.
    pub fn next_seed(&self) -> u64 {
        let launch = self.launches.fetch_add(1, Relaxed);
        if self.seed == 0 { 0 } else { self.seed.wrapping_mul(0x9e37_79b9).wrapping_add(launch) | 1 }
    }

    /// A handle that was never given out before.
    pub fn new_handle(&self) -> usize {
        self.handles.fetch_add(16, Relaxed) as usize
    }
}

/// The device of this process.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(Device::from_env)
}
