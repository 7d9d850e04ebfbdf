//! How quantised weights lie on the device: ggml's blocks, taken apart and put together as `kernels/quantised.cu` reads
//! them. Pure arithmetic on bytes; uploading and launching are others'.
//!
//! A record is eight rows by 64 columns, or by 256 in the formats with blocks of 256. It has the bytes that its blocks
//! have in the file, in planes: low bits of the codes in the order in which a warp wants them, high bits, scales. All
//! records of eight rows make a group. `kernels/quantised.cu` says which bit lies where.

use crate::backend::DType;
use crate::backend::cpu::dequantize::Block;

/// Rows of a record.
pub(super) const GROUP_ROWS: usize = 8;
/// Columns whose codes a lane has in one vector.
const RUN: usize = 64;
/// Columns that kernels take from memory at a time.
const UNIT: usize = 256;

/// The records of one format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Records {
    format: DType,
    /// Bits of a code.
    bits: u32,
    /// Columns of a record: 64 or 256.
    columns: usize,
}

impl Records {
    /// Of a quantised format.
    pub(super) fn new(format: DType) -> Self {
        let bits = match format {
            DType::Q4_0 | DType::Q4_1 | DType::Q4K => 4,
            DType::Q5_0 | DType::Q5_1 | DType::Q5K => 5,
            DType::Q6K => 6,
            DType::Q8_0 => 8,
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::F8E4M3 => {
                unreachable!("{format} has no blocks")
            }
        };
        Self { format, bits, columns: format.block_elements().max(RUN) }
    }

    /// Bytes of eight rows of 256 columns.
    pub(super) fn unit_bytes(self) -> usize {
        UNIT / self.columns * self.record_bytes()
    }

    /// Bytes of eight rows of so many columns.
    pub(super) fn group_bytes(self, columns: usize) -> usize {
        columns.div_ceil(self.columns) * self.record_bytes()
    }

    /// Writes a group: up to eight rows as they are stored, and zeros behind them.
    pub(super) fn write_group(self, rows: &[&[u8]], out: &mut [u8]) {
        out.fill(0);
        let blocks_per_record = self.columns / self.format.block_elements();
        for (row, bytes) in rows.iter().enumerate() {
            let parts = bytes.chunks(blocks_per_record * self.format.block_bytes());
            for (blocks, record) in parts.zip(out.chunks_exact_mut(self.record_bytes())) {
                self.write_row(row, blocks, record);
            }
        }
    }

    fn record_bytes(self) -> usize {
        GROUP_ROWS * self.columns / self.format.block_elements() * self.format.block_bytes()
    }

    /// Low and high bits of a run of 64 columns of all rows.
    fn run_bytes(self) -> (usize, usize) {
        match self.bits {
            4 => (256, 0),
            5 => (256, 64),
            6 => (256, 128),
            _ => (512, 0),
        }
    }

    /// Writes one row's part of a record; `blocks` may be fewer than a record has.
    fn write_row(self, row: usize, blocks: &[u8], record: &mut [u8]) {
        let (num_runs, (low_bytes, high_bytes)) = (self.columns / RUN, self.run_bytes());
        let (low, rest) = record.split_at_mut(num_runs * low_bytes);
        let (high, scales) = rest.split_at_mut(num_runs * high_bytes);
        let mut codes = [0u8; UNIT];
        let mut block = Block::new();
        let elements = self.format.block_elements();
        for (index, bytes) in blocks.chunks_exact(self.format.block_bytes()).enumerate() {
            block.read(self.format, bytes);
            codes[index * elements..][..elements].copy_from_slice(&block.codes[..elements]);
            self.write_scales(row, index, &block, scales);
        }
        for (run, codes) in codes[..self.columns].as_chunks::<RUN>().0.iter().enumerate() {
            let high = &mut high[run * high_bytes..][..high_bytes];
            self.write_run(row, codes, &mut low[run * low_bytes..][..low_bytes], high);
        }
    }

