//! Advanced Matrix Extensions: whether they may be used, and products of whole tiles with them.
//!
//! Eight tile registers hold 16 rows of 64 bytes. `TDPBF16PS` adds to a tile of f32 the product of a tile of bf16 rows
//! and one of bf16 pairs (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). A row of the result
//! depends on that row alone, so its bits are the same in a tile of one row and of 16.

#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Rows of a tile register.
pub(super) const TILE_ROWS: usize = 16;
/// `k` that one instruction takes: 64 bytes of bf16.
pub(super) const STEP_COLUMNS: usize = 32;
/// Whether the processor has bf16 tiles and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && request_permission())
}

fn has_instructions() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let found = __cpuid_count(7, 0).edx;
    found & AMX_BF16 != 0 && found & AMX_TILE != 0
}

/// Tile registers are 8 KiB of state for each thread, which Linux grants only when asked, for the whole process.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// What `LDTILECFG` reads.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tile registers; given up when dropped. Registers 0 to 3 are sums, 4 and 5 rows of the first factor (5
/// one of the second when the first has one tile), 6 and 7 the second factor.
pub(super) struct TileRegisters {
    /// Rows of the first factor, and pairs of `k` of a step.
    shape: (usize, usize),
}

impl TileRegisters {
    /// # Safety
    /// [`is_available`] has said yes.
    pub(super) unsafe fn new() -> Self {
        Self { shape: (0, 0) }
    }

    /// Shapes the registers for `num_rows` (1 to 32) rows of the first factor and steps of `num_pairs` pairs of `k`.
    fn shape(&mut self, num_rows: usize, num_pairs: usize) {
        if self.shape == (num_rows, num_pairs) {
            return;
        }
        let pairs = num_pairs as u8;
        let first = num_rows.min(TILE_ROWS) as u8;
        let rest = num_rows.saturating_sub(TILE_ROWS) as u8;
        let (sums, fifth) = if rest > 0 { (rest, rest) } else { (first, pairs) };
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.row_bytes[4] = 4 * u16::from(pairs);
        if rest > 0 {
            config.row_bytes[5] = 4 * u16::from(pairs);
        }
        config.rows[..8].copy_from_slice(&[first, first, sums, sums, first, fifth, pairs, pairs]);
        // SAFETY: whoever made `self` knows that the instruction is there; the configuration is 64 valid bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, preserves_flags)) };
        self.shape = (num_rows, num_pairs);
    }
}

impl Drop for TileRegisters {
    fn drop(&mut self) {
        // SAFETY: as for `shape`. Without it every later context switch would save 8 KiB.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

/// `c = a b`, or `c += a b`: up to 32 rows by 32 columns, 32 `k` at each step.
pub(super) struct TileProduct {
    /// bf16, from one row to the next `a_stride` bytes; the second tile begins `16 a_stride` after the first.
    pub(super) a: *const u8,
    pub(super) num_rows: usize,
    pub(super) a_stride: usize,
    /// Bytes from one step to the next.
    pub(super) a_step: usize,
    /// Pairs of `k` of the first and of the last 16 columns, from one pair to the next `b_stride` bytes.
    pub(super) b: [*const u8; 2],
    pub(super) b_stride: usize,
    pub(super) b_step: usize,
    pub(super) num_steps: usize,
    /// f32, from one row to the next `c_stride` bytes.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Whether `c` holds the sums over the `k` before.
    pub(super) resume: bool,
}

impl TileProduct {
    /// Computes it.
    ///
    /// # Safety
    /// Every pointer is good for the sizes beside it.
    pub(super) unsafe fn run(&self, registers: &mut TileRegisters) {
        registers.shape(self.num_rows, STEP_COLUMNS / 2);
        // SAFETY: the registers have the shape of the rows; the caller's promise.
        unsafe { if self.num_rows > TILE_ROWS { self.two_by_two() } else { self.one_by_two() } }
    }

    unsafe fn two_by_two(&self) {
        // SAFETY: the loop reads `num_steps` steps of both factors; sums go to the rows of `c`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "test {resume:e}, {resume:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {c_stride}*1]",
                "tileloadd tmm1, [{c} + {c_stride}*1 + 64]",
                "tileloadd tmm2, [{rest} + {c_stride}*1]",
                "tileloadd tmm3, [{rest} + {c_stride}*1 + 64]",
                "2:",
                "tileloadd tmm6, [{b} + {b_stride}*1]",
                "tileloadd tmm4, [{a} + {a_stride}*1]",
                "tileloadd tmm7, [{second} + {b_stride}*1]",
                "tileloadd tmm5, [{next} + {a_stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {b}, {b_step}",
                "add {second}, {b_step}",
                "add {a}, {a_step}",
                "add {next}, {a_step}",
                "dec {steps:e}",
                "jnz 2b",
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                "tilestored [{rest} + {c_stride}*1], tmm2",
                "tilestored [{rest} + {c_stride}*1 + 64], tmm3",
                resume = in(reg) u32::from(self.resume),
                c = in(reg) self.c,
                rest = in(reg) self.c.wrapping_byte_add(TILE_ROWS * self.c_stride),
                c_stride = in(reg) self.c_stride,
                a = inout(reg) self.a => _,
                next = inout(reg) self.a.wrapping_add(TILE_ROWS * self.a_stride) => _,
                a_stride = in(reg) self.a_stride,
                a_step = in(reg) self.a_step,
                b = inout(reg) self.b[0] => _,
                second = inout(reg) self.b[1] => _,
                b_stride = in(reg) self.b_stride,
                b_step = in(reg) self.b_step,
                steps = inout(reg) self.num_steps as u32 => _,
                options(nostack),
            );
        }
    }

