//! Merged copies against plain loops over unpacked rows, and the same bits however the work is cut.

use std::sync::Arc;

use half::{bf16, f16};

use super::super::lora_matrix::tests::{PAGE_BYTES, load_into_pages};
use super::super::weight_memory::WeightArena;
use super::*;
use crate::backend::{HostTensor, LoraPart};

const PLAIN: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// An update before it is loaded.
struct Plain {
    a: Vec<f32>,
    b: Vec<f32>,
    rank: usize,
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
        DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let len = bytes.len();
    HostTensor::new("test", Arc::new(bytes), 0..len, dtype, rows, values.len() / rows).unwrap()
}

fn plain(rank: usize, outputs: usize, inputs: usize, first_column: usize, seed: usize) -> Plain {
    let (a, b) = (numbers(rank * inputs, seed), numbers(outputs * rank, seed + 1));
    Plain { a, b, rank, first_column, scaling: 0.01 + seed as f32 / 1024.0 }
}

fn load(parts: &[Plain], dtype: DType) -> CpuLora {
    let part = |it: &Plain| LoraPart {
        a: tensor(&it.a, it.rank, dtype),
        b: tensor(&it.b, it.b.len() / it.rank, dtype),
        scaling: it.scaling,
        first_column: it.first_column,
    };
    load_into_pages(&parts.iter().map(part).collect::<Vec<_>>(), PAGE_BYTES)
}

fn unpack(matrix: &PackedMatrix) -> Vec<Vec<f32>> {
    let row = |row: usize| {
        let mut values = vec![0.0; matrix.num_columns()];
        matrix.unpack_row(row, &mut values);
        values
    };
    (0..matrix.num_rows()).map(row).collect()
}

fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The definition, number by number.
fn reference(
    base: &[Vec<f32>],
    adapters: &[(Vec<Plain>, f32)],
    dtype_of_row: impl Fn(usize) -> DType,
) -> Vec<Vec<f32>> {
    let number = |row: usize, k: usize| {
        let mut sum = base[row][k];
        for (parts, scale) in adapters {
            for part in parts {
                let outputs = part.b.len() / part.rank;
                let Some(own) = row.checked_sub(part.first_column).filter(|own| *own < outputs) else { continue };
                let inputs = part.a.len() / part.rank;
                let product = (0..part.rank).fold(0.0f32, |product, rank| {
                    part.a[rank * inputs + k].mul_add(part.b[own * part.rank + rank], product)
                });
                sum = (scale * part.scaling).mul_add(product, sum);
            }
        }
        rounded(sum, dtype_of_row(row))
    };
    (0..base.len()).map(|row| (0..base[row].len()).map(|k| number(row, k)).collect()).collect()
}

fn merged(
    isa: Isa,
    weight: &PackedMatrix,
    adapters: &[(CpuLora, f32)],
    slices: impl IntoIterator<Item = Range<usize>>,
) -> Vec<Vec<f32>> {
    let mut pool = ThreadPool::new(3);
    let updates: Vec<_> = adapters.iter().map(|(update, scale)| ScaledUpdate { update, scale: *scale }).collect();
    let mut target = weight.zeroed_like(&mut WeightArena::default()).unwrap();
    for rows in slices {
        merge_rows(&mut pool, isa, weight, &updates, rows, &mut target).unwrap();
    }
    unpack(&target)
}

/// A stack of two modules, `first` and `second` rows of `inputs`, with two adapters that do not begin at panels.
fn adapters(first: usize, second: usize, inputs: usize, rank: usize) -> Vec<(Vec<Plain>, f32)> {
    let both = vec![plain(rank, first, inputs, 0, 1), plain(3, second, inputs, first, 5)];
    vec![(both, 0.75), (vec![plain(rank + 7, second, inputs, first, 9)], -0.5)]
}

