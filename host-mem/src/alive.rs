//! How clients see that their node has died, with one load: a word of the index that holds the number of a thread of
//! the node, and that the kernel changes when this thread ends, however it ends. Not a heartbeat: nobody writes
//! anything while the node lives. Invariant: the word names the thread only while it runs; where the kernel does not
//! help, a node that was killed looks alive.
//!
//! Holds unsafe code: the thread's list of robust futexes (futex(2), set_robust_list(2)), which the kernel reads when
//! the thread ends. The C library uses that list for robust mutexes only, and the thread has none.
#![allow(unsafe_code)]

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::index::IndexMemory;
use crate::index::layout::ALIVE;

/// Bits of the word that name a thread; the kernel clears them.
const THREAD: u64 = 0x3fff_ffff;

/// `struct robust_list_head` of linux/futex.h. The list has one entry, which is a pointer back to the head.
#[repr(C)]
struct Head {
    list: *const Head,
    /// From the entry to its futex, in bytes.
    offset: libc::c_long,
    pending: *const Head,
    entry: *const Head,
}

/// Shows this thread as alive until it is dropped, which is to be on the same thread.
pub struct Alive {
    memory: Arc<IndexMemory>,
    /// Read by the kernel when the thread ends; at its address from `begin` on.
    _head: Pin<Box<Head>>,
    /// The list is the thread's: this value must not go to another one.
    _here: std::marker::PhantomData<*const ()>,
}

impl std::fmt::Debug for Alive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Alive").finish_non_exhaustive()
    }
}

impl Alive {
    /// Shows the calling thread as alive in the index's header.
    #[must_use = "the node looks dead once this is dropped"]
    pub fn begin(memory: Arc<IndexMemory>) -> Self {
        let word = &memory.words()[ALIVE];
        let mut head = Box::new(Head {
            list: std::ptr::null(),
            offset: 0,
            pending: std::ptr::null(),
            entry: std::ptr::null(),
        });
        let start = &raw const *head;
        let entry = (&raw const head.entry).cast::<Head>();
        // The futex is the half of the word that has its low bits.
        let half = if cfg!(target_endian = "big") { 4 } else { 0 };
        let futex = (word as *const std::sync::atomic::AtomicU64).addr() + half;
        head.list = entry;
        head.entry = start;
        #[allow(clippy::cast_possible_wrap, reason = "a difference of two addresses")]
        {
            head.offset = futex.wrapping_sub(entry.addr()) as libc::c_long;
        }
        let head = Box::into_pin(head);
        // SAFETY: the head and its one entry are what the kernel expects, and stay where they are until `drop`, which
        // takes the list back on this thread. A kernel that refuses is none that helps.
        unsafe {
            libc::syscall(libc::SYS_set_robust_list, &raw const *head, 3 * size_of::<usize>());
        }
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        word.store(u64::from(thread.unsigned_abs()) & THREAD, Ordering::Release);
        Self { memory, _head: head, _here: std::marker::PhantomData }
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.memory.words()[ALIVE].store(0, Ordering::Release);
        // SAFETY: no list is a list; from here on the kernel does not read the head that goes with `self`.
        unsafe {
            libc::syscall(libc::SYS_set_robust_list, std::ptr::null::<Head>(), 3 * size_of::<usize>());
        }
    }
}

/// Whether a word names a thread that runs.
#[inline]
pub(crate) const fn is_alive(word: u64) -> bool {
    word & THREAD != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{IndexReader, IndexWriter};

    #[test]
    fn the_word_is_cleared_when_its_thread_ends_whether_it_says_so_or_not() {
        let writer = IndexWriter::create(8).expect("an index");
        let fd = writer.descriptor().try_clone_to_owned().expect("a descriptor is left");
        let reader = IndexReader::map(fd).expect("the same index");
        assert!(!reader.node_is_alive(), "nobody has said so");
        for politely in [true, false] {
            let memory = writer.memory();
            let (said, heard) = std::sync::mpsc::channel();
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let thread = std::thread::spawn(move || {
                let alive = Alive::begin(memory);
                said.send(()).expect("the test waits");
                let _ = ended.recv();
                if politely {
                    drop(alive);
                } else {
                    // As if it were killed here: nothing is dropped, and the kernel is left with the list.
                    Box::leak(Box::new(alive));
                }
            });
            heard.recv().expect("it has begun");
            assert!(reader.node_is_alive());
            drop(end);
            thread.join().expect("it ends");
            assert!(!reader.node_is_alive(), "politely: {politely}");
        }
    }
}
