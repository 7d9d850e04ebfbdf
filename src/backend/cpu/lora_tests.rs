//! Updates against sums in f64, and the same bits whatever stands beside a row.
//!
//! Where pairs of bf16 are multiplied, the sums are of x rounded to it; shrunk rows, which are rounded too, come with a
//! tolerance.

use std::sync::Arc;

use half::bf16;

use super::super::lora_matrix::tests::{PAGE_BYTES, load_embedding, load_into_pages};
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
    load_into_pages(&parts.iter().map(|it| part(it, dtype)).collect::<Vec<_>>(), page_bytes)
}

fn part(it: &Plain, dtype: DType) -> LoraPart {
    LoraPart {
        a: tensor(&it.a, it.rank, dtype),
        b: tensor(&it.b, it.num_outputs, dtype),
        scaling: it.scaling,
        first_column: it.first_column,
    }
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

/// x, which bf16 does not hold.
fn inputs(num_rows: usize) -> Vec<f32> {
    numbers(num_rows * INPUTS, 20).into_iter().map(|number| number * 1.003).collect()
}

fn multiplies_pairs_of(isa: Isa, dtype: DType) -> bool {
    dtype == DType::BF16 && multiplies_pairs(isa)
}

fn run(isa: Isa, threads: usize, loaded: &[CpuLora], entries: &[(usize, i32, f32)], num_rows: usize) -> Vec<f32> {
    run_on(isa, threads, loaded, entries, LoraInput::Rows { x: &inputs(num_rows), num_inputs: INPUTS })
}

fn run_on(
    isa: Isa,
    threads: usize,
    loaded: &[CpuLora],
    entries: &[(usize, i32, f32)],
    input: LoraInput<'_>,
) -> Vec<f32> {
    let mut out = numbers(input.num_rows() * OUTPUTS, 21);
    let rows: Vec<i32> = entries.iter().map(|entry| entry.1).collect();
    let scales: Vec<f32> = entries.iter().map(|entry| entry.2).collect();
    let group = |group: usize| {
        let start = entries.iter().position(|entry| entry.0 == group)?;
        let count = entries.iter().filter(|entry| entry.0 == group).count();
        Some(LoraRows { update: &loaded[group], entries: start..start + count })
    };
    let work = LoraWork { input, rows: &rows, scales: &scales, group, num_groups: loaded.len() };
    let (mut pool, mut scratch) = (ThreadPool::new(threads), LoraScratch::default());
    add_lora(&mut pool, isa, &mut scratch, &work, &mut out, OUTPUTS);
    out
}

/// A number, and the root of the sum of the squares of what was added to it.
#[derive(Clone, Copy)]
struct Wanted {
    number: f64,
    size: f64,
}

fn reference(adapters: &[Vec<Plain>], entries: &[(usize, i32, f32)], num_rows: usize, in_pairs: bool) -> Vec<Wanted> {
    let round = |x: f32| if in_pairs { bf16::from_f32(x).to_f32() } else { x };
    let x: Vec<f32> = inputs(num_rows).into_iter().map(round).collect();
    let wanted = |number: f32| Wanted { number: f64::from(number), size: 0.0 };
    let mut out: Vec<Wanted> = numbers(num_rows * OUTPUTS, 21).into_iter().map(wanted).collect();
    for &(group, row, scale) in entries {
        let x = &x[row as usize * INPUTS..][..INPUTS];
        for part in &adapters[group] {
            let dot = |a: &[f32]| -> f64 { a.iter().zip(x).map(|(a, x)| f64::from(*a) * f64::from(*x)).sum() };
            let y: Vec<f64> = part.a.chunks(INPUTS).map(dot).collect();
            let factor = f64::from(scale) * f64::from(part.scaling);
            for (column, b) in part.b.chunks(part.rank).enumerate() {
                let added: Vec<f64> = b.iter().zip(&y).map(|(b, y)| f64::from(*b) * y * factor).collect();
                let wanted = &mut out[row as usize * OUTPUTS + part.first_column + column];
                wanted.number += added.iter().sum::<f64>();
                wanted.size = added.iter().fold(wanted.size, |size, added| size.hypot(*added));
            }
        }
    }
    out
}

fn check(found: &[f32], wanted: &[Wanted], in_pairs: bool, what: &str) {
    // A number is rounded by at most half of this part of it, and such errors hardly ever point one way.
    let rounding = if in_pairs { 1.0 / 128.0 } else { 0.0 };
    for (found, Wanted { number, size }) in found.iter().zip(wanted) {
        let most = 1e-3 + 1e-5 * number.abs() + rounding * size;
        assert!((f64::from(*found) - number).abs() <= most, "{what}: {found}, wanted {number} within {most}");
    }
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
fn updates_agree_with_sums_in_f64_and_instruction_sets_without_pairs_with_each_other() {
    let (adapters, entries) = (adapters(), entries());
    for dtype in [DType::BF16, DType::F32] {
        let loaded: Vec<CpuLora> = adapters.iter().map(|parts| load(parts, dtype)).collect();
        let first = run(Isa::Portable, 1, &loaded, &entries, 150);
        for isa in Isa::available() {
            let in_pairs = multiplies_pairs_of(isa, dtype);
            let found = run(isa, 3, &loaded, &entries, 150);
            check(&found, &reference(&adapters, &entries, 150, in_pairs), in_pairs, &format!("{isa} {dtype}"));
            assert!(in_pairs || found == first, "{isa} {dtype}");
        }
    }
}

/// Every rank up to two tasks of it and the lengths of a vector, rows up to two tiles, and columns about a panel.
#[test]
fn every_shape_agrees_with_sums_in_f64() {
    for rank in 1..=18 {
        for num_outputs in [1, 15, 16, 63, 64, 65, 149] {
            let adapters = [vec![plain(rank, num_outputs, 1, rank)]];
            let num_rows = 1 + (rank + num_outputs) % 9;
            let entries: Vec<_> = (0..num_rows as i32).map(|row| (0, row, 0.5 + row as f32)).collect();
            for (isa, dtype) in Isa::available().flat_map(|isa| [(isa, DType::BF16), (isa, DType::F32)]) {
                let in_pairs = multiplies_pairs_of(isa, dtype);
                let wanted = reference(&adapters, &entries, num_rows, in_pairs);
                let loaded = [load(&adapters[0], dtype)];
                let what = format!("{isa} {dtype}: {num_rows} rows, {rank} ranks, {num_outputs} outputs");
                check(&run(isa, 1, &loaded, &entries, num_rows), &wanted, in_pairs, &what);
            }
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
fn groups_without_common_rows_give_the_bits_of_those_with() {
    let (adapters, all) = (adapters(), entries());
    let loaded: Vec<CpuLora> = adapters.iter().map(|parts| load(parts, DType::BF16)).collect();
    // Row 7 stands in three groups; without it nobody meets anybody.
    let disjoint: Vec<_> =
        all.iter().copied().filter(|(adapter, row, _)| *row != 7 && *row != 50 && (*adapter, *row) != (2, 0)).collect();
    let mixed: Vec<_> = [disjoint.clone(), vec![(3, 148, 1.0)]].concat();
    for isa in Isa::available() {
        let wanted = run(isa, 2, &loaded, &all, 150);
        for entries in [&disjoint, &mixed] {
            let found = run(isa, 2, &loaded, entries, 150);
            for row in [2usize, 3, 10, 49, 77, 139, 149] {
                let columns = row * OUTPUTS..(row + 1) * OUTPUTS;
                assert_eq!(found[columns.clone()], wanted[columns], "{isa}, row {row}");
            }
        }
    }
}

/// A token is a row with one number.
#[test]
fn looking_a_token_up_is_multiplying_by_its_row() {
    let adapters = [plain(3, OUTPUTS, 0, 1), plain(16, OUTPUTS, 0, 3), plain(33, OUTPUTS, 0, 5)];
    let mut entries: Vec<(usize, i32, f32)> = (0..90).map(|row| (0, row, 1.0)).collect();
    entries.extend([(1, 7, 0.25), (1, 95, -2.0), (2, 7, 0.7), (2, 149, 1.5)]);
    let ids: Vec<i32> = (0..150).map(|row| row * 37 % INPUTS as i32).collect();
    let mut x = vec![0.0; 150 * INPUTS];
    ids.iter().enumerate().for_each(|(row, id)| x[row * INPUTS + *id as usize] = 1.5);
    for dtype in [DType::BF16, DType::F32] {
        let multiplied: Vec<CpuLora> = adapters.iter().map(|it| load(std::slice::from_ref(it), dtype)).collect();
        let looked_up: Vec<CpuLora> = adapters.iter().map(|it| load_embedding(&part(it, dtype))).collect();
        for isa in Isa::available() {
            let wanted = run_on(isa, 3, &multiplied, &entries, LoraInput::Rows { x: &x, num_inputs: INPUTS });
            let input = LoraInput::Tokens { ids: &ids, factor: 1.5, vocab_size: INPUTS };
            assert_eq!(run_on(isa, 3, &looked_up, &entries, input), wanted, "{isa} {dtype}");
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
