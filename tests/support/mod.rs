//! What several integration tests share.
#![allow(dead_code, unreachable_pub)] // each test program uses its own part

pub mod models;
