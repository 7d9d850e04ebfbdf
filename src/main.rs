//! The mneme binary.
#![allow(dead_code)] // until the commands are dispatched

mod cli;

fn main() {}
