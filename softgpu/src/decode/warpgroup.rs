//! Decoding of `wgmma`: matrix instructions of four warps.

use super::{Decoder, Result};
use crate::exec::isa::{Accumulate, Left, Op, Wgmma};
use crate::ptx::syntax::Operand;

impl Decoder<'_> {
    pub(super) fn warpgroup(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        match parts[1..] {
            ["fence", "sync", "aligned"] => Ok(Op::WgmmaFence),
            ["commit_group", "sync", "aligned"] => Ok(Op::WgmmaCommit),
            ["wait_group", "sync", "aligned"] => {
                let Operand::Int(groups) = self.operand(operands, 0)? else {
                    return self.fail("wait_group needs a constant");
                };
                Ok(Op::WgmmaWait { groups: *groups as u32 })
            }
            ["mma_async", "sync", "aligned", shape, "f32", a, b] if a == b => self.wgmma(shape, a, operands),
            _ => {
                self.fail("only wgmma.mma_async.sync.aligned with f32 accumulators and inputs of one type is supported")
            }
        }
    }

    fn wgmma(&mut self, shape: &str, ty: &str, operands: &[Operand]) -> Result<Op> {
        let is_bf16 = match ty {
            "f16" => false,
            "bf16" => true,
            _ => return self.fail(format!("inputs of .{ty} are not supported, only f16 and bf16")),
        };
        let n = shape.strip_prefix("m64n").and_then(|rest| rest.strip_suffix("k16")).and_then(|n| n.parse().ok());
        let Some(n @ 8..=256) = n.filter(|n: &usize| n.is_multiple_of(8)) else {
            return self.fail(format!("shape .{shape} is not supported, only m64nNk16 with N = 8, 16 to 256"));
        };
        let d = self.accumulator(self.operand(operands, 0)?, n / 2)?;
        let (left, b) = (self.operand(operands, 1)?, self.source(self.operand(operands, 2)?, true)?);
        let accumulate = self.accumulate(self.operand(operands, 3)?)?;
        let is_negative = self.is_negative(operands, 4)? != self.is_negative(operands, 5)?;
        let (a, last) = match left {
            Operand::Tuple(items) => (Left::Registers(self.fragment(items)?), 6),
            descriptor => (Left::Shared(self.source(descriptor, true)?, self.flag(operands, 6)?), 7),
        };
        let is_b_transposed = self.flag(operands, last)?;
        if operands.len() > last + 1 {
            return self.fail(format!("{} operands, {} wanted", operands.len(), last + 1));
        }
        Ok(Op::Wgmma(Box::new(Wgmma { is_bf16, c: d.clone(), d, a, b, is_b_transposed, accumulate, is_negative })))
    }

    fn accumulator(&mut self, operand: &Operand, count: usize) -> Result<Box<[u16]>> {
        match operand {
            Operand::Tuple(items) if items.len() == count => {
                items.iter().map(|item| self.target(item, false)).collect()
            }
            Operand::Tuple(items) => self.fail(format!("accumulator of {} registers, {count} wanted", items.len())),
            _ => self.fail("wgmma needs a list of accumulator registers"),
        }
    }

    fn fragment(&mut self, items: &[Operand]) -> Result<[u16; 4]> {
        let rows: Vec<u16> = items.iter().map(|item| self.source(item, false)).collect::<Result<_>>()?;
        match rows.try_into() {
            Ok(rows) => Ok(rows),
            Err(rows) => self.fail(format!("A of {} registers, 4 wanted", rows.len())),
        }
    }

    fn accumulate(&self, operand: &Operand) -> Result<Accumulate> {
        Ok(match operand {
            Operand::Int(0) => Accumulate::Never,
            Operand::Int(_) => Accumulate::Always,
            predicate => Accumulate::If(self.pred(predicate)?),
        })
    }

    fn is_negative(&self, operands: &[Operand], index: usize) -> Result<bool> {
        match self.operand(operands, index)? {
            Operand::Int(1) => Ok(false),
            Operand::Int(-1) => Ok(true),
            other => self.fail(format!("operand {} scales by {other:?}, 1 and -1 are there", index + 1)),
        }
    }

    fn flag(&self, operands: &[Operand], index: usize) -> Result<bool> {
        match self.operand(operands, index)? {
            Operand::Int(0) => Ok(false),
            Operand::Int(1) => Ok(true),
            other => self.fail(format!("operand {} is {other:?}, 0 and 1 are there", index + 1)),
        }
    }
}
