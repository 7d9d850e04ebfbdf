//! Tensors on the device and back, with poison where nothing has been written.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

use half::{bf16, f16};
use mneme::backend::cuda::{CudaBackend, CudaBuffer, CudaMatrix, CudaStream};
use mneme::backend::{Backend, BufferCopy, DType, Device, HostTensor, StreamKind, Tensor};

use crate::support::fp8;
use crate::support::random::Random;
use crate::support::softgpu;

pub type GpuTensor = Tensor<CudaBuffer>;

/// Bytes around an output that nobody may write; a multiple of every alignment.
const GUARD_BYTES: usize = 512;
/// As bf16, f16 or f32 it is not a number, as an index it is out of range.
const POISON: u8 = 0xff;

/// A backend with a stream.
pub struct Gpu {
    pub backend: CudaBackend,
    pub stream: CudaStream,
}

/// An output: what is inside is poison until a kernel writes it, what is around stays poison.
pub struct Output {
    pub tensor: GpuTensor,
}

impl Gpu {
    pub fn new(dtype: DType) -> Self {
        Self::of(softgpu::backend(dtype))
    }

    /// With one tile for all products, one of [`Self::tiles`].
    pub fn with_tile(dtype: DType, name: &str) -> Self {
        Self::of(softgpu::backend(dtype).with_gemm_tile(name))
    }

    /// The tiles that the device has for products.
    pub fn tiles(dtype: DType) -> Vec<&'static str> {
        softgpu::backend(dtype).gemm_tiles()
    }

    /// With adapters added by the kernels that every device has.
    pub fn without_lora_clusters(dtype: DType) -> Self {
        Self::of(softgpu::backend(dtype).without_lora_clusters())
    }

    /// With products by cuBLASLt, where there is one.
    pub fn fast(dtype: DType) -> Option<Self> {
        softgpu::fast_backend(dtype).map(Self::of)
    }

    /// With attention of prompts in launches of their own.
    pub fn in_runs(dtype: DType) -> Self {
        Self::of(softgpu::backend(dtype).with_attention_in_runs())
    }

    /// With attention of prompts by candle-flash-attn, where a driver was named whose device can run it.
    #[cfg(feature = "flash-attn")]
    pub fn flash(dtype: DType) -> Option<Self> {
        softgpu::flash_backend(dtype).map(Self::of)
    }

    fn of(backend: CudaBackend) -> Self {
        let stream = backend.create_stream(StreamKind::Compute).unwrap();
        Self { backend, stream }
    }

    /// Both types that kernels are compiled for.
    pub fn both() -> [Self; 2] {
        [Self::new(DType::BF16), Self::new(DType::F16)]
    }

    pub fn dtype(&self) -> DType {
        self.backend.activation_dtype()
    }

    pub fn upload(&self, bytes: &[u8]) -> CudaBuffer {
        let mut host = self.backend.allocate_host(bytes.len()).unwrap();
        host.as_mut()[..bytes.len()].copy_from_slice(bytes);
        let buffer = self.backend.allocate(bytes.len()).unwrap();
        self.backend.upload(&self.stream, &host, &buffer, 0..bytes.len()).unwrap();
        self.synchronize();
        buffer
    }

    /// Overwrites a tensor, on the stream; the bytes are there when it returns.
    pub fn write(&self, tensor: &GpuTensor, bytes: &[u8]) {
        let source = self.upload(bytes);
        let copy = BufferCopy {
            source: &source,
            source_offset: 0,
            target: tensor.buffer(),
            target_offset: tensor.offset_bytes(),
            bytes: bytes.len(),
        };
        self.backend.copy(&self.stream, &copy).unwrap();
        self.synchronize();
    }

    pub fn synchronize(&self) {
        let event = self.backend.record(&self.stream).unwrap();
        self.backend.synchronize(&event).unwrap();
    }

    pub fn download(&self, tensor: &GpuTensor) -> Vec<u8> {
        let mut host = self.backend.allocate_host(tensor.num_bytes()).unwrap();
        self.backend.download(&self.stream, tensor, &mut host, 0).unwrap();
        self.synchronize();
        host.as_ref().to_vec()
    }

    /// `[rows, columns]` in `dtype`; the values are representable in it (see [`Gpu::numbers`]).
    pub fn tensor(&self, values: &[f32], rows: usize, columns: usize, dtype: DType) -> GpuTensor {
        assert_eq!(values.len(), rows * columns);
        Tensor::new(self.upload(&encode(values, dtype)), 0, rows, columns, dtype)
    }

    /// A tensor of activations.
    pub fn activations(&self, values: &[f32], rows: usize, columns: usize) -> GpuTensor {
        self.tensor(values, rows, columns, self.dtype())
    }

    /// `[1, N]` f32.
    pub fn vector(&self, values: &[f32]) -> GpuTensor {
        self.tensor(values, 1, values.len(), DType::F32)
    }

    /// `[rows, columns]` i32.
    pub fn indices(&self, values: &[i32], rows: usize, columns: usize) -> GpuTensor {
        Tensor::new(self.upload(bytemuck::cast_slice(values)), 0, rows, columns, DType::I32)
    }

    pub fn matrix(&self, values: &[f32], rows: usize, columns: usize) -> CudaMatrix {
        self.backend
            .load_matrix(&[host_tensor(&encode(values, self.dtype()), rows, columns, self.dtype())], None)
            .unwrap()
    }

    /// Normal numbers that are representable in the device's type.
    pub fn numbers(&self, random: &mut Random, count: usize, scale: f64) -> Vec<f32> {
        let dtype = self.dtype();
        (0..count).map(|_| round((scale * random.normal()) as f32, dtype)).collect()
    }

    /// The same on the device, `[rows, columns]`, about one in size.
    pub fn random_rows(&self, random: &mut Random, rows: usize, columns: usize) -> GpuTensor {
        self.activations(&self.numbers(random, rows * columns, 1.0), rows, columns)
    }

    /// Rows of `x` times a matrix of `outputs` rows, and a bias, as `dtype`.
    pub fn product(
        &self,
        x: &GpuTensor,
        matrix: &CudaMatrix,
        bias: Option<&GpuTensor>,
        outputs: usize,
        dtype: DType,
    ) -> Output {
        let out = self.output(x.rows(), outputs, dtype);
        self.backend.linear(&self.stream, x, matrix, bias, &out.tensor).unwrap();
        out
    }

    /// A tensor that begins its buffer, full of poison.
    pub fn poison(&self, rows: usize, columns: usize, dtype: DType) -> GpuTensor {
        let buffer = self.upload(&vec![POISON; rows * columns * dtype.block_bytes()]);
        Tensor::new(buffer, 0, rows, columns, dtype)
    }

    pub fn output(&self, rows: usize, columns: usize, dtype: DType) -> Output {
        let bytes = rows * columns * dtype.block_bytes();
        let buffer = self.upload(&vec![POISON; bytes + 2 * GUARD_BYTES]);
        Output { tensor: Tensor::new(buffer, GUARD_BYTES, rows, columns, dtype) }
    }
}

