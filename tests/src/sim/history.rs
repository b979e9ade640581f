//! What clients did and saw, and what follows from it: which bytes a get may return, and which keys must be there.
//! Not the engine's view of anything. Invariant: every rule here holds for any correct store, whatever it does inside.

use std::collections::BTreeMap;

use hetmem_core::ObjectId;

use super::pattern;
use super::world::GRACE_NS;

/// How a put ended, as far as its client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It may be visible by now.
    Open,
    /// Told that it can be read, at this time.
    Sealed(u64),
    /// Told that it failed, or that another object was kept, at this time: its bytes must never be seen.
    Never(u64),
}

/// One attempt to put an object.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    pub(super) key: usize,
    pub(super) tag: u64,
    pub(super) len: u64,
    pub(super) node: usize,
    pub(super) epoch: u64,
    pub(super) invoked: u64,
    pub(super) outcome: Outcome,
    pub(super) exclusive: bool,
    /// It may go on its own: put as cache, or with a time to live.
    pub(super) fleeting: bool,
    /// A get has returned it.
    seen: bool,
    /// On how many nodes it was to be, and on how many its client was told that it is.
    pub(super) wanted: u8,
    pub(super) told: u32,
    /// Which object it has become.
    pub(super) object: Option<ObjectId>,
    /// When its node has died.
    died: Option<u64>,
    /// It was on several nodes, and more of them have died than could be made up for.
    gone: bool,
    /// A delete that every node of the list knows of was acknowledged, at this time, after it had taken the object from
    /// a node.
    deleted_for_good: Option<u64>,
    /// When it left its node's index.
    left: Option<u64>,
}

/// One delete of a key.
#[derive(Clone, Debug)]
struct Deletion {
    key: usize,
    invoked: u64,
    ended: Option<u64>,
    /// It was acknowledged, and every node was linked all the while.
    certain: bool,
    /// Originals that left their nodes while it was under way.
    taken: Vec<usize>,
}

/// What a get returned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    pub(super) key: usize,
    /// Where in the object the bytes start.
    pub(super) start: u64,
    /// Length of the whole object, as its metadata said.
    pub(super) len: u64,
    pub(super) bytes: &'a [u8],
    /// When the get began.
    pub(super) began: u64,
    /// Whether every node was reached then, and had been told what it missed.
    pub(super) calm: bool,
}

#[derive(Debug, Default)]
pub(super) struct History {
    pub(super) attempts: Vec<Attempt>,
    deletions: Vec<Deletion>,
    /// Forced evictions: key and time.
    forced: Vec<(usize, u64)>,
    by_key: Vec<Vec<usize>>,
    by_object: BTreeMap<ObjectId, usize>,
}

impl History {
    pub(super) fn new(keys: usize) -> Self {
        Self { by_key: vec![Vec::new(); keys], ..Self::default() }
    }

    pub(super) fn begin_put(&mut self, attempt: Attempt) -> usize {
        self.by_key[attempt.key].push(self.attempts.len());
        self.attempts.push(attempt);
        self.attempts.len() - 1
    }

    pub(super) fn attempt(
        key: usize,
        tag: u64,
        len: u64,
        (node, epoch): (usize, u64),
        invoked: u64,
    ) -> Attempt {
        Attempt {
            key,
            tag,
            len,
            node,
            epoch,
            invoked,
            outcome: Outcome::Open,
            exclusive: false,
            fleeting: false,
            seen: false,
            wanted: 1,
            told: 0,
            object: None,
            died: None,
            gone: false,
            deleted_for_good: None,
            left: None,
        }
    }

    /// A put has ended.
    pub(super) fn end_put(&mut self, attempt: usize, outcome: Outcome) -> Result<(), String> {
        let attempt = &mut self.attempts[attempt];
        attempt.outcome = outcome;
        if matches!(outcome, Outcome::Never(_)) && attempt.seen {
            return Err(format!(
                "a put of key {} failed, and its bytes had been read (tag {:x})",
                attempt.key, attempt.tag
            ));
        }
        Ok(())
    }

    pub(super) fn begin_delete(&mut self, key: usize, invoked: u64) -> usize {
        let deletion = Deletion { key, invoked, ended: None, certain: false, taken: Vec::new() };
        self.deletions.push(deletion);
        self.deletions.len() - 1
    }

