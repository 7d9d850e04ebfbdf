//! Decoding of arithmetic, comparison, selection, conversion and moves.

use super::{Decoder, Result, Slot};
use crate::exec::alu;
use crate::exec::isa::{Compare, Logic, NONE, NumType, Op, Pred, Rounding, SetPredicate};
use crate::ptx::syntax::Operand;

impl Decoder<'_> {
    pub(super) fn arithmetic(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        match parts[0] {
            "setp" => return self.set_predicate(parts, operands),
            "selp" => return self.select(parts, operands),
            "lop3" => return self.lop3(operands),
            "bfi" => return self.insert(parts, operands),
            "mov" => {
                if let Some(op) = self.special_move(parts, operands)? {
                    return Ok(op);
                }
            }
            "and" | "or" | "xor" | "not" if parts.last() == Some(&"pred") => {
                return self.predicate_logic(parts[0], operands);
            }
            _ => {}
        }
        self.lanes(parts, operands)
    }

    /// Everything in the lane table, then the general `cvt`.
    fn lanes(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let (mut ftz, mut sat, mut opcode) = (false, false, String::new());
        for part in parts {
            match *part {
                "rn" | "approx" | "full" => continue,
                "ftz" => ftz = true,
                "sat" | "satfinite" => sat = true,
                _ => {
                    if !opcode.is_empty() {
                        opcode.push('.');
                    }
                    opcode.push_str(part);
                }
            }
        }
        let Some(op) = alu::lookup(&opcode) else {
            if parts[0] == "cvt" {
                return self.convert(parts, operands);
            }
            return self.fail("instruction is not supported");
        };
        let signature = alu::signature(op);
        if parts[0] == "cvt" && (sat && !signature.is_f32 || self.needs_extension(operands, &signature)) {
            return self.convert(parts, operands);
        }
        if sat && !signature.is_f32 {
            return self.fail("saturation of this type is not supported");
        }
        let mut s = [0; 3];
        for (i, &wide) in signature.sources.iter().enumerate() {
            s[i] = self.source(self.operand(operands, i + 1)?, wide)?;
        }
        let d = self.target(self.operand(operands, 0)?, signature.wide)?;
        let narrow = signature.sources.iter().all(|wide| !wide);
        if sat || (ftz && narrow && parts[parts.len() - 1] == "f32") {
            let count = signature.sources.len() as u8;
            return Ok(Op::AluFlush { op, d, s, count, ftz, sat, flush_result: signature.is_f32 });
        }
        Ok(Op::Alu { op, d, s })
    }

    /// Conversions whose register is wider than their type take the general way.
    fn needs_extension(&self, operands: &[Operand], signature: &alu::Signature) -> bool {
        let differs = |operand: Option<&Operand>, wide: bool| match operand.and_then(|o| self.slot_of(o)) {
            Some(Slot::Wide(_)) => !wide,
            Some(Slot::Narrow(_)) => wide,
            _ => false,
        };
        differs(operands.first(), signature.wide) || differs(operands.get(1), signature.sources[0])
    }

    fn convert(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let types = parts.len();
        let (Some(to), Some(from)) = (NumType::parse(parts[types - 2]), NumType::parse(parts[types - 1])) else {
            return self.fail("conversion between these types is not supported");
        };
        let (mut rounding, mut saturate) = (Rounding::Nearest, false);
        for part in &parts[1..types - 2] {
            match *part {
                "rn" | "ftz" => {}
                "rni" => rounding = Rounding::NearestInt,
                "rzi" => rounding = Rounding::ZeroInt,
                "rmi" => rounding = Rounding::DownInt,
                "rpi" => rounding = Rounding::UpInt,
                "sat" => saturate = true,
                other => return self.fail(format!("conversion modifier .{other} is not supported")),
            }
        }
        let source = self.operand(operands, 1)?;
        let s_wide = match self.slot_of(source) {
            Some(Slot::Wide(_)) => true,
            Some(_) => false,
            None => from.is_wide(),
        };
        let s = self.source(source, s_wide)?;
        let (d, d_wide) = self.any_target(self.operand(operands, 0)?)?;
        Ok(Op::Convert { from, to, rounding, saturate, d, d_wide, s, s_wide })
    }

    fn any_target(&mut self, operand: &Operand) -> Result<(u16, bool)> {
        match self.slot_of(operand) {
            Some(Slot::Wide(slot)) => Ok((slot, true)),
            Some(Slot::Narrow(slot)) => Ok((slot, false)),
            _ => self.fail("target is not a register"),
        }
    }

    fn set_predicate(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let Some(ty) = parts.last().and_then(|name| NumType::parse(name)) else {
            return self.fail("comparison of this type is not supported");
        };
        let Some((compare, unordered)) = comparison(parts[1]) else {
            return self.fail(format!("comparison .{} is not supported", parts[1]));
        };
        let (p, q) = match self.operand(operands, 0)? {
            Operand::Pair(p, q) => (self.pred_target(p)?, self.pred_target(q)?),
            p => (self.pred_target(p)?, NONE),
        };
        let a = self.source(self.operand(operands, 1)?, ty.is_wide())?;
        let b = self.source(self.operand(operands, 2)?, ty.is_wide())?;
        let logic = parts[2..].iter().find_map(|part| logic(part));
        let combine = match logic {
            Some(logic) => Some((logic, self.pred(self.operand(operands, 3)?)?)),
            None => None,
        };
        Ok(Op::SetPredicate(SetPredicate { compare, unordered, ty, p, q, a, b, combine }))
    }

    fn select(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let Some(ty) = parts.get(1).and_then(|name| NumType::parse(name)) else {
            return self.fail("selection of this type is not supported");
        };
        let wide = ty.is_wide();
        Ok(Op::Select {
            wide,
            d: self.target(self.operand(operands, 0)?, wide)?,
            a: self.source(self.operand(operands, 1)?, wide)?,
            b: self.source(self.operand(operands, 2)?, wide)?,
            p: self.pred(self.operand(operands, 3)?)?,
        })
    }

    fn predicate_logic(&mut self, name: &str, operands: &[Operand]) -> Result<Op> {
        let d = self.pred_target(self.operand(operands, 0)?)?;
        let mut a = self.pred(self.operand(operands, 1)?)?;
        let Some(op) = logic(name) else {
            a.negated = !a.negated;
            return Ok(Op::MovPredicate { d, a });
        };
        Ok(match self.operand(operands, 2)? {
            Operand::Int(value) => with_constant(op, d, a, *value != 0),
            other => Op::Logic { op, d, a, b: self.pred(other)? },
        })
    }

    fn lop3(&mut self, operands: &[Operand]) -> Result<Op> {
        let Operand::Int(table) = self.operand(operands, 4)? else { return self.fail("lop3 needs a constant table") };
        Ok(Op::Lop3 {
            d: self.target(self.operand(operands, 0)?, false)?,
            a: self.source(self.operand(operands, 1)?, false)?,
            b: self.source(self.operand(operands, 2)?, false)?,
            c: self.source(self.operand(operands, 3)?, false)?,
            table: *table as u8,
        })
    }

    fn insert(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let wide = parts.get(1) == Some(&"b64");
        Ok(Op::Insert {
            wide,
            d: self.target(self.operand(operands, 0)?, wide)?,
            field: self.source(self.operand(operands, 1)?, wide)?,
            base: self.source(self.operand(operands, 2)?, wide)?,
            position: self.source(self.operand(operands, 3)?, false)?,
            length: self.source(self.operand(operands, 4)?, false)?,
        })
    }

    /// Moves that are more than a copy of a row: packing, unpacking, predicates, clocks.
    fn special_move(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Option<Op>> {
        let (target, source) = (self.operand(operands, 0)?, self.operand(operands, 1)?);
        let wide = parts.get(1).is_some_and(|t| matches!(*t, "b64" | "u64" | "s64" | "f64"));
        Ok(match (target, source) {
            (target, Operand::Tuple(items)) => {
                let (parts, count) = self.parts(items, wide, Self::source)?;
                Some(Op::Pack { d: self.target(target, wide)?, wide, parts, count })
            }
            (Operand::Tuple(items), source) => {
                let (parts, count) = self.parts(items, wide, Self::target)?;
                Some(Op::Unpack { s: self.source(source, wide)?, wide, parts, count })
            }
            (target, Operand::Special(name)) if name.starts_with("%clock") || name == "%globaltimer" => {
                Some(Op::Clock { d: self.target(target, wide)?, wide })
            }
            (target, Operand::Int(value)) if parts.get(1) == Some(&"pred") => {
                let (d, a) = (self.pred_target(target)?, self.pred(target)?);
                let op = if *value == 0 { Logic::And } else { Logic::Or };
                Some(with_constant(op, d, a, *value != 0))
            }
            (target, source) if parts.get(1) == Some(&"pred") => {
                Some(Op::MovPredicate { d: self.pred_target(target)?, a: self.pred(source)? })
            }
            _ => None,
        })
    }

    fn parts(
        &mut self,
        items: &[Operand],
        wide: bool,
        row: fn(&mut Self, &Operand, bool) -> Result<u16>,
    ) -> Result<([u16; 4], u8)> {
        let count = items.len();
        if !matches!((wide, count), (false, 2 | 4) | (true, 2 | 4)) {
            return self.fail(format!("a vector of {count} in mov is not supported"));
        }
        let mut rows = [0; 4];
        for (slot, item) in rows.iter_mut().zip(items) {
            *slot = row(self, item, false)?;
        }
        Ok((rows, count as u8))
    }
}

