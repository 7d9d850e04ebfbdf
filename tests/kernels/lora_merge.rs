//! Merged copies of weights against their definition, bit for bit: a number is one chain in order of adapter and rank.

use std::ops::Range;

use mneme::backend::cuda::{CudaLora, CudaMatrix};
use mneme::backend::{Backend, DType, LoraAdapter, ScaledUpdate};

use crate::gpu::{self, Gpu};
use crate::lora::{PAGE_BYTES, Part, SITE, load, random_parts};
use crate::support::random::Random;

/// Of one row or of many; none of the shapes has a longer one.
const PAGE_BYTES_WIDE: usize = 2 * PAGE_BYTES;

/// Weights, and adapters for them with their scales.
struct Case {
    weight: Vec<f32>,
    outputs: usize,
    inputs: usize,
    adapters: Vec<(Vec<Part>, f32)>,
}

impl Case {
    /// An adapter has an update of each module, rows of the weights, whose rank is not 0.
    fn random(gpu: &Gpu, seed: u64, modules: &[usize], inputs: usize, ranks: &[&[usize]]) -> Self {
        let random = &mut Random::new(seed);
        let outputs = modules.iter().sum();
        let mut weight = gpu.numbers(random, outputs * inputs, 1.0);
        weight.iter_mut().step_by(7).for_each(|number| *number = -0.0);
        let scales = [1.0, -0.5, 0.7, 2.0];
        let adapter = |(at, ranks): (usize, &&[usize])| {
            (random_parts(gpu, random, inputs, modules, ranks), scales[at % scales.len()])
        };
        let adapters = ranks.iter().enumerate().map(adapter).collect();
        Self { weight, outputs, inputs, adapters }
    }

    fn load(&self, gpu: &Gpu, page_bytes: usize) -> Vec<(LoraAdapter<CudaLora>, f32)> {
        let load = |(parts, scale): &(Vec<Part>, f32)| (load(gpu, parts, gpu.dtype(), page_bytes), *scale);
        self.adapters.iter().map(load).collect()
    }

    /// The copy, of which these rows are written, one slice after the other.
    fn merge(&self, gpu: &Gpu, slices: impl IntoIterator<Item = Range<usize>>, page_bytes: usize) -> Vec<f32> {
        let weight = gpu.matrix(&self.weight, self.outputs, self.inputs);
        let loaded = self.load(gpu, page_bytes);
        let updates = updates(&loaded);
        let mut target = gpu.backend.allocate_merged(&weight).unwrap();
        for rows in slices {
            gpu.backend.merge_rows(&gpu.stream, &weight, &updates, rows, &mut target).unwrap();
        }
        read(gpu, &target, self.outputs, self.inputs)
    }

    fn whole(&self) -> impl Iterator<Item = Range<usize>> {
        std::iter::once(0..self.outputs)
    }

    /// The definition, number by number.
    fn reference(&self, dtype: DType) -> Vec<f32> {
        let number = |(at, weight): (usize, &f32)| {
            let (row, input) = (at / self.inputs, at % self.inputs);
            let mut sum = *weight;
            for (part, scale) in
                self.adapters.iter().flat_map(|(parts, scale)| parts.iter().map(move |part| (part, scale)))
            {
                let own = row.checked_sub(part.first_column).filter(|own| *own < part.num_columns);
                let Some(own) = own else { continue };
                let product = (0..part.rank).fold(0.0f32, |product, rank| {
                    part.a[rank * self.inputs + input].mul_add(part.b[own * part.rank + rank], product)
                });
                sum = (scale * part.scaling).mul_add(product, sum);
            }
            gpu::round(sum, dtype)
        };
        self.weight.iter().enumerate().map(number).collect()
    }
}

pub fn updates(loaded: &[(LoraAdapter<CudaLora>, f32)]) -> Vec<ScaledUpdate<'_, CudaLora>> {
    let updates = loaded.iter().filter_map(|(adapter, scale)| Some((adapter.get(SITE)?, *scale)));
    updates.map(|(update, scale)| ScaledUpdate { update, scale }).collect()
}

