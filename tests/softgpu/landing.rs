//! Blocks of the host that come up layer by layer, beside the step that uses them.

use std::path::Path;
use std::thread;
use std::time::Duration;

use mneme::backend::DType;
use mneme::backend::cuda::CudaBackend;
use mneme::engine::{FetchDecision, SamplingParams, SchedulerLimits, TierConfig};

use crate::support::engine::{Output, PATIENCE, Setup, TestEngine, collect, limits};
use crate::support::random::Random;
use crate::support::tiny_model::{Family, TinyModel, VOCAB};
use crate::support::{byte_tokenizer, softgpu};
use crate::tiers::bits;
use crate::vault::Tiers;

/// Three blocks, all of which may be on their way down at a time.
pub(crate) const NUM_SHARED: usize = 48;
const NUM_BLOCKS: usize = 24;
pub(crate) const NUM_HOST_BLOCKS: usize = 100;

/// Kernels up to behind the attention of the second layer of two.
const LAUNCHES_TO_LAST_LAYER: u64 = 15;

/// Tokens that a server with a vocabulary of bytes takes, too.
pub(crate) const NUM_BYTES: usize = byte_tokenizer::BOS as usize;

/// Two prompts that begin alike.
pub(crate) fn prompts() -> [Vec<u32>; 2] {
    let mut random = Random::new(5);
    let shared = random.tokens(NUM_SHARED, NUM_BYTES);
    [(); 2].map(|()| [&shared[..], &random.tokens(5, NUM_BYTES)].concat())
}

pub(crate) fn ask(engine: &TestEngine, prompt: &[u32]) -> Output {
    let sampling = SamplingParams { temperature: 0.0, max_tokens: 4, logprobs: Some(VOCAB), ..Default::default() };
    collect(engine.submit(prompt, sampling))
}

/// An engine whose host tier, and nothing else, has what both prompts begin with.
pub(crate) fn engine_with_blocks_on_the_host(model: &Path, family: Family) -> TestEngine {
    engine_with_blocks(model, family, Setup::default().kv_dtype, Duration::ZERO)
}

/// The same on a device of the caller's.
pub(crate) fn engine_with_blocks_below(backend: CudaBackend, model: &Path, family: Family) -> TestEngine {
    let engine = engine_with_room_below(backend, model, family, Setup::default().kv_dtype, 0);
    fill_host(&engine, Duration::ZERO);
    engine
}

/// The same, whose KV cache is of `kv_dtype`, and which has so long a pause for copies on their way down.
fn engine_with_blocks(model: &Path, family: Family, kv_dtype: DType, pause: Duration) -> TestEngine {
    let engine = engine_with_room_below(softgpu::backend(kv_dtype), model, family, kv_dtype, 0);
    fill_host(&engine, pause);
    engine
}

/// An engine with an empty host tier of [`NUM_HOST_BLOCKS`], page-locked so many at a time.
pub(crate) fn engine_with_room_below(
    backend: CudaBackend,
    model: &Path,
    family: Family,
    kv_dtype: DType,
    slab_len: usize,
) -> TestEngine {
    let limits = SchedulerLimits { num_blocks: NUM_BLOCKS, max_model_len: 320, ..limits() };
    let mut below = Tiers::new(family);
    below.setup = Setup { limits, kv_dtype, ..Setup::default() };
    let (host_bytes, host_slab_bytes) = (NUM_HOST_BLOCKS * below.block_bytes(), slab_len * below.block_bytes());
    let fetch_wait = Some(PATIENCE);
    let tiers = TierConfig { host_bytes, host_slab_bytes, num_io_threads: 2, fetch_wait, ..TierConfig::default() };
    TestEngine::start_with_tiers(backend, model, below.setup, tiers)
}

/// Leaves what both prompts begin with on the host alone.
fn fill_host(engine: &TestEngine, pause: Duration) {
    ask(engine, &prompts()[0]);
    thread::sleep(pause);
    for seed in 100..103 {
        engine.greedy(&Random::new(seed).tokens(200, VOCAB), 1);
    }
}

