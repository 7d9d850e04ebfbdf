//! Low-rank updates against plain loops, and against themselves in other company.

use std::ops::Range;
use std::sync::Arc;

use mneme::backend::cuda::CudaLora;
use mneme::backend::{
    Backend, DType, Device, LoraAdapter, LoraBatch, LoraGroup, LoraLoader, LoraPart, LoraSite, PageImage, Projection,
};

use crate::gpu::{self, Gpu, assert_close, encode, epsilon, host_tensor};
use crate::support::random::Random;
use crate::support::softgpu;

pub const SITE: LoraSite = LoraSite { layer: 0, projection: Projection::Qkv };

/// Of one row or of many.
pub const PAGE_BYTES: usize = 2048;

/// An update of some columns, its factors row-major.
#[derive(Clone)]
pub struct Part {
    /// `[rank, inputs]`.
    pub a: Vec<f32>,
    /// `[num_columns, rank]`.
    pub b: Vec<f32>,
    pub rank: usize,
    pub first_column: usize,
    pub num_columns: usize,
    pub scaling: f32,
}

/// Which row has how much of which adapter.
#[derive(Clone, Copy)]
pub struct Entry {
    pub adapter: usize,
    pub row: usize,
    pub scale: f32,
}

/// A projection's input and output, and adapters for it.
pub struct Case {
    x: Vec<f32>,
    out: Vec<f32>,
    inputs: usize,
    outputs: usize,
    adapters: Vec<Vec<Part>>,
}

impl Case {
    /// An adapter has an update of each module whose rank is not 0.
    pub fn random(
        gpu: &Gpu,
        random: &mut Random,
        num_tokens: usize,
        inputs: usize,
        modules: &[usize],
        ranks: &[&[usize]],
    ) -> Self {
        let outputs = modules.iter().sum();
        let mut out = gpu.numbers(random, num_tokens * outputs, 1.0);
        out.iter_mut().step_by(5).for_each(|number| *number = -0.0);
        let adapters = ranks.iter().map(|ranks| random_parts(gpu, random, inputs, modules, ranks)).collect();
        Self { x: gpu.numbers(random, num_tokens * inputs, 1.0), out, inputs, outputs, adapters }
    }

    fn num_tokens(&self) -> usize {
        self.x.len() / self.inputs
    }

    fn load(&self, gpu: &Gpu) -> Vec<Arc<LoraAdapter<CudaLora>>> {
        self.load_in_pages_of(gpu, PAGE_BYTES)
    }

    pub fn load_in_pages_of(&self, gpu: &Gpu, page_bytes: usize) -> Vec<Arc<LoraAdapter<CudaLora>>> {
        self.adapters.iter().map(|parts| Arc::new(load(gpu, parts, gpu.dtype(), page_bytes))).collect()
    }

    /// Adds the entries, which are in order of adapter and row, and gives what is then in the output.
    pub fn run(&self, gpu: &Gpu, loaded: &[Arc<LoraAdapter<CudaLora>>], entries: &[Entry]) -> Vec<u8> {
        let rows: Vec<i32> = entries.iter().map(|entry| entry.row as i32).collect();
        let scales: Vec<f32> = entries.iter().map(|entry| entry.scale).collect();
        let groups: Vec<_> = entries
            .chunk_by(|a, b| a.adapter == b.adapter)
            .scan(0, |start, chunk| {
                let entries = *start..*start + chunk.len();
                *start = entries.end;
                Some(LoraGroup { adapter: Arc::clone(&loaded[chunk[0].adapter]), entries })
            })
            .collect();
        let x = gpu.activations(&self.x, self.num_tokens(), self.inputs);
        let out = gpu.output(self.num_tokens(), self.outputs, gpu.dtype());
        gpu.write(&out.tensor, &encode(&self.out, gpu.dtype()));
        let (rows, scales) = (gpu.indices(&rows, 1, rows.len()), gpu.vector(&scales));
        let batch = LoraBatch { rows, scales, groups: &groups };
        gpu.backend.add_lora(&gpu.stream, &x, &batch, SITE, &out.tensor).unwrap();
        out.bytes(gpu)
    }

