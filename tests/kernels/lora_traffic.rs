//! What the kernels of adapters move on shapes that models have, for tokens in decode and for prompts.
//!
//! In decode every byte is moved once, but for hardly any. A prompt has more rows than a block, and blocks that run side by
//! side read the same factors, and those of other columns the same shrunk numbers: together fewer bytes than any GPU's cache of
//! the second level has. The software GPU has no cache and counts them each time, so what is asked here is how often that
//! is, that all else is moved once, and that what is touched at all, which is what memory then moves, is the operands. On
//! Hopper clusters have so many rows that nothing is let off for rank 16.

use mneme::backend::DType;
use serde_json::Value;

use crate::gpu::Gpu;
use crate::lora::{self, Case, Entry};
use crate::support::random::Random;
use crate::support::softgpu;
use crate::traffic::{LEAST_EFFICIENCY, MOST_OVER_LEAST, moved};

/// As many inputs, and as many outputs, as the output of attention has in a model of 8 billion weights.
const HIDDEN: usize = 4096;

/// Rows of one step with one update of `rank` for each of them.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    adapters: usize,
    rank: usize,
}

impl Shape {
    /// Every adapter has its share of the rows, here and there; more adapters than rows have all of them.
    fn run(self, gpu: &Gpu) {
        let Self { rows, adapters, rank } = self;
        let ranks = vec![vec![rank]; adapters];
        let ranks: Vec<&[usize]> = ranks.iter().map(Vec::as_slice).collect();
        let case = Case::random(gpu, &mut Random::new(1), rows, HIDDEN, &[HIDDEN], &ranks);
        let entries = (0..adapters).flat_map(|adapter| {
            let has = move |row: &usize| rows < adapters || row % adapters == adapter;
            (0..rows).filter(has).map(move |row| Entry { adapter, row, scale: 1.0 })
        });
        drop(case.run(gpu, &case.load_in_pages_of(gpu, lora::PAGE_BYTES << 4), &entries.collect::<Vec<_>>()));
    }

    /// Of all `A`, or of all `B`.
    fn factor_bytes(self) -> f64 {
        (self.adapters * self.rank * HIDDEN * 2) as f64
    }

    fn shrunk_bytes(self) -> f64 {
        (self.rows * self.rank * 4) as f64
    }

    /// Bytes of memory that a kernel may move: hardly more than the least, and `shared` that other blocks have read.
    fn check(self, counted: &Value, kernel: &str, shared: f64) {
        let counters = &counted[kernel];
        let (bytes, least, sectors) = moved(counters);
        let Self { rows, adapters, rank } = self;
        eprintln!(
            "{kernel}, {rows} rows, {adapters} adapters of rank {rank}: {:.3} of the least, {:.3} without {:.3} that blocks share, \
             sector efficiency {:.3}",
            bytes / least,
            (bytes - shared) / least,
            shared / least,
            bytes / sectors
        );
        assert!(bytes - shared <= MOST_OVER_LEAST * least, "{kernel} moves {bytes} bytes, {least} at the least");
        assert!(bytes >= LEAST_EFFICIENCY * sectors, "{kernel} moves {bytes} bytes in sectors of {sectors}");
        let wavefronts = |what: &str| counters[format!("shared_wavefronts{what}")].as_u64().unwrap();
        assert_eq!(wavefronts(""), wavefronts("_ideal"), "{kernel} has bank conflicts");
    }

    /// What a kernel touches at all is hardly more than its operands: that is what memory has to move where a cache holds what
    /// blocks share, which is less than a fiftieth of the smallest that devices of these kernels have.
    fn check_touched(self, counted: &Value, kernel: &str, numbers: usize) {
        const CACHE_BYTES: f64 = 40e6;
        let shared = self.factor_bytes() + self.shrunk_bytes();
        let least = (numbers * 2) as f64 + shared;
        let (_, touched, _) = moved(&counted[kernel]);
        eprintln!("{kernel}, {} rows: touches {:.3} of its operands, {shared} are shared", self.rows, touched / least);
        assert!(touched <= MOST_OVER_LEAST * least, "{kernel} touches {touched} bytes, its operands are {least}");
        assert!(shared < CACHE_BYTES / 50.0, "blocks of {kernel} share {shared} bytes");
    }
}

