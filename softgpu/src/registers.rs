//! Which row holds which register: PTX has a new register for nearly every value, and a row for each would fit no cache.
//!
//! [`flow`] says where registers are live, [`rows`] has those share a row that never are at the same place, and [`check`], which
//! knows nothing of how, whether they get in each other's way. [`bits`] are sets.

pub mod bits;
pub mod check;
pub mod flow;
pub mod rows;
