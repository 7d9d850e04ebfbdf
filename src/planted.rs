//! Mistakes that a test can plant, to see that the simulation finds each of them. For tests alone, behind the feature
//! `planted-bugs`.
//!
//! Owns which mistake is planted; the place where it would be made asks [`is`]. Without the feature that is a constant,
//! and nothing of it is left in the binary.

/// A mistake somebody could have made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// Hashes do not depend on the model.
    IdentityIgnored = 1,
    /// Hashes do not depend on the cache domain.
    DomainIgnored,
    /// A block's hash depends on its own tokens alone.
    ParentIgnored,
    /// A block that is given away can still be found by what it held.
    OldContentKept,
    /// A slot of the host tier is read and not held meanwhile.
    HostSlotNotPinned,
    /// A block is read from the host slot beside its own.
    WrongHostSlot,
    /// Damage on disk goes unnoticed.
    DigestIgnored,
    /// A block is free while it is copied down.
    SavedBlockFreed,
    /// A block is found before it has been brought up.
    FetchPublishedEarly,
    /// A block that could not be brought up is taken for whole.
    LossIgnored,
    /// Nobody gives the blocks of a fetch back when its request has gone away.
    AbandonedFetchLeaks,
    /// The first of several copies ends the wait for all.
    CopyNotAwaited,
    /// A request that has waited long enough goes on with blocks that are still being filled.
    LateBlocksTaken,
    /// A deposit is durable before anything was synced.
    AckBeforeSeal,
    /// A deposit is sealed while its blocks are being written.
    SealBeforeSaves,
    /// A deposit does not notice that a block was not kept.
    SaveFailureIgnored,
    /// A sequence that goes away leaves others waiting for its blocks.
    PromiseKept,
    /// A block can be found before its last tokens are computed.
    PublishedEarly,
    /// A preempted sequence believes that its KV is still there.
    PreemptedKeepsCount,
    /// What follows a shared prefix is hashed in the domain of the prefix.
    OwnDomainIgnored,
    /// The block that a shared prefix ends in is hashed in the domain of the prefix.
    SharedPrefixRoundedUp,
    /// A deposit is kept in the domain that it was computed in, whichever was asked for.
    KeptDomainIgnored,
    /// A partial block that was copied counts as a full one.
    TailTakenForFull,
    /// Blocks are hashed as if the model were still unknown when it no longer is.
    IdentityNotTaken,
    /// Of several composed prompts that look for deviating tokens in one step, all take what the first one found.
    DeviationsOfAnother,
    /// The form of a sequence's adapters is not part of what its blocks are known by.
    FormIgnored,
    /// Rows that do not ask for a merged adapter use its copy.
    BystandersUseCopy,
    /// An adapter is used before it has arrived in its pages.
    AdapterReadEarly,
    /// An adapter's pages are free while requests use it.
    AdapterNotPinned,
    /// An adapter is taken from its files whatever is in them by now.
    AdapterChangeIgnored,
    /// A step does not wait for one of the layers of blocks that are on their way up.
    LayerNotAwaited,
    /// Blocks on their way up are held by the sequence alone that uses them already.
    LandingNotHeld,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 32] = [
        Bug::IdentityIgnored,
        Bug::DomainIgnored,
        Bug::ParentIgnored,
        Bug::OldContentKept,
        Bug::HostSlotNotPinned,
        Bug::WrongHostSlot,
        Bug::DigestIgnored,
        Bug::SavedBlockFreed,
        Bug::FetchPublishedEarly,
        Bug::LossIgnored,
        Bug::AbandonedFetchLeaks,
        Bug::CopyNotAwaited,
        Bug::LateBlocksTaken,
        Bug::AckBeforeSeal,
        Bug::SealBeforeSaves,
        Bug::SaveFailureIgnored,
        Bug::PromiseKept,
        Bug::PublishedEarly,
        Bug::PreemptedKeepsCount,
        Bug::OwnDomainIgnored,
        Bug::SharedPrefixRoundedUp,
        Bug::KeptDomainIgnored,
        Bug::TailTakenForFull,
        Bug::IdentityNotTaken,
        Bug::DeviationsOfAnother,
        Bug::FormIgnored,
        Bug::BystandersUseCopy,
        Bug::AdapterReadEarly,
        Bug::AdapterNotPinned,
        Bug::AdapterChangeIgnored,
        Bug::LayerNotAwaited,
        Bug::LandingNotHeld,
    ];
}

#[cfg(feature = "planted-bugs")]
static PLANTED: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Plants a mistake instead of the one before, or none, in all engines of this process.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.store(bug.map_or(0, |bug| bug as u8), std::sync::atomic::Ordering::SeqCst);
}

/// Whether this mistake is to be made.
#[cfg(feature = "planted-bugs")]
pub fn is(bug: Bug) -> bool {
    PLANTED.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// Whether this mistake is to be made: none ever is.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn is(_bug: Bug) -> bool {
    false
}
