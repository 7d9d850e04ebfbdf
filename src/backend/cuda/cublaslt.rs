//! Matrix products by cuBLASLt: the fast mode, in which a row's bits depend on how many rows are computed beside it.
//!
//! The library takes another algorithm, and another order of sums, for another number of rows. So KV of this mode is no KV
//! of the exact one: [`Backend::name`](crate::backend::Backend::name), which is part of every block's identity, says which it is.
//!
//! Algorithms are asked for once per shape and kept. All that a product needs is there before it is queued, so that it can
//! be recorded as part of a CUDA graph. Products with a bias and those of quantised weights stay with our kernels, as do
//! shapes that the library has no algorithm for.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_int;
use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex};

use cudarc::driver::CudaContext;

use super::cublaslt_library::{
    ALIGNMENTS, Algorithm, COMPUTE_F32, Create, DataType, Destroy, Handle, HeuristicResult, IN_COMPUTE_TYPE, Library,
    MOST_WORKSPACE, REDUCTION_SCHEMES, Status, TRANSPOSE_A, TRANSPOSED,
};
use super::driver::driver_error;
use super::memory::{CudaBuffer, address};
use super::stream::CudaStream;
use crate::backend::{DType, GpuInfo, Tensor};
use crate::{Result, invalid};

/// Shapes whose algorithms are kept. A step has five, and a prefill may have any number of rows; when there are more all are
/// asked for anew.
const MAX_PLANS: usize = 4096;

/// Pointers are told apart by their alignment up to that.
const MAX_ALIGNMENT: u32 = 256;

/// An object of the library, given back at the end.
struct Object {
    handle: Handle,
    destroy: Destroy,
}

impl Object {
    fn create(action: &str, create: impl FnOnce(*mut Handle) -> Status, destroy: Destroy) -> Result<Self> {
        let mut handle = ptr::null_mut();
        create(&mut handle).check(action)?;
        Ok(Self { handle, destroy })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the library made it, and nobody else has it.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// What decides the algorithm of a product `x W^T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    num_tokens: usize,
    outputs: usize,
    inputs: usize,
    out_dtype: DType,
    /// Of weight, x and out.
    alignments: [u32; 3],
}

/// How a product of one shape is done. The library counts column by column, so its A is the weight, its B x, and its D out,
/// each of our rows being one of its columns.
struct Plan {
    weight: Object,
    x: Object,
    out: Object,
    algorithm: Algorithm,
}

/// What was found for each shape; `None` where the library has no algorithm.
struct Plans<P> {
    by_shape: HashMap<Shape, Option<P>>,
}

impl<P> Plans<P> {
    fn new() -> Self {
        Self { by_shape: HashMap::new() }
    }

    /// That of a shape, asked for where it is not known. All others go when there are too many.
    fn find(&mut self, shape: Shape, ask: impl FnOnce(&Shape) -> Result<Option<P>>) -> Result<Option<&P>> {
        if !self.by_shape.contains_key(&shape) {
            let found = ask(&shape)?;
            if self.by_shape.len() == MAX_PLANS {
                self.by_shape.clear();
            }
            self.by_shape.insert(shape, found);
        }
        Ok(self.by_shape.get(&shape).and_then(Option::as_ref))
    }
}

/// The library on one device.
pub(super) struct CublasLt {
    // Fields are dropped in this order.
    plans: Mutex<Plans<Plan>>,
    operation: Object,
    workspace: CudaBuffer,
    handle: Object,
    library: Library,
    dtype: DataType,
    context: Arc<CudaContext>,
}

// SAFETY: the library may be called by many threads; plans are behind a lock, the other objects are never changed.
unsafe impl Send for CublasLt {}
// SAFETY: as for `Send`.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// Loads the library, from `path` or under its own name, for products of `dtype` on this device.
    pub(super) fn load(context: &Arc<CudaContext>, info: &GpuInfo, dtype: DType, path: Option<&Path>) -> Result<Self> {
        let library = Library::load(path, info.driver_version)?;
        context.bind_to_thread().map_err(driver_error("use the device"))?;
        // SAFETY: pointers to locals, and the device is the thread's.
        let handle = Object::create("start", |handle| unsafe { (library.create)(handle) }, library.destroy)?;
        Ok(Self {
            plans: Mutex::new(Plans::new()),
            operation: transposed_product(&library)?,
            workspace: CudaBuffer::allocate(context, workspace_bytes(info))?,
            handle,
            library,
            dtype: data_type(dtype)?,
            context: Arc::clone(context),
        })
    }

