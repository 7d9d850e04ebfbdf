//! What the device is said to be: the compute capability, and the limits that come with it.

use std::sync::OnceLock;

/// Names the compute capability.
const VARIABLE: &str = "SOFTGPU_COMPUTE_CAPABILITY";

/// A compute capability and what a device of it has.
#[derive(Debug, PartialEq, Eq)]
pub struct Capability {
    /// Ten times the compute capability: 80 for 8.0.
    pub number: u32,
    /// Shared memory that a block may ask for, bytes.
    pub max_shared: u32,
    /// Shared memory of a multiprocessor, bytes.
    pub multiprocessor_shared: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// L2 cache, bytes.
    pub l2_bytes: u32,
}

/// As an A100.
const AMPERE: Capability = Capability {
    number: 80,
    max_shared: 163 << 10,
    multiprocessor_shared: 164 << 10,
    multiprocessors: 108,
    l2_bytes: 40 << 20,
};

/// As an H100 SXM.
const HOPPER: Capability = Capability {
    number: 90,
    max_shared: 227 << 10,
    multiprocessor_shared: 228 << 10,
    multiprocessors: 132,
    l2_bytes: 50 << 20,
};

impl Capability {
    /// The one that is called `8.0` or `9.0`.
    ///
    /// # Errors
    /// Any other name.
    pub fn named(name: &str) -> Result<&'static Self, String> {
        match name {
            "8.0" => Ok(&AMPERE),
            "9.0" => Ok(&HOPPER),
            other => Err(format!("{VARIABLE} is \"{other}\"; 8.0 and 9.0 are there")),
        }
    }

    /// Major and minor number.
    pub fn version(&self) -> (u32, u32) {
        (self.number / 10, self.number % 10)
    }

    /// Why code for a `.target` such as `sm_90a` cannot run, or `None`: plain ones run on what is as new or newer, those
    /// with an `a` on just that device.
    pub fn refuse(&self, target: &str) -> Option<String> {
        let (number, is_exact) = target_number(target)?;
        let runs = if is_exact { number == self.number } else { number <= self.number };
        let (major, minor) = self.version();
        (!runs).then(|| {
            format!("the image is for {target}, the device has compute capability {major}.{minor} ({VARIABLE} sets it)")
        })
    }
}

/// The compute capability of a `.target`, ten times, and whether it is for that one alone; `None` where it has no such form.
pub fn target_number(target: &str) -> Option<(u32, bool)> {
    let number = target.strip_prefix("sm_")?;
    let is_exact = number.ends_with(|c: char| c.is_ascii_alphabetic());
    Some((number.trim_end_matches(|c: char| c.is_ascii_alphabetic()).parse().ok()?, is_exact))
}

/// That of this process: `SOFTGPU_COMPUTE_CAPABILITY`, 8.0 where it is not set.
///
/// # Errors
/// The variable names none.
pub fn wanted() -> Result<&'static Capability, String> {
    static WANTED: OnceLock<Result<&'static Capability, String>> = OnceLock::new();
    WANTED.get_or_init(|| Capability::named(&std::env::var(VARIABLE).unwrap_or_else(|_| "8.0".to_owned()))).clone()
}

/// As [`wanted`]; 8.0 where the variable names none, which `cuInit` refuses.
pub fn capability() -> &'static Capability {
    wanted().unwrap_or(&AMPERE)
}
