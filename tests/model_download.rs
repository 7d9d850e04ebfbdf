//! The default model, really fetched from its first source into an empty cache.

mod support;

use mneme::hub::catalog::{DEFAULT_MODEL, find};
use mneme::hub::{Cache, CacheState, ModelRef, Resolver, Silent};

#[test]
fn the_default_model_is_fetched_checked_and_kept() {
    if support::models::skips_models("fetching the default model") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let resolver = Resolver::new(Cache::at(folder.path()));
    let reference = ModelRef::parse(DEFAULT_MODEL).expect("the default is in the catalog");
    let artifact = find(DEFAULT_MODEL).expect("the default is in the catalog");

    let model = resolver.resolve(&reference, &mut Silent).expect("the default model can be fetched");
    assert_eq!(model.name, DEFAULT_MODEL);
    assert_eq!(std::fs::metadata(&model.path).expect("the file is there").len(), artifact.size_bytes);
    assert_eq!(&std::fs::read(&model.path).expect("the file is readable")[..4], b"GGUF");
    assert_eq!(resolver.cache().state(artifact).expect("the cache is readable"), CacheState::Ready(model.path.clone()));

    // A truncated file must be noticed at the next start and replaced.
    let file = std::fs::OpenOptions::new().write(true).open(&model.path).expect("the file is ours");
    file.set_len(1000).expect("the file can be cut");
    assert_eq!(resolver.cached(&reference).expect("the cache is readable"), None);
    assert_eq!(resolver.verify(&reference, &mut Silent).expect("it can be fetched again"), model);
    assert_eq!(std::fs::metadata(&model.path).expect("the file is there").len(), artifact.size_bytes);
}

#[test]
fn a_model_for_tests_is_in_the_users_cache() {
    if let Some(path) = support::models::model_path(DEFAULT_MODEL) {
        assert!(path.is_file(), "{}", path.display());
    }
}
