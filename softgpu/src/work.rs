//! What a stream can be asked to do, and doing it.

use crate::device::Device;
use crate::exec::launch::Launch;
use crate::fault::{Fault, FaultKind};
use crate::memory::{Accessor, Allocation};
use crate::module::Function;
use crate::pinned::digest;
use crate::product::Product;
use crate::report;
use std::ffi::c_void;
use std::sync::Arc;

/// A host function with its argument, as `cuLaunchHostFunc` takes it.
pub type HostFunction = unsafe extern "C" fn(*mut c_void);

/// Where a copy to the device takes its bytes from.
#[derive(Clone, Debug)]
pub enum HostSource {
    /// Copied when the call was made, as the driver does with pageable memory.
    Snapshot(Arc<[u8]>),
    /// Page-locked memory, read when the copy runs; with its digest at the call, if it had to stay the same.
    Pinned(usize, Option<u64>),
    /// Memory read when a graph runs.
    Live(usize),
}

/// A copy's target in host memory.
#[derive(Clone, Copy, Debug)]
pub struct HostTarget {
    /// Address.
    pub start: usize,
    /// Whether [`crate::pinned::Pinned`] tracks it.
    pub is_pinned: bool,
}

/// One operation.
#[derive(Clone, Debug)]
pub enum Work {
    /// A kernel.
    Launch {
        /// The kernel.
        function: Arc<Function>,
        /// Blocks, threads of a block, dynamic shared bytes.
        shape: ([u32; 3], [u32; 3], u32),
        /// Parameter buffer.
        params: Arc<[u8]>,
    },
    /// A matrix product of the library.
    Product(Product),
    /// Host to device.
    ToDevice(HostSource, u64, u64),
    /// Device to host: source address, target, bytes.
    ToHost(u64, HostTarget, u64),
    /// Device to device: source, target, bytes.
    Copy(u64, u64, u64),
    /// `count` elements of `width` bytes from `target`.
    Fill {
        /// First address.
        target: u64,
        /// The element.
        value: u32,
        /// Its bytes: 1, 2 or 4.
        width: u64,
        /// How many.
        count: u64,
    },
    /// End of an allocation.
    Free(u64),
    /// A function of the program, its argument as an address.
    Host(HostFunction, usize),
    /// Nothing; events and waits are positions of markers.
    Marker,
}

impl Work {
    /// Does it; a kernel on so many threads at most.
    ///
    /// # Errors
    /// What a checker found.
    pub fn run(&self, device: &Device, by: Accessor, threads: usize) -> Result<(), Fault> {
        match self {
            Self::Launch { function, shape, params } => {
                let seed = device.next_seed();
                let mut by = by;
                by.launch = by.stamp;
                let launch = Launch::new(&function.kernel, &device.memory, *shape, params, by, seed, device.simd);
                report::add(&function.kernel.name, launch.run(threads)?);
                Ok(())
            }
            Self::Free(address) => device.memory.free(*address),
            Self::Host(function, argument) => {
                // SAFETY: the program promised that the function may be called with this argument.
                unsafe { function(*argument as *mut c_void) };
                Ok(())
            }
            Self::Marker => Ok(()),
            _ => self.touch(device, &by),
        }
    }

    /// What touches memory without a kernel.
    fn touch(&self, device: &Device, by: &Accessor) -> Result<(), Fault> {
        let _in_use = device.memory.in_use();
        match self {
            Self::Product(product) => product.run(device, by),
            Self::ToDevice(source, target, bytes) => to_device(device, source, *target, *bytes, by),
            Self::ToHost(source, target, bytes) => to_host(device, *source, *target, *bytes, by),
            Self::Copy(source, target, bytes) => copy(device, *source, *target, *bytes, by),
            Self::Fill { target, value, width, count } => fill(device, *target, *value, *width, *count, by),
            Self::Launch { .. } | Self::Free(_) | Self::Host(..) | Self::Marker => Ok(()),
        }
    }

    /// Takes back what was noted when the work was queued; it has run or was dropped.
    pub fn settle(&self, device: &Device) {
        match self {
            Self::ToDevice(HostSource::Pinned(start, _), _, bytes) => device.pinned.end(*start, *bytes as usize, false),
            Self::ToHost(_, target, bytes) if target.is_pinned => {
                device.pinned.end(target.start, *bytes as usize, true);
            }
            _ => {}
        }
    }
}