/// `d = op(a, constant)` on predicates.
fn with_constant(op: Logic, d: u16, a: Pred, constant: bool) -> Op {
    let not_a = Pred { negated: !a.negated, ..a };
    match (op, constant) {
        (Logic::And, true) | (Logic::Or | Logic::Xor, false) => Op::MovPredicate { d, a },
        (Logic::Xor, true) => Op::MovPredicate { d, a: not_a },
        (Logic::And, false) | (Logic::Or, true) => Op::Logic { op, d, a, b: not_a },
    }
}

fn comparison(name: &str) -> Option<(Compare, bool)> {
    Some(match name {
        "eq" => (Compare::Eq, false),
        "ne" => (Compare::Ne, false),
        "lt" | "lo" => (Compare::Lt, false),
        "le" | "ls" => (Compare::Le, false),
        "gt" | "hi" => (Compare::Gt, false),
        "ge" | "hs" => (Compare::Ge, false),
        "equ" => (Compare::Eq, true),
        "neu" => (Compare::Ne, true),
        "ltu" => (Compare::Lt, true),
        "leu" => (Compare::Le, true),
        "gtu" => (Compare::Gt, true),
        "geu" => (Compare::Ge, true),
        "num" => (Compare::Num, false),
        "nan" => (Compare::Nan, true),
        _ => return None,
    })
}

fn logic(name: &str) -> Option<Logic> {
    match name {
        "and" => Some(Logic::And),
        "or" => Some(Logic::Or),
        "xor" => Some(Logic::Xor),
        _ => None,
    }
}
