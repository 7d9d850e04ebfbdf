//! Conversions between number formats, written so that the lane loops vectorise.

use super::isa::{NumType, Rounding};

/// f16 bits to f32; exact. After the well-known trick of scaling by a power of two.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let scaled = f32::from_bits(magnitude) * f32::from_bits((254 - 15) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0xff << 23 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | sign)
}

/// f32 to f16 bits, nearest even; a NaN stays one.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    half::f16::from_f32_const(value).to_bits()
}

/// f32 to bf16 bits, nearest even; every NaN becomes 0x7fff as on the device.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if value.is_nan() { 0x7fff } else { rounded }
}

/// A number on its way from one type to another.
#[derive(Clone, Copy)]
enum Number {
    Int(i128),
    Float(f64),
}

fn read(bits: u64, from: NumType) -> Number {
    match from {
        NumType::U8 => Number::Int(i128::from(bits as u8)),
        NumType::U16 => Number::Int(i128::from(bits as u16)),
        NumType::U32 => Number::Int(i128::from(bits as u32)),
        NumType::U64 => Number::Int(i128::from(bits)),
        NumType::S8 => Number::Int(i128::from(bits as i8)),
        NumType::S16 => Number::Int(i128::from(bits as i16)),
        NumType::S32 => Number::Int(i128::from(bits as i32)),
        NumType::S64 => Number::Int(i128::from(bits as i64)),
        NumType::F16 => Number::Float(f64::from(f16_to_f32(bits as u16))),
        NumType::Bf16 => Number::Float(f64::from(f32::from_bits((bits as u32) << 16))),
        NumType::F32 => Number::Float(f64::from(f32::from_bits(bits as u32))),
        NumType::F64 => Number::Float(f64::from_bits(bits)),
    }
}

fn round(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => value,
        Rounding::NearestInt => value.round_ties_even(),
        Rounding::ZeroInt => value.trunc(),
        Rounding::DownInt => value.floor(),
        Rounding::UpInt => value.ceil(),
    }
}

fn range(to: NumType) -> (i128, i128) {
    let bits = to.bits();
    if to.is_signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) }
}

/// `cvt` for any pair of types: register bits in, register bits out.
///
/// Float to integer saturates and NaN gives 0; integer to integer wraps unless `saturate`. A result narrower than its
/// register is sign- or zero-extended to 64 bits by its own type.
pub fn convert(bits: u64, from: NumType, to: NumType, rounding: Rounding, saturate: bool) -> u64 {
    let number = read(bits, from);
    if to.is_float() {
        let value = match number {
            Number::Int(int) if to == NumType::F32 => f64::from(int as f32),
            Number::Int(int) => int as f64,
            Number::Float(float) => round(float, rounding),
        };
        let value = if !saturate {
            value
        } else if value.is_nan() {
            0.0
        } else {
            value.clamp(0.0, 1.0)
        };
        return match to {
            NumType::F64 => value.to_bits(),
            NumType::F32 => u64::from((value as f32).to_bits()),
            NumType::F16 => u64::from(half::f16::from_f64(value).to_bits()),
            _ => u64::from(half::bf16::from_f64(value).to_bits()),
        };
    }
    let (low, high) = range(to);
    let int = match number {
        Number::Int(int) if saturate => int.clamp(low, high),
        Number::Int(int) => int,
        Number::Float(float) => (round(float, rounding) as i128).clamp(low, high),
    };
    let cut = int & ((1i128 << to.bits()) - 1);
    let negative = to.is_signed() && cut >> (to.bits() - 1) & 1 == 1;
    (if negative { cut - (1i128 << to.bits()) } else { cut }) as u64
}