    fn write_scales(self, row: usize, index: usize, block: &Block, scales: &mut [u8]) {
        let mut put = |at: usize, bytes: &[u8]| scales[at..at + bytes.len()].copy_from_slice(bytes);
        let (scale, offset) = (block.scale.to_le_bytes(), block.offset.to_le_bytes());
        match self.format {
            DType::Q4_1 | DType::Q5_1 => {
                put(row * 8 + index * 2, &scale);
                put(row * 8 + 4 + index * 2, &offset);
            }
            DType::Q4K | DType::Q5K => {
                put(row * 16, &[scale, offset].concat());
                for (run, pairs) in block.sub_scales.as_chunks::<2>().0.iter().enumerate() {
                    let (low, high) = split_six_bits([pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]]);
                    put(row * 16 + 4 + run * 2, &low.to_le_bytes());
                    put(row * 16 + 12 + run, &[high]);
                }
            }
            DType::Q6K => {
                put(row * 16, block.sub_scales.as_flattened());
                put(GROUP_ROWS * 16 + row * 2, &scale);
            }
            _ => put(row * 4 + index * 2, &scale),
        }
    }

    /// The codes of 64 columns of a row, for the four lanes that have that row.
    fn write_run(self, row: usize, codes: &[u8; RUN], low: &mut [u8], high: &mut [u8]) {
        for quad in 0..4 {
            let word = |step: usize| {
                let at = step * 16 + quad * 2;
                u32::from_le_bytes([codes[at], codes[at + 1], codes[at + 8], codes[at + 9]])
            };
            let (words, lane) = ([word(0), word(1), word(2), word(3)], row * 4 + quad);
            if self.bits == 8 {
                low[lane * 16..][..16].copy_from_slice(bytemuck::cast_slice(&words.map(u32::to_le)));
                continue;
            }
            let pair = |even: u32, odd: u32| (even & 0x0f0f_0f0f | (odd & 0x0f0f_0f0f) << 4).to_le();
            let pairs = [pair(words[0], words[1]), pair(words[2], words[3])];
            low[lane * 8..][..8].copy_from_slice(bytemuck::cast_slice(&pairs));
            match self.bits {
                5 => high[lane * 2..][..2].copy_from_slice(&fifth_bits(words).to_le_bytes()),
                6 => high[lane * 4..][..4].copy_from_slice(&high_pairs(words).to_le_bytes()),
                _ => {}
            }
        }
    }
}

/// Four numbers of six bits: the low four bits of each, and the high two.
fn split_six_bits(numbers: [u8; 4]) -> (u16, u8) {
    let low = numbers.iter().rev().fold(0, |low, number| low << 4 | u16::from(number & 15));
    let high = numbers.iter().rev().fold(0, |high, number| high << 2 | number >> 4);
    (low, high)
}

/// Bit 4 of byte `j` of word `s`, at bit `4 j + s`.
fn fifth_bits(words: [u32; 4]) -> u16 {
    let mut bits = 0;
    for (step, word) in words.iter().enumerate() {
        for (code, byte) in word.to_le_bytes().iter().enumerate() {
            bits |= u16::from(byte >> 4 & 1) << (4 * code + step);
        }
    }
    bits
}

/// Bits 4 and 5 of byte `j` of word `s`, at bits `8 j + 2 s` and the next.
fn high_pairs(words: [u32; 4]) -> u32 {
    words.iter().enumerate().fold(0, |bits, (step, word)| bits | (word >> 4 & 0x0303_0303) << (2 * step))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [DType; 8] =
        [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4K, DType::Q5K, DType::Q6K];

    #[test]
    fn groups_are_as_large_as_their_blocks() {
        for format in FORMATS {
            let records = Records::new(format);
            for columns in [256, 1024] {
                let stored = format.row_bytes(columns).unwrap();
                assert_eq!(records.group_bytes(columns), 8 * stored, "{format}");
            }
            assert_eq!(records.unit_bytes(), records.group_bytes(256), "{format}");
            assert_eq!(records.record_bytes() % 16, 0, "{format}");
        }
        assert_eq!(Records::new(DType::Q4_0).group_bytes(96), 8 * 18 * 4, "to whole records");
    }

    /// No bit is lost and none is written twice: records have as many ones as their blocks.
    #[test]
    fn every_bit_has_a_place() {
        for format in FORMATS {
            let records = Records::new(format);
            let row_bytes = format.row_bytes(512).unwrap();
            let stored: Vec<u8> = (0..5 * row_bytes).map(|at| (at * at * 31 + at * 7) as u8).collect();
            let rows: Vec<&[u8]> = stored.chunks_exact(row_bytes).collect();
            let mut out = vec![0xff; records.group_bytes(512)];
            records.write_group(&rows, &mut out);
            let ones = |bytes: &[u8]| bytes.iter().map(|byte| byte.count_ones()).sum::<u32>();
            // Signed bytes are kept with their sign turned.
            let turned = |bytes: &[u8]| -> Vec<u8> {
                let signs = |(at, byte): (usize, &u8)| if at % 34 < 2 { *byte } else { byte ^ 0x80 };
                bytes.iter().enumerate().map(signs).collect()
            };
            let wanted = if format == DType::Q8_0 { ones(&turned(&stored)) } else { ones(&stored) };
            assert_eq!(ones(&out), wanted, "{format}");
        }
    }

    #[test]
    fn six_bits_are_split() {
        assert_eq!(split_six_bits([0b10_0001, 0b01_0010, 0b11_0100, 0b00_1000]), (0x8421, 0b00_11_01_10));
    }
}
