//! What a forked child may do with what its parent had: nothing but forget it. Not the connecting again (`connection`).
//! Invariant: a value of [`OfProcess`] is dropped by the process that made it and by no other, so that no child lifts
//! a pin, ends a reservation or joins a thread of its parent's; and a child holds no descriptor of the parent's socket,
//! so the node sees when the parent is gone.
//!
//! Holds unsafe code: the handler that the C library runs in a forked child.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Goes up in every forked child.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// Sockets to nodes, -1 where there is none. A process has few; one that finds no place is closed later, at exit.
static SOCKETS: [AtomicI32; 64] = [const { AtomicI32::new(-1) }; 64];

/// Which process this is, among those that forked from one another.
#[inline]
pub(crate) fn generation() -> u64 {
    GENERATION.load(Ordering::Relaxed)
}

/// From now on forks are noticed.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a function of this library, which is never unloaded, and does only what a child of a
        // process with threads may do: atomics and system calls.
        let _ = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    for place in &SOCKETS {
        let fd = place.swap(-1, Ordering::Relaxed);
        if fd < 0 {
            continue;
        }
        // SAFETY: plain system calls. The number is a socket of this process's copy of the parent's descriptors, owned
        // by a value that is never used here; what takes its place fails every use.
        unsafe {
            let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if nothing >= 0 {
                libc::dup3(nothing, fd, libc::O_CLOEXEC);
                libc::close(nothing);
            }
        }
    }
}

/// A socket that forked children let go of, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Unshared(Option<(&'static AtomicI32, i32)>);

impl Unshared {
    pub(crate) fn new(socket: BorrowedFd<'_>) -> Self {
        let fd = socket.as_raw_fd();
        let free =
            |place: &&AtomicI32| place.compare_exchange(-1, fd, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        Self(SOCKETS.iter().find(free).map(|place| (place, fd)))
    }
}

impl Drop for Unshared {
    fn drop(&mut self) {
        if let Some((place, fd)) = self.0 {
            // In a child it is gone already, and the place may be another socket's.
            let _ = place.compare_exchange(fd, -1, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// A value that only the process that made it drops.
#[derive(Debug)]
pub(crate) struct OfProcess<T> {
    value: ManuallyDrop<T>,
    generation: u64,
}

impl<T> OfProcess<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: ManuallyDrop::new(value), generation: generation() }
    }

    /// Whether this process made it.
    #[inline]
    pub(crate) fn is_here(&self) -> bool {
        self.generation == generation()
    }
}

impl<T> Deref for OfProcess<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for OfProcess<T> {
    #[inline]
    fn drop(&mut self) {
        if self.is_here() {
            // SAFETY: this is the only place that drops it, and it runs once.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}