impl Output {
    /// What was written, after a look at the guards.
    pub fn bytes(&self, gpu: &Gpu) -> Vec<u8> {
        let len = self.tensor.num_bytes();
        let all = Tensor::new(self.tensor.buffer().clone(), 0, 1, (len + 2 * GUARD_BYTES) / 2, DType::BF16);
        let all = gpu.download(&all);
        let guards = all[..GUARD_BYTES].iter().chain(&all[GUARD_BYTES + len..]);
        assert!(guards.into_iter().all(|byte| *byte == POISON), "a kernel wrote beside its output");
        all[GUARD_BYTES..GUARD_BYTES + len].to_vec()
    }

    pub fn numbers(&self, gpu: &Gpu) -> Vec<f32> {
        decode(&self.bytes(gpu), self.tensor.dtype())
    }

    pub fn indices(&self, gpu: &Gpu) -> Vec<i32> {
        words(&self.bytes(gpu)).map(i32::from_le_bytes).collect()
    }
}

/// The nearest number of a type.
pub fn round(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::F8E4M3 => fp8::decode(fp8::nearest(value)),
        _ => value,
    }
}

/// Half the distance of two numbers of a type near one: what rounding may change, relatively.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-24),
    }
}

pub fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| match dtype {
            DType::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            DType::F8E4M3 => vec![fp8::nearest(*value)],
            _ => value.to_le_bytes().to_vec(),
        })
        .collect()
}

pub fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let two = |bytes: &[u8]| [bytes[0], bytes[1]];
    match dtype {
        DType::BF16 => bytes.chunks_exact(2).map(|x| bf16::from_le_bytes(two(x)).to_f32()).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|x| f16::from_le_bytes(two(x)).to_f32()).collect(),
        DType::F8E4M3 => bytes.iter().map(|code| fp8::decode(*code)).collect(),
        _ => words(bytes).map(f32::from_le_bytes).collect(),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]])
}

pub fn host_tensor(bytes: &[u8], rows: usize, columns: usize, dtype: DType) -> HostTensor {
    HostTensor::new("test", Arc::new(bytes.to_vec()), 0..bytes.len(), dtype, rows, columns).unwrap()
}

/// Compares with numbers computed in f64: each may be off by `relative` of itself and `absolute`.
pub fn assert_close(what: &str, found: &[f32], wanted: &[f64], relative: f64, absolute: f64) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (at, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let off = (f64::from(*found) - wanted).abs();
        assert!(off <= absolute + relative * wanted.abs(), "{what}: number {at} is {found}, wanted {wanted}");
    }
}

/// A backend of each type, this test's alone while it has them: calls of one backend share memory between kernels.
pub struct Lent(Option<[Gpu; 2]>);

/// Those that no test has at the moment: loading the kernels takes a while.
static FREE: Mutex<Vec<[Gpu; 2]>> = Mutex::new(Vec::new());

fn free() -> MutexGuard<'static, Vec<[Gpu; 2]>> {
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

pub fn lend() -> Lent {
    let known = free().pop();
    Lent(Some(known.unwrap_or_else(Gpu::both)))
}

impl Deref for Lent {
    type Target = [Gpu; 2];

    fn deref(&self) -> &[Gpu; 2] {
        self.0.as_ref().unwrap()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        free().extend(self.0.take());
    }
}
