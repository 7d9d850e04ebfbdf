//! A slice that several threads write at once, each its own part.

#![allow(unsafe_code)]

use std::marker::PhantomData;

/// A `&mut [T]` whose parts go to different tasks of a region.
pub(super) struct DisjointSlice<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`; `part` hands out parts that do not overlap, so sharing it sends `T`s.
unsafe impl<T: Send> Sync for DisjointSlice<'_, T> {}

impl<'a, T> DisjointSlice<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _borrow: PhantomData }
    }

    /// Elements `[start, start + len)`.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part lies outside its slice");
        // SAFETY: it lies inside the borrowed slice, and the caller promises that nobody else holds any of it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Elements `[start, start + len)`, to be read.
    ///
    /// # Safety
    /// No part that lives at the same time overlaps.
    pub(super) unsafe fn read(&self, start: usize, len: usize) -> &[T] {
        assert!(start <= self.len && len <= self.len - start, "a part lies outside its slice");
        // SAFETY: it lies inside the borrowed slice, and the caller promises that nobody writes any of it.
        unsafe { std::slice::from_raw_parts(self.start.add(start), len) }
    }
}
