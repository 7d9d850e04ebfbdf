//! Where the numbers of adapters lie: rows in pages of one size, which lie anywhere in an arena.
//!
//! A matrix is a run of rows of one length. A page holds as many of them as fit, beginning at multiples of that length,
//! so that row `r` of a run is found by one division and no row is ever cut. An adapter's last row is a table of the
//! pages it has, for kernels that look rows up by themselves. Whose pages these are is for others to know.

use super::Transfer;
use crate::{Result, unsupported};

/// Rows begin at multiples of this: vectors want it.
const ROW_ALIGNMENT: usize = 16;

/// Bytes of an entry of the table: the number of a page in the arena, an `int`.
const ENTRY_BYTES: usize = 4;

/// Rows of one length, one after the other in the pages of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRun {
    /// Rows of this length that would fit in front of it, counted from the adapter's first page.
    pub(super) first_slot: usize,
    /// Rows of this length in a page.
    pub(super) rows_per_page: usize,
    /// Bytes from one row to the next.
    pub(super) row_bytes: usize,
    pub(super) num_rows: usize,
}

impl RowRun {
    /// The page that row `row` lies in, among those of the adapter, and its first byte there.
    pub(super) fn place(&self, row: usize) -> (usize, usize) {
        assert!(row < self.num_rows, "row {row} of {} does not exist", self.num_rows);
        let slot = self.first_slot + row;
        (slot / self.rows_per_page, slot % self.rows_per_page * self.row_bytes)
    }
}

/// The pages of an adapter while it is arranged.
pub struct PageImage {
    page_bytes: usize,
    bytes: Vec<u8>,
    /// Bytes taken so far, gaps included.
    num_used: usize,
}

/// The content of an adapter's pages, wherever these are to be.
pub struct PagedImage {
    page_bytes: usize,
    bytes: Vec<u8>,
    table: RowRun,
}

/// Pages of an adapter on a device.
pub struct LoraPages<B> {
    arena: B,
    page_bytes: usize,
    /// Numbers of pages in the arena.
    pages: Vec<u32>,
    table: RowRun,
}

impl PageImage {
    /// No rows yet, in pages of `page_bytes`, a multiple of 16.
    pub fn new(page_bytes: usize) -> Self {
        assert!(page_bytes.is_multiple_of(ROW_ALIGNMENT), "pages begin where rows may");
        Self { page_bytes, bytes: Vec::new(), num_used: 0 }
    }

    /// Takes the room for `num_rows` rows of `row_bytes`, a multiple of 16; they are zeros.
    ///
    /// # Errors
    /// `Unsupported` when no page holds such a row; the message calls it a row of `what`.
    pub(super) fn reserve(&mut self, what: &str, num_rows: usize, row_bytes: usize) -> Result<RowRun> {
        assert!(row_bytes.is_multiple_of(ROW_ALIGNMENT) && row_bytes > 0, "{row_bytes} is no length of a row");
        let rows_per_page = self.page_bytes / row_bytes;
        if rows_per_page == 0 {
            let page_bytes = self.page_bytes;
            return Err(unsupported!(
                "a row of {what} takes {row_bytes} bytes and a KV block has {page_bytes}, in which adapters are kept; give \
                 a larger --block-size"
            ));
        }
        let (page, within) = (self.num_used / self.page_bytes, self.num_used % self.page_bytes);
        let first_slot = page * rows_per_page + within.div_ceil(row_bytes).min(rows_per_page);
        let run = RowRun { first_slot, rows_per_page, row_bytes, num_rows };
        let (page, within) = run.place(num_rows - 1);
        self.num_used = page * self.page_bytes + within + row_bytes;
        self.bytes.resize((page + 1) * self.page_bytes, 0);
        Ok(run)
    }

    /// The bytes of a row.
    pub(super) fn row_mut(&mut self, run: &RowRun, row: usize) -> &mut [u8] {
        let (page, within) = run.place(row);
        &mut self.bytes[page * self.page_bytes + within..][..run.row_bytes]
    }

    /// The whole adapter, with room for the table of its pages.
    ///
    /// # Errors
    /// `Unsupported` when there are so many pages that one does not hold their numbers.
    pub fn finish(mut self) -> Result<PagedImage> {
        // One more may be needed for the table.
        let num_pages = self.bytes.len() / self.page_bytes + 1;
        let table_bytes = (num_pages * ENTRY_BYTES).next_multiple_of(ROW_ALIGNMENT);
        let table = self.reserve("the table of pages", 1, table_bytes)?;
        Ok(PagedImage { page_bytes: self.page_bytes, bytes: self.bytes, table })
    }
}

impl PagedImage {
    /// Pages that it takes.
    pub fn num_pages(&self) -> usize {
        self.bytes.len() / self.page_bytes
    }

