//! Payloads: what they are, how they are combined, and where they lie in tensors and KV blocks.

use super::super::KvLayer;
use super::SimBuffer;
use super::device::SimTensor;

pub(super) const PAYLOAD_BYTES: usize = 8;

/// Combines two payloads (the finaliser of SplitMix64 over their combination).
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is stored of a token with payload `payload` at position `positions`; and of a stored token that is moved by so
/// many positions, because rotations add up: `rotated(rotated(x, a), b) == rotated(x, a + b)`.
pub fn rotated(payload: u64, positions: i64) -> u64 {
    payload.wrapping_add((positions as u64).wrapping_mul(0xa076_1d64_78bd_642f))
}

/// How far a freshly computed token is from the stored one: nothing when they are the same, else a number in [1, 2) that
/// depends on both.
pub fn deviation(fresh: u64, stored: u64) -> f32 {
    if fresh == stored { 0.0 } else { 1.0 + (mix(fresh, stored) >> 41) as f32 / (1u64 << 23) as f32 }
}

pub(super) fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + PAYLOAD_BYTES].try_into().expect("eight bytes"))
}

pub(super) fn write_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + PAYLOAD_BYTES].copy_from_slice(&value.to_le_bytes());
}

pub(super) fn payloads(tensor: &SimTensor) -> Vec<u64> {
    let bytes = tensor.buffer().lock();
    (0..tensor.rows()).map(|row| read_u64(&bytes, tensor.row(row).offset_bytes())).collect()
}

pub(super) fn set_payloads(tensor: &SimTensor, values: impl IntoIterator<Item = u64>) {
    let mut bytes = tensor.buffer().lock();
    for (row, value) in values.into_iter().enumerate() {
        write_u64(&mut bytes, tensor.row(row).offset_bytes(), value);
    }
}

pub(super) fn indices(tensor: &SimTensor) -> Vec<i32> {
    let bytes = tensor.buffer().lock();
    let start = tensor.offset_bytes();
    bytes[start..start + tensor.num_bytes()]
        .chunks_exact(4)
        .map(|word| i32::from_le_bytes(word.try_into().expect("four bytes")))
        .collect()
}

/// Payloads lie `[layer][token]` at the beginning of a block.
pub(super) fn payload_offset(kv: &KvLayer<'_, SimBuffer>, slot: usize) -> usize {
    let block_size = kv.layout.block_size();
    let (block, token) = (slot / block_size, slot % block_size);
    let within = (kv.layer * block_size + token) * PAYLOAD_BYTES;
    assert!(within + PAYLOAD_BYTES <= kv.layout.block_bytes(), "the double needs room for one payload per token");
    block * kv.layout.block_bytes() + within
}
