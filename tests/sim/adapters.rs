//! The LoRA adapters of simulated lives: what each is to the double, from its numbers alone, and which names stand for
//! which of them.

use std::path::Path;
use std::sync::Arc;

use half::bf16;
use mneme::backend::sim::mix;
use mneme::engine::{AppliedAdapter, EngineHandle, LoadedAdapter, MergeConfig, MergeRule};
use tempfile::TempDir;

use crate::oracle::{NUM_PRODUCTS, Tags, Update};
use crate::support::random::Random;
use crate::support::tiny_adapter::{ALL, TinyAdapter};
use crate::support::tiny_model::{Family, TinyModel, Written};

/// What all lives load: a model, and adapters of it.
pub struct Checkpoints {
    model: Written,
    adapters: Vec<Stored>,
}

struct Stored {
    folder: TempDir,
    tags: Tags,
}

impl Checkpoints {
    pub fn write() -> Arc<Self> {
        let model = TinyModel::new(Family::Llama, 1);
        let subsets: [&[&str]; 3] = [&ALL, &ALL[2..4], &ALL[5..]];
        let adapters = (1..).zip(subsets).map(|(rank, modules)| {
            let adapter = TinyAdapter::of(&model, modules, rank, 1);
            Stored { folder: adapter.write(), tags: tags(&model, &adapter) }
        });
        Arc::new(Self { adapters: adapters.collect(), model: model.write() })
    }

    pub fn model(&self) -> &Path {
        self.model.path()
    }
}

/// The products of a layer: their modules, each with the column where it begins.
fn products(model: &TinyModel) -> [Vec<(&'static str, usize)>; NUM_PRODUCTS] {
    let rows = |module: &str| model.tensor(&format!("model.layers.0.{module}.weight")).rows;
    let (q, k, gate) = (rows(ALL[0]), rows(ALL[1]), rows(ALL[4]));
    let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = ALL;
    let qkv = vec![(q_proj, 0), (k_proj, q), (v_proj, q + k)];
    [qkv, vec![(o_proj, 0)], vec![(gate_proj, 0), (up_proj, gate)], vec![(down_proj, 0)]]
}

/// The tags of an adapter, from its numbers alone.
fn tags(model: &TinyModel, adapter: &TinyAdapter) -> Tags {
    let products = products(model);
    let scaling = (adapter.alpha / adapter.rank as f64) as f32;
    let tag = |layer: usize, product: &[(&str, usize)]| {
        let mut tag = None;
        for (module, first_column) in product {
            let Some((a, b)) = adapter.updates.get(&format!("model.layers.{layer}.{module}")) else { continue };
            let numbers = a.values.iter().chain(&b.values);
            let bytes = numbers.flat_map(|value| bf16::from_f32(*value).to_le_bytes()).map(u64::from);
            let facts = [u64::from(scaling.to_bits()), *first_column as u64];
            tag = Some(facts.into_iter().chain(bytes).fold(tag.unwrap_or(0), mix));
        }
        tag
    };
    std::array::from_fn(|layer| std::array::from_fn(|product| tag(layer, &products[product])))
}

/// When adapters are merged in a life: soon, or under no circumstances.
pub fn merge_config(random: &mut Random) -> MergeConfig {
    let merge_share = [0.2, 0.4, 0.8][random.below(3)];
    MergeConfig {
        is_enabled: !random.once_in(4),
        max_bytes: if random.once_in(6) { 10_000 } else { 1 << 30 },
        merge_share,
        unmerge_share: merge_share * [0.0, 0.3, 1.0][random.below(3)],
        window_tokens: random.within(10, 400),
    }
}

/// Names that requests choose adapters by. What they stand for changes while requests run.
#[derive(Default)]
pub struct Names {
    loaded: Vec<Known>,
    /// Whether most requests want the first name as it is: only then one composition carries enough tokens to be merged,
    /// for long enough that others come upon what was computed under it.
    is_agreed: bool,
}

struct Known {
    tags: Tags,
    adapter: LoadedAdapter,
}

impl Names {
    pub const COUNT: usize = 2;

    pub fn new(random: &mut Random) -> Self {
        Self { loaded: vec![], is_agreed: random.once_in(2) }
    }

    /// Has a name stand for any of the adapters; an unknown name must be the next one.
    pub fn load(&mut self, name: usize, engine: &EngineHandle, checkpoints: &Checkpoints, random: &mut Random) {
        let Stored { folder, tags } = &checkpoints.adapters[random.below(checkpoints.adapters.len())];
        const RULES: [MergeRule; 5] =
            [MergeRule::Auto, MergeRule::Auto, MergeRule::Auto, MergeRule::Always, MergeRule::Never];
        let adapter = engine.load_adapter(folder.path()).unwrap();
        let known = Known { tags: *tags, adapter: adapter.with_merge_rule(RULES[random.below(RULES.len())]) };
        match self.loaded.get_mut(name) {
            Some(before) => *before = known,
            None => self.loaded.push(known),
        }
    }

    /// No adapter, one, or a sum of both names, which may stand for the same.
    fn choose(&self, random: &mut Random) -> Vec<(&Known, f32)> {
        const SCALES: [f32; 6] = [1.0, 1.0, 1.0, -0.5, 0.5, 0.25];
        if self.is_agreed && !random.once_in(4) {
            return self.loaded.iter().take(1).map(|known| (known, 1.0)).collect();
        }
        let mut chosen = vec![];
        for known in &self.loaded {
            if random.once_in(3) {
                chosen.push((known, SCALES[random.below(SCALES.len())]));
            }
        }
        chosen
    }

    /// Adapters for a request, and what they are to the double.
    pub fn compose(&self, random: &mut Random) -> (Vec<AppliedAdapter>, Vec<Update>) {
        let mut chosen = self.choose(random);
        let applied =
            chosen.iter().map(|(known, scale)| AppliedAdapter { adapter: known.adapter.clone(), scale: *scale });
        let mut applied: Vec<_> = applied.collect();
        if random.once_in(8) {
            applied.iter_mut().for_each(AppliedAdapter::forbid_merge);
        }
        chosen.sort_by_key(|(known, _)| known.adapter.digest());
        if let [(first, scale), (second, other)] = chosen[..]
            && first.tags == second.tags
        {
            chosen = vec![(first, scale + other)];
        }
        let effective = chosen.iter().filter(|(_, scale)| *scale != 0.0);
        (applied, effective.map(|(known, scale)| Update { tags: known.tags, scale: scale.to_bits() }).collect())
    }
}
