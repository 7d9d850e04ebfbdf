//! What the numbers of a checkpoint's rows are: ggml's block formats, taken apart and turned into f32.
//!
//! The block layouts are those of ggml's `ggml-common.h` and `ggml-quants.c` (formats Q4_0 to Q6_K). Packing
//! (`packed.rs`, and the records of CUDA) starts from the same [`Block`], so that a packed weight and a dequantised one are
//! the same number.

use half::{bf16, f16};

use super::super::DType;

/// The most elements that share one block.
pub(super) const MAX_BLOCK: usize = 256;

/// One block of a row, taken apart. An element is `scale * (code - bias) + minimum`; see [`Block::term`].
#[derive(Clone)]
pub(in crate::backend) struct Block {
    /// The block's scale.
    pub(in crate::backend) scale: f16,
    /// The block's offset (Q4_1, Q5_1) or the scale of its minima (Q4_K, Q5_K); else zero.
    pub(in crate::backend) offset: f16,
    /// Of K-quants, per 32 elements: (scale, minimum) unsigned, or for Q6_K the signed scales of two halves.
    pub(in crate::backend) sub_scales: [[u8; 2]; MAX_BLOCK / 32],
    /// The codes, unsigned.
    pub(in crate::backend) codes: [u8; MAX_BLOCK],
}

/// Scale and minimum that some elements share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Term {
    pub(super) scale: f32,
    pub(super) minimum: Option<f32>,
}

/// What a code of 0 stands for, negated.
pub(super) const fn code_bias(dtype: DType) -> i32 {
    match dtype {
        DType::Q4_0 => 8,
        DType::Q5_0 => 16,
        DType::Q6K => 32,
        DType::Q8_0 => 128,
        _ => 0,
    }
}

/// Writes the numbers of a row stored as `dtype` to `out`, one per element.
///
/// # Panics
/// When `bytes` are not a row of `out.len()` elements.
pub fn dequantize_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let wanted = dtype.row_bytes(out.len());
    assert_eq!(wanted, Some(bytes.len()), "{} elements of {dtype} in {} bytes", out.len(), bytes.len());
    match dtype {
        DType::F32 => convert(bytes, out, f32::from_le_bytes),
        DType::I32 => convert(bytes, out, |value| i32::from_le_bytes(value) as f32),
        DType::F16 => convert(bytes, out, |value| f16::from_le_bytes(value).to_f32()),
        DType::BF16 => convert(bytes, out, |value| bf16::from_le_bytes(value).to_f32()),
        _ => dequantize_blocks(dtype, bytes, out),
    }
}

fn convert<const BYTES: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; BYTES]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<BYTES>().0) {
        *out = value(*bytes);
    }
}

fn dequantize_blocks(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let mut block = Block::new();
    let blocks = bytes.chunks_exact(dtype.block_bytes());
    for (out, bytes) in out.chunks_exact_mut(dtype.block_elements()).zip(blocks) {
        block.read(dtype, bytes);
        for (half, out) in out.chunks_exact_mut(16).enumerate() {
            let term = block.term(dtype, half);
            for (out, &code) in out.iter_mut().zip(&block.codes[half * 16..]) {
                *out = term.value(i32::from(code) - code_bias(dtype));
            }
        }
    }
}

impl Term {
    /// The element whose code, less the bias, is `code`.
    pub(super) fn value(self, code: i32) -> f32 {
        match self.minimum {
            Some(minimum) => self.scale * code as f32 + minimum,
            None => self.scale * code as f32,
        }
    }

    /// From a block's `scale` and `offset` and the sub-scales of 32 elements, of which `half` is wanted.
    pub(super) fn new(dtype: DType, scale: f16, offset: f16, sub_scales: [u8; 2], half: usize) -> Self {
        let (scale, offset) = (scale.to_f32(), offset.to_f32());
        match dtype {
            DType::Q4_1 | DType::Q5_1 => Term { scale, minimum: Some(offset) },
            DType::Q4K | DType::Q5K => {
                Term { scale: scale * f32::from(sub_scales[0]), minimum: Some(-(offset * f32::from(sub_scales[1]))) }
            }
            DType::Q6K => Term { scale: scale * f32::from(sub_scales[half] as i8), minimum: None },
            _ => Term { scale, minimum: None },
        }
    }
}

impl Block {
    pub(in crate::backend) fn new() -> Self {
        Self { scale: f16::ZERO, offset: f16::ZERO, sub_scales: [[0; 2]; MAX_BLOCK / 32], codes: [0; MAX_BLOCK] }
    }

    /// Scale and minimum of the elements `[16 * half, 16 * half + 16)`.
    pub(super) fn term(&self, dtype: DType, half: usize) -> Term {
        Term::new(dtype, self.scale, self.offset, self.sub_scales[half / 2], half % 2)
    }

    /// Takes one block of a quantised `dtype` apart.
    pub(in crate::backend) fn read(&mut self, dtype: DType, bytes: &[u8]) {
        match dtype {
            DType::Q4_0 => self.read_small(bytes, false, false),
            DType::Q4_1 => self.read_small(bytes, true, false),
            DType::Q5_0 => self.read_small(bytes, false, true),
            DType::Q5_1 => self.read_small(bytes, true, true),
            DType::Q8_0 => self.read_q8_0(bytes),
            DType::Q4K => self.read_q4_k(bytes),
            DType::Q5K => self.read_q5_k(bytes),
            DType::Q6K => self.read_q6_k(bytes),
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::F8E4M3 => unreachable!("{dtype} has no blocks"),
        }
    }

