//! Decoding of loads, stores, atomics, asynchronous copies and address conversions.

use super::{Decoder, Result, Slot, window};
use crate::exec::alu::Alu;
use crate::exec::isa::{Access, AsyncCopy, AtomOp, Atomic, NONE, NumType, Op};
use crate::ptx::syntax::{Operand, Space};

fn space(name: &str) -> Option<Space> {
    if name == PEERS {
        return None;
    }
    Some(match name.split("::").next().unwrap_or(name) {
        "global" => Space::Global,
        "const" => Space::Const,
        "shared" => Space::Shared,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => return None,
    })
}

/// The shared memory of all blocks of a cluster; loads alone may name it.
const PEERS: &str = "shared::cluster";

impl Decoder<'_> {
    pub(super) fn memory(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        match parts[0] {
            "ld" | "ldu" => self.load(parts, operands),
            "st" => self.store(parts, operands),
            "atom" | "red" => self.atomic(parts, operands),
            "cp" => self.async_copy(parts, operands),
            "ldmatrix" => self.load_matrix(parts, operands),
            "cvta" => self.convert_address(parts, operands),
            "mapa" => self.peer_address(parts, operands),
            "prefetch" => Ok(Op::Nop),
            _ => self.fail("instruction is not supported"),
        }
    }

    /// Space, element type and count from the modifiers of a load or store.
    fn shape(&self, parts: &[&str]) -> Result<(Space, NumType, u8)> {
        let (mut at, mut count) = (Space::Generic, 1);
        for part in &parts[1..parts.len() - 1] {
            match *part {
                "v2" => count = 2,
                "v4" => count = 4,
                "nc" | "volatile" | "relaxed" | "acquire" | "release" | "weak" | "ca" | "cg" | "cs" | "lu" | "cv"
                | "wb" | "wt" | "cta" | "gpu" | "sys" | "cluster" => {}
                other if other.starts_with("L1::") || other.starts_with("L2::") => {}
                other => match space(other) {
                    Some(space) => at = space,
                    None => return self.fail(format!("modifier .{other} is not supported")),
                },
            }
        }
        match parts.last().and_then(|name| NumType::parse(name)) {
            Some(ty) if ty.bits() / 8 * u32::from(count) > 16 => self.fail("accesses above 16 bytes are not supported"),
            Some(ty) => Ok((at, ty, count)),
            None => self.fail("access to this type is not supported"),
        }
    }

    fn load(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let is_peer = parts.contains(&PEERS);
        let own: Vec<&str> = parts.iter().map(|&part| if part == PEERS { "shared" } else { part }).collect();
        let (space, ty, count) = self.shape(&own)?;
        let target = self.operand(operands, 0)?;
        let items = if let Operand::Tuple(items) = target { items.as_slice() } else { std::slice::from_ref(target) };
        let wide = items.iter().any(|item| matches!(self.slot_of(item), Some(Slot::Wide(_))));
        let regs = self.element_rows(items, count, |decoder, item| {
            if *item == Operand::Sink { Ok(NONE) } else { decoder.target(item, wide) }
        })?;
        let address = self.address(self.operand(operands, 1)?)?;
        let access = Access { space, bytes: (ty.bits() / 8) as u8, count, regs, wide, signed: ty.is_signed(), address };
        Ok(if is_peer { Op::PeerLoad(access) } else { Op::Load(access) })
    }

    fn store(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let (space, ty, count) = self.shape(parts)?;
        let source = self.operand(operands, 1)?;
        if space == Space::Param {
            return self.call_argument(self.operand(operands, 0)?, source);
        }
        let items = if let Operand::Tuple(items) = source { items.as_slice() } else { std::slice::from_ref(source) };
        let wide = items.iter().any(|item| matches!(self.slot_of(item), Some(Slot::Wide(_)))) || ty.is_wide();
        let regs = self.element_rows(items, count, |decoder, item| decoder.source(item, wide))?;
        let address = self.address(self.operand(operands, 0)?)?;
        Ok(Op::Store(Access { space, bytes: (ty.bits() / 8) as u8, count, regs, wide, signed: false, address }))
    }

    fn element_rows(
        &mut self,
        items: &[Operand],
        count: u8,
        mut row: impl FnMut(&mut Self, &Operand) -> Result<u16>,
    ) -> Result<[u16; 4]> {
        if items.len() != count as usize {
            return self.fail(format!("{count} elements wanted, {} found", items.len()));
        }
        let mut rows = [NONE; 4];
        for (slot, item) in rows.iter_mut().zip(items) {
            *slot = row(self, item)?;
        }
        Ok(rows)
    }

    /// `st.param` stores an argument of the call that follows; it is kept as an operand.
    fn call_argument(&mut self, target: &Operand, source: &Operand) -> Result<Op> {
        let Operand::Address(base, 0) = target else {
            return self.fail("call arguments at an offset are not supported");
        };
        let Operand::Symbol(name, 0) = base.as_ref() else { return self.fail("call argument without a name") };
        self.call_args.insert(name.clone(), source.clone());
        Ok(Op::Nop)
    }

    fn atomic(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let (mut at, mut op) = (Space::Generic, None);
        for part in &parts[1..parts.len() - 1] {
            match *part {
                "relaxed" | "acquire" | "release" | "acq_rel" | "cta" | "gpu" | "sys" | "noftz" => {}
                name => match (space(name), atom_op(name)) {
                    (Some(space), _) => at = space,
                    (_, Some(found)) => op = Some(found),
                    _ => return self.fail(format!("modifier .{name} is not supported")),
                },
            }
        }
        let ty = parts.last().and_then(|name| NumType::parse(name));
        let (Some(op), Some(ty)) = (op, ty) else { return self.fail("this atomic is not supported") };
        if !matches!(ty.bits(), 32 | 64) || (ty.is_float() && !matches!(op, AtomOp::Add | AtomOp::Exch)) {
            return self.fail("atomics of this type are not supported");
        }
        let (wide, first) = (ty.is_wide(), usize::from(parts[0] == "atom"));
        let d = if first == 1 { self.target(self.operand(operands, 0)?, wide)? } else { NONE };
        let address = self.address(self.operand(operands, first)?)?;
        let b = self.source(self.operand(operands, first + 1)?, wide)?;
        let c = if op == AtomOp::Cas { self.source(self.operand(operands, first + 2)?, wide)? } else { b };
        Ok(Op::Atomic(Atomic { space: at, op, ty, d, address, b, c }))
    }

    fn async_copy(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        match parts.get(1..3) {
            Some(["async", "commit_group"]) => return Ok(Op::AsyncCommit),
            Some(["async", "wait_all"]) => return Ok(Op::AsyncWaitAll),
            Some(["async", "wait_group"]) => {
                let Operand::Int(groups) = self.operand(operands, 0)? else {
                    return self.fail("wait_group needs a constant");
                };
                return Ok(Op::AsyncWait { groups: *groups as u32 });
            }
            Some(["async", "ca" | "cg"]) => {}
            _ => return self.fail("this form of cp is not supported"),
        }
        let Operand::Int(bytes @ (4 | 8 | 16)) = self.operand(operands, 2)? else {
            return self.fail("cp.async copies 4, 8 or 16 bytes");
        };
        let source_bytes = match operands.get(3) {
            Some(operand) => self.source(operand, false)?,
            None => NONE,
        };
        let target = self.address(self.operand(operands, 0)?)?;
        let source = self.address(self.operand(operands, 1)?)?;
        Ok(Op::AsyncCopy(AsyncCopy { target, source, bytes: *bytes as u8, source_bytes }))
    }

    fn load_matrix(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let (mut count, mut transposed) = (0, false);
        for part in &parts[1..] {
            match *part {
                "sync" | "aligned" | "m8n8" | "b16" | "shared" | "shared::cta" => {}
                "x1" => count = 1,
                "x2" => count = 2,
                "x4" => count = 4,
                "trans" => transposed = true,
                other => return self.fail(format!("modifier .{other} is not supported")),
            }
        }
        let Operand::Tuple(items) = self.operand(operands, 0)? else {
            return self.fail("ldmatrix needs a register list");
        };
        let d = self.element_rows(items, count, |decoder, item| decoder.target(item, false))?;
        Ok(Op::LoadMatrix { count, transposed, d, address: self.address(self.operand(operands, 1)?)? })
    }

    /// `cvta.S` adds the start of the window, `cvta.to.S` takes it away; for device memory they are moves.
    fn convert_address(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let to = parts.get(1) == Some(&"to");
        let Some(at) = parts.get(1 + usize::from(to)).and_then(|name| space(name)) else {
            return self.fail("conversion to this space is not supported");
        };
        let d = self.target(self.operand(operands, 0)?, true)?;
        let a = self.source(self.operand(operands, 1)?, true)?;
        // The address of a parameter is generic from the start (`source` gives it so).
        let base = if at == Space::Param { 0 } else { window(at) };
        let b = self.constant(if to { base.wrapping_neg() } else { base }, true);
        Ok(Op::Alu { op: Alu::AddU64, d, s: [a, b, 0] })
    }

    fn peer_address(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        if parts[1..] != [PEERS, "u32"] {
            return self.fail("this form of mapa is not supported");
        }
        let d = self.target(self.operand(operands, 0)?, false)?;
        let a = self.source(self.operand(operands, 1)?, false)?;
        Ok(Op::PeerAddress { d, a, rank: self.source(self.operand(operands, 2)?, false)? })
    }
}

pub(super) fn atom_op(name: &str) -> Option<AtomOp> {
    Some(match name {
        "add" => AtomOp::Add,
        "min" => AtomOp::Min,
        "max" => AtomOp::Max,
        "and" => AtomOp::And,
        "or" => AtomOp::Or,
        "xor" => AtomOp::Xor,
        "exch" => AtomOp::Exch,
        "cas" => AtomOp::Cas,
        "inc" => AtomOp::Inc,
        "dec" => AtomOp::Dec,
        _ => return None,
    })
}