    /// The library's version, as it counts.
    pub(super) fn version(&self) -> usize {
        self.library.version_number()
    }

    /// Queues `out = x W^T`, shapes checked by the caller. `false`, and nothing queued, where the library has no algorithm. All
    /// products share the workspace, so they are for one stream: the one that computes.
    pub(super) fn multiply(
        &self,
        stream: &CudaStream,
        x: &Tensor<CudaBuffer>,
        weight: &Tensor<CudaBuffer>,
        out: &Tensor<CudaBuffer>,
    ) -> Result<bool> {
        if x.rows() == 0 {
            return Ok(true);
        }
        self.context.bind_to_thread().map_err(driver_error("use the device"))?;
        let pointers = [address(weight)?, address(x)?, address(out)?];
        let shape = Shape {
            num_tokens: x.rows(),
            outputs: weight.rows(),
            inputs: weight.columns(),
            out_dtype: out.dtype(),
            alignments: pointers.map(alignment),
        };
        let mut plans = self.plans.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match plans.find(shape, |shape| self.plan(shape))? {
            Some(plan) => self.queue(stream, plan, pointers).map(|()| true),
            None => Ok(false),
        }
    }

    /// Asks for the best algorithm of a shape.
    fn plan(&self, shape: &Shape) -> Result<Option<Plan>> {
        let (inputs, outputs, num_tokens) = (shape.inputs, shape.outputs, shape.num_tokens);
        let weight = self.layout(self.dtype, inputs, outputs)?;
        let x = self.layout(self.dtype, inputs, num_tokens)?;
        let out = self.layout(data_type(shape.out_dtype)?, outputs, num_tokens)?;
        let preference = self.preference(shape)?;
        let (mut best, mut num_found): (HeuristicResult, c_int) = Default::default();
        let [weight_layout, x_layout, out_layout] = [&weight, &x, &out].map(|layout| layout.handle);
        // SAFETY: all objects live, and there is room for the one result.
        let status = unsafe {
            (self.library.heuristics)(
                self.handle.handle,
                self.operation.handle,
                weight_layout,
                x_layout,
                out_layout,
                out_layout,
                preference.handle,
                1,
                &mut best,
                &mut num_found,
            )
        };
        if status.is_unsupported() || status.is_success() && (num_found == 0 || best.state != 0) {
            tracing::warn!(?shape, "cuBLASLt has no algorithm for a matrix product; the exact kernel computes it");
            return Ok(None);
        }
        status.check(&format!("choose an algorithm for {shape:?}"))?;
        Ok(Some(Plan { weight, x, out, algorithm: best.algorithm }))
    }

    /// Numbers of `columns` rows of ours, each of `rows`.
    fn layout(&self, data_type: DataType, rows: usize, columns: usize) -> Result<Object> {
        let stride = i64::try_from(rows).map_err(|_| invalid!("rows of {rows} numbers"))?;
        // SAFETY: the pointer is to a local.
        let create = |handle: *mut Handle| unsafe {
            (self.library.create_layout)(handle, data_type, rows as u64, columns as u64, stride)
        };
        Object::create("describe a matrix", create, self.library.destroy_layout)
    }

    /// What an algorithm may use and rely on.
    fn preference(&self, shape: &Shape) -> Result<Object> {
        let Library { create_preference, destroy_preference, .. } = self.library;
        let preference = create_plain("describe what algorithms may use", create_preference, destroy_preference)?;
        let most_workspace = (self.workspace.len() as u64).to_le_bytes();
        self.prefer(&preference, MOST_WORKSPACE, &most_workspace)?;
        self.prefer(&preference, REDUCTION_SCHEMES, &IN_COMPUTE_TYPE.to_le_bytes())?;
        let [weight, x, out] = shape.alignments;
        ALIGNMENTS
            .into_iter()
            .zip([weight, x, out, out])
            .try_for_each(|(which, alignment)| self.prefer(&preference, which, &alignment.to_le_bytes()))?;
        Ok(preference)
    }

