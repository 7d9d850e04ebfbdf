//! Updates against sums in f64, and the same bits whatever stands beside a row.

use std::sync::Arc;

use half::bf16;

use super::super::lora_matrix::tests::{PAGE_BYTES, load_into_pages};
use super::*;
use crate::backend::{DType, HostTensor, LoraPart};

const INPUTS: usize = 100;
const OUTPUTS: usize = 150;

struct Plain {
    a: Vec<f32>,
    b: Vec<f32>,
    rank: usize,
    num_outputs: usize,
    first_column: usize,
    scaling: f32,
}

fn numbers(len: usize, seed: usize) -> Vec<f32> {
    let number = |at: usize| (((at * 7919 + seed * 104_729) % 2003) as f32 - 1001.0) / 700.0;
    (0..len).map(|at| bf16::from_f32(number(at)).to_f32()).collect()
}

fn tensor(values: &[f32], rows: usize, dtype: DType) -> HostTensor {
    let bytes: Vec<u8> = match dtype {
        DType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let len = bytes.len();
    HostTensor::new("test", Arc::new(bytes), 0..len, dtype, rows, values.len() / rows).unwrap()
}

fn plain(rank: usize, num_outputs: usize, first_column: usize, seed: usize) -> Plain {
    let (a, b) = (numbers(rank * INPUTS, seed), numbers(num_outputs * rank, seed + 1));
    Plain { a, b, rank, num_outputs, first_column, scaling: 0.5 + seed as f32 / 8.0 }
}

fn load(parts: &[Plain], dtype: DType) -> CpuLora {
    load_in_pages_of(PAGE_BYTES, parts, dtype)
}

fn load_in_pages_of(page_bytes: usize, parts: &[Plain], dtype: DType) -> CpuLora {
    let part = |it: &Plain| LoraPart {
        a: tensor(&it.a, it.rank, dtype),
        b: tensor(&it.b, it.num_outputs, dtype),
        scaling: it.scaling,
        first_column: it.first_column,
    };
    load_into_pages(&parts.iter().map(part).collect::<Vec<_>>(), page_bytes)
}

/// Adapters of different ranks for a projection of two modules, of 80 columns and 70; the first one updates both.
fn adapters() -> Vec<Vec<Plain>> {
    vec![
        vec![plain(3, 80, 0, 1), plain(16, 70, 80, 3)],
        vec![plain(8, 80, 0, 5)],
        vec![plain(33, 70, 80, 7)],
        vec![plain(512, 70, 80, 9)],
    ]
}

fn run(isa: Isa, threads: usize, loaded: &[CpuLora], entries: &[(usize, i32, f32)], num_rows: usize) -> Vec<f32> {
    let (x, mut out) = (numbers(num_rows * INPUTS, 20), numbers(num_rows * OUTPUTS, 21));
    let rows: Vec<i32> = entries.iter().map(|entry| entry.1).collect();
    let scales: Vec<f32> = entries.iter().map(|entry| entry.2).collect();
    let group = |group: usize| {
        let start = entries.iter().position(|entry| entry.0 == group)?;
        let count = entries.iter().filter(|entry| entry.0 == group).count();
        Some(LoraRows { update: &loaded[group], entries: start..start + count })
    };
    let work = LoraWork { x: &x, num_inputs: INPUTS, rows: &rows, scales: &scales, group, num_groups: loaded.len() };
    let (mut pool, mut scratch) = (ThreadPool::new(threads), LoraScratch::default());
    add_lora(&mut pool, isa, &mut scratch, &work, &mut out, OUTPUTS);
    out
}

fn reference(adapters: &[Vec<Plain>], entries: &[(usize, i32, f32)], num_rows: usize) -> Vec<f64> {
    let x = numbers(num_rows * INPUTS, 20);
    let mut out: Vec<f64> = numbers(num_rows * OUTPUTS, 21).into_iter().map(f64::from).collect();
    for &(group, row, scale) in entries {
        let x = &x[row as usize * INPUTS..][..INPUTS];
        for part in &adapters[group] {
            let dot = |a: &[f32]| -> f64 { a.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum() };
            let y: Vec<f64> = part.a.chunks(INPUTS).map(dot).collect();
            for (column, b) in part.b.chunks(part.rank).enumerate() {
                let sum: f64 = b.iter().zip(&y).map(|(b, y)| f64::from(*b) * y).sum();
                let factor = f64::from(scale) * f64::from(part.scaling);
                out[row as usize * OUTPUTS + part.first_column + column] += factor * sum;
            }
        }
    }
    out
}

/// (adapter, row, scale), by adapter: rows with none, one and several, negative scales.
fn entries() -> Vec<(usize, i32, f32)> {
    let long = (10..140).map(|row| (1, row, 1.0));
    let mut all = vec![(0, 0, 1.0), (0, 7, -0.5), (1, 2, 1.0), (1, 7, 0.25)];
    all.extend(long);
    all.extend([(2, 0, 0.7), (2, 3, 2.0), (2, 50, -1.5), (3, 7, 1.0), (3, 149, 1.0)]);
    all
}

#[test]
fn updates_agree_with_sums_in_f64_and_every_instruction_set_with_the_others() {
    let (adapters, entries) = (adapters(), entries());
    let wanted = reference(&adapters, &entries, 150);
    for dtype in [DType::BF16, DType::F32] {
        let loaded: Vec<CpuLora> = adapters.iter().map(|parts| load(parts, dtype)).collect();
        let first = run(Isa::Portable, 1, &loaded, &entries, 150);
        for (found, wanted) in first.iter().zip(&wanted) {
            assert!((f64::from(*found) - wanted).abs() <= 1e-3 + 1e-5 * wanted.abs(), "{found}, wanted {wanted}");
        }
        for isa in Isa::available() {
            assert_eq!(run(isa, 3, &loaded, &entries, 150), first, "{isa} {dtype}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_rows_without_adapters_keep_theirs() {
    let (adapters, all) = (adapters(), entries());
    let loaded: Vec<CpuLora> = adapters.iter().map(|parts| load(parts, DType::BF16)).collect();
    for isa in Isa::available() {
        let together = run(isa, 2, &loaded, &all, 150);
        for row in [0, 1, 2, 3, 7, 9, 50, 77, 149] {
            let own: Vec<_> = all.iter().copied().filter(|entry| entry.1 == row).collect();
            let alone = run(isa, 1, &loaded, &own, 150);
            let columns = row as usize * OUTPUTS..(row as usize + 1) * OUTPUTS;
            assert_eq!(together[columns.clone()], alone[columns.clone()], "{isa}, row {row}");
            if own.is_empty() {
                assert_eq!(together[columns.clone()], numbers(150 * OUTPUTS, 21)[columns]);
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_pages() {
    let (adapters, entries) = (adapters(), entries());
    for dtype in [DType::BF16, DType::F32] {
        let run_in = |page_bytes: usize| {
            let load = |parts: &Vec<Plain>| load_in_pages_of(page_bytes, parts, dtype);
            let loaded: Vec<CpuLora> = adapters.iter().map(load).collect();
            run(Isa::best(), 2, &loaded, &entries, 150)
        };
        let wanted = run_in(1 << 20);
        for page_bytes in [2048, 2560, 4096, 12_288] {
            assert_eq!(run_in(page_bytes), wanted, "{dtype} in pages of {page_bytes}");
        }
    }
}
