//! Where an operand of `wgmma` lies in shared memory, from its matrix descriptor.
//!
//! PTX ISA, "Matrix Descriptor Format" and "Shared Memory Matrix Layout", and the canonical layouts that CUTLASS states for
//! `make_gmma_desc`. An operand is made of core matrices of 8 rows of 16 bytes. Rows run along M or N where K runs fastest in
//! memory, and along K where M or N does. A swizzle of 32, 64 or 128 bytes exchanges the 16-byte chunks of a row of that
//! length: bits 4 to 6 of the address are XORed with bits 7 to 9, as far as the row goes.

use crate::fault::{Fault, FaultKind};

/// Bits of a descriptor that belong to a field.
const FIELDS: u64 = 0x3fff | 0x3fff << 16 | 0x3fff << 32 | 7 << 49 | 3 << 62;
/// Bytes of a row of a core matrix.
const CHUNK: u32 = 16;

/// The core matrices of one operand. They are counted along M or N, and there are two along K.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    /// Whether M or N runs fastest, not K.
    pub(super) is_transposed: bool,
    /// Core matrices along M or N.
    pub(super) groups: u32,
    start: u32,
    /// Core matrices along M or N that lie side by side.
    run: u32,
    /// From a run to the next, bytes.
    far: u32,
    /// From a core matrix to the next along K, bytes.
    step: u32,
    /// From a row to the next, bytes.
    pitch: u32,
    /// Bits of the address that are exchanged.
    swizzle: u32,
}

impl Tile {
    /// The operand of `8 * groups` rows or columns that a descriptor names.
    ///
    /// # Errors
    /// A descriptor that means nothing, and a tile that does not lie as its swizzle wants.
    pub(super) fn new(descriptor: u64, groups: u32, is_transposed: bool) -> Result<Self, Fault> {
        if descriptor & !FIELDS != 0 || descriptor >> 49 & 7 != 0 {
            let what = format!(
                "matrix descriptor {descriptor:#x} with a base offset or bits outside its fields, {:#x}",
                descriptor & (!FIELDS | 7 << 49)
            );
            return Err(Fault::new(FaultKind::AsyncMatrix, what));
        }
        let field = |shift: u32| (descriptor >> shift & 0x3fff) as u32 * CHUNK;
        let (start, leading, stride) = (field(0), field(16), field(32));
        let width = [CHUNK, 128, 64, 32][(descriptor >> 62) as usize];
        let is_swizzled = width > CHUNK;
        let (far, step) = match (is_swizzled, is_transposed) {
            (true, true) => (leading, stride),
            (true, false) => (stride, CHUNK),
            (false, _) => (stride, leading),
        };
        let run = if is_transposed { width / CHUNK } else { 1 };
        let tile = Self { is_transposed, groups, start, run, far, step, pitch: width, swizzle: width - CHUNK };
        if is_swizzled { tile.check_swizzle().map(|()| tile) } else { Ok(tile) }
    }

    /// The pattern of a swizzle spans 8 rows: they begin where the hardware takes them to.
    fn check_swizzle(&self) -> Result<(), Fault> {
        let Self { start, pitch: width, .. } = *self;
        let pattern = 8 * width;
        let fail = |what: String| Err(Fault::new(FaultKind::Misaligned, what));
        if start % pattern >= width {
            return fail(format!(
                "a tile of wgmma at shared address {start:#x}: a swizzle of {width} bytes wants rows that begin at a multiple \
                 of {pattern}"
            ));
        }
        let extent = CHUNK * if self.is_transposed { self.groups.min(self.run) } else { 2 };
        if start % width + extent > width {
            return fail(format!(
                "a tile of wgmma at shared address {start:#x}: {extent} bytes from there go beyond a row of {width}"
            ));
        }
        for (name, bytes, is_used) in
            [("M or N", self.far, self.groups > self.run), ("K", self.step, self.is_transposed)]
        {
            if is_used && bytes % pattern != 0 {
                return fail(format!(
                    "a tile of wgmma with {bytes} bytes from one block to the next along {name}: a swizzle of {width} bytes \
                     wants a multiple of {pattern}"
                ));
            }
        }
        Ok(())
    }

    /// Shared addresses of the rows of a core matrix: `group` along M or N, `half` along K.
    #[inline(always)]
    pub(super) fn rows(&self, group: u32, half: u32) -> [u32; 8] {
        let core = self.start + group / self.run * self.far + group % self.run * CHUNK + half * self.step;
        let mut rows = [0; 8];
        for (row, at) in rows.iter_mut().enumerate() {
            let address = core + row as u32 * self.pitch;
            *at = address ^ address >> 3 & self.swizzle;
        }
        rows
    }
}
