//! Launches: arguments in place, so that a step allocates nothing.

#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::driver::{CudaFunction, result};

use super::driver::driver_error;
use super::memory::{CudaBuffer, address};
use super::stream::CudaStream;
use crate::backend::Tensor;
use crate::{Result, invalid};

/// More than any kernel takes.
const MAX_ARGUMENTS: usize = 32;

/// Blocks and threads of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// Blocks in x, y and z.
    pub(super) blocks: (usize, usize, usize),
    /// Threads of a block.
    pub(super) threads: usize,
    /// Dynamic shared memory of a block.
    pub(super) shared_bytes: usize,
}

/// The arguments of one launch, in the order of the kernel's parameters. Each lies in eight bytes, of which the driver
/// reads as many as the parameter has, the low ones first.
pub(super) struct Arguments<'a> {
    values: [u64; MAX_ARGUMENTS],
    len: usize,
    /// The last argument, where that is a structure.
    structure: Option<&'a [u64]>,
}

impl<'a> Arguments<'a> {
    pub(super) fn new() -> Self {
        Self { values: [0; MAX_ARGUMENTS], len: 0, structure: None }
    }

    /// A pointer to a tensor, all of which lies inside its buffer.
    pub(super) fn tensor(self, tensor: &Tensor<CudaBuffer>) -> Result<Self> {
        Ok(self.push(address(tensor)?))
    }

    /// A pointer to a tensor, or null.
    pub(super) fn optional(self, tensor: Option<&Tensor<CudaBuffer>>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.tensor(tensor),
            None => Ok(self.push(0)),
        }
    }

    /// A pointer to the beginning of a buffer.
    pub(super) fn buffer(self, buffer: &CudaBuffer) -> Result<Self> {
        let start = buffer.address(0, buffer.len())?;
        Ok(self.push(start))
    }

    /// An `int`.
    pub(super) fn int(self, value: usize) -> Result<Self> {
        let value = i32::try_from(value).map_err(|_| invalid!("{value} does not fit into a kernel's int"))?;
        Ok(self.push(value as u64))
    }

    /// A `long long` or `size_t`.
    pub(super) fn long(self, value: usize) -> Self {
        self.push(value as u64)
    }

    /// A `float`.
    pub(super) fn float(self, value: f32) -> Self {
        self.push(u64::from(value.to_bits()))
    }

    /// A structure by value, the kernel's last parameter; as large as that is.
    pub(super) fn structure(self, words: &'a [u64]) -> Self {
        Self { structure: Some(words), ..self }
    }

    fn push(mut self, value: u64) -> Self {
        self.values[self.len] = value;
        self.len += 1;
        self
    }

    /// Queues the kernel. Nothing is launched for an empty grid.
    ///
    /// # Safety
    /// The arguments are those of the kernel in number, order and type, and what it reads and writes under them lies
    /// inside their buffers.
    pub(super) unsafe fn launch(
        mut self,
        name: &str,
        stream: &CudaStream,
        function: &CudaFunction,
        grid: Grid,
    ) -> Result<()> {
        let (x, y, z) = grid.blocks;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let narrow =
            |value: usize| u32::try_from(value).map_err(|_| invalid!("{name}: a grid of {grid:?} is too large"));
        let blocks = (narrow(x)?, narrow(y)?, narrow(z)?);
        let (threads, shared_bytes) = (narrow(grid.threads)?, narrow(grid.shared_bytes)?);
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGUMENTS + 1];
        for (pointer, value) in pointers.iter_mut().zip(&mut self.values[..self.len]) {
            *pointer = std::ptr::from_mut(value).cast();
        }
        let (function, stream) = (function.cu_function(), stream.get().cu_stream());
        if let Some(structure) = self.structure {
            pointers[self.len] = structure.as_ptr().cast_mut().cast();
            self.len += 1;
        }
        let pointers = &mut pointers[..self.len];
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        let launched =
            unsafe { result::launch_kernel(function, blocks, (threads, 1, 1), shared_bytes, stream, pointers) };
        launched.map_err(|error| driver_error(&format!("launch {name} on {grid:?}"))(error))
    }
}

/// Two neighbouring `int`s of a structure.
pub(super) fn ints(first: usize, second: usize) -> Result<u64> {
    let int = |value: usize| i32::try_from(value).map_err(|_| invalid!("{value} does not fit into a kernel's int"));
    Ok(int(first)? as u64 | (int(second)? as u64) << 32)
}
