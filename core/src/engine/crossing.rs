//! Bytes that are wanted in another tier than the one they are in: by a client that asked for them there, or by a peer
//! whose link does not reach that tier. Not the copying (`Action::Copy`), and no object of the index: what is made here
//! belongs to those who waited for it. Invariant: the object that is copied is held in place until the copy has ended,
//! and the copy is out of everyone else's reach in the pass in which it is handed over.

use std::collections::BTreeMap;

use super::Engine;
use super::action::Action;
use super::local::Caller;
use super::room::Purpose;
use super::space::Owner;
use crate::error::StoreError;
use crate::key::Key;
use crate::receipt::{Carried, Path};
use crate::tier::{ClientId, Extent, Generation, LinkId, Tier, TierHint};

/// A copy to another tier that is being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CrossingId(u64);

/// Who waits for it.
#[derive(Debug)]
pub(super) enum Reader {
    /// A client, and how the bytes came to this node.
    Client { caller: Caller, how: (Path, Option<Box<Carried>>) },
    /// A peer that asked with this request, and takes answers with payloads up to so many bytes.
    Peer { link: LinkId, request: u64, inline_max: u64 },
}

#[derive(Debug)]
struct Crossing {
    /// The object that is copied, and which part of it.
    source: Generation,
    part: Extent,
    to: Tier,
    readers: Vec<Reader>,
}

/// All that are under way.
#[derive(Debug, Default)]
pub(super) struct Crossings {
    under_way: BTreeMap<CrossingId, Crossing>,
    /// Copies that have begun: of which crossing, by the generation of what is being filled.
    copying: BTreeMap<Generation, CrossingId>,
    next: u64,
}

impl Crossings {
    /// The key of the object that is copied, for errors.
    pub(super) fn source(&self, id: CrossingId) -> Option<Generation> {
        self.under_way.get(&id).map(|crossing| crossing.source)
    }

    pub(super) fn is_copying(&self, generation: Generation) -> bool {
        self.copying.contains_key(&generation)
    }

    /// Forgets a client that left. A copy that nobody waits for any more ends by itself.
    pub(super) fn forget(&mut self, gone: ClientId) {
        for crossing in self.under_way.values_mut() {
            crossing
                .readers
                .retain(|reader| !matches!(reader, Reader::Client { caller, .. } if caller.client == gone));
        }
    }
}

impl Engine {
    /// The tier that a hint names on this node: the one itself, or host memory where that is allowed.
    pub(super) fn tier_of(&self, hint: TierHint) -> Result<Tier, StoreError> {
        match hint {
            TierHint { tier, .. } if self.space.has_tier(tier) => Ok(tier),
            TierHint { or_host: true, .. } => Ok(Tier::Host),
            TierHint { tier, .. } => {
                let gpus: Vec<String> = self.space.tiers().skip(1).map(|tier| tier.to_string()).collect();
                let why = if gpus.is_empty() {
                    format!("this node has no GPU tier: {}", self.config.why_no_gpu)
                } else {
                    format!("this node has {}", gpus.join(", "))
                };
                Err(StoreError::unavailable(tier.to_string(), why))
            }
        }
    }

    /// Copies a part of an object to another tier, for a reader.
    pub(super) fn cross(&mut self, reader: Reader, source: Generation, part: Extent, to: Tier) {
        let same = |crossing: &Crossing| (crossing.source, crossing.part, crossing.to) == (source, part, to);
        // Who reads the same bytes in the same place shares the copy.
        if let Some(crossing) = self.crossings.under_way.values_mut().find(|crossing| same(crossing)) {
            return crossing.readers.push(reader);
        }
        let id = CrossingId(self.crossings.next);
        self.crossings.next += 1;
        self.crossings.under_way.insert(id, Crossing { source, part, to, readers: vec![reader] });
        if let Some(object) = self.objects.get_mut(source) {
            object.copies += 1;
        }
        self.want_space(Purpose::Cross { crossing: id }, to, Owner::Node, part.len_bytes);
    }