    /// Bytes of all of them.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Copies it into pages `pages` of an arena, in order.
    ///
    /// # Errors
    /// The device's.
    pub fn upload<T: Transfer>(&self, transfer: &mut T, arena: &T::Buffer, pages: &[u32]) -> Result<()> {
        assert_eq!(pages.len(), self.num_pages(), "an adapter takes as many pages as it was arranged for");
        for (index, page) in pages.iter().enumerate() {
            let offset = *page as usize * self.page_bytes;
            transfer.fill(arena, offset, self.page_bytes, &mut |target| {
                self.write_page(index, pages, target);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn write_page(&self, index: usize, pages: &[u32], target: &mut [u8]) {
        target.copy_from_slice(&self.bytes[index * self.page_bytes..][..self.page_bytes]);
        let (table_page, within) = self.table.place(0);
        if index == table_page {
            let entries = target[within..].chunks_exact_mut(ENTRY_BYTES);
            entries.zip(pages).for_each(|(entry, page)| entry.copy_from_slice(&page.to_le_bytes()));
        }
    }

    /// Where its rows lie once it is uploaded.
    pub fn placed<B>(&self, arena: B, pages: Vec<u32>) -> LoraPages<B> {
        LoraPages { arena, page_bytes: self.page_bytes, pages, table: self.table }
    }
}

impl<B> LoraPages<B> {
    /// What the pages are of.
    pub(super) fn arena(&self) -> &B {
        &self.arena
    }

    /// Bytes of a page.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The first byte of a row in the arena.
    pub(super) fn offset(&self, run: &RowRun, row: usize) -> usize {
        let (page, within) = run.place(row);
        self.pages[page] as usize * self.page_bytes + within
    }

    /// The first byte of the table in the arena: the numbers of the adapter's pages, i32, in order.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) fn table_offset(&self) -> usize {
        self.offset(&self.table, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::backend::cpu::Isa;
    use crate::backend::{Device, Tensor};

    #[test]
    fn rows_follow_each_other_and_none_is_cut() {
        for page_bytes in [256, 1024, 4096] {
            let mut image = PageImage::new(page_bytes);
            let runs: Vec<RowRun> = [(3, 16), (5, 240), (1, 256), (40, 48), (7, 16), (2, 112)]
                .map(|(num_rows, row_bytes)| image.reserve("it", num_rows, row_bytes).unwrap())
                .to_vec();
            let mut end = 0;
            for (number, run) in (1u8..).zip(&runs) {
                for row in 0..run.num_rows {
                    let (page, within) = run.place(row);
                    assert!(within + run.row_bytes <= page_bytes && within.is_multiple_of(run.row_bytes));
                    let start = page * page_bytes + within;
                    assert!(start >= end, "{run:?} lies over what is before it");
                    end = start + run.row_bytes;
                    image.row_mut(run, row).fill(number);
                }
            }
            for (number, run) in (1u8..).zip(&runs) {
                assert!((0..run.num_rows).all(|row| image.row_mut(run, row).iter().all(|byte| *byte == number)));
            }
        }
        let why = PageImage::new(256).reserve("q_proj", 1, 272).unwrap_err().to_string();
        assert!(why.contains("q_proj") && why.contains("272") && why.contains("256"), "{why}");
    }

    #[test]
    fn what_is_uploaded_is_found_by_the_table_and_by_the_host() {
        let backend = CpuBackend::new(Isa::Portable, 1).unwrap();
        let (page_bytes, row_bytes) = (256, 48);
        let mut image = PageImage::new(page_bytes);
        let run = image.reserve("it", 33, row_bytes).unwrap();
        (0..33).for_each(|row| image.row_mut(&run, row).fill(row as u8 + 1));
        let image = image.finish().unwrap();
        let pages: Vec<u32> = (0..image.num_pages() as u32).map(|page| (page * 5 + 3) % 23).collect();
        let arena = backend.allocate(23 * page_bytes).unwrap();
        image.upload(&mut backend.create_transfer().unwrap(), &arena, &pages).unwrap();
        let placed = image.placed(arena.clone(), pages.clone());
        let mut found = backend.allocate_host(23 * page_bytes).unwrap();
        let all = Tensor::new(arena, 0, 1, 23 * page_bytes / 4, crate::backend::DType::I32);
        let stream = backend.create_stream(crate::backend::StreamKind::Compute).unwrap();
        backend.download(&stream, &all, &mut found, 0).unwrap();
        let found = found.as_ref();
        let entry = |at: usize| i32::from_le_bytes(found[placed.table_offset() + 4 * at..][..4].try_into().unwrap());
        for row in 0..33 {
            let (page, within) = run.place(row);
            assert_eq!(entry(page) as u32, pages[page]);
            let offset = placed.offset(&run, row);
            assert_eq!(offset, entry(page) as usize * page_bytes + within);
            assert!(found[offset..offset + row_bytes].iter().all(|byte| *byte == row as u8 + 1));
        }
    }
}
