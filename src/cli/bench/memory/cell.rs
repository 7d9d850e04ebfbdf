//! What is compared: contexts and queries of so many tokens, the places a context's KV can come from, and one answer.

use std::time::Duration;

use mneme::engine::Reuse;
use mneme::paging::Tier;
use serde_json::{Value, json};

/// A context of so many tokens with a query of so many behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) context_len: usize,
    pub(super) query_len: usize,
}

impl Cell {
    /// KV blocks that it fills with its one token of output.
    pub(super) fn num_blocks(self, block_size: usize) -> usize {
        (self.context_len + self.query_len + 1).div_ceil(block_size)
    }

    /// Tokens of its context that can be shared: those of full blocks.
    pub(super) fn num_shared(self, block_size: usize) -> usize {
        self.context_len / block_size * block_size
    }
}

/// Where the context's KV is when the query comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arm {
    /// Nowhere: all of it is computed.
    Control,
    Device,
    Host,
    /// On disk, its pages in the page cache.
    DiskCached,
    /// On disk, none of its pages in the page cache.
    DiskDropped,
    /// On disk, and the engine has been started anew.
    Restart,
}

impl Arm {
    /// In the order of the table.
    pub(super) const ALL: [Arm; 6] =
        [Arm::Control, Arm::Device, Arm::Host, Arm::DiskCached, Arm::DiskDropped, Arm::Restart];

    pub(super) fn name(self) -> &'static str {
        match self {
            Arm::Control => "control",
            Arm::Device => "device",
            Arm::Host => "host",
            Arm::DiskCached => "disk cached",
            Arm::DiskDropped => "disk dropped",
            Arm::Restart => "restart",
        }
    }

    /// Where the engine has to find the context; `None` for nowhere.
    pub(super) fn tier(self) -> Option<Tier> {
        match self {
            Arm::Control => None,
            Arm::Device => Some(Tier::Device),
            Arm::Host => Some(Tier::Host),
            Arm::DiskCached | Arm::DiskDropped | Arm::Restart => Some(Tier::Disk),
        }
    }
}

/// What came back for one request.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// From the request to its first token.
    pub(super) ttft: Duration,
    /// That token.
    pub(super) token: u32,
    pub(super) reuse: Reuse,
}

/// One measurement.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) arm: Arm,
    pub(super) answer: Answer,
    /// Moving the context's bytes without an engine, just before: a copy in memory or a read of the files.
    pub(super) bare: Option<Duration>,
    /// Why it says nothing about its arm.
    pub(super) faults: Vec<String>,
}

impl Sample {
    pub(super) fn new(arm: Arm, answer: Answer, bare: Option<Duration>) -> Self {
        Self { arm, answer, bare, faults: Vec::new() }
    }

    pub(super) fn ttft_ms(&self) -> f64 {
        self.answer.ttft.as_secs_f64() * 1e3
    }

    pub(super) fn bare_ms(&self) -> Option<f64> {
        self.bare.map(|bare| bare.as_secs_f64() * 1e3)
    }

    /// Tokens found on the device, on the host, on disk.
    pub(super) fn cached_tokens(&self) -> [usize; 3] {
        let Reuse { device_tokens, host_tokens, disk_tokens, .. } = self.answer.reuse;
        [device_tokens, host_tokens, disk_tokens]
    }

    /// Notes a fault unless the `num_shared` tokens of the context, and no others, came from the arm's tier.
    pub(super) fn check_tier(&mut self, num_shared: usize) {
        let wanted = match self.arm.tier() {
            None => [0; 3],
            Some(Tier::Device) => [num_shared, 0, 0],
            Some(Tier::Host) => [0, num_shared, 0],
            Some(Tier::Disk) => [0, 0, num_shared],
        };
        let found = self.cached_tokens();
        if found != wanted {
            let decision = self.answer.reuse.decision;
            self.faults.push(format!("tokens from device, host, disk: {found:?}, wanted {wanted:?} ({decision:?})"));
        }
    }

    /// Notes a fault unless the answer is that of a full computation of the same tokens. The control arm has a first
    /// token of its own, so its answer is not compared.
    pub(super) fn check_token(&mut self, reference: u32) {
        if self.arm != Arm::Control && self.answer.token != reference {
            self.faults.push(format!("the next token is {}, computed in full it is {reference}", self.answer.token));
        }
    }

    pub(super) fn json(&self) -> Value {
        let [device, host, disk] = self.cached_tokens();
        json!({
            "arm": self.arm.name(),
            "ttft_ms": self.ttft_ms(),
            "bare_ms": self.bare_ms(),
            "fetch_ms": self.answer.reuse.fetch_ms,
            "decision": format!("{:?}", self.answer.reuse.decision),
            "cached_tokens": {"device": device, "host": host, "disk": disk},
            "token": self.answer.token,
            "faults": self.faults,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(arm: Arm, reuse: Reuse) -> Sample {
        Sample::new(arm, Answer { ttft: Duration::from_millis(3), token: 7, reuse }, None)
    }

    #[test]
    fn tokens_from_another_tier_are_a_fault() {
        let disk = Reuse { disk_tokens: 32, ..Reuse::default() };
        let mixed = Reuse { device_tokens: 16, disk_tokens: 16, ..Reuse::default() };
        for (arm, reuse, num_faults) in [
            (Arm::Restart, disk, 0),
            (Arm::DiskDropped, mixed, 1),
            (Arm::Host, disk, 1),
            (Arm::Device, Reuse::default(), 1),
            (Arm::Control, Reuse::default(), 0),
            (Arm::Control, disk, 1),
        ] {
            let mut sample = sample(arm, reuse);
            sample.check_tier(32);
            assert_eq!(sample.faults.len(), num_faults, "{arm:?} {reuse:?}");
        }
    }

    #[test]
    fn another_answer_is_a_fault_of_every_arm_but_the_control() {
        for arm in Arm::ALL {
            let mut sample = sample(arm, Reuse::default());
            sample.check_token(7);
            assert!(sample.faults.is_empty());
            sample.check_token(8);
            assert_eq!(sample.faults.is_empty(), arm == Arm::Control);
        }
    }

    #[test]
    fn a_cell_shares_full_blocks() {
        let cell = Cell { context_len: 583, query_len: 167 };
        assert_eq!((cell.num_shared(16), cell.num_blocks(16)), (576, 47));
        assert_eq!(Cell { context_len: 32, query_len: 16 }.num_blocks(16), 4, "the output needs a place too");
    }
}
