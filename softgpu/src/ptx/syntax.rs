//! The syntax tree of a PTX module: what the parser gives and the decoder reads.

use std::collections::HashMap;

/// State spaces that hold variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Device memory.
    Global,
    /// Read-only device memory.
    Const,
    /// One per block.
    Shared,
    /// One per thread.
    Local,
    /// Kernel arguments.
    Param,
    /// Decided by the address.
    Generic,
}

/// A value in the initialiser of a variable.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// Raw bytes of one element.
    Bytes(Vec<u8>),
    /// The address of another variable plus an offset; the flag asks for a generic address.
    Address(String, i64, bool),
}

/// A variable of the module or of a kernel.
#[derive(Clone, Debug)]
pub struct Var {
    /// Where it lives.
    pub space: Space,
    /// Its name.
    pub name: String,
    /// Alignment, bytes.
    pub align: u32,
    /// Size, bytes; 0 for `extern` arrays.
    pub bytes: u64,
    /// Initial values in order; shorter than `bytes` means zeros follow.
    pub init: Vec<Init>,
    /// `.extern`: the size comes from the launch.
    pub is_extern: bool,
}

/// A kernel parameter.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name.
    pub name: String,
    /// Size, bytes.
    pub bytes: u32,
    /// Offset in the parameter buffer, bytes.
    pub offset: u32,
}

/// A source position; lines are 1-based.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loc {
    /// Key in [`Module::files`].
    pub file: u32,
    /// Line in the file.
    pub line: u32,
    /// The line that inlined the code, if it was inlined: file and line.
    pub inlined_at: Option<(u32, u32)>,
}

/// An instruction operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, as an index into [`Entry::regs`].
    Reg(u32),
    /// A negated predicate register.
    Not(u32),
    /// An integer immediate.
    Int(i128),
    /// A 32-bit float immediate, as bits.
    F32(u32),
    /// A 64-bit float immediate, as bits.
    F64(u64),
    /// A special register such as `%tid.x`.
    Special(String),
    /// A label, function or variable, plus an offset.
    Symbol(String, i64),
    /// `{a, b}`.
    Tuple(Vec<Operand>),
    /// `[base + offset]`.
    Address(Box<Operand>, i64),
    /// `d|p`.
    Pair(Box<Operand>, Box<Operand>),
    /// `_`.
    Sink,
}

/// One statement of a kernel body.
#[derive(Clone, Debug)]
pub struct Stmt {
    /// Line of the PTX text.
    pub line: u32,
    /// Source position.
    pub loc: Loc,
    /// Guard predicate: register and whether it is negated.
    pub guard: Option<(u32, bool)>,
    /// The opcode with all modifiers.
    pub opcode: String,
    /// Operands in order.
    pub operands: Vec<Operand>,
}

/// A kernel.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Type of each register (`f32`, `b64`, `pred`...).
    pub regs: Vec<String>,
    /// Variables declared inside.
    pub vars: Vec<Var>,
    /// Instructions.
    pub body: Vec<Stmt>,
    /// Labels: index into `body`.
    pub labels: HashMap<String, usize>,
    /// `.branchtargets` lists by their label.
    pub branch_targets: HashMap<String, Vec<String>>,
    /// `.reqntid`, if given.
    pub required_threads: Option<[u32; 3]>,
    /// Product of `.maxntid`, if given.
    pub max_threads: Option<u32>,
    /// `.reqnctapercluster`, if given.
    pub cluster: Option<[u32; 3]>,
}

/// A parsed module.
#[derive(Clone, Debug, Default)]
pub struct Module {
    /// `.target`.
    pub target: String,
    /// `.version`.
    pub version: String,
    /// Source files by number.
    pub files: HashMap<u32, String>,
    /// Module-level variables.
    pub vars: Vec<Var>,
    /// Kernels.
    pub entries: Vec<Entry>,
}
