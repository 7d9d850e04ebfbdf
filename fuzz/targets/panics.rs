//! Lets panics be caught: libraries that panic on damaged input are called through `catch_unwind`, and the fuzzer's own
//! hook would end the process before that. A panic that nobody catches still ends it.

/// Replaces the hook that aborts by one that reports.
pub fn let_the_code_catch() {
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
}