/// All numbers of a matrix, by looking its rows up as embeddings.
fn read(gpu: &Gpu, matrix: &CudaMatrix, rows: usize, columns: usize) -> Vec<f32> {
    let ids: Vec<i32> = (0..rows as i32).collect();
    let out = gpu.output(rows, columns, DType::F32);
    gpu.backend.embed(&gpu.stream, matrix, &gpu.indices(&ids, 1, rows), 1.0, &out.tensor).unwrap();
    out.numbers(gpu)
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Rows of the modules, inputs, ranks of every adapter's modules. Around the edges of every tile: strips of 32 rows, 256
/// inputs, stages of 16 ranks, of which a strip keeps four; blocks of several strips.
#[allow(clippy::type_complexity)] // a table
const SHAPES: &[(&[usize], usize, &[&[usize]])] = &[
    (&[8], 8, &[&[1]]),
    (&[24, 40], 200, &[&[8, 0], &[0, 3]]),
    (&[64, 16, 16], 64, &[&[16, 16, 16]]),
    (&[72, 8, 264], 264, &[&[64, 1, 16], &[0, 17, 8]]),
    (&[40], 256, &[&[15], &[65]]),
    (&[136], 520, &[&[48], &[16], &[1]]),
    (&[96], 40, &[&[130], &[33]]),
    (&[1400], 576, &[&[16]]),
    (&[1048], 1032, &[&[70], &[9]]),
];

#[test]
fn copies_are_what_the_definition_says() {
    for gpu in gpu::lend().iter() {
        for (seed, (modules, inputs, ranks)) in SHAPES.iter().enumerate() {
            let case = Case::random(gpu, 130 + seed as u64, modules, *inputs, ranks);
            let (found, wanted) = (case.merge(gpu, case.whole(), PAGE_BYTES_WIDE), case.reference(gpu.dtype()));
            let what = format!("{modules:?} by {inputs} in {}, ranks {ranks:?}", gpu.dtype());
            let wrong = found.iter().zip(&wanted).position(|(a, b)| a.to_bits() != b.to_bits());
            if let Some(at) = wrong {
                panic!("{what}: number {at} is {}, wanted {}", found[at], wanted[at]);
            }
            assert!(found.iter().zip(&case.weight).any(|(a, b)| a != b), "{what}: nothing was merged");
        }
    }
}

/// Slices of any lengths, in the order in which an engine asks for them; a copy without an adapter is a copy.
#[test]
fn slices_come_to_the_same_whole_and_touch_nothing_else() {
    for gpu in gpu::lend().iter() {
        let case = Case::random(gpu, 140, &[72, 40], 264, &[&[16, 5], &[0, 70]]);
        let whole = bits(&case.merge(gpu, case.whole(), PAGE_BYTES_WIDE));
        assert_eq!(whole, bits(&case.reference(gpu.dtype())));
        for len in [1, 7, 32, 33, 64] {
            let slices = (0..case.outputs).step_by(len).map(|start| start..case.outputs.min(start + len));
            let found = case.merge(gpu, slices, PAGE_BYTES_WIDE);
            assert!(bits(&found) == whole, "slices of {len}");
        }
        for rows in [3..3, 5..6, 30..75, 64..112] {
            let found = bits(&case.merge(gpu, [rows.clone()], PAGE_BYTES_WIDE));
            for (row, (found, whole)) in found.chunks(case.inputs).zip(whole.chunks(case.inputs)).enumerate() {
                let is_right = if rows.contains(&row) { found == whole } else { found.iter().all(|bits| *bits == 0) };
                assert!(is_right, "row {row} when {rows:?} are written");
            }
        }
        let plain = Case { adapters: vec![], ..case };
        assert_eq!(bits(&plain.merge(gpu, plain.whole(), PAGE_BYTES_WIDE)), bits(&plain.weight));
    }
}

#[test]
fn rows_without_an_update_keep_their_bits() {
    for gpu in gpu::lend().iter() {
        let case = Case::random(gpu, 141, &[24, 40, 16], 72, &[&[0, 8, 0]]);
        let found = bits(&case.merge(gpu, case.whole(), PAGE_BYTES));
        for (row, (found, weight)) in found.chunks(72).zip(case.weight.chunks(72)).enumerate() {
            assert_eq!(found == bits(weight), !(24..64).contains(&row), "row {row}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_pages() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let case = Case::random(gpu, 142, &[264, 72], 328, &[&[16, 16], &[40, 0], &[3, 65]]);
    let wanted = bits(&case.merge(gpu, case.whole(), 1 << 20));
    for page_bytes in [656, 1024, 4096, 12_288] {
        assert!(bits(&case.merge(gpu, case.whole(), page_bytes)) == wanted, "in pages of {page_bytes}");
    }
}

/// A composition of as many adapters as the arguments of a launch hold, and of more.
#[test]
fn many_adapters_are_merged_and_too_many_refused() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let ranks: [&[usize]; 33] = [&[3, 0]; 33];
    let mut case = Case::random(gpu, 143, &[16, 8], 24, &ranks);
    let refused = {
        let (weight, loaded) = (gpu.matrix(&case.weight, 24, 24), case.load(gpu, PAGE_BYTES));
        let mut target = gpu.backend.allocate_merged(&weight).unwrap();
        gpu.backend.merge_rows(&gpu.stream, &weight, &updates(&loaded), 0..24, &mut target).unwrap_err().to_string()
    };
    assert!(refused.contains("33 adapters") && refused.contains("takes 32"), "{refused}");
    case.adapters.pop();
    assert_eq!(bits(&case.merge(gpu, case.whole(), PAGE_BYTES)), bits(&case.reference(gpu.dtype())));
}

#[test]
fn what_does_not_fit_is_refused() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let case = Case::random(gpu, 144, &[16], 16, &[&[4], &[2]]);
    let loaded = case.load(gpu, PAGE_BYTES);
    let merge = |outputs: usize, inputs: usize, copy: (usize, usize), rows: Range<usize>| {
        let weight = gpu.matrix(&vec![0.0; outputs * inputs], outputs, inputs);
        let like = gpu.matrix(&vec![0.0; copy.0 * copy.1], copy.0, copy.1);
        let mut target = gpu.backend.allocate_merged(&like).unwrap();
        let merged = gpu.backend.merge_rows(&gpu.stream, &weight, &updates(&loaded), rows, &mut target);
        merged.map_err(|error| error.to_string())
    };
    assert_eq!(merge(16, 16, (16, 16), 0..16), Ok(()));
    assert!(merge(16, 24, (16, 24), 0..16).unwrap_err().contains("does not fit weights of [16, 24]"));
    assert!(merge(8, 16, (8, 16), 0..8).unwrap_err().contains("does not fit weights of [8, 16]"));
    assert!(merge(16, 16, (16, 24), 0..16).unwrap_err().contains("a copy of weights"));
    assert!(merge(16, 16, (16, 16), 0..17).unwrap_err().contains("rows 0..17"));
    let mut mixed = case.load(gpu, PAGE_BYTES);
    mixed[1] = case.load(gpu, 2 * PAGE_BYTES).remove(1);
    let weight = gpu.matrix(&case.weight, 16, 16);
    let mut target = gpu.backend.allocate_merged(&weight).unwrap();
    let merged = gpu.backend.merge_rows(&gpu.stream, &weight, &updates(&mixed), 0..16, &mut target);
    assert!(merged.unwrap_err().to_string().contains("in pages of"));
}