/// Blocks whose place the device takes before they have come down are lost, and that many engines may lose some.
pub(crate) const MAX_ENGINES: usize = 20;

/// How much longer each of them lets copies come down than the one before: a GPU takes places as fast as it computes.
const LONGER_PAUSE: Duration = Duration::from_millis(5);

/// Asks an engine whose host tier has all that both prompts begin with.
fn attached(model: &Path, family: Family, kv_dtype: DType, prompt: &[u32], num_launches_before: u64) -> Output {
    for attempt in 0..MAX_ENGINES as u32 {
        let engine = engine_with_blocks(model, family, kv_dtype, attempt * LONGER_PAUSE);
        softgpu::hold_copies(num_launches_before);
        let found = ask(&engine, prompt);
        if found.reuse.host_tokens == NUM_SHARED {
            assert_eq!(found.reuse.decision, FetchDecision::Attached);
            return found;
        }
    }
    panic!("{MAX_ENGINES} engines in turn have lost blocks on their way down");
}

/// The same prompt computed, and with its beginning from the device, from the host layer by layer and from disk block by
/// block.
pub(crate) fn check(family: Family, kv_dtype: DType) {
    let what = format!("{family:?}, {kv_dtype}");
    let model = TinyModel::new(family, 3).write();
    let [first, second] = prompts();
    let mut tiers = Tiers::new(family);
    tiers.setup.kv_dtype = kv_dtype;
    tiers.setup.limits.num_blocks = 64;
    let wanted = bits(&ask(&tiers.start(model.path()), &second));
    tiers.files = mneme::paging::faulty::FaultyFiles::new(2);
    let engine = tiers.start(model.path());
    ask(&engine, &first);
    let from_device = ask(&engine, &second);
    assert_eq!((from_device.reuse.device_tokens, bits(&from_device)), (NUM_SHARED, wanted.clone()), "{what}");
    drop(engine);
    tiers.files.restart();
    let whole = ask(&tiers.start(model.path()), &first);
    assert_eq!((whole.reuse.decision, whole.reuse.disk_tokens), (FetchDecision::Fetched, NUM_SHARED));
    let attached = |prompt: &[u32]| bits(&attached(model.path(), family, kv_dtype, prompt, 0));
    assert_eq!(attached(&first), bits(&whole), "{what}");
    assert_eq!(attached(&second), wanted, "{what}");
}

#[test]
fn blocks_that_land_layer_by_layer_give_the_same_bits() {
    for family in [Family::Llama, Family::Gemma3] {
        check(family, DType::BF16);
    }
}

/// No byte of them moves before the step that uses them is queued as far as the last layer.
#[test]
fn a_step_is_queued_before_its_blocks_are_there() {
    let model = TinyModel::new(Family::Llama, 3).write();
    let [_, second] = prompts();
    let attached = |num_launches| bits(&attached(model.path(), Family::Llama, DType::BF16, &second, num_launches));
    let wanted = attached(0);
    assert_eq!(attached(LAUNCHES_TO_LAST_LAYER), wanted);
}

/// The software GPU sees it when a step leaves out the wait for a single layer.
#[cfg(feature = "planted-bugs")]
mod planted {
    use std::process::Command;

    use mneme::planted::{Bug, plant};

    use super::*;

    /// Set in the process that is to fail.
    const VARIABLE: &str = "MNEME_TEST_WITHOUT_WAIT";

    #[test]
    fn a_layer_that_is_not_awaited_is_reported() {
        if std::env::var_os(VARIABLE).is_some() {
            let model = TinyModel::new(Family::Llama, 3).write();
            let engine = engine_with_blocks_on_the_host(model.path(), Family::Llama);
            plant(Some(Bug::LayerNotAwaited));
            softgpu::hold_copies(LAUNCHES_TO_LAST_LAYER);
            ask(&engine, &prompts()[1]);
            return;
        }
        softgpu::end_without_kernels();
        if softgpu::is_replaced() {
            return;
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["a_layer_that_is_not_awaited_is_reported", "--nocapture"]).env(VARIABLE, "1");
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("StreamOrder"), "{text}");
    }
}
