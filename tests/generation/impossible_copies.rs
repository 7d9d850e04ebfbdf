//! Slots that do not exist: the CPU looks at index arrays, other devices trust the host with them.

use crate::composition::runner;
use crate::support::runner::{BLOCK_SIZE, NUM_BLOCKS};
use crate::support::tiny_model::Family;

/// Slots and deltas that do not exist are errors, before anything is written.
#[test]
fn impossible_copies_are_refused() {
    let runner = runner(Family::Llama);
    let num_slots = (NUM_BLOCKS * BLOCK_SIZE) as i32;
    let run = |source: i32, target: i32, deltas: &[i32]| {
        runner.try_copy(&[source], &[target], deltas).map_err(|error| error.to_string())
    };
    assert_eq!(run(0, 20, &[-1023]), Ok(()));
    assert!(run(-1, 20, &[0]).unwrap_err().contains("source slot -1"));
    assert!(run(0, num_slots, &[0]).unwrap_err().contains("target slot"));
    assert!(run(0, 20, &[-1024]).unwrap_err().contains("moved by -1024 positions"));
    assert!(run(0, 20, &[]).unwrap_err().contains("position_deltas"));
}
