//! Keys by prefix, page after page. Not a snapshot: objects may come and go between pages. Invariant: no key comes
//! twice.

use std::sync::Arc;

use hetmem_core::wire::Listed;
use hetmem_core::{Key, StoreError};

use crate::shared::Shared;

/// Objects whose keys start with a prefix, in order of keys. Ends after the first error.
#[derive(Debug)]
pub struct Listing {
    shared: Arc<Shared>,
    prefix: String,
    page: std::vec::IntoIter<Listed>,
    after: Option<Key>,
    more: bool,
}

impl Listing {
    pub(crate) fn new(shared: Arc<Shared>, prefix: String) -> Self {
        Self { shared, prefix, page: Vec::new().into_iter(), after: None, more: true }
    }
}

impl Iterator for Listing {
    type Item = Result<Listed, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(listed) = self.page.next() {
                return Some(Ok(listed));
            }
            if !self.more {
                return None;
            }
            match self.shared.list_page(&self.prefix, self.after.clone(), u32::MAX) {
                Ok((page, more)) => {
                    // A page that does not move on would come for ever.
                    let last = page.last().map(|listed| listed.key.clone());
                    self.more = more && last > self.after;
                    self.after = last.or(self.after.take());
                    self.page = page.into_iter();
                }
                Err(error) => {
                    self.more = false;
                    return Some(Err(error));
                }
            }
        }
    }
}