    fn prefer(&self, preference: &Object, which: u32, value: &[u8]) -> Result<()> {
        // SAFETY: the object lives, and the value has so many bytes.
        let status =
            unsafe { (self.library.set_preference)(preference.handle, which, value.as_ptr().cast(), value.len()) };
        status.check("describe what algorithms may use")
    }

    fn queue(&self, stream: &CudaStream, plan: &Plan, [weight, x, out]: [u64; 3]) -> Result<()> {
        let workspace = self.workspace.address(0, self.workspace.len())?;
        // SAFETY: all objects live; the pointers are to matrices of these layouts in buffers that live as long as work on
        // them is queued; factors are read before the call returns.
        let status = unsafe {
            (self.library.multiply)(
                self.handle.handle,
                self.operation.handle,
                &1.0,
                weight,
                plan.weight.handle,
                x,
                plan.x.handle,
                &0.0,
                out,
                plan.out.handle,
                out,
                plan.out.handle,
                &plan.algorithm,
                workspace,
                self.workspace.len(),
                stream.get().cu_stream().cast(),
            )
        };
        status.check("multiply matrices")
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // The library gives back memory of the device that is the thread's.
        self.context.record_err(self.context.bind_to_thread());
    }
}

fn create_plain(action: &str, create: Create, destroy: Destroy) -> Result<Object> {
    // SAFETY: the pointer is to a local.
    Object::create(action, |handle| unsafe { create(handle) }, destroy)
}

/// The operation `A^T B`, computed in f32.
fn transposed_product(library: &Library) -> Result<Object> {
    let action = "describe a matrix product";
    // SAFETY: the pointer is to a local.
    let create = |handle: *mut Handle| unsafe { (library.create_operation)(handle, COMPUTE_F32, DataType::F32) };
    let operation = Object::create(action, create, library.destroy_operation)?;
    let value = TRANSPOSED.to_le_bytes();
    // SAFETY: the object lives, and the value has so many bytes.
    let status = unsafe { (library.set_operation)(operation.handle, TRANSPOSE_A, value.as_ptr().cast(), value.len()) };
    status.check(action)?;
    Ok(operation)
}

/// As much as NVIDIA recommends.
fn workspace_bytes(info: &GpuInfo) -> usize {
    let (major, _) = info.compute_capability;
    if major >= 9 { 32 << 20 } else { 4 << 20 }
}

/// The largest power of two that divides an address, as far as it matters.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(MAX_ALIGNMENT.trailing_zeros())
}

fn data_type(dtype: DType) -> Result<DataType> {
    match dtype {
        DType::F32 => Ok(DataType::F32),
        DType::F16 => Ok(DataType::F16),
        DType::BF16 => Ok(DataType::Bf16),
        other => Err(invalid!("cuBLASLt does not multiply {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_asked_for_once_and_shapes_are_bounded() {
        let mut plans = Plans::new();
        let mut num_asked = 0;
        let even = |number: usize| number.is_multiple_of(2).then_some(number);
        let mut find = |num_tokens: usize| {
            let shape = Shape { num_tokens, outputs: 8, inputs: 8, out_dtype: DType::F32, alignments: [16; 3] };
            let ask = |shape: &Shape| {
                num_asked += 1;
                Ok(even(shape.num_tokens))
            };
            let found = plans.find(shape, ask).unwrap().copied();
            assert_eq!(found, even(num_tokens));
            (plans.by_shape.len(), num_asked)
        };
        let all = |find: &mut dyn FnMut(usize) -> (usize, usize)| (0..MAX_PLANS).map(find).last();
        assert_eq!(all(&mut find), Some((MAX_PLANS, MAX_PLANS)));
        assert_eq!(all(&mut find), Some((MAX_PLANS, MAX_PLANS)));
        assert_eq!(find(MAX_PLANS), (1, MAX_PLANS + 1));
        assert_eq!(find(0), (2, MAX_PLANS + 2));
    }

    #[test]
    fn alignments_are_told_apart_up_to_a_bound() {
        assert_eq!([0x1000u64, 0x1010, 0x1002, 0].map(alignment), [256, 16, 2, 256]);
    }
}