    /// The same in f64.
    fn reference(&self, entries: &[Entry]) -> Vec<f64> {
        let mut out: Vec<f64> = self.out.iter().copied().map(f64::from).collect();
        for entry in entries {
            let x = &self.x[entry.row * self.inputs..][..self.inputs];
            for part in &self.adapters[entry.adapter] {
                let y: Vec<f64> = part.a.chunks_exact(self.inputs).map(|a| dot(a, x.iter().copied())).collect();
                let factor = f64::from(entry.scale) * f64::from(part.scaling);
                for (column, b) in part.b.chunks_exact(part.rank).enumerate() {
                    out[entry.row * self.outputs + part.first_column + column] += factor * dot(b, y.iter().copied());
                }
            }
        }
        out
    }

    /// The numbers of the output to which nothing is added keep their bits.
    fn check_untouched(&self, gpu: &Gpu, found: &[u8], entries: &[Entry]) {
        let mut is_touched = vec![false; self.out.len()];
        for entry in entries {
            for part in &self.adapters[entry.adapter] {
                let start = entry.row * self.outputs + part.first_column;
                is_touched[start..start + part.num_columns].fill(true);
            }
        }
        let before = encode(&self.out, gpu.dtype());
        for (at, _) in is_touched.iter().enumerate().filter(|(_, touched)| !**touched) {
            assert_eq!(found[2 * at..2 * at + 2], before[2 * at..2 * at + 2], "number {at} was written");
        }
    }

    /// The row alone, under the same adapters.
    fn alone(&self, row: usize) -> Self {
        self.part(row..row + 1)
    }

    /// Some of the rows.
    fn part(&self, rows: Range<usize>) -> Self {
        Self {
            x: self.x[rows.start * self.inputs..rows.end * self.inputs].to_vec(),
            out: self.out[rows.start * self.outputs..rows.end * self.outputs].to_vec(),
            adapters: self.adapters.clone(),
            ..*self
        }
    }
}

fn dot<N: Into<f64>>(a: &[f32], b: impl Iterator<Item = N>) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * b.into()).sum()
}

/// An adapter's updates of those modules whose rank is not 0.
pub fn random_parts(gpu: &Gpu, random: &mut Random, inputs: usize, modules: &[usize], ranks: &[usize]) -> Vec<Part> {
    let mut part = |rank: usize, first_column: usize, num_columns: usize| Part {
        a: gpu.numbers(random, rank * inputs, 1.0 / (inputs as f64).sqrt()),
        b: gpu.numbers(random, num_columns * rank, 1.0 / (rank as f64).sqrt()),
        rank,
        first_column,
        num_columns,
        scaling: 0.5 + rank as f32 / 16.0,
    };
    let firsts = modules.iter().scan(0, |next, columns| Some(std::mem::replace(next, *next + columns)));
    let placed = ranks.iter().zip(firsts.zip(modules)).filter(|(rank, _)| **rank > 0);
    placed.map(|(rank, (first, columns))| part(*rank, first, *columns)).collect()
}

/// In pages that lie here and there, in another order.
pub fn load(gpu: &Gpu, parts: &[Part], dtype: DType, page_bytes: usize) -> LoraAdapter<CudaLora> {
    let loader = gpu.backend.create_lora_loader().unwrap();
    let mut image = PageImage::new(page_bytes);
    let packed = loader.pack(&stored(parts, dtype), &mut image).unwrap();
    let image = image.finish().unwrap();
    let num_pages = image.num_pages();
    let pages: Vec<u32> = (0..num_pages as u32).rev().map(|page| 2 * page + 1).collect();
    let arena = gpu.poison(2 * num_pages, page_bytes / 4, DType::F32).buffer().clone();
    image.upload(&mut gpu.backend.create_transfer().unwrap(), &arena, &pages).unwrap();
    let mut adapter = LoraAdapter::new(1);
    adapter.insert(SITE, loader.place(&packed, &image.placed(arena, pages)).unwrap());
    adapter
}

fn stored(parts: &[Part], dtype: DType) -> Vec<LoraPart> {
    let stored = |part: &Part| LoraPart {
        a: host_tensor(&encode(&part.a, dtype), part.rank, part.a.len() / part.rank, dtype),
        b: host_tensor(&encode(&part.b, dtype), part.num_columns, part.rank, dtype),
        scaling: part.scaling,
        first_column: part.first_column,
    };
    parts.iter().map(stored).collect()
}

