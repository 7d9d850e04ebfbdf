//! Fused adapters against sums of dense updates.

use super::super::base::GgufConventions;
use super::*;

const GGUF: GgufConventions = GgufConventions { architecture: "llama", interleaved_heads: None };
const SHAPES: BaseShapes = BaseShapes {
    num_layers: 2,
    hidden_size: 24,
    intermediate_size: 40,
    q_size: 32,
    kv_size: 16,
    vocab_size: 20,
    gguf: GGUF,
};

fn number(at: usize, seed: usize) -> f32 {
    ((at * 2_654_435_761 + seed * 40_503) % 2000) as f32 / 1000.0 - 1.0
}

/// An adapter of `rank` on some modules, through the files that are written and read.
fn adapter(rank: usize, seed: usize, modules: &[(usize, Module)]) -> Adapter {
    let update = |(layer, module): &(usize, Module)| {
        let seed = seed + layer * 7 + *module as usize;
        let a = (0..rank * SHAPES.inputs(*module)).map(|at| number(at, seed)).collect();
        let b = (0..SHAPES.outputs(*module) * rank).map(|at| number(at, seed + 100)).collect();
        ((*layer, *module), FusedUpdate { a, b, rank })
    };
    read(&Fused { updates: modules.iter().map(update).collect(), shapes: SHAPES, largest_loss: 0.0 })
}

fn read(fused: &Fused) -> Adapter {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("adapter");
    fused.write(&folder, "a model").unwrap();
    Adapter::read(&folder, &SHAPES, 1 << 20).unwrap()
}

fn part(adapter: &Adapter, scale: f32) -> Part<'_> {
    Part { adapter, scale }
}

/// The update of a module, dense; zeros when there is none.
fn matrix(parts: &[Part], (layer, module): (usize, Module)) -> Vec<f32> {
    let size = (SHAPES.outputs(module), SHAPES.inputs(module));
    let mut sum = vec![0.0; size.0 * size.1];
    for part in parts {
        if let Some(update) = part.adapter.update(layer, module) {
            let update = dense(&(*part, update.clone()), size);
            sum.iter_mut().zip(update).for_each(|(sum, x)| *sum += x);
        }
    }
    sum
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(a)
}

const Q: (usize, Module) = (0, Module::Q);
const DOWN: (usize, Module) = (1, Module::Down);

#[test]
fn concatenated_factors_are_the_weighted_sum() {
    let (a, b) = (adapter(3, 1, &[Q, DOWN]), adapter(5, 2, &[Q, (1, Module::K)]));
    let parts = [part(&a, 0.7), part(&b, -0.3)];
    let fused = fuse(&parts, &SHAPES, FuseMethod::Concatenate).unwrap();
    let found = read(&fused);
    for (place, rank) in [(Q, 8), (DOWN, 3), ((1, Module::K), 5)] {
        assert_eq!(found.update(place.0, place.1).unwrap().a.rows(), rank);
        assert!(distance(&matrix(&parts, place), &matrix(&[part(&found, 1.0)], place)) < 1e-6);
    }
    assert!(found.update(0, Module::V).is_none());
    assert_eq!((fused.max_rank(), fused.largest_loss()), (8, 0.0));
}

#[test]
fn a_rank_that_suffices_loses_nothing_and_a_smaller_one_what_it_says() {
    let (a, b) = (adapter(3, 1, &[Q]), adapter(4, 2, &[Q]));
    let parts = [part(&a, 1.0), part(&b, 0.5)];
    let whole = fuse(&parts, &SHAPES, FuseMethod::Truncate { rank: 7 }).unwrap();
    assert!(whole.largest_loss() < 1e-6);
    assert!(distance(&matrix(&parts, Q), &matrix(&[part(&read(&whole), 1.0)], Q)) < 1e-5);
    let cut = fuse(&parts, &SHAPES, FuseMethod::Truncate { rank: 2 }).unwrap();
    let found = distance(&matrix(&parts, Q), &matrix(&[part(&read(&cut), 1.0)], Q));
    assert!(f64::from(found) > 0.05 && (f64::from(found) - cut.largest_loss()).abs() < 1e-4);
    // What takes itself away has no rank, and an update needs one.
    let nothing = fuse(&[part(&a, 1.0), part(&a, -1.0)], &SHAPES, FuseMethod::Truncate { rank: 2 }).unwrap();
    assert_eq!(nothing.max_rank(), 1);
    assert!(matrix(&[part(&read(&nothing), 1.0)], Q).iter().all(|x| *x == 0.0));
}

#[test]
fn ties_keeps_the_largest_and_the_sign_that_weighs_more() {
    assert_eq!(trim(vec![1.0, -3.0, 2.0, 0.5], 0.5), [0.0, -3.0, 2.0, 0.0]);
    assert_eq!(trim(vec![1.0, -3.0], 1.0), [1.0, -3.0]);
    // 3 outweighs -1; -4 outweighs 1 and 2; zeros do not count.
    assert_eq!(elect(&[vec![3.0, 1.0, 0.0], vec![-1.0, -4.0, 2.0], vec![0.0, 2.0, 4.0]]), [3.0, -4.0, 3.0]);
    let a = adapter(3, 1, &[Q]);
    let method = FuseMethod::Ties { rank: 3, density: 1.0 };
    let same = fuse(&[part(&a, 0.5)], &SHAPES, method).unwrap();
    assert!(distance(&matrix(&[part(&a, 0.5)], Q), &matrix(&[part(&read(&same), 1.0)], Q)) < 1e-5);
}

#[test]
fn dare_follows_from_its_seed() {
    let a = adapter(3, 1, &[Q]);
    let fused = |seed, density| {
        let method = FuseMethod::Dare { rank: 8, density, seed };
        read(&fuse(&[part(&a, 1.0)], &SHAPES, method).unwrap())
    };
    assert_eq!(fused(1, 0.5).digest(), fused(1, 0.5).digest());
    assert_ne!(fused(1, 0.5).digest(), fused(2, 0.5).digest());
    assert!(distance(&matrix(&[part(&a, 1.0)], Q), &matrix(&[part(&fused(1, 1.0), 1.0)], Q)) < 1e-5);
    let kept = drop_at_random(vec![1.0; 10_000], 0.25, choice(7, &a, Q));
    let num_kept = kept.iter().filter(|x| **x == 4.0).count();
    assert!(kept.iter().all(|x| *x == 0.0 || *x == 4.0) && (2300..2700).contains(&num_kept), "{num_kept}");
}

#[test]
fn what_cannot_be_is_refused() {
    let a = adapter(300, 1, &[Q]);
    let refusal = |parts: &[Part], method| match fuse(parts, &SHAPES, method) {
        Ok(_) => panic!("it was fused"),
        Err(error) => error.to_string(),
    };
    assert!(refusal(&[], FuseMethod::Concatenate).contains("0 were named"));
    let twice = [part(&a, 1.0), part(&a, 1.0)];
    assert!(refusal(&twice, FuseMethod::Concatenate).contains("rank 600, more than 512"));
    assert!(refusal(&twice, FuseMethod::Truncate { rank: 0 }).contains("wanted 1 to 512"));
    assert!(refusal(&twice, FuseMethod::Ties { rank: 4, density: 0.0 }).contains("density 0"));
    assert!(refusal(&[part(&a, f32::NAN)], FuseMethod::Concatenate).contains("finite"));
    let folder = tempfile::tempdir().unwrap();
    let fused = fuse(&[part(&a, 1.0)], &SHAPES, FuseMethod::Concatenate).unwrap();
    assert!(fused.write(folder.path(), "m").unwrap_err().to_string().contains("is there already"));
}
