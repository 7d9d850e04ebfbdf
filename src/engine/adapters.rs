//! Adapters as requests name them: what each is, in which order several are applied, and what identifies a composition.
//! Where their numbers are is for others to know.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use uuid::Uuid;

use super::merge::MergeRule;
use crate::adapters::{Adapter, AdapterDigest, BaseShapes, GgufConventions};
use crate::models::ModelConfig;
use crate::planted::{self, Bug};
use crate::{Result, invalid};

/// Adapters of one request.
pub const MAX_APPLIED: usize = 8;

/// An adapter that was read and can be used; a cheap handle. Its numbers are brought to the device when they are needed.
#[derive(Clone)]
pub struct LoadedAdapter {
    loaded: Arc<Loaded>,
    merge_rule: MergeRule,
}

/// What handles share.
pub(super) struct Loaded {
    digest: AdapterDigest,
    num_bytes: usize,
    max_rank: usize,
    /// Pages that it takes on the device.
    num_pages: usize,
    /// Where it was read: a folder or a GGUF file.
    path: PathBuf,
    /// Which store read it.
    store: Uuid,
    /// Whether new requests find it merged, alone or with others.
    is_merged: AtomicBool,
}

impl Loaded {
    pub(super) fn set_merged(&self, is_merged: bool) {
        self.is_merged.store(is_merged, Ordering::Relaxed);
    }
}

/// An adapter and how strongly a request wants it.
#[derive(Clone)]
pub struct AppliedAdapter {
    /// What is added.
    pub adapter: LoadedAdapter,
    /// Multiplies its update; may be negative.
    pub scale: f32,
}

impl AppliedAdapter {
    /// Has the request add it, never use it merged.
    pub fn forbid_merge(&mut self) {
        self.adapter.merge_rule = MergeRule::Never;
    }
}

/// Reads adapters, so that an engine can use them.
pub trait AdapterLoader: Send + Sync {
    /// Reads a folder or a GGUF file, while the engine runs.
    fn load(&self, path: &Path) -> Result<LoadedAdapter>;
}

impl LoadedAdapter {
    /// What `store` has read from a folder or a file.
    pub(super) fn new(adapter: &Adapter, num_pages: usize, path: &Path, store: Uuid) -> Self {
        let loaded = Loaded {
            digest: adapter.digest(),
            num_bytes: adapter.num_bytes(),
            max_rank: adapter.max_rank(),
            num_pages,
            path: path.to_owned(),
            store,
            is_merged: AtomicBool::new(false),
        };
        Self { loaded: Arc::new(loaded), merge_rule: MergeRule::default() }
    }

    /// The same adapter for requests of which another rule holds.
    pub fn with_merge_rule(self, merge_rule: MergeRule) -> Self {
        Self { merge_rule, ..self }
    }

    /// Whether requests that use this handle may use it merged.
    pub fn merge_rule(&self) -> MergeRule {
        self.merge_rule
    }

    /// Whether new requests find it merged into the weights: by itself, or the composition that it is part of.
    pub fn is_merged(&self) -> bool {
        self.loaded.is_merged.load(Ordering::Relaxed)
    }

    /// A handle that does not keep it.
    pub(super) fn downgrade(&self) -> Weak<Loaded> {
        Arc::downgrade(&self.loaded)
    }

    /// Its identity.
    pub fn digest(&self) -> AdapterDigest {
        self.loaded.digest
    }

    /// Bytes of its file of weights.
    pub fn num_bytes(&self) -> usize {
        self.loaded.num_bytes
    }

    /// The largest rank of its updates.
    pub fn max_rank(&self) -> usize {
        self.loaded.max_rank
    }

    /// Pages of the KV arena that it takes while it is on the device.
    pub fn num_pages(&self) -> usize {
        self.loaded.num_pages
    }

    /// Where it was read, and will be again.
    pub fn path(&self) -> &Path {
        &self.loaded.path
    }

    /// Which store read it.
    pub(super) fn store(&self) -> Uuid {
        self.loaded.store
    }
}

/// The modules of a model.
pub fn base_shapes(config: &ModelConfig) -> BaseShapes {
    BaseShapes {
        num_layers: config.num_layers,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        q_size: config.num_heads * config.head_dim,
        kv_size: config.num_kv_heads * config.head_dim,
        vocab_size: config.vocab_size,
        gguf: GgufConventions {
            architecture: config.architecture.gguf_name(),
            interleaved_heads: config.interleaved_heads(),
        },
    }
}

/// A composition in the order in which it is applied and hashed, by digest: the order of a request must not decide how
/// sums are rounded. What is named twice is added up, and what has no weight is left out.
pub(super) fn in_order(mut adapters: Vec<AppliedAdapter>) -> Result<Vec<AppliedAdapter>> {
    if adapters.len() > MAX_APPLIED {
        return Err(invalid!("a request may use {MAX_APPLIED} adapters, this one uses {}", adapters.len()));
    }
    adapters.sort_by_key(|applied| applied.adapter.digest());
    adapters.dedup_by(|next, kept| {
        let is_same = next.adapter.digest() == kept.adapter.digest();
        if is_same {
            kept.scale += next.scale;
        }
        is_same
    });
    if let Some(applied) = adapters.iter().find(|applied| !applied.scale.is_finite()) {
        return Err(invalid!("an adapter has the scale {}, wanted a finite number", applied.scale));
    }
    adapters.retain(|applied| applied.scale != 0.0);
    Ok(adapters)
}

