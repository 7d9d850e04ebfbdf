//! From an adapter's tensors to what a device adds.

use super::base::{BaseShapes, Module};
use super::format::{Adapter, Update};
use crate::Result;
use crate::backend::{LoraAdapter, LoraLoader, LoraPart, LoraSite, PageImage, PagedImage, Projection, Transfer};

/// An adapter as it lies in a device's pages, still on the host.
pub struct PackedAdapter<L: LoraLoader> {
    updates: LoraAdapter<L::Packed>,
    image: PagedImage,
}

impl<L: LoraLoader> PackedAdapter<L> {
    /// Arranges all updates of an adapter, layer by layer; those of one product together.
    ///
    /// # Errors
    /// `Unsupported` where the device cannot apply adapters, or a page does not hold a row of this one.
    pub fn new(loader: &L, adapter: &Adapter, shapes: &BaseShapes, page_bytes: usize) -> Result<Self> {
        let mut updates = LoraAdapter::new(shapes.num_layers);
        let mut image = PageImage::new(page_bytes);
        for layer in 0..shapes.num_layers {
            for projection in Projection::ALL {
                let site = LoraSite { layer, projection };
                let parts = parts_at(adapter, shapes, site);
                if !parts.is_empty() {
                    updates.insert(site, loader.pack(&parts, &mut image)?);
                }
            }
        }
        let embedding = adapter.update(0, Module::Embedding).map(whole_part);
        let embedding = embedding.map(|part| loader.pack_embedding(&part, &mut image)).transpose()?;
        let head = adapter.update(0, Module::Head).map(whole_part);
        let head = head.map(|part| loader.pack_head(&part, &mut image)).transpose()?;
        updates.set_vocabulary(embedding, head);
        Ok(Self { updates, image: image.finish()? })
    }

    /// Pages that it takes.
    pub fn num_pages(&self) -> usize {
        self.image.num_pages()
    }

    /// Bytes of all of them.
    pub fn num_bytes(&self) -> usize {
        self.image.num_bytes()
    }

    /// What kernels take of it once it lies in these pages of an arena.
    ///
    /// # Errors
    /// `Invalid` when the pages do not lie in the arena.
    pub fn place(&self, loader: &L, arena: &L::Buffer, pages: &[u32]) -> Result<LoraAdapter<L::Lora>> {
        let placed = self.image.placed(arena.clone(), pages.to_vec());
        self.updates.try_map(|packed| loader.place(packed, &placed))
    }

    /// Copies it into these pages, layer by layer, and waits for that.
    ///
    /// # Errors
    /// The device's.
    pub fn upload<T: Transfer<Buffer = L::Buffer>>(
        &self,
        transfer: &mut T,
        arena: &L::Buffer,
        pages: &[u32],
    ) -> Result<()> {
        self.image.upload(transfer, arena, pages)
    }
}

fn parts_at(adapter: &Adapter, shapes: &BaseShapes, wanted: LoraSite) -> Vec<LoraPart> {
    let part = |module: Module| {
        let (site, first_column) = shapes.place(wanted.layer, module)?;
        let update = adapter.update(wanted.layer, module).filter(|_| site == wanted)?;
        Some(LoraPart { first_column, ..whole_part(update) })
    };
    Module::ALL.into_iter().filter_map(part).collect()
}

/// The update of a product that is one module.
fn whole_part(update: &Update) -> LoraPart {
    LoraPart { a: update.a.clone(), b: update.b.clone(), scaling: update.scaling, first_column: 0 }
}
