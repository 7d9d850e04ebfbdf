//! What kernels move on shapes that models have: hardly more than every byte once, in whole sectors. Attention's are in
//! `attention/traffic.rs`.

use mneme::backend::{Backend, DType};
use serde_json::Value;

use crate::attention::LARGE;
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

/// The same against what the shape says that it has to move.
pub fn check_moved(counted: &Value, kernel: &str, least: usize) {
    let counters = &counted[kernel];
    let (bytes, _, sectors) = moved(counters);
    let (over_least, efficiency) = (bytes / least as f64, bytes / sectors);
    eprintln!("{kernel}: {over_least:.3} of the least, sector efficiency {efficiency:.3}");
    assert!(over_least >= 1.0, "{kernel} does not move what it has to: {over_least:.3}");
    assert!(over_least <= MOST_OVER_LEAST, "{kernel} moves {over_least:.3} times the least");
    assert!(efficiency >= LEAST_EFFICIENCY, "{kernel} uses {efficiency:.3} of the sectors it touches");
}

/// Rows of a step that fills the device.
const NUM_ROWS: usize = 2048;
const NUM_TOKENS: usize = 1024;

/// Bytes of storing tokens: queries, keys and values are read with a position's angles, an index for each token, queries and
/// keys written, keys and values stored.
fn stored_least(num_tokens: usize, cache_bytes: usize) -> usize {
    let [q, kv] = [LARGE.num_heads(), LARGE.num_kv_heads].map(|heads| heads * LARGE.head_dim);
    num_tokens * (2 * (q + 2 * kv) + 4 * LARGE.head_dim + 2 * 4 + 2 * (q + kv) + 2 * kv * cache_bytes)
}

/// Bytes of moving tokens in the cache: keys and values read and written, three indices for each.
fn moved_least(num_copies: usize, cache_bytes: usize) -> usize {
    num_copies * (2 * 2 * LARGE.num_kv_heads * LARGE.head_dim * cache_bytes + 3 * 4)
}

#[test]
fn kernels_of_a_step_move_hardly_more_than_they_must() {
    let counted = softgpu::count("traffic::kernels_of_a_step_move_hardly_more_than_they_must", || {
        let gpu = Gpu::new(DType::BF16);
        attention::store_large(&gpu, DType::BF16, NUM_TOKENS, false);
        compose::move_large(&gpu, DType::BF16, 1024);
        raw::copy_large(&gpu);
        elementwise::norm_large(&gpu, NUM_ROWS, HIDDEN);
        elementwise::norm_large(&gpu, NUM_ROWS, 2 * HIDDEN);
        elementwise::norm_large(&Gpu::new(DType::F16), NUM_ROWS, HIDDEN);
    });
    let Some(counted) = counted else { return };
    let (norm, sum) = (NUM_ROWS * HIDDEN * 6 + HIDDEN * 4, NUM_ROWS * HIDDEN * 12 + HIDDEN * 4);
    for (kernel, least) in [
        ("copy_blocks", 2 * 2 * raw::LARGE_BLOCK_BYTES),
        ("rope_store_kv_bf16", stored_least(NUM_TOKENS, 2)),
        ("rotate_gather_bf16", moved_least(1024, 2)),
        ("rms_norm_bf16_h4096", norm),
        ("rms_norm_f16_h4096", norm),
        ("add_rms_norm_bf16_h4096", sum),
        ("add_rms_norm_f16_h4096", sum),
        ("rms_norm_bf16_h8192", 2 * norm),
        ("add_rms_norm_bf16_h8192", 2 * sum),
    ] {
        check_moved(&counted, kernel, least);
        check_limit(kernel, &counted[kernel]);
    }
}

#[test]
fn kernels_of_a_cache_of_fp8_move_hardly_more_than_they_must() {
    let counted = softgpu::count("traffic::kernels_of_a_cache_of_fp8_move_hardly_more_than_they_must", || {
        let gpu = Gpu::new(DType::BF16);
        attention::store_large(&gpu, DType::F8E4M3, NUM_TOKENS, false);
        compose::move_large(&gpu, DType::F8E4M3, 1024);
    });
    let Some(counted) = counted else { return };
    check_moved(&counted, "rope_store_kv_bf16_fp8", stored_least(NUM_TOKENS, 1));
    check_moved(&counted, "rotate_gather_fp8", moved_least(1024, 1));
}

#[test]
fn norms_of_heads_are_read_once_for_a_token() {
    let counted = softgpu::count("traffic::norms_of_heads_are_read_once_for_a_token", || {
        attention::store_large(&Gpu::new(DType::BF16), DType::BF16, NUM_TOKENS, true);
    });
    let Some(counted) = counted else { return };
    check_moved(&counted, "rope_store_kv_bf16", stored_least(NUM_TOKENS, 2));
}

/// What saves bytes is for steps that fill the device anyway: the rows of a decode step do not wait for each other.
#[test]
fn few_rows_have_blocks_of_their_own() {
    const NUM_ROWS: usize = 64;
    let counted = softgpu::count("traffic::few_rows_have_blocks_of_their_own", || {
        let gpu = Gpu::new(DType::BF16);
        attention::store_large(&gpu, DType::BF16, NUM_ROWS, false);
        compose::move_large(&gpu, DType::BF16, NUM_ROWS);
        elementwise::norm_large(&gpu, NUM_ROWS, HIDDEN);
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
        let (bytes, least, sector_bytes) = moved(counters);
        let footprint = counters["global_load_footprint_bytes"].as_f64().unwrap();
        let x_bytes = 256.0 * 2.0;
        let stored = (16384 * format.row_bytes(256).unwrap()) as f64 + x_bytes;
        // Every block reads x, which a device has in a cache from the first one on.
        let again = (counters["blocks"].as_f64().unwrap() - 1.0) * x_bytes;
        let (over_least, efficiency) = ((bytes - again) / least, bytes / sector_bytes);
        eprintln!("{format}: {over_least:.3} of the least, sector efficiency {efficiency:.3}");
        assert_eq!(footprint, stored, "{format}: what is read are blocks and x");
        assert!(over_least <= MOST_OVER_LEAST, "{format} moves {over_least:.3} times the least");
        assert!(efficiency >= LEAST_EFFICIENCY, "{format} uses {efficiency:.3} of the sectors it touches");
    }
}

/// By estimates for real devices, nothing but memory is what such a kernel waits for.
pub fn check_limit(kernel: &str, counters: &Value) {
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