/// Which adapters, and by how much: compositions with one key are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CompositionKey(pub(super) [u8; 32]);

impl CompositionKey {
    /// That of adapters in order.
    pub(super) fn of(adapters: &[AppliedAdapter]) -> Self {
        Self(blake3::hash(&identity_under(&[], adapters, false)).into())
    }
}

/// What holds of a composition: no adapter in it may be against it, and all must be for it.
pub(super) fn merge_rule_of(adapters: &[AppliedAdapter]) -> MergeRule {
    let has = |rule| adapters.iter().any(|applied| applied.adapter.merge_rule == rule);
    match (has(MergeRule::Never), has(MergeRule::Auto), has(MergeRule::Always)) {
        (true, ..) => MergeRule::Never,
        (false, false, true) => MergeRule::Always,
        _ => MergeRule::Auto,
    }
}

/// What decides the bits of KV beside tokens: `base`, the adapters it was computed under, and their form. Without any it
/// is `base`.
pub(super) fn identity_under(base: &[u8], adapters: &[AppliedAdapter], is_merged: bool) -> Vec<u8> {
    let mut identity = base.to_vec();
    if !adapters.is_empty() {
        let is_merged = is_merged && !planted::is(Bug::FormIgnored);
        identity.extend(if is_merged { &b"\0adapters merged v1\0"[..] } else { b"\0adapters applied v1\0" });
    }
    for applied in adapters {
        identity.extend(applied.adapter.digest().0);
        identity.extend(applied.scale.to_bits().to_le_bytes());
    }
    identity
}

/// An adapter that nobody has read, for tests of what schedules them.
#[cfg(test)]
pub(super) fn sample(digest: u8, num_pages: usize) -> LoadedAdapter {
    let loaded = Loaded {
        digest: AdapterDigest([digest; 32]),
        num_bytes: 0,
        max_rank: 1,
        num_pages,
        path: PathBuf::new(),
        store: Uuid::nil(),
        is_merged: AtomicBool::new(false),
    };
    LoadedAdapter { loaded: Arc::new(loaded), merge_rule: MergeRule::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(digest: u8, scale: f32) -> AppliedAdapter {
        AppliedAdapter { adapter: sample(digest, 1), scale }
    }

    fn facts(adapters: Vec<AppliedAdapter>) -> Vec<(u8, f32)> {
        in_order(adapters).unwrap().iter().map(|it| (it.adapter.digest().0[0], it.scale)).collect()
    }

    #[test]
    fn a_composition_has_one_form() {
        assert_eq!(facts(vec![applied(9, 1.0), applied(2, -0.5)]), [(2, -0.5), (9, 1.0)]);
        assert_eq!(facts(vec![applied(4, 0.25), applied(1, 0.0), applied(4, 0.5)]), [(4, 0.75)]);
        assert_eq!(facts(vec![applied(4, 0.5), applied(4, -0.5)]), []);
        assert!(in_order(vec![applied(4, f32::NAN)]).is_err());
        assert!(in_order((0..9).map(|digest| applied(digest, 1.0)).collect()).is_err());
    }

    #[test]
    fn adapters_and_their_scales_are_part_of_the_identity() {
        let of = |adapters: &[AppliedAdapter]| identity_under(b"model", adapters, false);
        assert_eq!(of(&[]), b"model");
        assert_eq!(identity_under(b"model", &[], true), b"model");
        let all = [
            of(&[]),
            of(&[applied(1, 1.0)]),
            of(&[applied(2, 1.0)]),
            of(&[applied(1, 0.5)]),
            of(&[applied(1, -0.5)]),
            of(&[applied(1, 1.0), applied(2, 1.0)]),
            identity_under(b"model", &[applied(1, 1.0)], true),
        ];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn one_adapter_can_forbid_a_merge_and_all_together_demand_it() {
        use MergeRule::{Always, Auto, Never};
        for (rules, wanted) in [
            (&[][..], Auto),
            (&[Always], Always),
            (&[Always, Always], Always),
            (&[Always, Auto], Auto),
            (&[Always, Never, Auto], Never),
        ] {
            let with = |(digest, rule): (u8, &MergeRule)| {
                let AppliedAdapter { adapter, scale } = applied(digest, 1.0);
                AppliedAdapter { adapter: adapter.with_merge_rule(*rule), scale }
            };
            let adapters: Vec<_> = (0..).zip(rules).map(with).collect();
            assert_eq!(merge_rule_of(&adapters), wanted, "{rules:?}");
        }
    }
}
