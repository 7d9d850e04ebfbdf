//! What happened to cubes, kept in memory: the newest few thousand events. Shown only to those who may read the cube.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::acl::{Access, Principal};
use super::cube::{Cube, CubeId};
use super::name::{CubeName, Version};
use super::timestamp::Timestamp;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A cube was made.
    Created,
    /// A cube was made from another.
    Forked,
    /// A version was added.
    Appended,
    /// A version that holds what an older one did was added.
    Restored,
    /// It has another name.
    Renamed,
    /// What governs or describes it was changed.
    Changed,
    /// It is never evicted any more.
    Pinned,
    /// It is evicted like others again.
    Unpinned,
    /// It is immutable now.
    Frozen,
    /// It can be changed again.
    Unfrozen,
    /// It came into use.
    Activated,
    /// It went to rest on disk.
    Archived,
    /// It was deleted.
    Deleted,
    /// Its lifetime was over.
    Expired,
}

/// Something that happened to a cube.
#[derive(Debug, Clone)]
pub struct Event {
    /// Later events have greater numbers.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// What.
    pub kind: EventKind,
    /// Who did it; nobody when it happened by itself.
    pub principal: Option<Principal>,
    cube: Arc<Cube>,
}

/// A stretch of the log.
#[derive(Debug, Clone)]
pub struct EventPage {
    /// In order.
    pub events: Vec<Event>,
    /// Where to go on reading.
    pub next_since: u64,
    /// Whether events behind `since` were dropped before they were read.
    pub has_gap: bool,
}

/// The newest events.
pub(super) struct EventLog {
    events: VecDeque<Event>,
    capacity: usize,
    /// Number of the last event, given out or not.
    last_seq: u64,
    first_seq: u64,
}

impl Event {
    /// The cube's identity.
    pub fn id(&self) -> CubeId {
        self.cube.id
    }

    /// What the cube was called then.
    pub fn name(&self) -> &CubeName {
        &self.cube.name
    }

    /// The cube's newest version then.
    pub fn version(&self) -> Version {
        self.cube.version
    }
}

impl EventLog {
    /// An empty log. Numbers begin with the time in the upper bits, so that they go on growing after a restart; they stay
    /// below 2^53, which JSON readers can hold.
    pub(super) fn new(capacity: usize, now: Timestamp) -> Self {
        let last_seq = (now.millis() / 1000) << 20;
        Self { events: VecDeque::new(), capacity: capacity.max(1), last_seq, first_seq: last_seq + 1 }
    }

    pub(super) fn push(&mut self, kind: EventKind, at: Timestamp, principal: Option<&Principal>, cube: Arc<Cube>) {
        if self.events.len() == self.capacity {
            self.events.pop_front();
        }
        self.last_seq += 1;
        self.events.push_back(Event { seq: self.last_seq, at, kind, principal: principal.cloned(), cube });
    }

    /// Up to `limit` events with numbers above `since`, of the cubes that `principal` may read.
    pub(super) fn since(&self, principal: &Principal, since: u64, limit: usize) -> EventPage {
        let first_kept = self.events.front().map_or(self.last_seq + 1, |event| event.seq);
        let mut page = EventPage { events: Vec::new(), next_since: since, has_gap: false };
        page.has_gap = since.saturating_add(1) < first_kept && first_kept > self.first_seq;
        for event in self.events.iter().filter(|event| event.seq > since) {
            if page.events.len() == limit {
                return page;
            }
            page.next_since = event.seq;
            if event.cube.allows(principal, Access::Read) {
                page.events.push(event.clone());
            }
        }
        page.next_since = page.next_since.max(self.last_seq);
        page
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn the_log_is_bounded_and_says_what_it_lost() {
        let (ana, other) = ("ana".parse().unwrap(), "other".parse().unwrap());
        let cube = Arc::new(samples::plaintext("ana/a"));
        let now = Timestamp::from_millis(5_000);
        let mut log = EventLog::new(3, now);
        let start = log.last_seq;
        assert_eq!(log.since(&ana, 0, 10).next_since, start);
        for _ in 0..5 {
            log.push(EventKind::Changed, now, Some(&ana), Arc::clone(&cube));
        }
        let page = log.since(&ana, start, 10);
        assert_eq!((page.events.len(), page.next_since, page.has_gap), (3, start + 5, true));
        let page = log.since(&ana, start + 2, 2);
        assert_eq!((page.events.len(), page.next_since, page.has_gap), (2, start + 4, false));
        assert_eq!(log.since(&ana, page.next_since, 2).events.len(), 1);
        let hidden = log.since(&other, start, 10);
        assert_eq!((hidden.events.len(), hidden.next_since), (0, start + 5));
        assert!(log.since(&ana, u64::MAX - 1, 2).events.is_empty());
    }
}