    unsafe fn one_by_two(&self) {
        // SAFETY: as for `two_by_two`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                "test {resume:e}, {resume:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {c_stride}*1]",
                "tileloadd tmm1, [{c} + {c_stride}*1 + 64]",
                "2:",
                "tileloadd tmm4, [{a} + {a_stride}*1]",
                "tileloadd tmm6, [{b} + {b_stride}*1]",
                "tileloadd tmm7, [{second} + {b_stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {b}, {b_step}",
                "add {second}, {b_step}",
                "add {a}, {a_step}",
                "dec {steps:e}",
                "jnz 2b",
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                resume = in(reg) u32::from(self.resume),
                c = in(reg) self.c,
                c_stride = in(reg) self.c_stride,
                a = inout(reg) self.a => _,
                a_stride = in(reg) self.a_stride,
                a_step = in(reg) self.a_step,
                b = inout(reg) self.b[0] => _,
                second = inout(reg) self.b[1] => _,
                b_stride = in(reg) self.b_stride,
                b_step = in(reg) self.b_step,
                steps = inout(reg) self.num_steps as u32 => _,
                options(nostack),
            );
        }
    }
}

/// `c = a b` where the second factor lies in pieces of 16 `k`: up to 32 rows by 32 columns.
pub(super) struct GatheredProduct<'a> {
    /// bf16, from one row to the next `a_stride` bytes, a piece's 16 after those of the piece before.
    pub(super) a: *const u8,
    pub(super) num_rows: usize,
    pub(super) a_stride: usize,
    /// Where each piece's 8 pairs of `k` begin, from one pair to the next `b_stride` bytes.
    pub(super) pieces: &'a [*const u8],
    /// Bytes from the beginning of a pair to the first column.
    pub(super) column_bytes: usize,
    pub(super) b_stride: usize,
    /// f32, from one row to the next `c_stride` bytes.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
}

/// `k` of a piece of a [`GatheredProduct`].
const PIECE_COLUMNS: usize = 16;

impl GatheredProduct<'_> {
    /// Computes it.
    ///
    /// # Safety
    /// Every pointer is good for the sizes beside it.
    pub(super) unsafe fn run(&self, registers: &mut TileRegisters) {
        registers.shape(self.num_rows, PIECE_COLUMNS / 2);
        // SAFETY: the registers have the shape of the rows; the caller's promise.
        unsafe { if self.num_rows > TILE_ROWS { self.two_by_two() } else { self.one_by_two() } }
    }

    unsafe fn two_by_two(&self) {
        // SAFETY: the loop reads every piece and as much of the rows; sums go to the rows of `c`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "mov {b}, [{piece}]",
                "add {b}, {column}",
                "tileloadd tmm6, [{b} + {b_stride}*1]",
                "tileloadd tmm4, [{a} + {a_stride}*1]",
                "tileloadd tmm7, [{b} + {b_stride}*1 + 64]",
                "tileloadd tmm5, [{next} + {a_stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {piece}, 8",
                "add {a}, {a_step}",
                "add {next}, {a_step}",
                "cmp {piece}, {end}",
                "jne 2b",
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                "tilestored [{rest} + {c_stride}*1], tmm2",
                "tilestored [{rest} + {c_stride}*1 + 64], tmm3",
                piece = inout(reg) self.pieces.as_ptr_range().start => _,
                end = in(reg) self.pieces.as_ptr_range().end,
                b = out(reg) _,
                column = in(reg) self.column_bytes,
                b_stride = in(reg) self.b_stride,
                a = inout(reg) self.a => _,
                next = inout(reg) self.a.wrapping_add(TILE_ROWS * self.a_stride) => _,
                a_stride = in(reg) self.a_stride,
                a_step = const 2 * PIECE_COLUMNS,
                c = in(reg) self.c,
                rest = in(reg) self.c.wrapping_byte_add(TILE_ROWS * self.c_stride),
                c_stride = in(reg) self.c_stride,
                options(nostack),
            );
        }
    }

    unsafe fn one_by_two(&self) {
        // SAFETY: as for `two_by_two`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                "2:",
                "mov {b}, [{piece}]",
                "add {b}, {column}",
                "tileloadd tmm4, [{a} + {a_stride}*1]",
                "tileloadd tmm6, [{b} + {b_stride}*1]",
                "tileloadd tmm7, [{b} + {b_stride}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {piece}, 8",
                "add {a}, {a_step}",
                "cmp {piece}, {end}",
                "jne 2b",
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                piece = inout(reg) self.pieces.as_ptr_range().start => _,
                end = in(reg) self.pieces.as_ptr_range().end,
                b = out(reg) _,
                column = in(reg) self.column_bytes,
                b_stride = in(reg) self.b_stride,
                a = inout(reg) self.a => _,
                a_stride = in(reg) self.a_stride,
                a_step = const 2 * PIECE_COLUMNS,
                c = in(reg) self.c,
                c_stride = in(reg) self.c_stride,
                options(nostack),
            );
        }
    }
}