    /// A delete has ended; `certain` if it was acknowledged and nothing kept the nodes apart meanwhile.
    pub(super) fn end_delete(&mut self, deletion: usize, ended: u64, certain: bool, for_good: bool) {
        self.deletions[deletion].ended = Some(ended);
        self.deletions[deletion].certain = certain;
        for attempt in std::mem::take(&mut self.deletions[deletion].taken).into_iter().filter(|_| for_good) {
            let key = self.attempts[attempt].key;
            if !self.forced.iter().any(|(forced, _)| *forced == key) && !self.attempts[attempt].fleeting {
                self.attempts[attempt].deleted_for_good.get_or_insert(ended);
            }
        }
    }

    /// When a delete began.
    pub(super) fn delete_began(&self, deletion: usize) -> u64 {
        self.deletions[deletion].invoked
    }

    /// The put of an object that was told of.
    pub(super) fn put_of(&self, object: ObjectId) -> Option<usize> {
        self.by_object.get(&object).copied()
    }

    /// A put has led to an object that is on so many nodes.
    pub(super) fn became(&mut self, attempt: usize, object: ObjectId, told: u32) {
        self.attempts[attempt].object = Some(object);
        self.attempts[attempt].told = told;
        self.by_object.insert(object, attempt);
    }

    /// Puts that were told that they are on several nodes, and that nothing but deaths can have taken from them.
    pub(super) fn replicated(&self) -> Vec<usize> {
        let numbers = 0..self.attempts.len();
        numbers.filter(|&index| self.is_replicated(&self.attempts[index])).collect()
    }

    pub(super) fn is_replicated(&self, attempt: &Attempt) -> bool {
        attempt.told > 1 && self.is_durable(attempt, u64::MAX)
    }

    /// On how many nodes an object of this key may have to be.
    pub(super) fn wanted(&self, key: usize) -> u8 {
        self.by_key[key].iter().map(|&index| self.attempts[index].wanted).max().unwrap_or(0)
    }

    /// The length of the longest object that may be one of this key.
    pub(super) fn longest(&self, key: usize) -> u64 {
        self.by_key[key].iter().map(|&index| self.attempts[index].len).max().unwrap_or(0)
    }

    /// Too many of the nodes that had an object have died.
    pub(super) fn is_gone(&mut self, attempt: usize) {
        self.attempts[attempt].gone = true;
    }

    pub(super) fn force_evict(&mut self, key: usize, now: u64) {
        self.forced.push((key, now));
    }

    pub(super) fn node_died(&mut self, node: usize, epoch: u64, now: u64) {
        let of_it = |attempt: &&mut Attempt| (attempt.node, attempt.epoch) == (node, epoch);
        self.attempts.iter_mut().filter(of_it).for_each(|attempt| attempt.died = Some(now));
    }

    /// Whether a delete that was acknowledged before `began` had to take this object.
    fn is_deleted(&self, attempt: &Attempt, began: u64) -> bool {
        let Outcome::Sealed(sealed) = attempt.outcome else {
            return false;
        };
        self.deletions.iter().any(|deletion| {
            deletion.key == attempt.key
                && deletion.certain
                && sealed <= deletion.invoked
                && deletion.ended.is_some_and(|ended| ended <= began)
                && !self.was_nowhere(attempt, deletion)
        })
    }

    /// Whether an object was evicted before, or by force during, a delete: then no node holds it, but a copy may be on
    /// its way, and a delete knows only what some node holds.
    fn was_nowhere(&self, attempt: &Attempt, deletion: &Deletion) -> bool {
        let during = |at: u64| deletion.invoked <= at && deletion.ended.is_none_or(|ended| at <= ended);
        attempt.left.is_some_and(|left| left < deletion.invoked)
            || self.forced.iter().any(|(key, at)| *key == attempt.key && during(*at))
    }

