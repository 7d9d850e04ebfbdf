//! Every CUDA kernel against a plain reference, over shapes with odd tails. Outputs are poisoned before and guarded
//! around; the device is the software GPU unless `MNEME_TEST_LIBCUDA` names a driver.

#![cfg(feature = "cuda")]
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod attention;
mod compose;
mod cublaslt;
mod elementwise;
mod gpu;
mod landing;
mod linear;
mod logits;
mod lora;
mod lora_merge;
mod lora_traffic;
mod quantised;
mod raw;
#[path = "../support/mod.rs"]
mod support;
mod tensor_cores;
mod traffic;

/// Another order of work that is allowed: streams that run only when waited for, blocks and warps shuffled by a seed.
#[test]
fn every_test_passes_in_other_schedules() {
    support::softgpu::pass_lazily(&[], "every_test_passes_in_other_schedules");
}

/// Products by warpgroups beside those by warps, adapters by clusters, and how a device of more multiprocessors divides what
/// it moves.
#[test]
fn what_depends_on_the_gpu_passes_on_hopper() {
    let wanted = ["linear::", "lora::", "lora_traffic::", "tensor_cores::products_feed", "traffic::kernels_of"];
    support::softgpu::pass_on_hopper(&wanted);
}
