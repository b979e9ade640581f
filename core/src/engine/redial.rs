//! When an address may be dialled again. Not who wants to dial it (`links`, `fetch`). Invariant: connections to one
//! address that fail, or end soon after they came up, are begun at pauses that grow from one to the next, however many
//! want them and however often; the pauses of different nodes differ, so that a cluster does not dial in step.

use std::collections::BTreeMap;

use super::Engine;
use super::fetch::Stage;
use super::timer::{Time, Timer};
use crate::fingerprint;

/// The first pause, in milliseconds; each one is twice the one before.
const PAUSE_MS_MIN: u64 = 50;
/// The longest pause but for the share that is added to it, in milliseconds.
const PAUSE_MS_MAX: u64 = 1_000;
/// A link that lived this long, in milliseconds, was none of a series that fails at once.
const LIVED_MS: u64 = 2_000;
/// Addresses that are remembered: a bound on what peers can make this node keep by naming holders.
const ADDRESSES_MAX: usize = 4_096;

#[derive(Debug, Default)]
struct Book {
    /// Connections in a row that failed or ended soon.
    failures: u32,
    not_before: Time,
    up_since: Option<Time>,
    /// Somebody wanted to dial meanwhile.
    wanted: bool,
}

/// What is known of addresses that were dialled.
#[derive(Debug, Default)]
pub(super) struct Redial(BTreeMap<String, Book>);

impl Redial {
    /// From when on an address that is wanted now may be dialled; none if at once.
    fn wanted(&mut self, address: &str, now: Time) -> Option<Time> {
        let book = self.0.get_mut(address).filter(|book| book.not_before > now)?;
        book.wanted = true;
        Some(book.not_before)
    }

    /// Whether an address may not be dialled yet.
    pub(super) fn is_paused(&self, address: &str, now: Time) -> bool {
        self.0.get(address).is_some_and(|book| book.not_before > now)
    }

    fn make_room(&mut self, now: Time) {
        if self.0.len() >= ADDRESSES_MAX {
            self.0.retain(|_, book| book.up_since.is_some() || book.not_before > now);
        }
        if self.0.len() >= ADDRESSES_MAX {
            self.0.pop_first();
        }
    }

    fn up(&mut self, address: &str, now: Time) {
        self.make_room(now);
        self.0.entry(address.to_owned()).or_default().up_since = Some(now);
    }

    /// A connection failed, or one that was up has ended.
    fn ended(&mut self, address: &str, now: Time, node: u64) {
        self.make_room(now);
        let book = self.0.entry(address.to_owned()).or_default();
        let lived = book.up_since.take().is_some_and(|since| now.ms_since(since) >= LIVED_MS);
        if lived {
            self.0.remove(address);
            return;
        }
        book.failures = book.failures.saturating_add(1);
        let pause = (PAUSE_MS_MIN << (book.failures - 1).min(8)).min(PAUSE_MS_MAX);
        let spread = fingerprint(format!("{node} {} {address}", book.failures).as_bytes()) % (pause / 2);
        book.not_before = now.after_ms(pause + spread);
    }

    /// Addresses that somebody wanted to dial and that may be dialled now.
    fn due(&mut self, now: Time) -> Vec<String> {
        let due = |(address, book): (&String, &mut Book)| {
            let due = book.wanted && book.not_before <= now;
            book.wanted &= !due;
            due.then(|| address.clone())
        };
        self.0.iter_mut().filter_map(due).collect()
    }
}

impl Engine {
    /// Whether an address may be dialled now. If not, whoever still wants it then is remembered.
    pub(super) fn may_dial(&mut self, address: &str) -> bool {
        match self.redial.wanted(address, self.now) {
            None => true,
            Some(at) => {
                self.timers.set(at, Timer::Redial);
                false
            }
        }
    }

    pub(super) fn dialled_up(&mut self, address: &str) {
        self.redial.up(address, self.now);
    }

    /// A connection that this node had dialled is no more, or never was.
    pub(super) fn dialled_down(&mut self, address: &str) {
        self.redial.ended(address, self.now, self.config.member.node.0);
    }

    /// Some addresses may be dialled again.
    pub(super) fn redial_due(&mut self) {
        for address in self.redial.due(self.now) {
            let waits =
                |stage: &Stage| matches!(stage, Stage::Dialling { holder, .. } if holder.address == address);
            if self.wants_listed(&address) || self.fetches.any(|fetch| waits(&fetch.stage)) {
                self.dial(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_differ_and_end_with_a_link_that_lives() {
        let mut redial = Redial::default();
        let mut now = Time::default();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert_eq!(redial.wanted("a", now), None);
            redial.up("a", now);
            now = now.after_ms(1);
            redial.ended("a", now, 1);
            let at = redial.wanted("a", now).expect("a pause");
            pauses.push(at.ms_since(now));
            assert!(redial.due(now).is_empty());
            now = at;
            assert_eq!(redial.due(now), ["a"]);
            assert!(redial.due(now).is_empty(), "told once");
        }
        for (number, pause) in pauses.iter().enumerate() {
            let base = (50 << number.min(8)).min(1_000);
            assert!((base..base + base / 2).contains(pause), "pause {number} of {pause} ms");
        }
        let mut other = Redial::default();
        for _ in 0..12 {
            other.ended("a", now, 2);
        }
        assert_ne!(other.wanted("a", now).expect("a pause").ms_since(now), pauses[11], "another node's");
        redial.up("a", now);
        redial.ended("a", now.after_ms(LIVED_MS), 1);
        assert_eq!(redial.wanted("a", now), None);
        assert!(redial.0.is_empty());
    }

    #[test]
    fn only_so_many_addresses_are_remembered() {
        let mut redial = Redial::default();
        for number in 0..3 * ADDRESSES_MAX {
            redial.ended(&format!("a{number}"), Time::default(), 1);
        }
        assert!(redial.0.len() <= ADDRESSES_MAX, "{} addresses", redial.0.len());
    }
}
