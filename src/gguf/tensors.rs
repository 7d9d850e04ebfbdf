//! The tensor table of a GGUF header: names, shapes, types and where the bytes are.

use std::collections::HashMap;
use std::ops::Range;

use super::cursor::Cursor;
use crate::backend::DType;
use crate::{Result, malformed, unsupported};

const MAX_TENSORS: usize = 1 << 17;
const MAX_NAME_BYTES: usize = 1024;
const MAX_DIMENSIONS: u32 = 4;
const LEAST_INFO_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// One row of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Extents, fastest-varying first (ggml's order: `[columns, rows, ...]`).
    pub dims: Vec<usize>,
    /// How its numbers are stored.
    pub dtype: DType,
    /// Where its bytes lie in the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Number of columns: the contiguous extent.
    pub fn columns(&self) -> usize {
        self.dims[0]
    }

    /// Number of rows: the product of all other extents, 1 for a vector.
    pub fn rows(&self) -> usize {
        self.dims[1..].iter().product()
    }
}

/// Reads `num_tensors` rows, their ranges still relative to the data section.
pub(super) fn parse(cursor: &mut Cursor<'_>, num_tensors: usize) -> Result<HashMap<String, TensorInfo>> {
    if num_tensors > MAX_TENSORS || num_tensors > cursor.remaining() / LEAST_INFO_BYTES {
        return Err(malformed!("GGUF: {num_tensors} tensors are more than the file can hold"));
    }
    let mut tensors = HashMap::new();
    for _ in 0..num_tensors {
        let name = cursor.text(MAX_NAME_BYTES, "a tensor name")?;
        let info = parse_info(cursor, name)?;
        if tensors.insert(name.to_owned(), info).is_some() {
            return Err(malformed!("GGUF: tensor {name:?} occurs twice"));
        }
    }
    Ok(tensors)
}

fn parse_info(cursor: &mut Cursor<'_>, name: &str) -> Result<TensorInfo> {
    let num_dims = cursor.u32(name)?;
    if !(1..=MAX_DIMENSIONS).contains(&num_dims) {
        return Err(malformed!("GGUF: tensor {name:?} has {num_dims} dimensions, wanted 1 to {MAX_DIMENSIONS}"));
    }
    let mut dims = Vec::with_capacity(num_dims as usize);
    for _ in 0..num_dims {
        dims.push(parse_extent(cursor.u64(name)?, name)?);
    }
    let dtype = dtype_from_code(cursor.u32(name)?, name)?;
    let num_bytes = size_bytes(&dims, dtype, name)?;
    let offset = usize::try_from(cursor.u64(name)?).ok();
    let range = offset.and_then(|start| Some(start..start.checked_add(num_bytes)?));
    let range = range.ok_or_else(|| malformed!("GGUF: tensor {name:?}: its offset overflows"))?;
    Ok(TensorInfo { dims, dtype, range })
}

fn parse_extent(extent: u64, name: &str) -> Result<usize> {
    match usize::try_from(extent) {
        Ok(extent) if extent > 0 => Ok(extent),
        _ => Err(malformed!("GGUF: tensor {name:?} has a dimension of {extent}")),
    }
}

fn size_bytes(dims: &[usize], dtype: DType, name: &str) -> Result<usize> {
    let rows = dims[1..].iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
    let total = dtype.row_bytes(dims[0]).zip(rows).and_then(|(row, rows)| row.checked_mul(rows));
    total.ok_or_else(|| {
        let block = dtype.block_elements();
        malformed!("GGUF: tensor {name:?}: {dims:?} of {dtype} overflows or is no multiple of {block} columns")
    })
}

/// Moves the ranges behind `data_start` and checks that they are aligned, inside the file and do not overlap.
pub(super) fn place(
    tensors: &mut HashMap<String, TensorInfo>,
    data_start: usize,
    alignment: usize,
    file_bytes: usize,
) -> Result<()> {
    for (name, info) in tensors.iter_mut() {
        let Range { start, end } = info.range;
        if start % alignment != 0 {
            return Err(malformed!("GGUF: tensor {name:?} starts at {start}, which is not a multiple of {alignment}"));
        }
        let moved = data_start.checked_add(end).filter(|end| *end <= file_bytes);
        let end = moved.ok_or_else(|| {
            let wanted = end as u128 + data_start as u128;
            malformed!("GGUF: tensor {name:?} ends at byte {wanted} of a file of {file_bytes}; the file is cut short")
        })?;
        info.range = data_start + start..end;
    }
    check_disjoint(tensors)
}

fn check_disjoint(tensors: &HashMap<String, TensorInfo>) -> Result<()> {
    let mut placed: Vec<_> = tensors.iter().map(|(name, info)| (info.range.start, info.range.end, name)).collect();
    placed.sort_unstable();
    for pair in placed.windows(2) {
        let [(_, end, first), (start, _, second)] = pair else { continue };
        if start < end {
            return Err(malformed!("GGUF: tensors {first:?} and {second:?} share bytes"));
        }
    }
    Ok(())
}

fn dtype_from_code(code: u32, name: &str) -> Result<DType> {
    Ok(match code {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        12 => DType::Q4K,
        13 => DType::Q5K,
        14 => DType::Q6K,
        26 => DType::I32,
        30 => DType::BF16,
        other => {
            let known = "f32, f16, bf16, i32, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k";
            let found = type_name(other);
            return Err(unsupported!(
                "GGUF: tensor {name:?} has type {found}; this build reads {known}; quantise the model to one of those"
            ));
        }
    })
}

/// ggml's name of a type this build does not read.
fn type_name(code: u32) -> String {
    let name = match code {
        9 => "q8_1",
        10 => "q2_k",
        11 => "q3_k",
        15 => "q8_k",
        16 => "iq2_xxs",
        17 => "iq2_xs",
        18 => "iq3_xxs",
        19 => "iq1_s",
        20 => "iq4_nl",
        21 => "iq3_s",
        22 => "iq2_s",
        23 => "iq4_xs",
        24 => "i8",
        25 => "i16",
        27 => "i64",
        28 => "f64",
        29 => "iq1_m",
        34 => "tq1_0",
        35 => "tq2_0",
        39 => "mxfp4",
        _ => return format!("number {code}"),
    };
    format!("{name} (number {code})")
}
