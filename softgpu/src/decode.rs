//! Syntax tree to decoded kernel: register slots, constants, addresses of variables, one function per opcode group.

use crate::exec::isa::{
    Address, Inst, Kernel, LOCAL_WINDOW, NONE, Op, PARAM_WINDOW, Pred, SHARED_WINDOW, SharedVar, Special,
};
use crate::exec::operands::Bank;
use crate::ptx::PtxError;
use crate::ptx::syntax::{Entry, Loc, Module, Operand, Space, Stmt, Var};
use crate::registers::rows;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Of the next kernel.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

mod arithmetic;
mod control;
mod memory;
mod warp_wide;
mod warpgroup;

pub(crate) type Result<T> = std::result::Result<T, PtxError>;

/// Unowned bytes between shared variables, so that running past one is seen.
const SHARED_GAP: u32 = 128;

/// Where a PTX register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    Narrow(u16),
    Wide(u16),
    Pred(u16),
}

/// Decodes one kernel. `globals` gives the addresses of the module's `.global` and `.const` variables.
///
/// # Errors
/// The first instruction that is not supported, with its line.
pub fn decode(
    module: &Module,
    entry: &Entry,
    globals: &HashMap<String, u64>,
    files: &Arc<HashMap<u32, String>>,
) -> Result<Kernel> {
    let mut decoder = Decoder::new(module, entry, globals)?;
    for (index, stmt) in entry.body.iter().enumerate() {
        decoder.starts.push(decoder.insts.len() as u32);
        decoder.statement(stmt).map_err(|mut e| {
            e.line = stmt.line;
            e.message = format!("{} in kernel {}: `{}`", e.message, entry.name, stmt.opcode);
            e
        })?;
        debug_assert!(decoder.starts.len() == index + 1);
    }
    decoder.starts.push(decoder.insts.len() as u32);
    decoder.finish(files)
}

/// State while one kernel is decoded.
pub(crate) struct Decoder<'a> {
    pub(crate) entry: &'a Entry,
    globals: &'a HashMap<String, u64>,
    slots: Vec<Slot>,
    symbols: HashMap<String, (Space, u64)>,
    /// Registers of each bank so far, each with a number of its own: `rows` gives them rows.
    registers: [usize; 3],
    consts32: HashMap<u32, u16>,
    consts64: HashMap<u64, u16>,
    specials: HashMap<Special, u16>,
    pub(crate) insts: Vec<Inst>,
    locs: Vec<Loc>,
    /// First instruction of each statement.
    starts: Vec<u32>,
    guard: Option<Pred>,
    shared: Vec<SharedVar>,
    static_shared: u32,
    dynamic_offset: u32,
    local_bytes: u32,
    /// Arguments stored for a call that follows.
    pub(crate) call_args: HashMap<String, Operand>,
    /// The instruction of a `barrier.cluster.arrive` whose wait is to come.
    pub(crate) cluster_arrival: Option<usize>,
}

impl<'a> Decoder<'a> {
    fn new(module: &'a Module, entry: &'a Entry, globals: &'a HashMap<String, u64>) -> Result<Self> {
        let mut registers = [rows::SCRATCH, 0, 0];
        let slots = entry.regs.iter().map(|kind| new_slot(&mut registers, kind)).collect();
        let mut decoder = Self {
            entry,
            globals,
            slots,
            symbols: HashMap::new(),
            registers,
            consts32: HashMap::new(),
            consts64: HashMap::new(),
            specials: HashMap::new(),
            insts: Vec::new(),
            locs: Vec::new(),
            starts: Vec::new(),
            guard: None,
            shared: Vec::new(),
            static_shared: 0,
            dynamic_offset: 0,
            local_bytes: 0,
            call_args: HashMap::new(),
            cluster_arrival: None,
        };
        decoder.place_variables(module, entry);
        Ok(decoder)
    }

    fn place_variables(&mut self, module: &Module, entry: &Entry) {
        for param in &entry.params {
            self.symbols.insert(param.name.clone(), (Space::Param, u64::from(param.offset)));
        }
        let mut shared_end = 0;
        let mut dynamic: Vec<&Var> = Vec::new();
        for var in module.vars.iter().chain(&entry.vars) {
            match var.space {
                Space::Shared if var.is_extern && var.bytes == 0 => dynamic.push(var),
                Space::Shared if is_used(entry, var) => shared_end = self.place_shared(var, shared_end),
                Space::Local => {
                    let offset = self.local_bytes.next_multiple_of(var.align.max(1));
                    self.local_bytes = offset + var.bytes as u32;
                    self.symbols.insert(var.name.clone(), (Space::Local, u64::from(offset)));
                }
                _ => {}
            }
        }
        self.dynamic_offset = dynamic_offset(entry, shared_end, &dynamic);
        for var in dynamic {
            self.symbols.insert(var.name.clone(), (Space::Shared, u64::from(self.dynamic_offset)));
        }
    }

