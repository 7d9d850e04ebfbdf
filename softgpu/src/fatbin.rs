//! Finding the PTX text in a fatbin.
//!
//! Layout, read from files that `fatbinary` of CUDA 13.0 writes: a header (magic, version, header bytes, u64 size of what
//! follows), then entries, each with a header (u16 kind, u32 header bytes at 4, u64 payload bytes at 8, u32 compute
//! capability at 28, u64 uncompressed bytes at 56, 0 if the payload is not compressed).

use crate::capability::{Capability, capability, target_number};

const MAGIC: u32 = 0xba55_ed50;
const WRAPPER_MAGIC: u32 = 0x4662_43b1;
const KIND_PTX: u16 = 1;

/// Why an image has no PTX for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// Machine code only, or PTX for other devices.
    NoPtx(String),
    /// Neither PTX text nor a fatbin.
    Unknown(String),
}

/// The PTX text of an image that `cuModuleLoadData` was given.
///
/// # Errors
/// Says what was found instead and how to compile so that PTX is there.
///
/// # Safety
/// `image` points to a whole fatbin, fatbin wrapper, cubin or zero-terminated text.
pub unsafe fn ptx_of_image(image: *const u8) -> Result<String, ImageError> {
    // SAFETY: every kind of image has at least 4 bytes.
    let magic = unsafe { image.cast::<u32>().read_unaligned() };
    match magic {
        MAGIC => {
            // SAFETY: the header gives the size of the whole.
            let whole = unsafe {
                let size = image.add(8).cast::<u64>().read_unaligned() as usize;
                let header = image.add(6).cast::<u16>().read_unaligned() as usize;
                std::slice::from_raw_parts(image, header + size)
            };
            ptx_of_fatbin(whole, capability())
        }
        // SAFETY: a wrapper holds the pointer to the fatbin at offset 8.
        WRAPPER_MAGIC => unsafe { ptx_of_image(image.add(8).cast::<*const u8>().read_unaligned()) },
        0x464c_457f => {
            Err(ImageError::NoPtx("the image is a cubin (machine code); give PTX or a fatbin with PTX".to_owned()))
        }
        _ => {
            // SAFETY: what is left is zero-terminated text.
            let text = unsafe { std::ffi::CStr::from_ptr(image.cast()) };
            match text.to_str() {
                Ok(text) if text.contains(".version") => match capability().refuse(target(text)) {
                    Some(message) => Err(ImageError::NoPtx(message)),
                    None => Ok(text.to_owned()),
                },
                _ => Err(ImageError::Unknown(format!("the image begins with {magic:#010x}, neither PTX nor a fatbin"))),
            }
        }
    }
}

/// What a text says behind `.target`, or nothing.
fn target(text: &str) -> &str {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(".target")).unwrap_or_default();
    line.trim().split([',', ' ', '\t']).next().unwrap_or_default()
}

/// The PTX text of a fatbin; of several, the one for the highest compute capability that `device` runs.
///
/// # Errors
/// No PTX entry, only compressed ones, or only for other devices.
pub fn ptx_of_fatbin(bytes: &[u8], device: &Capability) -> Result<String, ImageError> {
    let u16_at = |at: usize| bytes.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let u32_at = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let u64_at = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    if u32_at(0) != Some(MAGIC) {
        return Err(ImageError::Unknown("not a fatbin".to_owned()));
    }
    let mut at = u16_at(6).unwrap_or(16) as usize;
    let mut best: Option<((u32, bool), &str)> = None;
    let (mut compressed, mut refused, mut kinds) = (false, None, Vec::new());
    while let (Some(kind), Some(header), Some(size)) = (u16_at(at), u32_at(at + 4), u64_at(at + 8)) {
        let (header, size) = (header as usize, size as usize);
        let Some(payload) = at.checked_add(header).and_then(|s| bytes.get(s..s.checked_add(size)?)) else { break };
        kinds.push(kind);
        if kind == KIND_PTX {
            let is_compressed = header >= 64 && u64_at(at + 56).unwrap_or(0) != 0;
            compressed |= is_compressed;
            if !is_compressed {
                let text = payload.split(|&b| b == 0).next().unwrap_or_default();
                let text =
                    std::str::from_utf8(text).map_err(|_| ImageError::Unknown("the PTX is not text".to_owned()))?;
                // The header has the same number for 9.0 and 9.0a: the text knows.
                let number = target_number(target(text)).unwrap_or((u32_at(at + 28).unwrap_or(0), false));
                match device.refuse(target(text)) {
                    Some(message) => refused = Some(message),
                    None if best.is_none_or(|(highest, _)| number > highest) => best = Some((number, text)),
                    None => {}
                }
            }
        }
        if header + size == 0 {
            break;
        }
        at += header + size;
    }
    match best {
        Some((_, text)) => Ok(text.to_owned()),
        None if refused.is_some() => Err(ImageError::NoPtx(refused.unwrap_or_default())),
        None if compressed => {
            Err(ImageError::NoPtx("the PTX in the fatbin is compressed; compile with -no-compress".to_owned()))
        }
        None => Err(ImageError::NoPtx(format!(
            "the fatbin has no PTX (entry kinds {kinds:?}, 1 would be PTX); add -gencode arch=compute_80,code=compute_80"
        ))),
    }
}
