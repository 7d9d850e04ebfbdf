//! Transfers of the CPU backend: its device memory is host memory, so files are read into blocks without a stop.

#![allow(unsafe_code)]

use super::copy_stream::CpuEvent;
use super::memory::{CpuBuffer, CpuHostBuffer};
use crate::backend::Transfer;
use crate::{Result, invalid};

/// Shows blocks where they are.
pub struct CpuTransfer;

impl Transfer for CpuTransfer {
    type Buffer = CpuBuffer;
    type HostBuffer = CpuHostBuffer;
    type Event = CpuEvent;

    fn fill(
        &mut self,
        target: &CpuBuffer,
        offset: usize,
        bytes: usize,
        write: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        check(target, offset, bytes)?;
        // SAFETY: the run exists, and who owns the blocks lets nobody else touch it.
        write(unsafe { target.bytes_mut(offset, bytes) })
    }

    fn show(
        &mut self,
        source: &CpuBuffer,
        offset: usize,
        bytes: usize,
        read: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        check(source, offset, bytes)?;
        // SAFETY: the run exists, and who owns the blocks lets nobody write it.
        read(unsafe { source.bytes(offset, bytes) })
    }
}

fn check(buffer: &CpuBuffer, offset: usize, bytes: usize) -> Result<()> {
    match offset <= buffer.len() && bytes <= buffer.len() - offset {
        true => Ok(()),
        false => Err(invalid!("bytes {offset}+{bytes} lie outside a buffer of {}", buffer.len())),
    }
}
