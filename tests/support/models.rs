//! Owns getting real models for integration tests: through the library, into the user's own cache, once.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use mneme::hub::{Cache, ModelRef, resolve, stderr_progress};

static NUM_SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Whether `MNEME_SKIP_MODEL_TESTS=1` asks to go without models. Says so, with the number of tests skipped so far in
/// this program: a run that skipped must not look like one that did not.
pub fn skips_models(what: &str) -> bool {
    if std::env::var("MNEME_SKIP_MODEL_TESTS").as_deref() != Ok("1") {
        return false;
    }
    let num_skipped = NUM_SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    eprintln!("skipped: {what} (MNEME_SKIP_MODEL_TESTS=1, {num_skipped} so far)");
    true
}

/// The model of a short name; `None` only when `MNEME_SKIP_MODEL_TESTS=1`.
///
/// # Panics
/// When the model can be neither found nor fetched: a test that lacks its model has failed.
pub fn model_path(short_name: &str) -> Option<PathBuf> {
    if skips_models(short_name) {
        return None;
    }
    let model = Cache::from_env()
        .and_then(|cache| resolve(&ModelRef::parse(short_name)?, &cache, stderr_progress().as_mut()))
        .unwrap_or_else(|e| panic!("no model {short_name}: {e}\nSet MNEME_SKIP_MODEL_TESTS=1 to go without models."));
    Some(model.path)
}

/// The folder of an adapter that golden data exists for: under `MNEME_TEST_ADAPTERS`, or in `../shared/adapters`. Without it
/// the test is skipped and says so, with the number of tests skipped so far in this program.
pub fn adapter_path(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MNEME_TEST_ADAPTERS")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/adapters"), PathBuf::from);
    let path = folder.join(name);
    if path.join("adapter_config.json").exists() {
        return Some(path);
    }
    let num_skipped = NUM_SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    eprintln!("skipped: adapter {name}, not in {} ({num_skipped} so far)", folder.display());
    None
}
