//! A loaded module: its variables in device memory, its kernels decoded.

use crate::capability::capability;
use crate::decode::decode;
use crate::exec::isa::{Kernel, SHARED_WINDOW};
use crate::memory::Memory;
use crate::ptx::syntax::{Init, Space, Var};
use crate::ptx::{self, PtxError};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex};

/// Dynamic shared memory that a kernel may use without asking, bytes.
pub const DEFAULT_SHARED: u32 = 48 << 10;

/// The kernels of texts that were loaded before: a test program loads the same ones for every engine. What has variables is
/// decoded for their addresses, and not kept.
static KNOWN: LazyLock<Mutex<KernelsByText>> = LazyLock::new(Mutex::default);
type KernelsByText = HashMap<Box<str>, Vec<Arc<Kernel>>>;
/// Blocks of a cluster that every device with clusters has room for.
const MAX_CLUSTER: u32 = 8;
/// Texts that are kept.
const MAX_KNOWN: usize = 64;

/// A kernel with its settings.
#[derive(Debug)]
pub struct Function {
    /// The decoded kernel.
    pub kernel: Arc<Kernel>,
    /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
    pub max_dynamic_shared: AtomicU32,
}

impl Function {
    fn new(kernel: Arc<Kernel>) -> Self {
        let allowed = DEFAULT_SHARED.saturating_sub(kernel.static_shared);
        Self { kernel, max_dynamic_shared: AtomicU32::new(allowed) }
    }

    /// Why a launch of this shape is not allowed, or `None`.
    pub fn refuse(&self, grid: [u32; 3], block: [u32; 3], dynamic_shared: u32) -> Option<String> {
        let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
        let name = &self.kernel.name;
        let limit = self.max_dynamic_shared.load(Relaxed);
        if grid.contains(&0) || block.contains(&0) {
            return Some(format!("kernel {name}: grid {grid:?} and block {block:?} must not contain 0"));
        }
        if grid[1] > 65535 || grid[2] > 65535 || grid[0] > i32::MAX as u32 {
            return Some(format!("kernel {name}: grid {grid:?} exceeds (2147483647, 65535, 65535)"));
        }
        if threads > 1024 || block[2] > 64 {
            return Some(format!("kernel {name}: block {block:?} has {threads} threads, at most 1024 (64 in z)"));
        }
        if self.kernel.max_threads.is_some_and(|max| threads > u64::from(max)) {
            return Some(format!(
                "kernel {name}: {threads} threads exceed its __launch_bounds__ {:?}",
                self.kernel.max_threads
            ));
        }
        if self.kernel.required_threads.is_some_and(|wanted| wanted != block) {
            return Some(format!("kernel {name}: block {block:?}, it requires {:?}", self.kernel.required_threads));
        }
        let cluster = self.kernel.cluster;
        if self.kernel.cluster_size() > MAX_CLUSTER || (0..3).any(|axis| !grid[axis].is_multiple_of(cluster[axis])) {
            return Some(format!(
                "kernel {name}: grid {grid:?} in clusters of {cluster:?} blocks, which must divide it and be {MAX_CLUSTER} at most"
            ));
        }
        if dynamic_shared > limit {
            return Some(format!(
                "kernel {name}: {dynamic_shared} bytes of dynamic shared memory, {limit} allowed; \
                 raise CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
            ));
        }
        let total = dynamic_shared + self.kernel.static_shared;
        let most = capability().max_shared;
        (total > most).then(|| format!("kernel {name}: {total} bytes of shared memory, the device has {most}"))
    }
}

/// A module on the device.
#[derive(Debug)]
pub struct Module {
    /// Kernels by name.
    pub functions: HashMap<String, Arc<Function>>,
    /// Variables by name: address, bytes.
    pub globals: HashMap<String, (u64, u64)>,
}

impl Module {
    /// Parses and decodes PTX text and places its variables in `memory`.
    ///
    /// # Errors
    /// The first construct that is not supported, with its line.
    pub fn load(text: &str, memory: &Memory) -> Result<Self, PtxError> {
        let known = || KNOWN.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(kernels) = known().get(text) {
            return Ok(Self::of(kernels, HashMap::new()));
        }
        let module = ptx::parse(text)?;
        if let Some(message) = capability().refuse(&module.target) {
            return Err(PtxError { line: 0, message });
        }
        let vars: Vec<&Var> = module.vars.iter().filter(|v| matches!(v.space, Space::Global | Space::Const)).collect();
        let mut globals = HashMap::new();
        for var in &vars {
            let Some(allocation) = memory.allocate(var.bytes, &format!("variable {}", var.name)) else {
                return Err(PtxError { line: 0, message: format!("no memory for variable {}", var.name) });
            };
            globals.insert(var.name.clone(), (allocation.base, var.bytes));
        }
        let addresses: HashMap<String, u64> =
            globals.iter().map(|(name, &(address, _))| (name.clone(), address)).collect();
        for var in vars {
            initialise(var, &addresses, memory);
        }
        let files = Arc::new(module.files.clone());
        let decoded = module.entries.iter().map(|entry| decode(&module, entry, &addresses, &files).map(Arc::new));
        let kernels = decoded.collect::<Result<Vec<_>, _>>()?;
        let loaded = Self::of(&kernels, globals);
        let mut known = known();
        if loaded.globals.is_empty() && known.len() < MAX_KNOWN {
            known.insert(text.into(), kernels);
        }
        Ok(loaded)
    }

    fn of(kernels: &[Arc<Kernel>], globals: HashMap<String, (u64, u64)>) -> Self {
        let function = |kernel: &Arc<Kernel>| (kernel.name.clone(), Arc::new(Function::new(Arc::clone(kernel))));
        Self { functions: kernels.iter().map(function).collect(), globals }
    }
}

fn initialise(var: &Var, addresses: &HashMap<String, u64>, memory: &Memory) {
    let mut bytes = Vec::with_capacity(var.bytes as usize);
    for value in &var.init {
        match value {
            Init::Bytes(raw) => bytes.extend_from_slice(raw),
            Init::Address(name, offset, generic) => {
                let base = addresses.get(name).copied().unwrap_or(if *generic { SHARED_WINDOW } else { 0 });
                bytes.extend_from_slice(&base.wrapping_add_signed(*offset).to_le_bytes());
            }
        }
    }
    // Variables without an initialiser are zero, as CUDA promises.
    bytes.resize(var.bytes as usize, 0);
    if let Ok(allocation) = memory.resolve(addresses[&var.name], var.bytes) {
        allocation.touch();
        // SAFETY: the allocation was made with `var.bytes` bytes just now; nobody else knows it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), allocation.data(0), bytes.len()) };
        allocation.mark_init(0, var.bytes);
    }
}
