//! Parts of the library that no kernel is needed for.

use softgpu::capability::Capability;
use softgpu::counters::Counters;
use softgpu::inject::{arm, failure};
use softgpu::product::{ends, sum};
use softgpu::roofline::{Estimate, Limits};
use std::collections::HashSet;

const DEVICE: Limits =
    Limits { name: "round", bytes_per_s: 1e9, tensor_flops_per_s: 1e12, multiprocessors: 10.0, cycles_per_s: 1e6 };

#[test]
fn what_takes_longest_is_named() {
    let idle = Counters { global_load_footprint_bytes: 600, global_store_footprint_bytes: 400, ..Counters::default() };
    assert_eq!(DEVICE.estimate(&idle), Estimate { seconds: 1e-6, limit: "memory" });
    let counted = [
        (Counters { mma_flops: 2_000_000, ..idle }, "tensor cores"),
        (Counters { warp_instructions: 80, ..idle }, "instructions"),
        (Counters { shared_wavefronts: 20, ..idle }, "shared memory"),
    ];
    for (counters, limit) in counted {
        assert_eq!(DEVICE.estimate(&counters), Estimate { seconds: 2e-6, limit });
    }
}

#[test]
fn code_runs_on_what_it_was_made_for() {
    let runs = |name: &str, target: &str| Capability::named(name).map(|c| c.refuse(target).is_none());
    for (target, on_ampere, on_hopper) in [
        ("sm_75", true, true),
        ("sm_80", true, true),
        ("sm_90", false, true),
        ("sm_90a", false, true),
        ("sm_100", false, false),
    ] {
        assert_eq!((runs("8.0", target), runs("9.0", target)), (Ok(on_ampere), Ok(on_hopper)), "{target}");
    }
    assert!(Capability::named("7.5").is_err_and(|message| message.contains("7.5")));
    let message = Capability::named("8.0").unwrap().refuse("sm_90a").unwrap_or_default();
    assert!(message.contains("sm_90a") && message.contains("8.0"), "{message}");
}

#[test]
fn parts_begin_elsewhere_for_every_number_of_columns() {
    assert_eq!(ends(8, 2, 0), [1, 5, 8]);
    assert_eq!(ends(8, 2, 1), [2, 6, 8]);
    assert_eq!(ends(8, 2, 3), [4, 8]);
    assert_eq!(ends(8, 3, 1), [2, 5, 8]);
    assert_eq!(ends(1, 2, 7), [1]);
}

#[test]
fn sums_are_near_whatever_their_parts() {
    let row: Vec<f32> = (0..100).map(|at| (at as f32).sin()).collect();
    let column: Vec<f32> = (0..100).map(|at| (1.7 * at as f32).cos()).collect();
    let wanted: f32 = row.iter().zip(&column).map(|(a, b)| a * b).sum();
    let sums: Vec<f32> = (1..20).map(|num_columns| sum(&row, &column, &ends(100, 3, num_columns))).collect();
    assert!(sums.iter().all(|sum| (sum - wanted).abs() < 1e-2), "{sums:?}, wanted {wanted}");
    let differing: HashSet<u32> = sums.iter().map(|sum| sum.to_bits()).collect();
    assert!(differing.len() > sums.len() / 2, "{sums:?}");
}

#[test]
fn rules_say_which_calls_fail() {
    assert!(arm("cuMemAlloc_v2").is_err() && arm("cuMemAlloc_v2=0").is_err() && arm("cuMemAlloc_v2=2@a").is_err());
    arm("one=2@1x2, two=719").unwrap();
    let calls: Vec<Option<(u32, bool)>> = (0..4).map(|_| failure("one")).collect();
    assert_eq!(calls, [None, Some((2, false)), Some((2, false)), None]);
    assert_eq!([failure("two"), failure("two"), failure("three")], [Some((719, true)), Some((719, true)), None]);
    arm("").unwrap();
    assert_eq!(failure("two"), None);
}
