//! Decoding of branches, barriers, fences and the one call that kernels make: a failed assertion.

use super::{Decoder, Result};
use crate::exec::isa::{Logic, NONE, Op};
use crate::ptx::syntax::Operand;

impl Decoder<'_> {
    pub(super) fn control(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        Ok(match parts[0] {
            "bra" => Op::Branch { target: self.label(self.operand(operands, 0)?)? },
            "brx" => self.branch_table(operands)?,
            "ret" | "exit" => Op::Exit,
            "trap" | "brkpt" => Op::Trap,
            "fence" if parts[1..].starts_with(&["proxy", "async"]) => self.proxy_fence(parts)?,
            "membar" | "fence" => Op::Fence,
            "nanosleep" | "pmevent" | "griddepcontrol" | "setmaxnreg" => Op::Nop,
            "call" => self.call(operands)?,
            _ => self.barrier(parts, operands)?,
        })
    }

    /// Copies and matrices of the async proxy are there for shared memory alone.
    fn proxy_fence(&self, parts: &[&str]) -> Result<Op> {
        match parts[3..] {
            [] | ["shared::cta" | "shared::cluster"] => Ok(Op::ProxyFence),
            ["global"] => Ok(Op::Nop),
            _ => self.fail("this form of fence.proxy.async is not supported"),
        }
    }

    /// The statement number of a label; [`Decoder::finish`] turns it into an instruction number.
    fn label(&self, operand: &Operand) -> Result<u32> {
        let Operand::Symbol(name, 0) = operand else { return self.fail("branch target is not a label") };
        match self.entry.labels.get(name) {
            Some(&statement) => Ok(statement as u32),
            None => self.fail(format!("unknown label {name}")),
        }
    }

    fn branch_table(&mut self, operands: &[Operand]) -> Result<Op> {
        let index = self.source(self.operand(operands, 0)?, false)?;
        let Operand::Symbol(list, 0) = self.operand(operands, 1)? else { return self.fail("brx needs a label list") };
        let Some(names) = self.entry.branch_targets.get(list) else {
            return self.fail(format!("unknown label list {list}"));
        };
        let targets = names.iter().map(|name| self.label(&Operand::Symbol(name.clone(), 0))).collect::<Result<_>>()?;
        Ok(Op::BranchTable { index, targets })
    }

    fn call(&mut self, operands: &[Operand]) -> Result<Op> {
        let name =
            operands.iter().find_map(|o| if let Operand::Symbol(name, 0) = o { Some(name.as_str()) } else { None });
        if name != Some("__assertfail") {
            return self.fail(format!("calls of device functions are not supported ({name:?}); inline it"));
        }
        let Some(Operand::Tuple(args)) = operands.last() else { return self.fail("call without arguments") };
        let value = |decoder: &mut Self, index: usize, wide: bool| {
            let Some(Operand::Symbol(name, 0)) = args.get(index) else { return decoder.fail("call argument missing") };
            let Some(operand) = decoder.call_args.get(name).cloned() else {
                return decoder.fail("call argument was not stored");
            };
            decoder.source(&operand, wide)
        };
        Ok(Op::Assert { message: value(self, 0, true)?, file: value(self, 1, true)?, line: value(self, 2, false)? })
    }

    /// Both halves of a barrier of the cluster, with nothing between them: what a thread does there would be ordered by neither.
    fn cluster_barrier(&mut self, names: &[&str]) -> Result<Op> {
        match (names, self.cluster_arrival.take()) {
            _ if self.guard.is_some() => self.fail("a barrier of the cluster under a predicate is not supported"),
            (["arrive"] | ["arrive", "release"], None) => {
                self.cluster_arrival = Some(self.insts.len());
                Ok(Op::Nop)
            }
            (["wait"] | ["wait", "acquire"], Some(arrival)) if arrival + 1 == self.insts.len() => {
                Ok(Op::ClusterBarrier)
            }
            _ => self.fail("a barrier of the cluster is an arrive, with release, and its wait right behind it"),
        }
    }

    fn barrier(&mut self, parts: &[&str], operands: &[Operand]) -> Result<Op> {
        let names: Vec<&str> = parts.iter().copied().filter(|p| !matches!(*p, "cta" | "aligned")).collect();
        match names[1..] {
            ["cluster", ..] => self.cluster_barrier(&names[2..]),
            ["warp", "sync"] => Ok(Op::WarpBarrier { mask: self.source(self.operand(operands, 0)?, false)? }),
            ["sync"] => {
                let id = self.source(self.operand(operands, 0)?, false)?;
                let count = match operands.get(1) {
                    Some(count) => self.source(count, false)?,
                    None => NONE,
                };
                Ok(Op::Barrier { id, count })
            }
            ["red", op, _] => {
                let op = match op {
                    "and" => Some(Logic::And),
                    "or" => Some(Logic::Or),
                    "popc" => None,
                    other => return self.fail(format!("barrier reduction .{other} is not supported")),
                };
                let d = self.operand(operands, 0)?;
                let d = if op.is_some() { self.pred_target(d)? } else { self.target(d, false)? };
                let id = self.source(self.operand(operands, 1)?, false)?;
                let last = self.operand(operands, operands.len() - 1)?;
                Ok(Op::BarrierReduce { op, id, d, p: self.pred(last)? })
            }
            _ => self.fail("this form of barrier is not supported"),
        }
    }
}
