//! Numbers of e4m3, by its definition: 1 bit of sign, 4 of exponent with a bias of 7, 3 of fraction, no infinities.

use std::sync::LazyLock;

/// The number of a code.
pub fn decode(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = if exponent == 0 { fraction * 2f32.powi(-6) } else { (1.0 + fraction) * 2f32.powi(exponent - 7) };
    if code >= 128 { -size } else { size }
}

/// The code of the number nearest to `value`, the even one of two; the largest for what is larger than all.
pub fn nearest(value: f32) -> u8 {
    static NUMBERS: LazyLock<[f32; 0x7f]> = LazyLock::new(|| std::array::from_fn(|code| decode(code as u8)));
    let size = value.abs();
    let above = NUMBERS.partition_point(|number| *number < size).min(0x7e);
    let below = above.saturating_sub(1);
    // Differences of numbers so near to each other have no error.
    let (to_above, to_below) = (NUMBERS[above] - size, size - NUMBERS[below]);
    let code = if to_below < to_above || to_below == to_above && below % 2 == 0 { below } else { above };
    code as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
}
