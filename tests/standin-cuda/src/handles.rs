//! Tables of the objects that C holds by number. Not the objects. Invariant: a number is never given twice, so a handle
//! that was destroyed names nothing, and no handle is an address.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::abi::Handle;
use crate::code::{Code, Outcome};

/// What a handle is of; the topmost bits of its number, which make it no address.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Context = 0xC1,
    Stream = 0xC2,
    Event = 0xC3,
    Module = 0xC4,
    Function = 0xC5,
    Memory = 0xC6,
}

impl Kind {
    pub(crate) fn handle(self, number: usize) -> Handle {
        Handle((self as usize) << 56 | number << 4)
    }

    /// The number that `handle` made this from; none for a handle of another kind.
    pub(crate) fn number(self, handle: Handle) -> Option<usize> {
        (handle.0 >> 56 == self as usize).then_some(handle.0 << 8 >> 12)
    }
}

#[derive(Debug)]
pub(crate) struct Table<T> {
    kind: Kind,
    next: AtomicUsize,
    items: Mutex<HashMap<Handle, Arc<T>>>,
}

impl<T> Table<T> {
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, next: AtomicUsize::new(1), items: Mutex::default() }
    }

    fn items(&self) -> MutexGuard<'_, HashMap<Handle, Arc<T>>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, item: Arc<T>) -> Handle {
        let handle = self.kind.handle(self.next.fetch_add(1, Ordering::Relaxed));
        self.items().insert(handle, item);
        handle
    }

    /// # Errors
    /// `INVALID_HANDLE`.
    pub(crate) fn get(&self, handle: Handle) -> Outcome<Arc<T>> {
        self.items().get(&handle).cloned().ok_or(Code::INVALID_HANDLE)
    }

    /// # Errors
    /// `INVALID_HANDLE`.
    pub(crate) fn remove(&self, handle: Handle) -> Outcome<Arc<T>> {
        self.items().remove(&handle).ok_or(Code::INVALID_HANDLE)
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.items().values().cloned().collect()
    }

    pub(crate) fn retain(&self, keep: impl Fn(&T) -> bool) {
        self.items().retain(|_, item| keep(item));
    }

    pub(crate) fn count(&self) -> usize {
        self.items().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_handle_names_nothing() {
        let table = Table::new(Kind::Event);
        let (first, second) = (table.add(Arc::new('a')), table.add(Arc::new('b')));
        assert_ne!(first, second);
        assert_eq!(table.remove(first), Ok(Arc::new('a')));
        assert_eq!(table.get(first), Err(Code::INVALID_HANDLE));
        assert_eq!((table.get(second), table.count()), (Ok(Arc::new('b')), 1));
        assert_eq!(Kind::Event.number(second), Some(2));
        assert_eq!(Kind::Stream.number(second), None);
    }
}
