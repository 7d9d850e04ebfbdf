//! What kernels of adapters and of quantised weights move on shapes that models have: hardly more than every byte once, in
//! whole sectors.

use mneme::backend::{Backend, DType};
use serde_json::Value;

use crate::gpu::{Gpu, host_tensor};
use crate::lora;
use crate::quantised::{FORMATS, random_blocks};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::{attention, compose, elementwise, lora_merge, raw};

/// Features of a model of 8 billion weights, and the rank that most adapters have. The output of attention has as many
/// inputs as outputs. Where modules are stacked, each has the inputs read for itself.
const HIDDEN: usize = 4096;
const RANK: usize = 16;

/// All rows of the weights.
fn merge(gpu: &Gpu) {
    let ones = vec![0x3f; HIDDEN * HIDDEN * 2];
    let weight = gpu.backend.load_matrix(&[host_tensor(&ones, HIDDEN, HIDDEN, DType::BF16)], None).unwrap();
    let parts = lora::random_parts(gpu, &mut Random::new(2), HIDDEN, &[HIDDEN], &[RANK]);
    let loaded = [(lora::load(gpu, &parts, gpu.dtype(), lora::PAGE_BYTES << 4), 1.0)];
    let mut target = gpu.backend.allocate_merged(&weight).unwrap();
    gpu.backend.merge_rows(&gpu.stream, &weight, &lora_merge::updates(&loaded), 0..HIDDEN, &mut target).unwrap();
    gpu.synchronize();
}

/// What every kernel keeps to: bytes moved over the least, and the part used of the sectors that they lie in.
pub const MOST_OVER_LEAST: f64 = 1.05;
pub const LEAST_EFFICIENCY: f64 = 0.95;

fn check(counted: &Value, kernels: &[&str]) {
    let found: Vec<(f64, f64)> = kernels.iter().map(|kernel| traffic(&counted[*kernel])).collect();
    for (kernel, (over_least, efficiency)) in kernels.iter().zip(&found) {
        eprintln!("{kernel}: {over_least:.3} of the least, sector efficiency {efficiency:.3}");
    }
    for (kernel, (over_least, efficiency)) in kernels.iter().zip(found) {
        assert!(over_least <= MOST_OVER_LEAST, "{kernel} moves {over_least:.3} times the least");
        assert!(efficiency >= LEAST_EFFICIENCY, "{kernel} uses {efficiency:.3} of the sectors it touches");
    }
}

#[test]
fn merged_weights_are_moved_once() {
    let counted = softgpu::count("traffic::merged_weights_are_moved_once", || merge(&Gpu::new(DType::BF16)));
    let Some(counted) = counted else { return };
    check(&counted, &["lora_merge_bf16"]);
}

#[test]
fn kernels_of_a_step_move_hardly_more_than_they_must() {
    let counted = softgpu::count("traffic::kernels_of_a_step_move_hardly_more_than_they_must", || {
        let gpu = Gpu::new(DType::BF16);
        attention::run_large(&gpu);
        compose::move_large(&gpu, DType::BF16, 256);
        raw::copy_large(&gpu);
        elementwise::norm_large(&gpu, 2048);
    });
    let Some(counted) = counted else { return };
    let kernels = [
        "attention_decode_bf16_d128",
        "copy_blocks",
        "rope_store_kv_bf16",
        "rotate_gather_bf16",
        "rms_norm_bf16_h4096",
        "add_rms_norm_bf16_h4096",
    ];
    check(&counted, &kernels);
    kernels.iter().for_each(|kernel| check_limit(kernel, &counted[*kernel]));
}

#[test]
fn kernels_of_a_cache_of_fp8_move_hardly_more_than_they_must() {
    let counted = softgpu::count("traffic::kernels_of_a_cache_of_fp8_move_hardly_more_than_they_must", || {
        let gpu = Gpu::new(DType::BF16);
        attention::store_large(&gpu, DType::F8E4M3, 1024, false);
        compose::move_large(&gpu, DType::F8E4M3, 512);
    });
    let Some(counted) = counted else { return };
    check(&counted, &["rope_store_kv_bf16_fp8", "rotate_gather_fp8"]);
}

