//! What the seeds came to, and that they come to the interesting places.

/// What one run did, to know that the seeds reach the interesting places.
#[derive(Default, Debug, Clone, Copy)]
pub struct Reached {
    pub num_finished: usize,
    pub num_cancelled: usize,
    pub num_preemptions: usize,
    pub num_cached_tokens: usize,
    pub num_refused: usize,
    pub num_host_tokens: usize,
    pub num_disk_tokens: usize,
    pub num_restarts: usize,
    /// Restarts after a crash in the middle of a life.
    pub num_crashes: usize,
    pub num_restored_tokens: usize,
    /// Requests that were computed while their blocks came up.
    pub num_attached: usize,
    pub num_late: usize,
    pub num_lost: usize,
    pub num_deposits: usize,
    pub num_refused_deposits: usize,
    /// Blocks that came in files.
    pub num_imports: usize,
    /// Deposits kept in another domain than they were computed in.
    pub num_rekept: usize,
    /// Blocks of durable deposits that were there after a restart.
    pub num_kept_blocks: usize,
    /// Tokens of durable deposits that a request was given after a restart.
    pub num_kept_tokens: usize,
    /// Such requests that named a deposit which ends with a partial block.
    pub num_kept_tails: usize,
    /// Tokens found beyond a shared prefix and in it, by those who are of another domain.
    pub num_shared_tokens: usize,
    /// Finished under adapters.
    pub num_adapted: usize,
    /// Tokens found under adapters.
    pub num_adapted_tokens: usize,
    /// Finished under merged adapters.
    pub num_merged: usize,
    /// Tokens found under them.
    pub num_merged_tokens: usize,
    /// Tokens that were moved under them.
    pub num_merged_links: usize,
    pub num_merges: usize,
    pub num_unmerges: usize,
    /// Compositions whose copy had no room.
    pub num_unmergeable: usize,
    /// Adapters brought to the device from their files.
    pub num_disk_loads: usize,
    /// And from the host's memory.
    pub num_host_loads: usize,
    /// Adapters that made room for KV.
    pub num_evicted_by_kv: usize,
    /// Adapters that made room for others.
    pub num_evicted_by_adapters: usize,
    /// Cached KV blocks that made room for adapters.
    pub num_evicted_blocks: usize,
    /// Requests whose adapters could not be read any more.
    pub num_failed_loads: usize,
    /// Requests that have no room beside their adapters.
    pub num_without_room: usize,
    /// Finished composed prompts.
    pub num_composed: usize,
    /// Tokens that were moved into them.
    pub num_linked_tokens: usize,
    /// Tokens that were moved into them and computed because they deviated most.
    pub num_chosen_tokens: usize,
    /// Tokens that composed prompts found, in their pieces and in themselves.
    pub num_relinked_tokens: usize,
    /// Tokens that were moved under adapters.
    pub num_adapted_links: usize,
    /// Requests that leave nothing in memory.
    pub num_erased: usize,
}

impl std::ops::AddAssign for Reached {
    fn add_assign(&mut self, other: Self) {
        self.num_finished += other.num_finished;
        self.num_cancelled += other.num_cancelled;
        self.num_preemptions += other.num_preemptions;
        self.num_cached_tokens += other.num_cached_tokens;
        self.num_refused += other.num_refused;
        self.num_host_tokens += other.num_host_tokens;
        self.num_disk_tokens += other.num_disk_tokens;
        self.num_restarts += other.num_restarts;
        self.num_crashes += other.num_crashes;
        self.num_restored_tokens += other.num_restored_tokens;
        self.num_attached += other.num_attached;
        self.num_late += other.num_late;
        self.num_lost += other.num_lost;
        self.num_deposits += other.num_deposits;
        self.num_refused_deposits += other.num_refused_deposits;
        self.num_rekept += other.num_rekept;
        self.num_imports += other.num_imports;
        self.num_kept_blocks += other.num_kept_blocks;
        self.num_kept_tokens += other.num_kept_tokens;
        self.num_kept_tails += other.num_kept_tails;
        self.num_shared_tokens += other.num_shared_tokens;
        self.num_adapted += other.num_adapted;
        self.num_adapted_tokens += other.num_adapted_tokens;
        self.num_merged += other.num_merged;
        self.num_merged_tokens += other.num_merged_tokens;
        self.num_merged_links += other.num_merged_links;
        self.num_merges += other.num_merges;
        self.num_unmerges += other.num_unmerges;
        self.num_unmergeable += other.num_unmergeable;
        self.num_disk_loads += other.num_disk_loads;
        self.num_host_loads += other.num_host_loads;
        self.num_evicted_by_kv += other.num_evicted_by_kv;
        self.num_evicted_by_adapters += other.num_evicted_by_adapters;
        self.num_evicted_blocks += other.num_evicted_blocks;
        self.num_failed_loads += other.num_failed_loads;
        self.num_without_room += other.num_without_room;
        self.num_composed += other.num_composed;
        self.num_linked_tokens += other.num_linked_tokens;
        self.num_chosen_tokens += other.num_chosen_tokens;
        self.num_relinked_tokens += other.num_relinked_tokens;
        self.num_adapted_links += other.num_adapted_links;
        self.num_erased += other.num_erased;
    }
}

impl Reached {
    /// That as many seeds as are run anyway come to every place.
    pub fn check(&self) {
        let places = [
            (self.num_finished, 1000),
            (self.num_cancelled, 1000),
            (self.num_preemptions, 100),
            (self.num_cached_tokens, 10_000),
            (self.num_host_tokens, 1500),
            (self.num_disk_tokens, 500),
            (self.num_restored_tokens, 100),
            (self.num_restarts - self.num_crashes, 50),
            (self.num_crashes, 50),
            (self.num_attached, 10),
            (self.num_late, 20),
            (self.num_lost, 5),
            (self.num_deposits, 500),
            (self.num_refused_deposits, 20),
            (self.num_rekept, 100),
            (self.num_imports, 100),
            (self.num_kept_blocks, 500),
            (self.num_kept_tokens, 500),
            (self.num_kept_tails, 20),
            (self.num_shared_tokens, 1000),
            (self.num_adapted, 1000),
            (self.num_adapted_tokens, 1000),
            (self.num_merged, 400),
            (self.num_merged_tokens, 1000),
            (self.num_merged_links, 1000),
            (self.num_merges, 200),
            (self.num_unmerges, 100),
            (self.num_unmergeable, 20),
            (self.num_disk_loads, 20),
            (self.num_host_loads, 20),
            (self.num_evicted_by_kv, 20),
            (self.num_evicted_by_adapters, 20),
            (self.num_evicted_blocks, 20),
            (self.num_failed_loads, 20),
            (self.num_without_room, 20),
            (self.num_composed, 500),
            (self.num_linked_tokens, 10_000),
            (self.num_chosen_tokens, 1000),
            (self.num_relinked_tokens, 1500),
            (self.num_adapted_links, 5000),
            (self.num_erased, 500),
        ];
        assert!(places.iter().all(|(reached, least)| reached >= least), "{self:?}");
    }

    /// That a few short ones come to most.
    pub fn check_few(&self) {
        let places = [
            self.num_finished,
            self.num_cancelled,
            self.num_cached_tokens,
            self.num_disk_tokens,
            self.num_deposits,
            self.num_adapted,
            self.num_composed,
            self.num_linked_tokens,
        ];
        assert!(places.iter().all(|reached| *reached > 0), "{self:?}");
    }
}
