//! An allocator that counts: how often it was asked, how much is held, how much was held at most.
#![allow(unsafe_code, reason = "an allocator cannot be had without")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Counts what the system's allocator is asked for, by all threads.
pub struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    CALLS.fetch_add(1, Relaxed);
    MOST.fetch_max(HELD.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

fn returned(bytes: usize) {
    HELD.fetch_sub(bytes, Relaxed);
}

// SAFETY: every call goes to `System` as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        returned(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Old and new may both be there for a while: that is what counts.
        taken(size);
        returned(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// What the heap went through while something ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Times memory was asked for.
    pub calls: usize,
    /// Bytes held at most, above those held before.
    pub most: usize,
    /// Bytes still held, above those held before.
    pub kept: usize,
}

/// Runs `body` and counts. Two at a time would count each other's.
pub fn count<R>(body: impl FnOnce() -> R) -> (R, Account) {
    let (calls, held) = (CALLS.load(Relaxed), HELD.load(Relaxed));
    MOST.store(held, Relaxed);
    let result = body();
    let account = Account {
        calls: CALLS.load(Relaxed) - calls,
        most: MOST.load(Relaxed).saturating_sub(held),
        kept: HELD.load(Relaxed).saturating_sub(held),
    };
    (result, account)
}