    /// An original has left its node's index.
    pub(super) fn left(&mut self, key: usize, node: usize, epoch: u64, now: u64) {
        for &index in &self.by_key[key] {
            let attempt = &mut self.attempts[index];
            if (attempt.node, attempt.epoch) == (node, epoch) && matches!(attempt.outcome, Outcome::Sealed(_))
            {
                if attempt.left.is_none() {
                    let open = |deletion: &&mut Deletion| deletion.key == key && deletion.ended.is_none();
                    self.deletions.iter_mut().filter(open).for_each(|deletion| deletion.taken.push(index));
                }
                attempt.left.get_or_insert(now);
            }
        }
    }

    /// Checks what a get returned: whole bytes of one object of the key that may still be read.
    pub(super) fn saw(&mut self, seen: Seen<'_>) -> Result<(), String> {
        let mut reason = None;
        let mut found = None;
        for &index in &self.by_key[seen.key] {
            let attempt = &self.attempts[index];
            if attempt.len != seen.len || !pattern::are_of(attempt.tag, seen.start, seen.bytes) {
                continue;
            }
            if matches!(attempt.outcome, Outcome::Never(_)) {
                reason = Some("of a put that failed");
            } else if seen.calm && attempt.deleted_for_good.is_some_and(|at| at <= seen.began) {
                reason = Some("of an object that came back after its delete");
            } else if self.is_deleted(attempt, seen.began) {
                reason = Some("of an object whose delete was acknowledged before the get began");
            } else {
                found = Some(index);
                break;
            }
        }
        if let Some(index) = found {
            // Empty parts fit every object, so they tell nothing about this one.
            self.attempts[index].seen |= !seen.bytes.is_empty();
            return Ok(());
        }
        let what = reason.map_or_else(|| self.describe(seen), str::to_owned);
        Err(format!(
            "a get of key {} ({} bytes from {} of {}, begun at {} ns) returned bytes {what}",
            seen.key,
            seen.bytes.len(),
            seen.start,
            seen.len,
            seen.began
        ))
    }

    /// Whose bytes these are, for a message.
    fn describe(&self, seen: Seen<'_>) -> String {
        let mut runs: Vec<String> = Vec::new();
        for (number, chunk) in seen.bytes.chunks(8).enumerate() {
            let start = seen.start + 8 * number as u64;
            let owner = self.attempts.iter().find(|attempt| pattern::are_of(attempt.tag, start, chunk));
            let name = match owner {
                Some(attempt) => format!("of key {} tag {:x} there", attempt.key, attempt.tag),
                None if chunk.iter().all(|byte| *byte == 0) => "of zeros".to_owned(),
                None => "of nobody there".to_owned(),
            };
            if runs.last() != Some(&name) {
                runs.push(name);
            }
            if runs.len() > 6 {
                break;
            }
        }
        format!("that are torn or foreign: {}", runs.join(", then "))
    }

    /// Checks metadata that a stat returned.
    pub(super) fn saw_len(&self, key: usize, len: u64) -> Result<(), String> {
        let known = self.by_key[key].iter().any(|&index| {
            let attempt = &self.attempts[index];
            attempt.len == len && !matches!(attempt.outcome, Outcome::Never(_))
        });
        if known {
            return Ok(());
        }
        Err(format!("a stat of key {key} says {len} bytes; no such object was put"))
    }

    /// An object that has to be found by whoever asks from `began` on: sealed before, not fleeting, on a node that
    /// lived, and never the aim of a delete or forced eviction.
    pub(super) fn must_exist(&self, key: usize, began: u64) -> Option<&Attempt> {
        self.by_key[key]
            .iter()
            .map(|&index| &self.attempts[index])
            .find(|attempt| self.is_durable(attempt, began))
    }

    fn is_durable(&self, attempt: &Attempt, began: u64) -> bool {
        let sealed = matches!(attempt.outcome, Outcome::Sealed(at) if at <= began);
        let aimed_at = self.deletions.iter().any(|deletion| {
            deletion.key == attempt.key && deletion.ended.is_none_or(|ended| ended >= attempt.invoked)
        });
        let lost = if attempt.told > 1 { attempt.gone } else { attempt.died.is_some() };
        sealed && !attempt.fleeting && !lost && !aimed_at && !self.was_forced(attempt)
    }

    fn was_forced(&self, attempt: &Attempt) -> bool {
        self.forced.iter().any(|(key, at)| *key == attempt.key && *at >= attempt.invoked)
    }