    /// Whether somebody still waits for a crossing. One that nobody waits for is over.
    pub(super) fn is_crossing_wanted(&mut self, id: CrossingId) -> bool {
        let wanted = self.crossings.under_way.get(&id).is_some_and(|crossing| !crossing.readers.is_empty());
        if !wanted {
            self.end_crossing(id);
        }
        wanted
    }

    fn end_crossing(&mut self, id: CrossingId) -> Option<Crossing> {
        let crossing = self.crossings.under_way.remove(&id)?;
        if let Some(object) = self.objects.get_mut(crossing.source) {
            object.copies = object.copies.saturating_sub(1);
            self.reader_left(crossing.source);
        }
        Some(crossing)
    }

    /// There is room in the other tier.
    pub(super) fn cross_into(&mut self, id: CrossingId, to: Extent) {
        let crossing = self.crossings.under_way.get(&id);
        let source = crossing.and_then(|crossing| Some((self.objects.get(crossing.source)?, crossing.part)));
        let Some((object, from)) = source else {
            let _ = self.space.free(to);
            self.end_crossing(id);
            return;
        };
        let copy = object.copied_to(to, self.space.tier(to.segment));
        let generation = self.objects.insert(copy);
        self.crossings.copying.insert(generation, id);
        self.out.push(Action::Copy { generation, from, to });
    }

    /// There is none.
    pub(super) fn cross_missing(&mut self, id: CrossingId, error: &StoreError) {
        let Some(Crossing { source, part, readers, .. }) = self.crossings.under_way.remove(&id) else {
            return;
        };
        for reader in readers {
            match reader {
                Reader::Client { caller, how } if caller.tier.is_some_and(|hint| hint.or_host) => {
                    let caller = Caller { tier: Some(Tier::Host.into()), ..caller };
                    self.locate(caller, source, part, how);
                }
                reader => self.refuse_reader(reader, error),
            }
        }
        if let Some(object) = self.objects.get_mut(source) {
            object.copies = object.copies.saturating_sub(1);
            self.reader_left(source);
        }
    }

    fn refuse_reader(&mut self, reader: Reader, error: &StoreError) {
        match reader {
            Reader::Client { caller, .. } => {
                self.counters.failed += 1;
                self.answer_caller(caller, Err(error.clone()));
            }
            Reader::Peer { link, request, .. } => self.refuse_peer(link, request, error),
        }
    }

    /// The copy has ended.
    pub(super) fn crossed(&mut self, generation: Generation, result: Result<(), StoreError>) {
        let Some(id) = self.crossings.copying.remove(&generation) else {
            return;
        };
        if let Some(object) = self.objects.get_mut(generation) {
            object.filling = false;
        }
        let Some(Crossing { source, readers, .. }) = self.end_crossing(id) else {
            return self.free_object(generation);
        };
        if let Err(error) = result {
            readers.into_iter().for_each(|reader| self.refuse_reader(reader, &error));
            self.free_object(generation);
            self.space_freed = true;
            return;
        }
        let from = self.objects.get(source).map_or(Tier::Host, |object| object.tier);
        let for_clients = readers.iter().any(|reader| matches!(reader, Reader::Client { .. }));
        let stays = for_clients && self.promote(source, generation);
        for reader in readers {
            match reader {
                Reader::Client { caller, how } => self.hand_out(caller, generation, how, Some(from)),
                Reader::Peer { link, request, inline_max } => {
                    self.serve_copy(link, request, generation, (source, inline_max));
                }
            }
        }
        // From here on only the pins, leases and sends that were just made hold it, unless it has become the object.
        if !stays {
            self.withdraw_handed_out(generation);
        }
    }

    /// The name of what is copied, for errors.
    pub(super) fn key_of_crossing(&self, id: CrossingId) -> Option<&Key> {
        self.objects.get(self.crossings.source(id)?).map(|object| &object.key)
    }
}
