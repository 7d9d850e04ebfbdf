//! From an adapter's tensors to what a device adds.

use super::base::{BaseShapes, Module};
use super::format::Adapter;
use crate::Result;
use crate::backend::{LoraAdapter, LoraLoader, LoraPart, LoraSite, Projection};

/// Brings all updates of an adapter onto the loader's device; those of one product together.
///
/// # Errors
/// `Unsupported` where the device cannot apply adapters.
pub fn load_onto<L: LoraLoader>(loader: &L, adapter: &Adapter, shapes: &BaseShapes) -> Result<LoraAdapter<L::Lora>> {
    let mut loaded = LoraAdapter::new(shapes.num_layers);
    for layer in 0..shapes.num_layers {
        for projection in Projection::ALL {
            let site = LoraSite { layer, projection };
            let parts = parts_at(adapter, shapes, site);
            if !parts.is_empty() {
                loaded.insert(site, loader.load(&parts)?);
            }
        }
    }
    Ok(loaded)
}

fn parts_at(adapter: &Adapter, shapes: &BaseShapes, wanted: LoraSite) -> Vec<LoraPart> {
    let part = |module: Module| {
        let (site, first_column) = shapes.place(wanted.layer, module);
        let update = adapter.update(wanted.layer, module).filter(|_| site == wanted)?;
        let (a, b) = (update.a.clone(), update.b.clone());
        Some(LoraPart { a, b, scaling: update.scaling, first_column })
    };
    Module::ALL.into_iter().filter_map(part).collect()
}