    /// Whether anything that clients did explains that an object of this key left the index of the node it was put on.
    pub(super) fn may_leave(&self, key: usize, object: ObjectId, node: usize, epoch: u64) -> bool {
        if let Some(put) = self.put_of(object) {
            return !self.is_durable(&self.attempts[put], u64::MAX);
        }
        // Any attempt whose object is not known may be the one that left.
        let maybe =
            |attempt: &&Attempt| (attempt.node, attempt.epoch) == (node, epoch) && attempt.object.is_none();
        let attempts = self.by_key[key].iter().map(|&index| &self.attempts[index]);
        attempts.filter(maybe).all(|attempt| !self.is_durable(attempt, u64::MAX))
    }

    /// When the node died that an object was put on, if the object has to outlive it where there is a copy.
    pub(super) fn must_outlive(&self, key: usize, node: usize, epoch: u64) -> Option<u64> {
        let deleted = self.deletions.iter().any(|deletion| deletion.key == key);
        let of_node = |attempt: &&Attempt| (attempt.node, attempt.epoch) == (node, epoch);
        let lost = |attempt: &Attempt| {
            let sealed = matches!(attempt.outcome, Outcome::Sealed(_)) && !self.was_forced(attempt);
            attempt.died.filter(|_| sealed)
        };
        let attempts = self.by_key[key].iter().map(|&index| &self.attempts[index]);
        let mut of_it = attempts.filter(of_node);
        // What the dead node kept as cache, or for a time, may have gone from it before.
        if deleted || of_it.clone().any(|attempt| attempt.fleeting) {
            return None;
        }
        of_it.find_map(lost)
    }

    /// Of two exclusive puts of one key, with nothing between that takes the first away, only one succeeds.
    /// `certain_before`: what was announced by then is known to the directory.
    pub(super) fn exclusive_won(&self, winner: usize, certain_before: u64) -> Result<(), String> {
        let won = &self.attempts[winner];
        let others = self.by_key[won.key].iter().filter(|&&index| index != winner);
        for other in others.map(|&index| &self.attempts[index]) {
            let known = if other.exclusive || (other.node, other.epoch) == (won.node, won.epoch) {
                won.invoked
            } else {
                certain_before.min(won.invoked)
            };
            if self.is_durable(other, known) {
                return Err(format!(
                    "put of key {} with if_exists = error succeeded (tag {:x}, begun at {} ns) beside an object sealed before (tag {:x}, {:?})",
                    won.key, won.tag, won.invoked, other.tag, other.outcome
                ));
            }
        }
        Ok(())
    }

    /// Whether anything explains that a key is said to be taken, to a put that began then.
    pub(super) fn may_be_taken(&self, attempt: usize) -> bool {
        let put = &self.attempts[attempt];
        let others = self.by_key[put.key].iter().filter(|&&index| index != attempt);
        others.map(|&index| &self.attempts[index]).any(|other| match other.outcome {
            Outcome::Open => true,
            Outcome::Sealed(_) => !self.is_deleted(other, put.invoked),
            // That it failed has to reach the node that keeps the directory.
            Outcome::Never(at) => at + GRACE_NS >= put.invoked,
        })
    }

    /// Whether an object of this key may go although all clients have ended: as cache, when its time is over, because all
    /// that is left of it are mere copies, for its original was thrown out, or by a delete whose client was never told
    /// that it is done, for that is still carried out when every node can be reached.
    pub(super) fn may_go(&self, key: usize) -> bool {
        let mut attempts = self.by_key[key].iter().map(|&index| &self.attempts[index]);
        attempts.any(|attempt| attempt.fleeting || self.was_forced(attempt))
            || self.deletions.iter().any(|deletion| deletion.key == key && deletion.ended.is_none())
    }

    /// Keys that have to be readable everywhere once all is well.
    pub(super) fn durable_keys(&self, now: u64) -> Vec<usize> {
        (0..self.by_key.len()).filter(|&key| self.must_exist(key, now).is_some()).collect()
    }

    /// Whether any object of this key can be there.
    pub(super) fn may_exist(&self, key: usize) -> bool {
        self.by_key[key].iter().any(|&index| !matches!(self.attempts[index].outcome, Outcome::Never(_)))
    }
}
