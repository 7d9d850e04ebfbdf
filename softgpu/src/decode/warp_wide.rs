//! Decoding of instructions in which the lanes of a warp work together.

use super::memory::atom_op;
use super::{Decoder, Result};
use crate::exec::isa::{Mma, NONE, Op, Shuffle, Vote};
use crate::ptx::syntax::Operand;

impl Decoder<'_> {
    pub(super) fn warp_wide(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        match parts[0] {
            "shfl" => self.shuffle(parts, operands),
            "vote" => self.vote(parts, operands),
            "activemask" => Ok(Op::ActiveMask { d: self.target(self.operand(operands, 0)?, false)? }),
            "match" => self.matching(parts, operands),
            "redux" => self.reduce(parts, operands),
            _ => self.mma(parts, operands),
        }
    }

    fn shuffle(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let mode = match parts.get(1..3) {
            Some(["sync", "up"]) => Shuffle::Up,
            Some(["sync", "down"]) => Shuffle::Down,
            Some(["sync", "bfly"]) => Shuffle::Butterfly,
            Some(["sync", "idx"]) => Shuffle::Index,
            _ => return self.fail("only shfl.sync is supported"),
        };
        let (d, p) = match self.operand(operands, 0)? {
            Operand::Pair(d, p) => (self.target(d, false)?, self.pred_target(p)?),
            d => (self.target(d, false)?, NONE),
        };
        Ok(Op::Shuffle {
            mode,
            d,
            p,
            a: self.source(self.operand(operands, 1)?, false)?,
            b: self.source(self.operand(operands, 2)?, false)?,
            c: self.source(self.operand(operands, 3)?, false)?,
            mask: self.source(self.operand(operands, 4)?, false)?,
        })
    }

    fn vote(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let mode = match parts.get(1..3) {
            Some(["sync", "all"]) => Vote::All,
            Some(["sync", "any"]) => Vote::Any,
            Some(["sync", "uni"]) => Vote::Uniform,
            Some(["sync", "ballot"]) => Vote::Ballot,
            _ => return self.fail("only vote.sync is supported"),
        };
        let d = self.operand(operands, 0)?;
        let d = if mode == Vote::Ballot { self.target(d, false)? } else { self.pred_target(d)? };
        let p = self.pred(self.operand(operands, 1)?)?;
        Ok(Op::Vote { mode, d, p, mask: self.source(self.operand(operands, 2)?, false)? })
    }

    fn matching(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let (all, wide) = (parts.contains(&"all"), parts.last() == Some(&"b64"));
        let (d, p) = match self.operand(operands, 0)? {
            Operand::Pair(d, p) => (self.target(d, false)?, self.pred_target(p)?),
            d => (self.target(d, false)?, NONE),
        };
        let a = self.source(self.operand(operands, 1)?, wide)?;
        Ok(Op::Match { all, wide, d, p, a, mask: self.source(self.operand(operands, 2)?, false)? })
    }

    fn reduce(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let signed = match parts.last() {
            Some(&"s32") => true,
            Some(&("u32" | "b32")) => false,
            _ => return self.fail("redux of this type is not supported"),
        };
        let Some(op) = parts.get(2).and_then(|name| atom_op(name)) else { return self.fail("unknown reduction") };
        let d = self.target(self.operand(operands, 0)?, false)?;
        let a = self.source(self.operand(operands, 1)?, false)?;
        Ok(Op::Reduce { op, signed, d, a, mask: self.source(self.operand(operands, 2)?, false)? })
    }

    fn mma(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let (k, is_bf16) = match parts[1..] {
            ["sync", "aligned", shape, "row", "col", "f32", a, b, "f32"] if a == b => {
                let k = match shape {
                    "m16n8k8" => 8,
                    "m16n8k16" => 16,
                    _ => return self.fail("only m16n8k8 and m16n8k16 are supported"),
                };
                match a {
                    "f16" => (k, false),
                    "bf16" => (k, true),
                    _ => return self.fail("only f16 and bf16 inputs are supported"),
                }
            }
            _ => return self.fail("only mma.sync.aligned row.col with f32 accumulators is supported"),
        };
        let mut rows = [[NONE; 4]; 4];
        for (i, count) in [4, usize::from(k) / 4, usize::from(k) / 8, 4].into_iter().enumerate() {
            let Operand::Tuple(items) = self.operand(operands, i)? else {
                return self.fail("mma needs register lists");
            };
            if items.len() != count {
                return self.fail(format!("operand {} has {} registers, {count} wanted", i + 1, items.len()));
            }
            for (slot, item) in rows[i].iter_mut().zip(items) {
                *slot = if i == 0 { self.target(item, false)? } else { self.source(item, false)? };
            }
        }
        Ok(Op::Mma(Mma { is_bf16, k, d: rows[0], a: rows[1], b: [rows[2][0], rows[2][1]], c: rows[3] }))
    }
}
