//! The mneme binary.
fn main() {}