/// No more than the least by either kernel, whatever a cache holds.
fn decode(test: &str, tile: &str, block: &str, rows: usize, adapters: usize) {
    let shape = Shape { rows, adapters, rank: 16 };
    let counted = softgpu::count(&format!("lora_traffic::{test}"), || shape.run(&Gpu::new(DType::BF16)));
    let Some(counted) = counted else { return };
    shape.check(&counted, &format!("lora_shrink_bf16_{tile}"), 0.0);
    shape.check(&counted, &format!("lora_expand_bf16_{block}"), 0.0);
}

#[test]
fn one_row_of_one_adapter() {
    decode("one_row_of_one_adapter", "t16", "w4", 1, 1);
}

#[test]
fn one_row_of_four_adapters() {
    decode("one_row_of_four_adapters", "t16", "w4", 1, 4);
}

#[test]
fn sixteen_rows_of_one_adapter() {
    decode("sixteen_rows_of_one_adapter", "t16", "w4", 16, 1);
}

#[test]
fn sixteen_rows_of_four_adapters() {
    decode("sixteen_rows_of_four_adapters", "t16", "w4", 16, 4);
}

#[test]
fn thirty_two_rows_of_one_adapter() {
    decode("thirty_two_rows_of_one_adapter", "t32", "w8", 32, 1);
}

#[test]
fn thirty_two_rows_of_four_adapters() {
    decode("thirty_two_rows_of_four_adapters", "t16", "w4", 32, 4);
}

#[test]
fn sixty_four_rows_of_one_adapter() {
    decode("sixty_four_rows_of_one_adapter", "t64", "w8", 64, 1);
}

#[test]
fn sixty_four_rows_of_four_adapters() {
    decode("sixty_four_rows_of_four_adapters", "t16", "w4", 64, 4);
}

/// How a prompt's rows are cut.
struct Cut<'a> {
    /// Of the first kernel, and its rows.
    tile: (&'a str, usize),
    /// Of the second, with the rows for which b is read once, and its columns.
    block: (&'a str, usize, usize),
}

/// With `cut`, or by clusters as `on_hopper` says. What blocks share is let off, but where clusters have enough rows.
fn prefill(test: &str, rows: usize, rank: usize, cut: Cut<'_>, on_hopper: Cut<'_>) {
    let shape = Shape { rows, adapters: 1, rank };
    let counted = softgpu::count(&format!("lora_traffic::{test}"), || shape.run(&Gpu::new(DType::BF16)));
    let Some(counted) = counted else { return };
    let Cut { tile: (tile, tile_rows), block: (block, block_rows, columns) } =
        if softgpu::is_hopper() { on_hopper } else { cut };
    let is_let_off = !softgpu::is_hopper() || rank > 16;
    let again = |all: usize, block: usize| if is_let_off { (all.div_ceil(block) - 1) as f64 } else { 0.0 };
    shape.check(&counted, &format!("lora_shrink_bf16_{tile}"), again(rows, tile_rows) * shape.factor_bytes());
    let shared = again(rows, block_rows) * shape.factor_bytes() + again(HIDDEN, columns) * shape.shrunk_bytes();
    shape.check(&counted, &format!("lora_expand_bf16_{block}"), shared);
    shape.check_touched(&counted, &format!("lora_shrink_bf16_{tile}"), rows * HIDDEN);
    shape.check_touched(&counted, &format!("lora_expand_bf16_{block}"), 2 * rows * HIDDEN);
}

#[test]
fn a_prompt_of_512() {
    let cut = Cut { tile: ("t64_r16", 64), block: ("w8", 128, 512) };
    let on_hopper = Cut { tile: ("c256_r16", 256), block: ("c8", 512, 512) };
    prefill("a_prompt_of_512", 512, 16, cut, on_hopper);
}

#[test]
fn a_prompt_of_2048() {
    let cut = Cut { tile: ("t128_r16", 128), block: ("w8", 352, 512) };
    let on_hopper = Cut { tile: ("c384_r16", 384), block: ("c8", 1024, 512) };
    prefill("a_prompt_of_2048", 2048, 16, cut, on_hopper);
}

#[test]
fn a_prompt_under_a_high_rank() {
    let cut = Cut { tile: ("t64_r64", 64), block: ("w4", 176, 256) };
    let on_hopper = Cut { tile: ("c256_r64", 256), block: ("c8", 512, 512) };
    prefill("a_prompt_under_a_high_rank", 512, 64, cut, on_hopper);
}