/// Rows with no adapter, one and several, by adapter.
fn scattered(num_tokens: usize, num_adapters: usize) -> Vec<Entry> {
    let scales = [1.0, -0.5, 0.7, 2.0];
    let has = |adapter: usize, row: usize| (row + adapter) % 3 != 2 && row % 5 != 4;
    (0..num_adapters)
        .flat_map(|adapter| (0..num_tokens).map(move |row| (adapter, row)))
        .filter(|&(adapter, row)| has(adapter, row))
        .map(|(adapter, row)| Entry { adapter, row, scale: scales[(adapter + row) % 4] })
        .collect()
}

/// Runs of rows, as prompts have them: one adapter, two, none.
fn in_runs(num_tokens: usize) -> Vec<Entry> {
    let (first, second) = (num_tokens / 3, num_tokens * 2 / 3);
    let run = |adapter, rows: std::ops::Range<usize>| rows.map(move |row| Entry { adapter, row, scale: 1.0 });
    run(0, 0..second).chain(run(1, first..second)).collect()
}

/// Rows, inputs, outputs of the modules, ranks of every adapter's modules. Around the edges of every tile: 16 to 128 rows, 16
/// and 64 ranks, stages of 64 inputs and segments of several, strips of 64 columns and blocks of 256 and 512.
#[allow(clippy::type_complexity)] // a table
const SHAPES: &[(usize, usize, &[usize], &[&[usize]])] = &[
    (1, 8, &[8], &[&[1]]),
    (1, 64, &[64, 16, 16], &[&[8, 8, 8]]),
    (2, 200, &[264, 72], &[&[16, 0], &[0, 3], &[8, 8]]),
    (7, 264, &[256], &[&[512]]),
    (15, 72, &[40, 8, 8], &[&[64, 0, 1], &[0, 16, 0]]),
    (16, 256, &[16], &[&[16], &[1], &[64], &[8]]),
    (17, 576, &[24], &[&[17], &[33]]),
    (33, 40, &[520], &[&[15], &[65]]),
    (40, 48, &[8, 264], &[&[16, 16], &[512, 0], &[1, 9]]),
    (65, 1016, &[72], &[&[16]]),
    (100, 136, &[528], &[&[9], &[16]]),
    (131, 40, &[24, 600], &[&[17, 3], &[0, 130]]),
    (197, 24, &[520, 8], &[&[48, 20], &[0, 33], &[4, 0]]),
    (1030, 72, &[16], &[&[5]]),
    (1100, 8, &[8, 8], &[&[70, 0]]),
];

#[test]
fn updates_are_products_of_products() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(120);
        for &(num_tokens, inputs, modules, ranks) in SHAPES {
            let case = Case::random(gpu, random, num_tokens, inputs, modules, ranks);
            let loaded = case.load(gpu);
            let mut batches = vec![scattered(num_tokens, ranks.len())];
            if ranks.len() > 1 {
                batches.push(in_runs(num_tokens));
            }
            for entries in batches.iter().filter(|entries| !entries.is_empty()) {
                let found = case.run(gpu, &loaded, entries);
                let what = format!("{num_tokens} rows, {inputs} inputs to {modules:?}, ranks {ranks:?}");
                let numbers = gpu::decode(&found, gpu.dtype());
                assert_close(&what, &numbers, &case.reference(entries), epsilon(gpu.dtype()), 5e-4);
                case.check_untouched(gpu, &found, entries);
            }
        }
    }
}

/// Prompts under one adapter, several and more than there is room for at once; and rows that fill neither tiles nor clusters.
#[allow(clippy::type_complexity)] // a table
const PROMPTS: &[(usize, usize, &[usize], &[&[usize]])] = &[
    (65, 520, &[72], &[&[16]]),
    (129, 1016, &[528, 40], &[&[9, 16], &[33, 0]]),
    (300, 4096, &[520], &[&[16]]),
    (300, 40, &[24, 600], &[&[17, 3], &[0, 130], &[64, 64]]),
    (530, 264, &[1040], &[&[70], &[58], &[16]]),
    (1100, 136, &[16], &[&[5]]),
];