#[test]
fn norms_of_heads_are_read_once_for_a_token() {
    let counted = softgpu::count("traffic::norms_of_heads_are_read_once_for_a_token", || {
        attention::store_large(&Gpu::new(DType::BF16), DType::BF16, 1024, true);
    });
    let Some(counted) = counted else { return };
    check(&counted, &["rope_store_kv_bf16"]);
}

/// What saves bytes is for steps that fill the device anyway: the rows of a decode step do not wait for each other.
#[test]
fn few_rows_have_blocks_of_their_own() {
    const NUM_ROWS: usize = 64;
    let counted = softgpu::count("traffic::few_rows_have_blocks_of_their_own", || {
        let gpu = Gpu::new(DType::BF16);
        attention::store_large(&gpu, DType::BF16, NUM_ROWS, false);
        compose::move_large(&gpu, DType::BF16, NUM_ROWS);
        elementwise::norm_large(&gpu, NUM_ROWS);
    });
    let Some(counted) = counted else { return };
    // A block has a third of a token's heads, or all of a copy's.
    for (kernel, blocks) in [
        ("rope_store_kv_bf16", 3 * NUM_ROWS),
        ("rotate_gather_bf16", NUM_ROWS),
        ("rms_norm_bf16_h4096", NUM_ROWS),
        ("add_rms_norm_bf16_h4096", NUM_ROWS),
    ] {
        assert_eq!(counted[kernel]["blocks"], blocks, "{kernel}");
    }
}

/// One token through a projection with as many outputs as gate and up of a model of 3 billion weights have. How many
/// inputs it has changes no ratio.
fn decode_quantised(gpu: &Gpu) {
    const OUTPUTS: usize = 16384;
    const INPUTS: usize = 256;
    let random = &mut Random::new(3);
    let x = gpu.activations(&gpu.numbers(random, INPUTS, 1.0), 1, INPUTS);
    for format in FORMATS {
        let blocks = random_blocks(random, format, OUTPUTS, INPUTS);
        let weight = gpu.backend.load_matrix(&[host_tensor(&blocks, OUTPUTS, INPUTS, format)], None).unwrap();
        let out = gpu.output(1, OUTPUTS, DType::F32);
        gpu.backend.linear(&gpu.stream, &x, &weight, None, &out.tensor).unwrap();
        gpu.synchronize();
    }
}

/// Weights in blocks are read as they are: no byte more than the file has.
#[test]
fn quantised_weights_are_read_once() {
    let counted = softgpu::count("traffic::quantised_weights_are_read_once", || {
        decode_quantised(&Gpu::new(DType::BF16));
    });
    let Some(counted) = counted else { return };
    for format in FORMATS {
        let counters = &counted[format!("quant_gemm_bf16_{format}_t16")];
        let (over_least, efficiency) = traffic(counters);
        let footprint = counters["global_load_footprint_bytes"].as_f64().unwrap();
        let stored = (16384 * format.row_bytes(256).unwrap() + 256 * 2) as f64;
        eprintln!("{format}: {over_least:.3} of the least, sector efficiency {efficiency:.3}");
        assert_eq!(footprint, stored, "{format}: what is read are blocks and x");
        assert!(over_least <= MOST_OVER_LEAST, "{format} moves {over_least:.3} times the least");
        assert!(efficiency >= LEAST_EFFICIENCY, "{format} uses {efficiency:.3} of the sectors it touches");
    }
}

/// By estimates for real devices, nothing but memory is what such a kernel waits for.
fn check_limit(kernel: &str, counters: &Value) {
    for (device, estimate) in counters["roofline_estimates_not_times"].as_object().unwrap() {
        eprintln!("{kernel}, {device}: {estimate}");
        assert_eq!(estimate["bound_by"], "memory", "{kernel} on {device}");
    }
}

/// Bytes moved over the least, and over those of the sectors they lie in.
fn traffic(counters: &Value) -> (f64, f64) {
    let (bytes, least, sectors) = moved(counters);
    (bytes / least, bytes / sectors)
}

/// Bytes moved, the least, and those of the sectors they lie in.
pub fn moved(counters: &Value) -> (f64, f64, f64) {
    let both = |what: &str| -> f64 {
        let number = |of: &str| counters[format!("global_{of}_{what}")].as_f64().unwrap();
        number("load") + number("store")
    };
    (both("bytes"), both("footprint_bytes"), 32.0 * both("sectors"))
}