/// What is going to be written, unless it must not be.
pub(crate) fn take(device: &Device, address: u64, bytes: u64, by: &Accessor) -> Result<&'static Allocation, Fault> {
    let allocation = device.memory.resolve(address, bytes)?;
    if bytes > 0 {
        allocation.note_write(address - allocation.base, bytes, by, |_| false)?;
    }
    // SAFETY: allocations are never dropped (`Memory` leaks their records).
    Ok(unsafe { &*std::ptr::from_ref(allocation) })
}

/// What is going to be read, unless it must not be.
pub(crate) fn source(device: &Device, address: u64, bytes: u64, by: &Accessor) -> Result<&'static Allocation, Fault> {
    let allocation = device.memory.resolve(address, bytes)?;
    if bytes > 0 {
        allocation.note_read(address - allocation.base, bytes, by, |_| false)?;
    }
    // SAFETY: as in `take`.
    Ok(unsafe { &*std::ptr::from_ref(allocation) })
}

fn to_device(device: &Device, from: &HostSource, target: u64, bytes: u64, by: &Accessor) -> Result<(), Fault> {
    let allocation = take(device, target, bytes, by)?;
    let start = match from {
        HostSource::Snapshot(snapshot) => snapshot.as_ptr(),
        HostSource::Pinned(start, _) | HostSource::Live(start) => *start as *const u8,
    };
    if let HostSource::Pinned(start, Some(before)) = from {
        // SAFETY: the region is not freed while the copy is queued.
        let now = digest(unsafe { std::slice::from_raw_parts(*start as *const u8, bytes as usize) });
        if now != *before {
            let what = format!(
                "{bytes} bytes of page-locked memory at {start:#x} changed between the copy's call and its run"
            );
            return Err(Fault::new(FaultKind::HostBuffer, what));
        }
    }
    let offset = target - allocation.base;
    // SAFETY: the source has `bytes` bytes by the call's contract, the target was resolved.
    unsafe { std::ptr::copy(start, allocation.data(offset), bytes as usize) };
    allocation.mark_init(offset, bytes);
    Ok(())
}

fn to_host(device: &Device, from: u64, target: HostTarget, bytes: u64, by: &Accessor) -> Result<(), Fault> {
    let allocation = source(device, from, bytes, by)?;
    let offset = from - allocation.base;
    if !allocation.is_init(offset, bytes) {
        let at = allocation.first_uninit(offset..offset + bytes).unwrap_or(offset);
        let what = format!(
            "copy to the host reads address {:#x}, never written, in {}",
            allocation.base + at,
            allocation.describe()
        );
        return Err(Fault::new(FaultKind::Uninitialised, what));
    }
    // SAFETY: the source was resolved, the target has `bytes` bytes by the call's contract.
    unsafe { std::ptr::copy(allocation.data(offset), target.start as *mut u8, bytes as usize) };
    Ok(())
}

/// Unwritten bytes stay unwritten in the copy: only reading them is wrong.
fn copy(device: &Device, from: u64, target: u64, bytes: u64, by: &Accessor) -> Result<(), Fault> {
    let (a, b) = (source(device, from, bytes, by)?, take(device, target, bytes, by)?);
    // SAFETY: both ranges were resolved; `copy` allows overlap.
    unsafe { std::ptr::copy(a.data(from - a.base), b.data(target - b.base), bytes as usize) };
    b.copy_init(target - b.base, a, from - a.base, bytes);
    Ok(())
}

fn fill(device: &Device, target: u64, value: u32, width: u64, count: u64, by: &Accessor) -> Result<(), Fault> {
    if !target.is_multiple_of(width) {
        return Err(Fault::new(FaultKind::Misaligned, format!("memset of {width}-byte elements at {target:#x}")));
    }
    let is_untouched = device.memory.resolve(target, width * count)?.is_untouched();
    let allocation = take(device, target, width * count, by)?;
    let (offset, value) = (target - allocation.base, value.to_le_bytes());
    // Memory that nobody has written to is zeros already, and costs the host nothing.
    if !is_untouched || value != [0; 4] {
        // SAFETY: the range was resolved.
        let bytes = unsafe { std::slice::from_raw_parts_mut(allocation.data(offset), (width * count) as usize) };
        bytes.chunks_exact_mut(width as usize).for_each(|element| element.copy_from_slice(&value[..width as usize]));
    }
    allocation.mark_init(offset, width * count);
    Ok(())
}
