//! Attention, matrix products and updates of adapters multiply on the tensor cores alone. Operands get there by cp.async and
//! ldmatrix, and no two lanes of a request to shared memory meet in a bank.

use std::collections::HashMap;

use mneme::backend::{Backend, DType, kernel_source};
use serde_json::Value;

use crate::attention::{self, CACHES, Lengths, Shape};
use crate::gpu::{Gpu, host_tensor};
use crate::linear::{WARP_TILES, WARPGROUP_TILES, tile_size};
use crate::quantised::{FORMATS, random_blocks};
use crate::support::random::Random;
use crate::support::softgpu;

/// What a kernel has to multiply, and to bring into shared memory.
struct Work {
    kernel: String,
    flops: usize,
    operand_bytes: usize,
}

impl Work {
    fn check(&self, counted: &Value) {
        let Self { kernel, flops, operand_bytes } = self;
        let number = |what: &str| counted[kernel][what].as_u64().unwrap_or_else(|| panic!("{kernel} was not run"));
        assert!(number("mma_flops") >= *flops as u64, "{kernel} multiplies in other ways than by mma");
        assert!(number("async_copy_bytes") >= *operand_bytes as u64, "{kernel} copies in other ways than by cp.async");
        // Tiles of warpgroups are read where they lie, and not by requests of lanes.
        let is_of_warpgroups = warpgroup_kernels().iter().any(|(name, _)| name == kernel);
        assert_eq!(number("shared_requests") == 0, is_of_warpgroups, "{kernel}: requests to shared memory");
        let (passes, ideal) = (number("shared_wavefronts"), number("shared_wavefronts_ideal"));
        assert_eq!(passes, ideal, "{kernel} has conflicts of banks");
    }
}

/// A step with a prompt behind cached context and a sequence that goes on.
const PARTS: [Lengths; 2] = [(70, 100), (1, 90)];

fn attention_shape(head_dim: usize) -> Shape {
    Shape { num_kv_heads: 1, group: 2, head_dim, ..attention::SMALL }
}

/// What attention has to do for one of the parts.
fn attention_work(kind: &str, types: (DType, DType), head_dim: usize, part: Lengths) -> Work {
    let (num_queries, context_len) = part;
    let num_heads = attention_shape(head_dim).num_heads();
    let num_scores = num_heads * (context_len - num_queries + 1..=context_len).sum::<usize>();
    Work {
        kernel: attention::kernel_name(kind, types, head_dim),
        flops: 2 * 2 * num_scores * head_dim,
        operand_bytes: 2 * context_len * head_dim * types.1.block_bytes() + 2 * num_queries * num_heads * head_dim,
    }
}

const HEAD_DIMS: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];

#[test]
fn attention_feeds_the_tensor_cores() {
    let counted = softgpu::count("tensor_cores::attention_feeds_the_tensor_cores", || {
        for (dtype, cache) in CACHES {
            let gpu = Gpu::new(dtype);
            HEAD_DIMS.iter().for_each(|dim| attention::attend_to_anything(&gpu, cache, attention_shape(*dim), &PARTS));
        }
    });
    let Some(counted) = counted else { return };
    for (types, head_dim) in CACHES.iter().flat_map(|types| HEAD_DIMS.map(|head_dim| (*types, head_dim))) {
        let [prompt, token] = PARTS;
        attention_work("prefill", types, head_dim, prompt).check(&counted);
        attention_work("decode", types, head_dim, token).check(&counted);
    }
}

/// Outputs and inputs are such that the last tile and the last step are not full.
const OUTPUTS: usize = 264;
const INPUTS: usize = 328;

fn multiply(dtype: DType) {
    let random = &mut Random::new(1);
    for tile in Gpu::tiles(dtype) {
        let gpu = Gpu::with_tile(dtype, tile);
        let matrix = gpu.matrix(&gpu.numbers(random, OUTPUTS * INPUTS, 1.0), OUTPUTS, INPUTS);
        let x = gpu.random_rows(random, tile_size(tile).0, INPUTS);
        for dtype in [gpu.dtype(), DType::F32] {
            drop(gpu.product(&x, &matrix, None, OUTPUTS, dtype));
        }
        gpu.synchronize();
    }
}

#[test]
fn products_feed_the_tensor_cores() {
    let dtypes = [DType::BF16, DType::F16];
    let counted = softgpu::count("tensor_cores::products_feed_the_tensor_cores", || {
        dtypes.into_iter().for_each(multiply);
    });
    let Some(counted) = counted else { return };
    for (dtype, tile) in dtypes.iter().flat_map(|dtype| Gpu::tiles(*dtype).into_iter().map(|tile| (*dtype, tile))) {
        let (num_tokens, _) = tile_size(tile);
        for output in [dtype, DType::F32] {
            let kernel = format!("gemm_{dtype}_{output}_{tile}");
            let operand_bytes = 2 * (num_tokens + OUTPUTS) * INPUTS;
            Work { kernel, flops: 2 * num_tokens * OUTPUTS * INPUTS, operand_bytes }.check(&counted);
        }
    }
}

/// The same of quantised weights, whose rows are of whole blocks.
const QUANTISED_TILES: [usize; 2] = [16, 64];
const QUANTISED_INPUTS: usize = 512;

