//! Composed prompts on the software GPU: which tokens are computed, and that steps do not decide it.

use mneme::engine::{Piece, SchedulerLimits};

use crate::start;
use crate::support::composed::{bits, blended, composed, run};
use crate::support::engine::{Output, Setup, limits};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};

fn count(output: &Output) -> (usize, usize) {
    (output.reuse.linked_tokens, output.reuse.chosen_tokens)
}

#[test]
fn chosen_tokens_do_not_depend_on_steps() {
    let model = TinyModel::new(Family::Gemma3, 21).write();
    let (prompt, pieces) = composed(&mut Random::new(1), &[20], 1);
    let ask = |max_num_batched_tokens, num_chosen| {
        let limits = SchedulerLimits { max_num_batched_tokens, ..limits() };
        let engine = start(model.path(), Setup { limits, ..Setup::default() });
        run(&engine, &prompt, &blended(&pieces, num_chosen), 2)
    };
    let whole = ask(64, 5);
    assert_eq!(count(&whole), (9, 5));
    assert_eq!(bits(&ask(9, 5)), bits(&whole));
    let linked = ask(64, 0);
    assert_eq!(count(&linked), (14, 0));
    assert_ne!(bits(&linked), bits(&whole));
}

/// Keys and values that stay where they are deviate by nothing, whichever are computed again.
#[test]
fn tokens_that_are_not_moved_may_be_chosen() {
    let model = TinyModel::new(Family::Gemma3, 21).write();
    let source = Random::new(2).tokens(16, VOCAB);
    let prompt = [&source[..], &Random::new(3).tokens(4, VOCAB)].concat();
    let (domain, num_tokens) = (String::new(), source.len());
    let piece = Piece { start: 0, num_tokens, source, source_start: 0, domain, num_recomputed: 0, num_chosen: 3 };
    let engine = start(model.path(), Setup::default());
    let found = run(&engine, &prompt, &[piece], 2);
    assert_eq!(count(&found), (13, 3));
    assert_eq!(bits(&found), bits(&run(&engine, &prompt, &[], 2)));
}
