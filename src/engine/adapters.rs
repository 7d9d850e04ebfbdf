//! Adapters as requests use them: loaded onto the engine's device by other threads, handed over whole, and kept for as
//! long as any request that uses them runs.

use std::any::Any;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::merge::MergeRule;
use crate::adapters::{Adapter, AdapterDigest, BaseShapes, MAX_ADAPTER_BYTES, load_onto};
use crate::backend::{LoraAdapter, LoraLoader};
use crate::models::ModelConfig;
use crate::planted::{self, Bug};
use crate::{Result, invalid};

/// Adapters of one request.
pub const MAX_APPLIED: usize = 8;

/// An adapter on the device; a cheap handle. Its memory is free when the last handle goes.
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
    /// A `LoraAdapter` of the engine's backend, which handles do not know.
    device: Arc<dyn Any + Send + Sync>,
    /// Whether new requests find it merged, alone or with others.
    is_merged: AtomicBool,
}

impl Loaded {
    fn new(adapter: &Adapter, device: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            digest: adapter.digest(),
            num_bytes: adapter.num_bytes(),
            max_rank: adapter.max_rank(),
            device,
            is_merged: AtomicBool::new(false),
        }
    }

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

/// Reads adapters and brings them onto the engine's device.
pub trait AdapterLoader: Send + Sync {
    /// Loads a folder, while the engine runs.
    fn load(&self, folder: &Path) -> Result<LoadedAdapter>;
}

/// An [`AdapterLoader`] for one kind of device.
pub struct DeviceAdapterLoader<L> {
    loader: L,
    shapes: BaseShapes,
}

impl<L: LoraLoader> DeviceAdapterLoader<L> {
    /// For adapters of a model with these shapes.
    pub fn new(loader: L, shapes: BaseShapes) -> Self {
        Self { loader, shapes }
    }
}

impl<L: LoraLoader> AdapterLoader for DeviceAdapterLoader<L> {
    fn load(&self, folder: &Path) -> Result<LoadedAdapter> {
        let adapter = Adapter::read(folder, &self.shapes, MAX_ADAPTER_BYTES)?;
        let device = Arc::new(load_onto(&self.loader, &adapter, &self.shapes)?);
        Ok(LoadedAdapter::new(Loaded::new(&adapter, device)))
    }
}

impl LoadedAdapter {
    fn new(loaded: Loaded) -> Self {
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

    /// What the backend made of it; `None` when it was loaded for another kind of device.
    pub(super) fn on_device<L: Send + Sync + 'static>(&self) -> Option<Arc<LoraAdapter<L>>> {
        Arc::clone(&self.loaded.device).downcast().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(digest: u8, scale: f32) -> AppliedAdapter {
        let (digest, device) = (AdapterDigest([digest; 32]), Arc::new(()));
        let loaded = Loaded { digest, num_bytes: 0, max_rank: 1, device, is_merged: AtomicBool::new(false) };
        AppliedAdapter { adapter: LoadedAdapter::new(loaded), scale }
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