fn multiply_quantised(gpu: &Gpu) {
    let random = &mut Random::new(2);
    for format in FORMATS {
        let blocks = random_blocks(random, format, OUTPUTS, QUANTISED_INPUTS);
        let part = host_tensor(&blocks, OUTPUTS, QUANTISED_INPUTS, format);
        let matrix = gpu.backend.load_matrix(&[part], None).unwrap();
        for num_tokens in QUANTISED_TILES {
            let x = gpu.random_rows(random, num_tokens, QUANTISED_INPUTS);
            drop(gpu.product(&x, &matrix, None, OUTPUTS, gpu.dtype()));
        }
    }
    gpu.synchronize();
}

#[test]
fn products_of_quantised_weights_feed_the_tensor_cores() {
    let dtypes = [DType::BF16, DType::F16];
    let counted = softgpu::count("tensor_cores::products_of_quantised_weights_feed_the_tensor_cores", || {
        dtypes.iter().for_each(|dtype| multiply_quantised(&Gpu::new(*dtype)));
    });
    let Some(counted) = counted else { return };
    for (dtype, format) in dtypes.iter().flat_map(|dtype| FORMATS.map(|format| (*dtype, format))) {
        for num_tokens in QUANTISED_TILES {
            let kernel = format!("quant_gemm_{dtype}_{format}_t{num_tokens}");
            let weight_bytes = OUTPUTS * format.row_bytes(QUANTISED_INPUTS).unwrap();
            let operand_bytes = weight_bytes + 2 * num_tokens * QUANTISED_INPUTS;
            Work { kernel, flops: 2 * num_tokens * OUTPUTS * QUANTISED_INPUTS, operand_bytes }.check(&counted);
        }
    }
}

/// The texts of all kernels by name. They lie in this program as they were compiled: each goes on to the next kernel, or to
/// the zero behind the last.
fn ptx(program: &[u8]) -> HashMap<&str, &str> {
    const HEAD: &[u8] = b".visible .entry ";
    let heads = program.windows(HEAD.len()).enumerate().filter(|(_, found)| *found == HEAD);
    let starts: Vec<usize> = heads.map(|(at, _)| at + HEAD.len()).collect();
    let ends = starts.iter().skip(1).copied().chain([program.len()]);
    let texts = starts.iter().zip(ends).map(|(start, end)| &program[*start..end]);
    let texts = texts.filter_map(|text| std::str::from_utf8(text.split(|byte| *byte == 0).next()?).ok());
    // Beside the machine code lies the same text in single lines.
    texts.filter_map(|text| text.split_once("(\n")).collect()
}

/// Operands leave shared memory by ldmatrix, or are read there by wgmma; which nothing counts apart.
#[test]
fn kernels_are_made_of_ldmatrix() {
    softgpu::end_without_kernels();
    if kernel_source().unwrap() != "compiled into this program" {
        return;
    }
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let ptx = ptx(&program);
    for (kernel, element) in warpgroup_kernels() {
        let inputs = format!("k16.f32.{element}.{element} {{");
        for instruction in ["wgmma.mma_async.sync.aligned.m64n", &inputs, "cp.async.cg.shared.global"] {
            assert!(ptx[&kernel[..]].contains(instruction), "{kernel} has no {instruction}");
        }
    }
    for (kernel, element) in kernels() {
        let multiply = format!("mma.sync.aligned.m16n8k16.row.col.f32.{element}.{element}.f32");
        for instruction in
            [&multiply[..], "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global", "cp.async.wait_group"]
        {
            assert!(ptx[&kernel[..]].contains(instruction), "{kernel} has no {instruction}");
        }
    }
}

/// Products by plain weights, to both types of outputs.
fn products(dtype: DType, tiles: [&str; 5]) -> Vec<(String, DType)> {
    let named = |output: DType| tiles.map(|tile| (format!("gemm_{dtype}_{output}_{tile}"), dtype));
    [dtype, DType::F32].into_iter().flat_map(named).collect()
}

fn warpgroup_kernels() -> Vec<(String, DType)> {
    [DType::BF16, DType::F16].into_iter().flat_map(|dtype| products(dtype, WARPGROUP_TILES)).collect()
}

fn kernels() -> Vec<(String, DType)> {
    let mut all = vec![];
    for (types, head_dim) in CACHES.iter().flat_map(|types| HEAD_DIMS.map(|head_dim| (*types, head_dim))) {
        for kind in ["decode", "prefill"] {
            all.push((attention::kernel_name(kind, types, head_dim), types.0));
        }
    }
    for dtype in [DType::BF16, DType::F16] {
        all.extend(products(dtype, WARP_TILES));
        for (format, num_tokens) in FORMATS.iter().flat_map(|format| QUANTISED_TILES.map(|tile| (*format, tile))) {
            all.push((format!("quant_gemm_{dtype}_{format}_t{num_tokens}"), dtype));
        }
        let shrink = ["t16", "t32", "t64", "t64_r16", "t64_r64", "t128_r16", "t128_r64"];
        let by_clusters = ["c128_r16", "c256_r16", "c384_r16", "c128_r64", "c256_r64"];
        let shrink = shrink.into_iter().chain(by_clusters);
        all.extend(shrink.map(|tile| (format!("lora_shrink_{dtype}_{tile}"), dtype)));
        // In either type shrunk numbers are taken as sums of bf16.
        all.extend(["w4", "w8", "c8"].map(|block| (format!("lora_expand_{dtype}_{block}"), DType::BF16)));
    }
    all
}
