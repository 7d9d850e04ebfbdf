//! Every CUDA kernel against a plain reference, over shapes with odd tails. Outputs are poisoned before and guarded
//! around; the device is the software GPU unless `MNEME_TEST_LIBCUDA` names a driver.

#![cfg(feature = "cuda")]
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod attention;
mod elementwise;
mod gpu;
mod linear;
mod raw;
#[path = "../support/mod.rs"]
mod support;
