//! The shape of a decode step: what decides which kernels it is, and on how many of what.

/// A step in which every sequence goes on by one token, and the next token of each is wanted. Two of the same shape differ
/// in what their buffers hold alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeShape {
    /// Sequences, and so tokens and rows of logits.
    pub num_seqs: usize,
    /// Columns of the block tables.
    pub max_blocks: usize,
    /// The longest context, or more.
    pub max_context_len: usize,
    /// A number for which adapters, lying where, are added to which rows: equal ones mean that all of it is equal. 0 without
    /// adapters.
    pub adapters: u64,
    /// The number of the copy of the weights, with adapters merged into them, that the last rows go through, and the first of
    /// these rows. No two copies have the same.
    pub merged: Option<(u64, usize)>,
}

impl DecodeShape {
    /// The shape of larger tables and a longer context, so that only one in a doubling differs. Kernels ignore what is
    /// behind a sequence's own context.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) fn rounded_up(self, min_blocks: usize, min_context_len: usize) -> Self {
        Self {
            max_blocks: self.max_blocks.next_power_of_two().max(min_blocks),
            max_context_len: self.max_context_len.next_power_of_two().max(min_context_len),
            ..self
        }
    }

    /// The shape with tables and a context no larger than these, which hold every sequence.
    pub fn at_most(self, max_blocks: usize, max_context_len: usize) -> Self {
        Self {
            max_blocks: self.max_blocks.min(max_blocks),
            max_context_len: self.max_context_len.min(max_context_len),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_rounded_up_and_stay_within_bounds() {
        let shape = |num_seqs, max_blocks, max_context_len| {
            let (adapters, merged) = (7, Some((2, 1)));
            DecodeShape { num_seqs, max_blocks, max_context_len, adapters, merged }
        };
        let rounded = shape(3, 17, 257).rounded_up(16, 256);
        assert_eq!(rounded, shape(3, 32, 512));
        assert_eq!(rounded.at_most(20, 320), shape(3, 20, 320));
        assert_eq!(shape(1, 1, 1).rounded_up(16, 256), shape(1, 16, 256));
    }
}