    fn place_shared(&mut self, var: &Var, end: u32) -> u32 {
        let offset = end.next_multiple_of(var.align.max(1));
        self.static_shared = self.static_shared.next_multiple_of(var.align.max(1)) + var.bytes as u32;
        self.symbols.insert(var.name.clone(), (Space::Shared, u64::from(offset)));
        self.shared.push(SharedVar { name: var.name.clone(), offset, bytes: var.bytes as u32 });
        (offset + var.bytes as u32).next_multiple_of(128) + SHARED_GAP
    }

    pub(crate) fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(PtxError::new(0, message))
    }

    fn finish(mut self, files: &Arc<HashMap<u32, String>>) -> Result<Kernel> {
        self.guard = None;
        if self.cluster_arrival.is_some() {
            return self
                .fail(format!("kernel {} has a barrier.cluster.arrive with no wait behind it", self.entry.name));
        }
        self.push(Op::Exit, Loc::default());
        if self.registers.iter().any(|&count| count >= NONE as usize) {
            return self.fail(format!("kernel {} uses more than 65534 registers", self.entry.name));
        }
        self.resolve_targets();
        let prepared = self.prepared();
        let rows = match rows::assign(&mut self.insts, self.registers, &prepared) {
            Ok(rows) => rows,
            Err(inst) => return self.fail(format!("rows of kernel {} are mixed up at {inst}", self.entry.name)),
        };
        let row = |bank: Bank, slot: u16| rows.of[bank as usize][slot as usize];
        let has_fence = self.insts.iter().any(|i| matches!(i.op, Op::Fence));
        let has_wgmma = self.insts.iter().any(|i| matches!(i.op, Op::Wgmma(_)));
        let has_peer_loads = self.insts.iter().any(|i| matches!(i.op, Op::PeerLoad(_)));
        Ok(Kernel {
            id: NEXT_ID.fetch_add(1, Relaxed),
            name: self.entry.name.clone(),
            params: self.entry.params.clone(),
            insts: self.insts,
            locs: self.locs,
            files: Arc::clone(files),
            rows: rows.counts,
            consts32: self.consts32.into_iter().map(|(v, s)| (row(Bank::Narrow, s), v)).collect(),
            consts64: self.consts64.into_iter().map(|(v, s)| (row(Bank::Wide, s), v)).collect(),
            specials: self.specials.into_iter().map(|(special, s)| (special, row(Bank::Narrow, s))).collect(),
            shared: self.shared,
            static_shared: self.static_shared,
            dynamic_offset: self.dynamic_offset,
            local_bytes: self.local_bytes,
            max_threads: self.entry.max_threads,
            required_threads: self.entry.required_threads,
            cluster: self.entry.cluster.unwrap_or([1; 3]),
            has_fence,
            has_wgmma,
            has_peer_loads,
        })
    }

    /// The registers that have their values before a kernel starts.
    fn prepared(&self) -> Vec<(Bank, u16)> {
        let narrow = self.consts32.values().chain(self.specials.values()).map(|&slot| (Bank::Narrow, slot));
        narrow.chain(self.consts64.values().map(|&slot| (Bank::Wide, slot))).collect()
    }

    /// Statement numbers in branches become instruction numbers.
    fn resolve_targets(&mut self) {
        for inst in &mut self.insts {
            match &mut inst.op {
                Op::Branch { target } => *target = self.starts[*target as usize],
                Op::BranchTable { targets, .. } => {
                    for target in targets.iter_mut() {
                        *target = self.starts[*target as usize];
                    }
                }
                _ => {}
            }
        }
    }

    fn statement(&mut self, stmt: &Stmt) -> Result<()> {
        self.guard = match stmt.guard {
            Some((reg, negated)) => Some(self.pred(&if negated { Operand::Not(reg) } else { Operand::Reg(reg) })?),
            None => None,
        };
        let parts: Vec<&str> = stmt.opcode.split('.').collect();
        let op = match parts[0] {
            "ld" | "ldu" | "st" | "atom" | "red" | "cp" | "ldmatrix" | "cvta" | "mapa" | "prefetch" | "isspacep" => {
                self.memory(&parts, &stmt.operands)?
            }
            "bra" | "brx" | "ret" | "exit" | "trap" | "call" | "bar" | "barrier" | "membar" | "fence" | "nanosleep"
            | "brkpt" | "pmevent" | "griddepcontrol" | "setmaxnreg" => self.control(&parts, &stmt.operands)?,
            "wgmma" => self.warpgroup(&parts, &stmt.operands)?,
            "shfl" | "vote" | "activemask" | "match" | "redux" | "mma" => self.warp_wide(&parts, &stmt.operands)?,
            _ => self.arithmetic(&parts, &stmt.operands)?,
        };
        self.push(op, stmt.loc);
        Ok(())
    }

    fn push(&mut self, op: Op, loc: Loc) {
        if self.locs.last() != Some(&loc) {
            self.locs.push(loc);
        }
        self.insts.push(Inst { op, guard: self.guard, loc: self.locs.len() as u32 - 1 });
    }

    /// The address of a variable or parameter: its space and the address in it.
    pub(crate) fn symbol(&self, name: &str) -> Option<(Space, u64)> {
        self.symbols.get(name).copied().or_else(|| self.globals.get(name).map(|&address| (Space::Global, address)))
    }

    pub(crate) fn operand<'o>(&self, operands: &'o [Operand], index: usize) -> Result<&'o Operand> {
        match operands.get(index) {
            Some(operand) => Ok(operand),
            None => self.fail(format!("operand {} is missing", index + 1)),
        }
    }

    pub(crate) fn slot_of(&self, operand: &Operand) -> Option<Slot> {
        match operand {
            Operand::Reg(reg) => self.slots.get(*reg as usize).copied(),
            _ => None,
        }
    }

    /// A source row of the given width: a register, a constant or a special register.
    pub(crate) fn source(&mut self, operand: &Operand, wide: bool) -> Result<u16> {
        match operand {
            Operand::Reg(_) => match self.slot_of(operand) {
                Some(Slot::Wide(slot)) if wide => Ok(slot),
                Some(Slot::Narrow(slot)) if !wide => Ok(slot),
                other => self.fail(format!("source register has the wrong width ({other:?})")),
            },
            Operand::Int(value) => Ok(self.constant(*value as u64, wide)),
            Operand::F32(bits) => Ok(self.constant(u64::from(*bits), wide)),
            Operand::F64(bits) if wide => Ok(self.constant(*bits, true)),
            Operand::F64(bits) => Ok(self.constant(u64::from((f64::from_bits(*bits) as f32).to_bits()), false)),
            Operand::Special(name) => self.special(name, wide),
            Operand::Symbol(name, offset) => match self.symbol(name) {
                Some((space, address)) => {
                    let base = if space == Space::Param { PARAM_WINDOW } else { 0 };
                    Ok(self.constant((base + address).wrapping_add_signed(*offset), wide))
                }
                None => self.fail(format!("unknown name {name}")),
            },
            other => self.fail(format!("{other:?} is not a source")),
        }
    }

    pub(crate) fn constant(&mut self, bits: u64, wide: bool) -> u16 {
        if wide {
            let next = &mut self.registers[Bank::Wide as usize];
            return *self.consts64.entry(bits).or_insert_with(|| take(next));
        }
        let next = &mut self.registers[Bank::Narrow as usize];
        *self.consts32.entry(bits as u32).or_insert_with(|| take(next))
    }

    /// A target of the given width; `_` becomes a register that nobody reads.
    pub(crate) fn target(&mut self, operand: &Operand, wide: bool) -> Result<u16> {
        match self.slot_of(operand) {
            Some(Slot::Wide(slot)) if wide => Ok(slot),
            Some(Slot::Narrow(slot)) if !wide => Ok(slot),
            None if *operand == Operand::Sink => Ok(take(&mut self.registers[Bank::of(wide) as usize])),
            other => self.fail(format!("target register has the wrong width ({other:?})")),
        }
    }

    pub(crate) fn pred(&self, operand: &Operand) -> Result<Pred> {
        let (reg, negated) = match operand {
            Operand::Reg(reg) => (*reg, false),
            Operand::Not(reg) => (*reg, true),
            other => return self.fail(format!("{other:?} is not a predicate")),
        };
        match self.slots[reg as usize] {
            Slot::Pred(slot) => Ok(Pred { slot, negated }),
            other => self.fail(format!("{other:?} is not a predicate register")),
        }
    }

    /// A predicate target; `_` or nothing gives [`NONE`].
    pub(crate) fn pred_target(&self, operand: &Operand) -> Result<u16> {
        if *operand == Operand::Sink { Ok(NONE) } else { Ok(self.pred(operand)?.slot) }
    }

    fn special(&mut self, name: &str, wide: bool) -> Result<u16> {
        let axis = |suffix: &str| match suffix {
            "x" => Some(0),
            "y" => Some(1),
            "z" => Some(2),
            _ => None,
        };
        let (base, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
        let special = match (base, axis(suffix)) {
            ("%tid", Some(i)) => Special::Tid(i),
            ("%ntid", Some(i)) => Special::Ntid(i),
            ("%ctaid", Some(i)) => Special::Ctaid(i),
            ("%nctaid", Some(i)) => Special::Nctaid(i),
            ("%clusterid", Some(i)) => Special::ClusterId(i),
            ("%nclusterid", Some(i)) => Special::NumClusters(i),
            ("%cluster_ctaid", Some(i)) => Special::ClusterCtaid(i),
            ("%cluster_nctaid", Some(i)) => Special::ClusterNctaid(i),
            ("%cluster_ctarank", None) => Special::ClusterRank,
            ("%cluster_nctarank", None) => Special::ClusterSize,
            ("%laneid", None) => Special::LaneId,
            ("%warpid", None) => Special::WarpId,
            ("%nwarpid", None) => Special::NumWarps,
            ("%smid", None) => Special::SmId,
            ("%lanemask_eq", None) => Special::LaneMaskEq,
            ("%lanemask_lt", None) => Special::LaneMaskLt,
            ("%lanemask_le", None) => Special::LaneMaskLe,
            ("%lanemask_gt", None) => Special::LaneMaskGt,
            ("%lanemask_ge", None) => Special::LaneMaskGe,
            ("%dynamic_smem_size", None) => Special::DynamicShared,
            ("%total_smem_size", None) => Special::TotalShared,
            _ => return self.fail(format!("special register {name} is not supported")),
        };
        if wide {
            return self.fail(format!("special register {name} is 32 bits wide"));
        }
        let next = &mut self.registers[Bank::Narrow as usize];
        Ok(*self.specials.entry(special).or_insert_with(|| take(next)))
    }

    /// `[base + offset]` as a row plus an offset.
    pub(crate) fn address(&mut self, operand: &Operand) -> Result<Address> {
        let Operand::Address(base, offset) = operand else {
            return self.fail(format!("{operand:?} is not an address"));
        };
        match self.slot_of(base) {
            Some(Slot::Wide(slot)) => Ok(Address { slot, wide: true, offset: *offset }),
            Some(Slot::Narrow(slot)) => Ok(Address { slot, wide: false, offset: *offset }),
            _ => Ok(Address { slot: self.source(base, true)?, wide: true, offset: *offset }),
        }
    }
}