/// A product of up to 16 rows by two panels of weights, which are two streams of memory.
pub(super) struct PanelPairProduct {
    /// `[num_steps][num_rows][32]` bf16.
    pub(super) x: *const u8,
    pub(super) num_rows: usize,
    /// Two panels, each `[num_steps][16][32][2]` bf16.
    pub(super) panels: [*const u8; 2],
    pub(super) num_steps: usize,
    /// `[num_rows][64]` f32, `out_bytes` from one row to the next.
    pub(super) out: *mut f32,
    pub(super) out_bytes: usize,
    /// Whether `out` holds the sums over the `k` before.
    pub(super) resume: bool,
}

/// Bytes of one step of `k` of a panel of 32 rows of weights.
pub(super) const STEP_BYTES: usize = STEP_COLUMNS * 64;

/// How far ahead of a product weights are asked for: the hardware's own prefetch ends at each 4 KiB.
const PREFETCH_BYTES: usize = 2 * STEP_BYTES;

impl PanelPairProduct {
    /// Computes it.
    ///
    /// # Safety
    /// Every pointer is good for the sizes beside it.
    pub(super) unsafe fn run(&self, registers: &mut TileRegisters) {
        registers.shape(self.num_rows, STEP_COLUMNS / 2);
        // SAFETY: the loop reads `num_steps` steps of x and of both panels; sums go to the rows of `out`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "test {resume:e}, {resume:e}",
                "jz 2f",
                "tileloadd tmm0, [{out} + {stride}*1]",
                "tileloadd tmm1, [{out} + {stride}*1 + 64]",
                "tileloadd tmm2, [{out} + {stride}*1 + 128]",
                "tileloadd tmm3, [{out} + {stride}*1 + 192]",
                "2:",
                ".irp line, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960",
                "prefetcht0 [{first} + \\line + {ahead}]",
                "prefetcht0 [{first} + \\line + {ahead} + 1024]",
                "prefetcht0 [{second} + \\line + {ahead}]",
                "prefetcht0 [{second} + \\line + {ahead} + 1024]",
                ".endr",
                "tileloadd tmm4, [{x} + {x_stride}*1]",
                "tileloadd tmm5, [{first} + {panel_stride}*1]",
                "tileloadd tmm6, [{first} + {panel_stride}*1 + 64]",
                "tileloadd tmm7, [{second} + {panel_stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm5, [{second} + {panel_stride}*1 + 64]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {first}, {step}",
                "add {second}, {step}",
                "add {x}, {x_step}",
                "dec {steps:e}",
                "jnz 2b",
                "tilestored [{out} + {stride}*1], tmm0",
                "tilestored [{out} + {stride}*1 + 64], tmm1",
                "tilestored [{out} + {stride}*1 + 128], tmm2",
                "tilestored [{out} + {stride}*1 + 192], tmm3",
                resume = in(reg) u32::from(self.resume),
                out = in(reg) self.out,
                stride = in(reg) self.out_bytes,
                first = inout(reg) self.panels[0] => _,
                second = inout(reg) self.panels[1] => _,
                panel_stride = in(reg) PANEL_STRIDE,
                x = inout(reg) self.x => _,
                x_stride = in(reg) 64usize,
                x_step = in(reg) 64 * self.num_rows,
                steps = inout(reg) self.num_steps as u32 => _,
                step = const STEP_BYTES,
                ahead = const PREFETCH_BYTES,
                options(nostack),
            );
        }
    }
}

/// Bytes from one pair of `k` of a panel to the next.
pub(super) const PANEL_STRIDE: usize = 128;