/// Hopper adds to many rows by clusters; what every device has gives the same.
#[test]
fn clusters_give_the_same_bits() {
    if !softgpu::is_hopper() && !softgpu::is_replaced() {
        return;
    }
    for gpu in gpu::lend().iter() {
        let plain = Gpu::without_lora_clusters(gpu.dtype());
        let random = &mut Random::new(127);
        for &(num_tokens, inputs, modules, ranks) in PROMPTS {
            let case = Case::random(gpu, random, num_tokens, inputs, modules, ranks);
            let whole = (0..num_tokens).map(|row| Entry { adapter: 0, row, scale: 1.0 }).collect();
            let runs = if ranks.len() > 1 { in_runs(num_tokens) } else { whole };
            for entries in [runs, scattered(num_tokens, ranks.len())] {
                let run = |gpu: &Gpu| case.run(gpu, &case.load_in_pages_of(gpu, PAGE_BYTES << 4), &entries);
                let [found, wanted] = [gpu, &plain].map(run);
                assert!(found == wanted, "{num_tokens} rows to {modules:?}, ranks {ranks:?}, {}", gpu.dtype());
            }
        }
    }
}

/// Every tile of either kernel, by the number of rows.
#[test]
fn a_row_has_the_same_bits_in_every_tile() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(126);
        for rank in [13, 70] {
            let case = Case::random(gpu, random, 1040, 712, &[72], &[&[rank]]);
            let loaded = case.load(gpu);
            let run = |num_rows: usize| {
                let entry = |row| Entry { adapter: 0, row, scale: 1.5 };
                case.part(0..num_rows).run(gpu, &loaded, &(0..num_rows).map(entry).collect::<Vec<_>>())
            };
            let all = run(1040);
            for num_rows in [1, 16, 17, 33, 65, 129] {
                assert_eq!(run(num_rows), all[..num_rows * 144], "{num_rows} rows, rank {rank}, {}", gpu.dtype());
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for gpu in gpu::lend().iter() {
        let random = &mut Random::new(121);
        let ranks: &[&[usize]] = &[&[16, 16], &[40, 0], &[3, 65]];
        let case = Case::random(gpu, random, 40, 328, &[264, 72], ranks);
        let loaded = case.load(gpu);
        for entries in [scattered(40, 3), in_runs(40)] {
            let together = case.run(gpu, &loaded, &entries);
            for row in [0, 1, 3, 12, 15, 16, 20, 25, 30, 38] {
                let own = entries.iter().filter(|entry| entry.row == row).map(|entry| Entry { row: 0, ..*entry });
                let own: Vec<Entry> = own.collect();
                if own.is_empty() {
                    continue;
                }
                let alone = case.alone(row).run(gpu, &loaded, &own);
                let bytes = 2 * case.outputs;
                assert_eq!(together[row * bytes..(row + 1) * bytes], alone, "row {row} of {}", gpu.dtype());
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_pages() {
    for gpu in gpu::lend().iter() {
        let ranks: &[&[usize]] = &[&[16, 16], &[40, 0], &[3, 65]];
        let case = Case::random(gpu, &mut Random::new(125), 20, 328, &[264, 72], ranks);
        let entries = scattered(20, 3);
        let wanted = case.run(gpu, &case.load_in_pages_of(gpu, 1 << 20), &entries);
        for page_bytes in [656, 1024, 4096, 12_288] {
            let found = case.run(gpu, &case.load_in_pages_of(gpu, page_bytes), &entries);
            assert!(found == wanted, "{} in pages of {page_bytes}", gpu.dtype());
        }
    }
}

/// More adapters than the arguments of a launch hold, and more ranks than there is room for in one round of all rows.
#[test]
fn adapters_without_number_take_several_launches_and_rounds() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let (num_tokens, num_adapters) = (40, 210);
    let case = Case::random(gpu, &mut Random::new(122), num_tokens, 8, &[8], &[&[512]]);
    let same = vec![case.load(gpu).remove(0); num_adapters];
    let case = Case { adapters: vec![case.adapters[0].clone(); num_adapters], ..case };
    let entry = |adapter: usize| Entry { adapter, row: adapter % num_tokens, scale: 0.25 + (adapter % 3) as f32 };
    let entries: Vec<Entry> = (0..num_adapters).map(entry).collect();
    let together = case.run(gpu, &same, &entries);
    assert_close("many", &gpu::decode(&together, gpu.dtype()), &case.reference(&entries), epsilon(gpu.dtype()), 1e-3);
    for row in [0, 17, 38, 39] {
        let own = entries.iter().filter(|entry| entry.row == row).map(|entry| Entry { row: 0, ..*entry });
        let alone = case.alone(row).run(gpu, &same, &own.collect::<Vec<_>>());
        assert_eq!(together[row * 16..(row + 1) * 16], alone, "row {row}");
    }
}

/// Whatever type factors are stored in, they are kept as the device's, and small ones do not vanish in f16.
#[test]
fn factors_of_other_types_are_rounded_once() {
    for gpu in gpu::lend().iter() {
        let mut case = Case::random(gpu, &mut Random::new(123), 5, 64, &[48], &[&[12]]);
        let part = &mut case.adapters[0][0];
        part.b.iter_mut().for_each(|number| *number *= 2.0f32.powi(-30));
        part.scaling *= 2.0f32.powi(30);
        let entries = scattered(5, 1);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let stored_parts = stored(&case.adapters[0], dtype);
            let loaded = [Arc::new(load(gpu, &case.adapters[0], dtype, PAGE_BYTES))];
            let found = gpu::decode(&case.run(gpu, &loaded, &entries), gpu.dtype());
            let mut wanted = Case { adapters: case.adapters.clone(), x: case.x.clone(), out: case.out.clone(), ..case };
            for (numbers, stored) in [(0, &stored_parts[0].a), (1, &stored_parts[0].b)] {
                let part = &mut wanted.adapters[0][0];
                let target = if numbers == 0 { &mut part.a } else { &mut part.b };
                *target = gpu::decode(stored.bytes(), dtype);
            }
            // Each factor may be off by half a unit, each sum of products by about that.
            let tolerance = 4.0 * epsilon(gpu.dtype());
            assert_close(&format!("{dtype}"), &found, &wanted.reference(&entries), tolerance, 4.0 * tolerance);
        }
    }
}

#[test]
fn updates_that_do_not_fit_are_refused() {
    let gpus = gpu::lend();
    let gpu = &gpus[0];
    let case = Case::random(gpu, &mut Random::new(124), 2, 16, &[16], &[&[4]]);
    let loader = gpu.backend.create_lora_loader().unwrap();
    let refused = |change: &dyn Fn(&mut LoraPart)| {
        let mut parts = stored(&case.adapters[0], DType::BF16);
        change(&mut parts[0]);
        loader.pack(&parts, &mut PageImage::new(PAGE_BYTES)).err().unwrap().to_string()
    };
    let zeros = |rows: usize, columns: usize| host_tensor(&vec![0; rows * columns * 2], rows, columns, DType::BF16);
    assert!(refused(&|part| part.a = zeros(4, 12)).contains("12 columns"));
    assert!(refused(&|part| part.b = zeros(20, 4)).contains("20 columns"));
    assert!(refused(&|part| part.b = zeros(16, 5)).contains("rank 5"));
    assert!(refused(&|part| part.first_column = 4).contains("column 4"));

    let adapter = Arc::new(load(gpu, &case.adapters[0], DType::BF16, PAGE_BYTES));
    let run = |inputs: usize, outputs: usize, num_scales: usize, end: usize| {
        let (x, out) = (gpu.activations(&vec![0.0; 2 * inputs], 2, inputs), gpu.output(2, outputs, gpu.dtype()));
        let groups = [LoraGroup { adapter: Arc::clone(&adapter), entries: 0..end }];
        let (rows, scales) = (gpu.indices(&[0, 1], 1, 2), gpu.vector(&vec![1.0; num_scales]));
        let batch = LoraBatch { rows, scales, groups: &groups };
        gpu.write(&out.tensor, &vec![0; 4 * outputs]);
        gpu.backend.add_lora(&gpu.stream, &x, &batch, SITE, &out.tensor).map_err(|error| error.to_string())
    };
    assert_eq!(run(16, 16, 2, 2), Ok(()));
    assert!(run(24, 16, 2, 2).unwrap_err().contains("takes 16 inputs"));
    assert!(run(16, 8, 2, 2).unwrap_err().contains("8 outputs"));
    assert!(run(16, 20, 2, 2).unwrap_err().contains("20 columns"));
    assert!(run(16, 16, 1, 2).unwrap_err().contains("scales of adapters"));
    assert!(run(16, 16, 2, 3).unwrap_err().contains("entries 0..3 of 2"));
    let wide = zeros(4, PAGE_BYTES / 2 + 8);
    assert!(refused(&|part| part.a = wide.clone()).contains("--block-size"), "a row is longer than a page");
    // Nothing to add is no error, whatever the shapes.
    assert_eq!(run(24, 20, 2, 0), Ok(()));
}
