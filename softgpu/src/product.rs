//! Matrix products as cuBLASLt's algorithms give them: right within rounding, and another sum for every number of columns.
//!
//! The library splits sums of products and adds the parts up, in a way that depends on the algorithm and on the shape. Here
//! the algorithm says how many parts there are and the number of columns where they begin, and a part keeps 14 bits, which is
//! coarser than any device: so a small test already sees that a program relies on equal bits.

use crate::device::Device;
use crate::fault::{Fault, FaultKind};
use crate::memory::Accessor;
use crate::work::{source, take};
use half::{bf16, f16};

/// The low bits of an f32 that a part does not keep.
const LOST_BITS: u32 = 0x3ff;

/// What the workspace holds afterwards: nobody is to rely on it.
const LEFT_BEHIND: u8 = 0xdb;

/// A type of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// f32.
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
}

/// A matrix, column after column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Its numbers.
    pub numbers: Numbers,
    /// Numbers of a column.
    pub rows: u64,
    /// How many columns.
    pub columns: u64,
    /// Numbers from one column to the next.
    pub stride: u64,
}

/// `d = alpha a^T b`, shapes and alignments checked.
#[derive(Clone, Debug)]
pub struct Product {
    /// `[k, m]` and its address.
    pub a: (Matrix, u64),
    /// `[k, n]` and its address.
    pub b: (Matrix, u64),
    /// `[m, n]` and its address.
    pub d: (Matrix, u64),
    /// The factor.
    pub alpha: f32,
    /// Parts of a sum of k products.
    pub num_parts: u64,
    /// The address of what the algorithm works in, and its bytes.
    pub workspace: (u64, u64),
}

impl Numbers {
    /// Bytes of a number.
    pub fn bytes(self) -> u64 {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        match self {
            Self::F32 => {
                bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
            }
            Self::F16 => pairs.map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            Self::Bf16 => pairs.map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        }
    }

    fn encode(self, numbers: &[f32]) -> Vec<u8> {
        let numbers = numbers.iter().copied();
        match self {
            Self::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
            Self::F16 => numbers.flat_map(|number| f16::from_f32(number).to_le_bytes()).collect(),
            Self::Bf16 => numbers.flat_map(|number| bf16::from_f32(number).to_le_bytes()).collect(),
        }
    }
}

impl Matrix {
    fn column_bytes(&self) -> u64 {
        self.rows * self.numbers.bytes()
    }

    fn column(&self, address: u64, column: u64) -> u64 {
        address + column * self.stride * self.numbers.bytes()
    }

    /// All numbers, column after column.
    fn read(&self, address: u64, device: &Device, by: &Accessor) -> Result<Vec<f32>, Fault> {
        let mut numbers = Vec::with_capacity((self.rows * self.columns) as usize);
        for start in (0..self.columns).map(|column| self.column(address, column)) {
            let allocation = source(device, start, self.column_bytes(), by)?;
            let offset = start - allocation.base;
            if !allocation.is_init(offset, self.column_bytes()) {
                let what =
                    format!("cublasLtMatmul reads at {start:#x} what was never written, {}", allocation.describe());
                return Err(Fault::new(FaultKind::Uninitialised, what));
            }
            // SAFETY: the range was resolved, and who writes to it at the same time is reported.
            let bytes = unsafe { std::slice::from_raw_parts(allocation.data(offset), self.column_bytes() as usize) };
            numbers.extend(self.numbers.decode(bytes));
        }
        Ok(numbers)
    }

    fn write(&self, address: u64, numbers: &[f32], device: &Device, by: &Accessor) -> Result<(), Fault> {
        for (column, numbers) in numbers.chunks_exact(self.rows as usize).enumerate() {
            let start = self.column(address, column as u64);
            write(device, start, &self.numbers.encode(numbers), by)?;
        }
        Ok(())
    }
}

fn write(device: &Device, start: u64, bytes: &[u8], by: &Accessor) -> Result<(), Fault> {
    let allocation = take(device, start, bytes.len() as u64, by)?;
    let offset = start - allocation.base;
    // SAFETY: the range was resolved.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), allocation.data(offset), bytes.len()) };
    allocation.mark_init(offset, bytes.len() as u64);
    Ok(())
}

/// Where the parts of a sum of `k` products end, of a matrix of so many columns.
pub fn ends(k: usize, num_parts: usize, num_columns: usize) -> Vec<usize> {
    let len = k.div_ceil(num_parts.max(1));
    let first = 1 + num_columns % len;
    (first..k).step_by(len).chain([k]).collect()
}

/// A row times a column, added up in parts that end there.
pub fn sum(row: &[f32], column: &[f32], ends: &[usize]) -> f32 {
    let (mut sum, mut start) = (0.0, 0);
    for end in ends {
        let products = row[start..*end].iter().zip(&column[start..*end]).map(|(a, b)| a * b);
        let part: f32 = products.fold(0.0, |sum, product| sum + product);
        sum += f32::from_bits(part.to_bits() & !LOST_BITS);
        start = *end;
    }
    sum
}

impl Product {
    /// Does it.
    ///
    /// # Errors
    /// What a checker found.
    pub fn run(&self, device: &Device, by: &Accessor) -> Result<(), Fault> {
        let ((a, at_a), (b, at_b), (d, at_d)) = (self.a, self.b, self.d);
        let (rows, columns) = (a.read(at_a, device, by)?, b.read(at_b, device, by)?);
        let (workspace, bytes) = self.workspace;
        if bytes > 0 {
            write(device, workspace, &vec![LEFT_BEHIND; bytes as usize], by)?;
        }
        let k = a.rows as usize;
        let ends = ends(k, self.num_parts as usize, b.columns as usize);
        let dot = |column| rows.chunks_exact(k).map(move |row| (row, column));
        let pairs = columns.chunks_exact(k).flat_map(dot);
        let numbers: Vec<f32> = pairs.map(|(row, column)| self.alpha * sum(row, column, &ends)).collect();
        d.write(at_d, &numbers, device, by)
    }
}
