//! The books of gets from other nodes: which are under way, and which of them others may join.
//! Not what becomes of them (`fetch`). Invariant: a fetch that others may join is found by its key for as
//! long as it is under way.

use std::collections::HashMap;

use super::fetch::{Fetch, FetchId, Want};
use super::numbers::Numbered;
use crate::key::Key;

/// Fetches by number.
#[derive(Debug, Default)]
pub(super) struct Fetches {
    books: Numbered<FetchId, Box<Fetch>>,
    /// Those that are kept for later readers, oldest first: who asks for the same meanwhile may join one.
    joinable: HashMap<Key, Vec<FetchId>>,
    next: u64,
}

impl Fetches {
    pub(super) fn len(&self) -> usize {
        self.books.len()
    }

    pub(super) fn get(&self, id: FetchId) -> Option<&Fetch> {
        self.books.get(id).map(|fetch| &**fetch)
    }

    pub(super) fn get_mut(&mut self, id: FetchId) -> Option<&mut Fetch> {
        self.books.get_mut(id).map(|fetch| &mut **fetch)
    }

    pub(super) fn contains(&self, id: FetchId) -> bool {
        self.books.contains(id)
    }

    pub(super) fn insert(&mut self, fetch: Box<Fetch>) -> FetchId {
        let id = FetchId(self.next);
        self.next += 1;
        if fetch.want == (Want::Object { keep: true }) {
            self.joinable.entry(fetch.key.clone()).or_default().push(id);
        }
        self.books.insert(id, fetch);
        id
    }

    pub(super) fn remove(&mut self, id: FetchId) -> Option<Box<Fetch>> {
        let fetch = self.books.remove(id)?;
        if fetch.want == (Want::Object { keep: true })
            && let Some(of_key) = self.joinable.get_mut(&fetch.key)
        {
            of_key.retain(|other| *other != id);
            if of_key.is_empty() {
                self.joinable.remove(&fetch.key);
            }
        }
        Some(fetch)
    }

    /// The oldest one of a key that may be joined and is like this.
    pub(super) fn joinable(&self, key: &Key, like: impl Fn(&Fetch) -> bool) -> Option<FetchId> {
        let of_key = self.joinable.get(key)?;
        of_key.iter().copied().find(|id| self.get(*id).is_some_and(&like))
    }

    /// Replicas that are being fetched.
    pub(super) fn replicas(&self) -> usize {
        self.books.sum(|fetch| fetch.replicas())
    }

    /// Whether any is like this.
    pub(super) fn any(&self, like: impl Fn(&Fetch) -> bool) -> bool {
        self.books.any(|fetch| like(fetch))
    }

    /// All that are like this, oldest first.
    pub(super) fn numbers(&self, like: impl Fn(&Fetch) -> bool) -> Vec<FetchId> {
        self.books.numbers(|fetch| like(fetch))
    }
}