/// Generic address of the start of a space; 0 where generic and specific addresses are the same.
pub(crate) fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        _ => 0,
    }
}

fn take(next: &mut usize) -> u16 {
    *next += 1;
    (*next - 1).min(NONE as usize) as u16
}

fn new_slot(registers: &mut [usize; 3], kind: &str) -> Slot {
    match kind {
        "pred" => Slot::Pred(take(&mut registers[Bank::Predicate as usize])),
        "b64" | "u64" | "s64" | "f64" => Slot::Wide(take(&mut registers[Bank::Wide as usize])),
        _ => Slot::Narrow(take(&mut registers[Bank::Narrow as usize])),
    }
}

/// Where dynamic shared memory begins. Tiles of `wgmma` want more than what is given to every kernel: one that does not ask
/// for it is not given it by chance.
fn dynamic_offset(entry: &Entry, end: u32, dynamic: &[&Var]) -> u32 {
    let align = dynamic.iter().map(|var| var.align).max().unwrap_or(0).max(128);
    let offset = end.next_multiple_of(align);
    let has_tiles = entry.body.iter().any(|stmt| stmt.opcode.starts_with("wgmma."));
    if has_tiles && align < 1024 && offset.is_multiple_of(1024) { offset + align } else { offset }
}

/// Whether a kernel names a module-level variable; shared memory counts only for kernels that do.
fn is_used(entry: &Entry, var: &Var) -> bool {
    fn names(operand: &Operand, name: &str) -> bool {
        match operand {
            Operand::Symbol(symbol, _) => symbol == name,
            Operand::Address(base, _) => names(base, name),
            Operand::Tuple(items) => items.iter().any(|item| names(item, name)),
            _ => false,
        }
    }
    entry.vars.iter().any(|v| v.name == var.name)
        || entry.body.iter().any(|stmt| stmt.operands.iter().any(|operand| names(operand, &var.name)))
}
