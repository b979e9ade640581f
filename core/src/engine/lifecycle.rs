//! The life of an object on one node. Not its bytes. Invariant: only the steps listed here happen.

use crate::error::StoreError;

/// Where in its life an object is. Freed objects are gone from the books and have no state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A client writes the bytes.
    Reserved,
    /// The node writes the bytes: from a peer, or by a copy at seal.
    Filling,
    /// Complete, immutable, and found by everyone.
    Sealed,
    /// Found by nobody any more; its readers are still there.
    Draining,
}

impl State {
    /// Goes on to another state.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Stale`] if that step does not exist; the state stays.
    pub fn advance(&mut self, to: Self, key: &str) -> Result<(), StoreError> {
        use State::{Draining, Filling, Reserved, Sealed};
        match (*self, to) {
            (Reserved, Filling | Sealed | Draining) | (Filling, Sealed | Draining) | (Sealed, Draining) => {
                *self = to;
                Ok(())
            }
            (from, to) => {
                Err(StoreError::stale("object", key, format!("it is {from:?} and cannot become {to:?}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_forward() {
        use State::{Draining, Filling, Reserved, Sealed};
        let all = [Reserved, Filling, Sealed, Draining];
        for (at, from) in all.into_iter().enumerate() {
            for (to_at, to) in all.into_iter().enumerate() {
                let mut state = from;
                let moved = state.advance(to, "k").is_ok();
                assert_eq!(moved, to_at > at, "{from:?} to {to:?}");
                assert_eq!(state, if moved { to } else { from });
            }
        }
    }
}