    /// `scale, [offset], [fifth bits], nibbles`: element `j` is a low nibble, element `j + 16` the high one.
    fn read_small(&mut self, bytes: &[u8], has_offset: bool, has_fifth_bit: bool) {
        self.scale = f16_at(bytes, 0);
        let mut at = 2;
        if has_offset {
            self.offset = f16_at(bytes, at);
            at += 2;
        }
        let mut fifth = 0;
        if has_fifth_bit {
            fifth = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            at += 4;
        }
        for (j, &pair) in bytes[at..at + 16].iter().enumerate() {
            self.codes[j] = pair & 15 | ((fifth >> j & 1) as u8) << 4;
            self.codes[j + 16] = pair >> 4 | ((fifth >> (j + 16) & 1) as u8) << 4;
        }
    }

    /// `scale, 32 signed bytes`; the codes get 128 added.
    fn read_q8_0(&mut self, bytes: &[u8]) {
        self.scale = f16_at(bytes, 0);
        for (code, &byte) in self.codes.iter_mut().zip(&bytes[2..34]) {
            *code = byte ^ 0x80;
        }
    }

    /// `scale, minimum scale, 12 bytes of 6-bit sub-scales, nibbles`: 32 low nibbles, then their 32 high ones.
    fn read_q4_k(&mut self, bytes: &[u8]) {
        (self.scale, self.offset) = (f16_at(bytes, 0), f16_at(bytes, 2));
        self.read_six_bit_scales(&bytes[4..16]);
        for (chunk, pairs) in bytes[16..144].as_chunks::<32>().0.iter().enumerate() {
            for (l, &pair) in pairs.iter().enumerate() {
                self.codes[chunk * 64 + l] = pair & 15;
                self.codes[chunk * 64 + 32 + l] = pair >> 4;
            }
        }
    }

    /// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit `i` of byte `l` belongs to element `32 i + l`.
    fn read_q5_k(&mut self, bytes: &[u8]) {
        (self.scale, self.offset) = (f16_at(bytes, 0), f16_at(bytes, 2));
        self.read_six_bit_scales(&bytes[4..16]);
        let fifth = &bytes[16..48];
        for (chunk, pairs) in bytes[48..176].as_chunks::<32>().0.iter().enumerate() {
            for (l, &pair) in pairs.iter().enumerate() {
                self.codes[chunk * 64 + l] = pair & 15 | (fifth[l] >> (2 * chunk) & 1) << 4;
                self.codes[chunk * 64 + 32 + l] = pair >> 4 | (fifth[l] >> (2 * chunk + 1) & 1) << 4;
            }
        }
    }

    /// `low nibbles (128 bytes), high bit pairs (64), 16 signed scales, scale`, in two halves of 128 elements.
    fn read_q6_k(&mut self, bytes: &[u8]) {
        self.scale = f16_at(bytes, 208);
        for (half, scale) in bytes[192..208].iter().enumerate() {
            self.sub_scales[half / 2][half % 2] = *scale;
        }
        for part in 0..2 {
            let (low, high) = (&bytes[part * 64..part * 64 + 64], &bytes[128 + part * 32..160 + part * 32]);
            let codes = &mut self.codes[part * 128..part * 128 + 128];
            for l in 0..32 {
                codes[l] = low[l] & 15 | (high[l] & 3) << 4;
                codes[l + 32] = low[l + 32] & 15 | (high[l] >> 2 & 3) << 4;
                codes[l + 64] = low[l] >> 4 | (high[l] >> 4 & 3) << 4;
                codes[l + 96] = low[l + 32] >> 4 | (high[l] >> 6) << 4;
            }
        }
    }

    /// Eight 6-bit scales and eight 6-bit minima in 12 bytes (`get_scale_min_k4`).
    fn read_six_bit_scales(&mut self, packed: &[u8]) {
        for j in 0..4 {
            self.sub_scales[j] = [packed[j] & 63, packed[j + 4] & 63];
            let (high_scale, high_minimum) = (packed[j] >> 6 << 4, packed[j + 4] >> 6 << 4);
            self.sub_scales[j + 4] = [packed[j + 8] & 15 | high_scale, packed[j + 8] >> 4 | high_minimum];
        }
    }
}

fn f16_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    const FORMATS: [(DType, GgmlDType); 11] = [
        (DType::F32, GgmlDType::F32),
        (DType::F16, GgmlDType::F16),
        (DType::BF16, GgmlDType::BF16),
        (DType::Q4_0, GgmlDType::Q4_0),
        (DType::Q4_1, GgmlDType::Q4_1),
        (DType::Q5_0, GgmlDType::Q5_0),
        (DType::Q5_1, GgmlDType::Q5_1),
        (DType::Q8_0, GgmlDType::Q8_0),
        (DType::Q4K, GgmlDType::Q4K),
        (DType::Q5K, GgmlDType::Q5K),
        (DType::Q6K, GgmlDType::Q6K),
    ];

    /// candle is an independent implementation of the formats; both must give the same bits.
    #[test]
    fn every_format_is_what_candle_reads() {
        let values = Tensor::randn(0f32, 0.05, (3, 1024), &Device::Cpu).unwrap();
        for (dtype, theirs) in FORMATS {
            let quantised = QTensor::quantize(&values, theirs).unwrap();
            let wanted: Vec<f32> =
                quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let mut found = vec![0.0; 3 * 1024];
            dequantize_row(dtype, &quantised.data().unwrap(), &mut found);
            for (index, (wanted, found)) in wanted.iter().zip(&found).enumerate() {
                assert_eq!(wanted.to_bits(), found.to_bits(), "{dtype} element {index}: {wanted} {found}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "32 elements of q8_0 in 33 bytes")]
    fn a_short_row_is_refused() {
        dequantize_row(DType::Q8_0, &[0; 33], &mut [0.0; 32]);
    }
}
