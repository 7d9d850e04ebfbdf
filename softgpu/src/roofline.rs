//! How long kernels would take at the least on devices that exist, estimated from what was counted (the roofline model of
//! Williams, Waterman and Patterson, CACM 52(4), 2009).
//!
//! **Estimates, not times.** A device is four limits: bytes of memory, steps of tensor cores, instructions issued and passes over
//! the banks of shared memory, each at its peak, and a kernel takes as long as what takes longest. Latencies, occupancy,
//! caches and launches are left out, so a real device takes longer, and nobody knows here how much.

use crate::counters::Counters;

/// The limits of a device.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// What it is called.
    pub name: &'static str,
    /// Of its memory.
    pub bytes_per_s: f64,
    /// Of its tensor cores with 16-bit inputs and f32 sums, no zeros left out.
    pub tensor_flops_per_s: f64,
    /// Multiprocessors.
    pub multiprocessors: f64,
    /// Of a multiprocessor.
    pub cycles_per_s: f64,
}

/// Schedulers of a multiprocessor, each of which issues an instruction of a warp a cycle.
const SCHEDULERS: f64 = 4.0;

/// Devices from their data sheets; clocks are those that the tensor cores' peaks are stated at.
pub const DEVICES: [Limits; 2] = [
    Limits {
        name: "A100 SXM 80 GB",
        bytes_per_s: 2039e9,
        tensor_flops_per_s: 312e12,
        multiprocessors: 108.0,
        cycles_per_s: 1.41e9,
    },
    // mma.sync, which kernels here are written with, does not reach this peak.
    Limits {
        name: "H100 SXM 80 GB",
        bytes_per_s: 3350e9,
        tensor_flops_per_s: 989e12,
        multiprocessors: 132.0,
        cycles_per_s: 1.83e9,
    },
];

/// What takes longest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// How long, at the least.
    pub seconds: f64,
    /// What: `memory`, `tensor cores`, `instructions` or `shared memory`.
    pub limit: &'static str,
}

impl Limits {
    /// How long all launches of a kernel take at the least, each of which finds nothing in a cache.
    pub fn estimate(&self, counters: &Counters) -> Estimate {
        let bytes = counters.global_load_footprint_bytes + counters.global_store_footprint_bytes;
        let cycles = self.multiprocessors * self.cycles_per_s;
        let parts = [
            ("memory", bytes as f64 / self.bytes_per_s),
            ("tensor cores", counters.mma_flops as f64 / self.tensor_flops_per_s),
            ("instructions", counters.warp_instructions as f64 / (cycles * SCHEDULERS)),
            ("shared memory", counters.shared_wavefronts as f64 / cycles),
        ];
        let longest = parts.into_iter().fold(parts[0], |longest, part| if part.1 > longest.1 { part } else { longest });
        Estimate { limit: longest.0, seconds: longest.1 }
    }
}
