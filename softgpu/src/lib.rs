//! A software CUDA device for tests: `libcuda.so.1` in Rust.
//!
//! Programs that load the CUDA driver at run time load this library instead (README.md says how) and their kernels, given
//! as PTX, run on the CPU with every access checked. It measures nothing: no time, no occupancy, no cache, no weak
//! memory ordering, no rounding of tensor cores.
//!
//! From the bottom: [`ptx`] reads text; [`decode`] makes kernels of it, with rows from [`registers`]; [`memory`] holds device memory and its shadow;
//! [`exec`] runs kernels; [`module`] and [`fatbin`] load them; [`stream`] orders work and [`capture`] records it; [`driver`] is the C interface, whose
//! calls [`inject`] makes fail. Beside it [`cublaslt`] is that of a library of matrix products, which [`product`] computes.
//! [`capability`] is what the device is said to be, [`counters`] say what kernels did, and [`roofline`] what that would take on real devices at the least.

#![allow(clippy::needless_range_loop)] // Lane loops index several rows at once.

pub mod capability;
pub mod capture;
pub mod counters;
pub mod cublaslt;
pub mod decode;
pub mod device;
pub mod driver;
pub mod exec;
pub mod fatbin;
pub mod fault;
pub mod inject;
pub mod library;
pub mod memory;
pub mod module;
pub mod pinned;
pub mod product;
pub mod ptx;
pub mod registers;
pub mod report;
pub mod rng;
pub mod roofline;
pub mod stream;
pub mod work;
