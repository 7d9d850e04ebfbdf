//! Ends the erasures of deleted cubes: their blocks are overwritten, then the catalog takes note. What a crash or a failing disk
//! cut short is still in the catalog's list, and is done at the next start or the next sweep.

use crate::Result;
use crate::kv::BlockHash;
use crate::memory::{Catalog, Erasure};
use crate::paging::BlockStore;

/// Overwrites what an earlier process was to erase and did not, in a store that was just opened: nobody has any of it in
/// memory yet.
pub fn finish_erasures(store: &BlockStore, catalog: &Catalog) {
    if let Err(error) = erase_all(catalog, catalog.pending_erasures(), |blocks| store.erase(blocks)) {
        tracing::warn!(%error, "the KV of deleted cubes is not overwritten yet");
    }
}

/// Whether all of them have come to their end.
pub(super) fn erase_all(
    catalog: &Catalog,
    erasures: Vec<Erasure>,
    erase: impl Fn(&[BlockHash]) -> Result<bool>,
) -> Result<bool> {
    let mut are_all_over = true;
    for Erasure { id, blocks } in erasures {
        let is_over = erase(&blocks)?;
        if is_over {
            catalog.finish_erasure(id);
        }
        are_all_over &= is_over;
    }
    Ok(are_all_over)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use super::*;
    use crate::memory::{
        Activation, Binding, Blocks, CatalogLimits, CubeChanges, CubeName, Digest, Durability, Form, NewCube, Payload,
        Principal, SystemClock,
    };
    use crate::paging::faulty::FaultyFiles;
    use crate::paging::{BlockFormat, Files, StoreConfig};

    const BLOCK_BYTES: usize = 4096;
    const SECRET: [u8; 4] = *b"tea!";

    fn open(files: &FaultyFiles) -> Result<(Catalog, BlockStore)> {
        let shared: Arc<dyn Files> = Arc::new(files.clone());
        let (folder, clock) = (PathBuf::from("/vault/cubes"), Arc::new(SystemClock));
        let catalog = Catalog::open(Arc::clone(&shared), folder, clock, CatalogLimits::default())?;
        let format = BlockFormat { block_bytes: BLOCK_BYTES, block_size: 1, layout: "test".into() };
        let config = StoreConfig { format, max_bytes: 16 << 20, segment_bytes: 1 << 20 };
        let (store, _) = BlockStore::open(shared, Path::new("/vault/segments"), config)?;
        Ok((catalog, store))
    }

    fn hash(number: u32) -> BlockHash {
        BlockHash::root(b"model", b"").child(&[number])
    }

    fn name(text: &str) -> CubeName {
        text.parse().unwrap()
    }

    fn cube(text: &str, numbers: &[u32]) -> NewCube {
        let digest = Digest::of(b"");
        let binding = Binding {
            weights: digest,
            architecture: "llama".parse().unwrap(),
            dtype: "bf16".parse().unwrap(),
            tokenizer: digest,
            template: None,
            identity: digest,
            form: Form::Prefix,
            domain: "".parse().unwrap(),
        };
        let full = numbers.iter().map(|number| hash(*number)).collect();
        let blocks = Blocks { full, tail: None, num_bytes: 0 };
        let payload = Activation::new(None, binding, numbers.to_vec(), blocks).unwrap();
        let changes = CubeChanges { erase_on_free: Some(true), ..CubeChanges::default() };
        NewCube { changes, ..NewCube::new(name(text), Payload::Activation(Box::new(payload))) }
    }

    /// Two cubes that share block 2; the other blocks of the first hold secrets.
    fn vault() -> FaultyFiles {
        let files = FaultyFiles::new(1);
        ["/vault/cubes", "/vault/segments"].iter().for_each(|folder| files.create_folder(Path::new(folder)).unwrap());
        let (catalog, store) = open(&files).unwrap();
        for number in 0..4u32 {
            let content = if number == 2 { *b"free" } else { SECRET };
            store.write(hash(number), &[number], &content.repeat(BLOCK_BYTES / 4)).unwrap();
        }
        store.seal().unwrap();
        let create = |new| catalog.create(&Principal::local(), new, Durability::Synced).unwrap();
        create(cube("ana/secret", &[0, 1, 2, 3]));
        create(cube("ana/other", &[2]));
        ["/", "/vault", "/vault/cubes"].iter().for_each(|folder| files.sync_folder(Path::new(folder)).unwrap());
        files
    }

    /// Whether the deletion was acknowledged.
    fn delete(files: &FaultyFiles) -> Result<bool> {
        let (catalog, store) = open(files)?;
        let ended = catalog.delete(&Principal::local(), &name("ana/secret"))?;
        erase_all(&catalog, ended.erasures, |blocks| store.erase(blocks))
    }

    fn holds_secret(files: &FaultyFiles) -> bool {
        let has = |path: &PathBuf| {
            let file = files.open(path).unwrap();
            let mut bytes = vec![0; file.num_bytes().unwrap() as usize];
            file.read_at(&mut bytes, 0).unwrap();
            bytes.windows(64).any(|window| window == SECRET.repeat(16))
        };
        files.paths().iter().filter(|path| path.starts_with("/vault/segments")).any(has)
    }

    #[test]
    fn an_erasure_that_a_crash_cut_short_is_finished_at_the_next_start() {
        let all = vault();
        assert!(holds_secret(&all));
        let before = all.num_operations();
        assert!(delete(&all).unwrap());
        assert!(!holds_secret(&all));
        let num_operations = all.num_operations() - before;
        assert!(num_operations > 8, "{num_operations} are hardly all of them");
        let (mut num_kept, mut num_finished) = (0, 0);
        for operation in 0..num_operations {
            for seed in 0..8 {
                let files = vault();
                files.stop_at(operation + 1);
                let is_acknowledged = delete(&files).is_ok();
                let image = files.after_crash(seed);
                let (catalog, store) = open(&image).unwrap();
                let case = format!("crash at operation {operation}, seed {seed}");
                let is_gone = catalog.get(&Principal::local(), &name("ana/secret").into()).is_err();
                assert!(is_gone || !is_acknowledged, "{case}: what was deleted stays deleted");
                num_finished += usize::from(holds_secret(&image) && is_gone);
                num_kept += usize::from(!is_gone);
                finish_erasures(&store, &catalog);
                assert_eq!(holds_secret(&image), !is_gone, "{case}");
                assert!(store.contains(&hash(2)), "{case}: another cube has it");
                assert_eq!(store.contains(&hash(0)), !is_gone, "{case}");
                assert_eq!(catalog.pending_erasures().len(), 0, "{case}");
                // A later start finds nothing to do, whatever became of the removed files.
                let (catalog, store) = open(&image.after_crash(seed)).unwrap();
                finish_erasures(&store, &catalog);
                assert!(store.contains(&hash(2)), "{case}");
            }
        }
        assert!(num_kept > 0 && num_finished > 0, "{num_kept} {num_finished}: both were seen");
    }

    #[test]
    fn what_cannot_be_erased_now_stays_to_be_erased() {
        let files = vault();
        let (catalog, store) = open(&files).unwrap();
        let ended = catalog.delete(&Principal::local(), &name("ana/secret")).unwrap();
        assert_eq!(ended.erasures[0].blocks.len(), 3, "block 2 is another cube's");
        // As with a vault that is not open yet.
        assert!(!erase_all(&catalog, ended.erasures, |_| Ok(false)).unwrap());
        assert_eq!(catalog.pending_erasures().len(), 1);
        drop((catalog, store));
        let (catalog, store) = open(&files).unwrap();
        assert_eq!((catalog.pending_erasures().len(), catalog.num_cubes()), (1, 1));
        finish_erasures(&store, &catalog);
        assert!(catalog.pending_erasures().is_empty() && !holds_secret(&files));
        let has_manifest = |path: &PathBuf| path.starts_with("/vault/cubes") && !path.ends_with("tombstone.json");
        assert_eq!(files.paths().iter().filter(|path| has_manifest(path)).count(), 2, "a manifest and a tombstone");
    }
}
