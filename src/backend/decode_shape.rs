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
        let shape = DecodeShape { num_seqs: 3, max_blocks: 17, max_context_len: 257 };
        let rounded = shape.rounded_up(16, 256);
        assert_eq!(rounded, DecodeShape { num_seqs: 3, max_blocks: 32, max_context_len: 512 });
        assert_eq!(rounded.at_most(20, 320), DecodeShape { num_seqs: 3, max_blocks: 20, max_context_len: 320 });
        let small = DecodeShape { num_seqs: 1, max_blocks: 1, max_context_len: 1 };
        assert_eq!(small.rounded_up(16, 256), DecodeShape { num_seqs: 1, max_blocks: 16, max_context_len: 256 });
    }
}
