//! The models whose shapes are measured.

use clap::ValueEnum;

/// A model by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ShapeName {
    /// Small enough for the software GPU.
    #[value(name = "tiny")]
    Tiny,
    #[value(name = "smollm2-135m")]
    SmolLm2,
    #[value(name = "qwen2.5-0.5b")]
    Qwen,
    #[value(name = "llama-2-7b")]
    Llama7b,
    #[value(name = "llama-3.1-8b")]
    Llama8b,
}

/// What decides how much its kernels have to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dimensions {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab_size: usize,
}

impl ShapeName {
    /// As it is asked for.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub(super) fn dimensions(self) -> Dimensions {
        let of = |hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size| Dimensions {
            hidden_size,
            intermediate_size,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
        };
        match self {
            Self::Tiny => of(256, 512, 4, 2, 64, 512),
            Self::SmolLm2 => of(576, 1536, 9, 3, 64, 49_152),
            Self::Qwen => of(896, 4864, 14, 2, 64, 151_936),
            Self::Llama7b => of(4096, 11_008, 32, 32, 128, 32_000),
            Self::Llama8b => of(4096, 14_336, 32, 8, 128, 128_256),
        }
    }
}

impl Dimensions {
    /// Numbers in a row of queries, keys and values.
    pub(super) fn qkv_size(&self) -> usize {
        self.q_size() + 2 * self.num_kv_heads * self.head_dim
    }

    /// Numbers in a row of queries.
    pub(super) fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }
}
