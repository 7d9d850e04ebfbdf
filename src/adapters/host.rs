//! Copies of adapters in the host's memory, ready for the device: as many as a budget holds, those used last.

use std::collections::HashMap;
use std::sync::Arc;

use super::format::AdapterDigest;

/// The copies. What a copy is made of is the caller's.
pub struct HostCopies<P> {
    max_bytes: usize,
    num_bytes: usize,
    copies: HashMap<AdapterDigest, Kept<P>>,
    /// Counts uses.
    now: u64,
}

struct Kept<P> {
    packed: Arc<P>,
    num_bytes: usize,
    used_at: u64,
}

impl<P> HostCopies<P> {
    /// None yet, and never more than `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, num_bytes: 0, copies: HashMap::new(), now: 0 }
    }

    /// The copy of an adapter, which is then the one used last.
    pub fn find(&mut self, digest: &AdapterDigest) -> Option<Arc<P>> {
        self.now += 1;
        let copy = self.copies.get_mut(digest)?;
        copy.used_at = self.now;
        Some(Arc::clone(&copy.packed))
    }

    /// Keeps a copy of `num_bytes` in place of those used longest ago; not at all where all bytes are not enough.
    pub fn insert(&mut self, digest: AdapterDigest, packed: Arc<P>, num_bytes: usize) {
        self.remove(&digest);
        if num_bytes > self.max_bytes {
            return;
        }
        while self.num_bytes + num_bytes > self.max_bytes {
            let oldest = self.copies.iter().min_by_key(|(_, copy)| copy.used_at).map(|(digest, _)| *digest);
            let Some(oldest) = oldest else { break };
            self.remove(&oldest);
        }
        self.now += 1;
        self.num_bytes += num_bytes;
        self.copies.insert(digest, Kept { packed, num_bytes, used_at: self.now });
    }

    /// Gives up the copy of an adapter.
    pub fn remove(&mut self, digest: &AdapterDigest) {
        if let Some(copy) = self.copies.remove(digest) {
            self.num_bytes -= copy.num_bytes;
        }
    }

    /// Gives up copies of all adapters but those that `is_wanted`.
    pub fn retain(&mut self, is_wanted: impl Fn(&AdapterDigest) -> bool) {
        let unwanted: Vec<_> = self.copies.keys().filter(|digest| !is_wanted(digest)).copied().collect();
        unwanted.iter().for_each(|digest| self.remove(digest));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Bytes of all of them.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u8) -> AdapterDigest {
        AdapterDigest([number; 32])
    }

    #[test]
    fn the_copies_used_last_stay_within_the_budget() {
        let mut copies = HostCopies::new(100);
        for number in 1..=3 {
            copies.insert(digest(number), Arc::new(number), 30);
        }
        assert_eq!(copies.find(&digest(1)).as_deref(), Some(&1));
        copies.insert(digest(4), Arc::new(4), 50);
        let found: Vec<u8> = (1..=4).filter(|number| copies.find(&digest(*number)).is_some()).collect();
        assert_eq!((found, copies.num_bytes()), (vec![1, 4], 80));
        copies.insert(digest(5), Arc::new(5), 101);
        assert_eq!((copies.len(), copies.num_bytes()), (2, 80), "what never fits takes nobody's place");
        copies.insert(digest(4), Arc::new(7), 60);
        assert_eq!((copies.find(&digest(4)).as_deref(), copies.num_bytes()), (Some(&7), 90));
        copies.retain(|known| *known == digest(1));
        assert_eq!((copies.len(), copies.num_bytes(), copies.is_empty()), (1, 30, false));
    }
}
