//! The LoRA adapters of simulated lives: what each is to the double, from its numbers alone, which names stand for which of
//! them, and what becomes of their files.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;
use mneme::backend::sim::mix;
use mneme::engine::{AppliedAdapter, EngineHandle, LoadedAdapter, MergeConfig, MergeRule};
use tempfile::TempDir;

use super::oracle::{NUM_PRODUCTS, Tags, Update};
use crate::support::random::Random;
use crate::support::tiny_adapter::{ALL, TinyAdapter};
use crate::support::tiny_model::{Family, TinyModel, Written};

/// What all lives load: a model, and adapters of it.
pub struct Checkpoints {
    family: Family,
    model: Written,
    adapters: Vec<Stored>,
}

struct Stored {
    folder: TempDir,
    tags: Tags,
    /// Another one of the same modules and ranks, which somebody could put in its place.
    twin: TempDir,
}

const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

impl Checkpoints {
    pub fn write(family: Family) -> Arc<Self> {
        let model = TinyModel::new(family, 1);
        // Of one page to some more than the smallest pools have.
        let kinds: [(usize, &[&str]); 5] = [(1, &ALL), (2, &ALL[2..4]), (3, &ALL[5..]), (4, &ALL), (2, &ALL)];
        let adapters = (1..).zip(kinds).map(|(seed, (rank, modules))| {
            let adapter = TinyAdapter::of(&model, modules, rank, seed);
            let twin = TinyAdapter::of(&model, modules, rank, seed + 100).write();
            Stored { folder: adapter.write(), tags: tags(&model, &adapter), twin }
        });
        Arc::new(Self { family, adapters: adapters.collect(), model: model.write() })
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn model(&self) -> &Path {
        self.model.path()
    }

    /// All adapters, unharmed.
    pub fn adapters(&self) -> impl Iterator<Item = (&Path, Tags)> {
        self.adapters.iter().map(|stored| (stored.folder.path(), stored.tags))
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
    /// Whether each name has files of its own, which may be harmed.
    has_files: bool,
    /// As long as anybody may want to read them again.
    folders: Vec<TempDir>,
}

#[derive(Clone)]
struct Known {
    /// Which of all adapters.
    number: usize,
    tags: Tags,
    adapter: LoadedAdapter,
    is_harmed: Arc<AtomicBool>,
}

/// Adapters for a request.
pub struct Composed {
    pub applied: Vec<AppliedAdapter>,
    /// What they are to the double.
    pub updates: Vec<Update>,
    /// Blocks that they take.
    pub num_pages: usize,
    /// What has become of their files.
    pub are_harmed: Vec<Arc<AtomicBool>>,
}

impl Names {
    pub const COUNT: usize = 3;

    pub fn new(random: &mut Random) -> Self {
        Self { is_agreed: random.once_in(2), has_files: random.once_in(3), ..Self::default() }
    }

    /// Has a name stand for any of the adapters that the engine has room for; an unknown name must be the next one.
    pub fn load(&mut self, name: usize, engine: &EngineHandle, checkpoints: &Checkpoints, random: &mut Random) {
        const RULES: [MergeRule; 5] =
            [MergeRule::Auto, MergeRule::Auto, MergeRule::Auto, MergeRule::Always, MergeRule::Never];
        let rule = RULES[random.below(RULES.len())];
        let known = loop {
            let number = random.below(checkpoints.adapters.len());
            let Stored { folder, tags, .. } = &checkpoints.adapters[number];
            match engine.load_adapter(&self.place(folder.path())) {
                Ok(adapter) => {
                    let (adapter, is_harmed) = (adapter.with_merge_rule(rule), Arc::default());
                    break Known { number, tags: *tags, adapter, is_harmed };
                }
                Err(error) => assert!(error.to_string().contains("more --kv-cache-memory-bytes"), "{error}"),
            }
        };
        match self.loaded.get_mut(name) {
            Some(before) => *before = known,
            None => self.loaded.push(known),
        }
    }

    /// Where a name reads its files.
    fn place(&mut self, folder: &Path) -> std::path::PathBuf {
        if !self.has_files {
            return folder.to_owned();
        }
        let own = tempfile::tempdir().unwrap();
        for file in FILES {
            fs::copy(folder.join(file), own.path().join(file)).unwrap();
        }
        let path = own.path().to_owned();
        self.folders.push(own);
        path
    }

    /// Something happens to the files of a name, where these are its own.
    pub fn harm(&mut self, checkpoints: &Checkpoints, random: &mut Random) {
        let name = random.below(self.loaded.len());
        if !self.has_files {
            return;
        }
        let known = &self.loaded[name];
        known.is_harmed.store(true, Ordering::SeqCst);
        // The folders are in order of loading: the name's own is the last that was made for its adapter.
        let Some(folder) = self.folders.iter().find(|folder| folder.path() == known.adapter.path()) else { return };
        let weights = folder.path().join(FILES[1]);
        match random.below(4) {
            // Somebody may have been here before.
            0 => drop(fs::remove_file(&weights)),
            1 => fs::write(&weights, b"no weights").unwrap(),
            _ => {
                let twin = checkpoints.adapters[known.number].twin.path();
                fs::copy(twin.join(FILES[1]), &weights).unwrap();
            }
        }
    }

    /// No adapter, one, or a sum of several names, which may stand for the same.
    fn choose(&self, random: &mut Random) -> Vec<(Known, f32)> {
        const SCALES: [f32; 6] = [1.0, 1.0, 1.0, -0.5, 0.5, 0.25];
        if self.is_agreed && !random.once_in(4) {
            return self.loaded.iter().take(1).map(|known| (known.clone(), 1.0)).collect();
        }
        let mut chosen = vec![];
        for known in &self.loaded {
            if random.once_in(3) {
                chosen.push((known.clone(), SCALES[random.below(SCALES.len())]));
            }
        }
        chosen
    }

    /// Adapters for a request.
    pub fn compose(&self, random: &mut Random) -> Composed {
        let mut chosen = self.choose(random);
        let applied =
            chosen.iter().map(|(known, scale)| AppliedAdapter { adapter: known.adapter.clone(), scale: *scale });
        let mut applied: Vec<_> = applied.collect();
        if random.once_in(8) {
            applied.iter_mut().for_each(AppliedAdapter::forbid_merge);
        }
        let are_harmed = chosen.iter().map(|(known, _)| Arc::clone(&known.is_harmed)).collect();
        chosen.sort_by_key(|(known, _)| known.adapter.digest());
        // The sum of three scales depends on their order, as they were chosen.
        chosen.dedup_by(|(next, scale), (kept, sum)| {
            let is_same = next.tags == kept.tags;
            if is_same {
                *sum += *scale;
            }
            is_same
        });
        chosen.retain(|(_, scale)| *scale != 0.0);
        let num_pages = chosen.iter().map(|(known, _)| known.adapter.num_pages()).sum();
        let updates = chosen.iter().map(|(known, scale)| Update { tags: known.tags, scale: scale.to_bits() }).collect();
        Composed { applied, updates, num_pages, are_harmed }
    }
}