#[test]
fn a_copy_is_what_the_definition_says_for_all_shapes_types_and_instructions() {
    for (first, second, inputs, rank) in
        [(32, 32, 64, 16), (70, 45, 33, 3), (5, 1, 1, 1), (96, 7, 300, 33), (1, 40, 257, 64)]
    {
        let plain = adapters(first, second, inputs, rank);
        for dtype in PLAIN {
            let stacked = [
                tensor(&numbers(first * inputs, 30), first, dtype),
                tensor(&numbers(second * inputs, 31), second, dtype),
            ];
            let weight = PackedMatrix::pack(&stacked, None, &mut ThreadPool::new(1)).unwrap();
            let base = unpack(&weight);
            let wanted = reference(&base, &plain, |_| dtype);
            assert_ne!(wanted, base);
            for factors in [DType::BF16, DType::F32] {
                let loaded: Vec<_> = plain.iter().map(|(parts, scale)| (load(parts, factors), *scale)).collect();
                for isa in Isa::available() {
                    let whole = merged(isa, &weight, &loaded, std::iter::once(0..first + second));
                    assert_eq!(whole, wanted, "{isa} {dtype} [{first}+{second}, {inputs}] rank {rank}");
                }
            }
        }
    }
}

#[test]
fn slices_come_to_the_same_whole_and_touch_nothing_else() {
    let (first, second, inputs) = (70, 45, 100);
    let loaded: Vec<_> =
        adapters(first, second, inputs, 16).iter().map(|(parts, scale)| (load(parts, DType::BF16), *scale)).collect();
    let stacked = [
        tensor(&numbers(first * inputs, 30), first, DType::BF16),
        tensor(&numbers(second * inputs, 31), second, DType::F16),
    ];
    let weight = PackedMatrix::pack(&stacked, None, &mut ThreadPool::new(1)).unwrap();
    assert_eq!(weight.segments().len(), 2);
    let num_rows = first + second;
    let whole = merged(Isa::best(), &weight, &loaded, std::iter::once(0..num_rows));
    let dtype_of_row = |row: usize| if row < first { DType::BF16 } else { DType::F16 };
    assert_eq!(whole, reference(&unpack(&weight), &adapters(first, second, inputs, 16), dtype_of_row));
    for len in [1, 7, 32, 33, 64] {
        let slices = (0..num_rows).step_by(len).map(|start| start..num_rows.min(start + len));
        assert_eq!(merged(Isa::best(), &weight, &loaded, slices), whole, "slices of {len}");
    }
    let part = merged(Isa::best(), &weight, &loaded, std::iter::once(32..64));
    for (row, found) in part.iter().enumerate() {
        let is_written = (32..64).contains(&row);
        assert_eq!(*found, if is_written { whole[row].clone() } else { vec![0.0; inputs] }, "row {row}");
    }
}

#[test]
fn rows_without_an_update_keep_their_bits() {
    let stacked = [tensor(&numbers(80 * 50, 30), 80, DType::BF16)];
    let weight = PackedMatrix::pack(&stacked, None, &mut ThreadPool::new(1)).unwrap();
    let loaded = vec![(load(&[plain(8, 20, 50, 35, 3)], DType::BF16), 1.0)];
    let (base, found) = (unpack(&weight), merged(Isa::best(), &weight, &loaded, std::iter::once(0..80)));
    for row in 0..80 {
        assert_eq!(found[row] == base[row], !(35..55).contains(&row), "row {row}");
    }
}

#[test]
fn quantised_weights_and_updates_of_other_shapes_are_refused() {
    let bytes = vec![0u8; 34 * 2 * 4];
    let quantised = HostTensor::new("test", Arc::new(bytes), 0..34 * 2 * 4, DType::Q8_0, 4, 64).unwrap();
    let quantised = PackedMatrix::pack(&[quantised], None, &mut ThreadPool::new(1)).unwrap();
    let why = check(&quantised).unwrap_err().to_string();
    assert!(why.contains("quantised") && why.to_lowercase().contains("q8_0"), "{why}");
    let weight = PackedMatrix::pack(&[tensor(&numbers(64, 1), 8, DType::F32)], None, &mut ThreadPool::new(1)).unwrap();
    let mut target = weight.zeroed_like(&mut WeightArena::default()).unwrap();
    for (outputs, inputs, first_column) in [(8, 9, 0), (9, 8, 0), (8, 8, 1)] {
        let update = load(&[plain(2, outputs, inputs, first_column, 1)], DType::F32);
        let updates = [ScaledUpdate { update: &update, scale: 1.0 }];
        let result = merge_rows(&mut ThreadPool::new(1), Isa::best(), &weight, &updates, 0..8, &mut target);
        assert!(result.unwrap_err().to_string().contains("does not fit"));
    }
}
