//! Files of cubes to and from the vault of a server that does not run. No model is loaded: blocks are moved as they are,
//! and whoever serves their model later finds them.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use mneme::memory::{CatalogLimits, Cube, CubeAddress, Durability, Incoming, NewCube, Origin, Outgoing, Principal};
use mneme::memory::{SystemClock, Vault};
use mneme::paging::{BlockFormat, BlockStore, StoreConfig, SystemFiles};
use mneme::server::hold_all;
use serde_json::{Value, json};

use crate::cli::tiers::SEGMENT_BYTES;

/// The cache domain of whoever uses a server without keys.
const NAMESPACE: &str = "public";

/// Writes a cube to `file`; the file's length.
pub(super) fn export(vault: &Path, max_bytes: u64, name: &str, file: &Path) -> anyhow::Result<u64> {
    let vault = open(vault)?;
    let cube = vault.catalog().get(&Principal::local(), &name.parse::<CubeAddress>()?)?.cube;
    let outgoing = Outgoing::new(&cube, store_of(&vault, max_bytes, &cube)?)?;
    let mut out = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    outgoing.write(&mut out)?;
    out.sync_all()?;
    Ok(outgoing.num_bytes()?)
}

/// Makes a cube of `file`; the same answer as a server's, as far as it is printed.
pub(super) fn import(vault: &Path, max_bytes: u64, file: &Path, name: Option<&str>) -> anyhow::Result<Value> {
    let source = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let incoming = Incoming::open(BufReader::new(source)).with_context(|| format!("{}", file.display()))?;
    let (vault, owner) = (open(vault)?, Principal::local());
    let name = name.map_or_else(|| Ok(incoming.cube.name.clone()), str::parse)?;
    vault.catalog().check_name(&owner, &name)?;
    let changes = incoming.cube.changes();
    let (payload, _pins) = match incoming.format().cloned() {
        None => (incoming.into_plaintext()?, None),
        Some(format) => {
            let store = Arc::new(open_store(&vault, max_bytes, format)?);
            hold_all(&store, vault.catalog());
            let (payload, pins) = incoming.store(&store, NAMESPACE)?;
            (payload, Some(pins))
        }
    };
    let num_tokens = payload.activation().map_or(0, |activation| activation.token_ids().len());
    let new = NewCube { name, payload, parents: Vec::new(), origin: Origin::Import, changes };
    let cube = vault.catalog().create(&owner, new, Durability::Synced)?.cube;
    let (name, version) = (cube.name.as_str(), cube.version.get());
    Ok(json!({ "name": name, "version": version, "restored_tokens": num_tokens, "computed_tokens": 0 }))
}

fn open(folder: &Path) -> anyhow::Result<Vault> {
    anyhow::ensure!(folder.is_dir(), "there is no vault {}", folder.display());
    Ok(Vault::open(folder, Arc::new(SystemClock), CatalogLimits::default())?)
}

/// The store that has a cube's blocks, whichever model they are of.
fn store_of(vault: &Vault, max_bytes: u64, cube: &Cube) -> anyhow::Result<Option<Arc<BlockStore>>> {
    let Some(first) = cube.payload.blocks().next() else { return Ok(None) };
    for format in BlockStore::formats(&SystemFiles, &vault.segments_folder())? {
        let store = open_store(vault, max_bytes, format)?;
        if store.contains(first) {
            return Ok(Some(Arc::new(store)));
        }
    }
    Ok(None)
}

fn open_store(vault: &Vault, max_bytes: u64, format: BlockFormat) -> anyhow::Result<BlockStore> {
    let config = StoreConfig { format, max_bytes, segment_bytes: SEGMENT_BYTES.min(max_bytes / 4) };
    Ok(BlockStore::open(Arc::new(SystemFiles), &vault.segments_folder(), config)?.0)
}
