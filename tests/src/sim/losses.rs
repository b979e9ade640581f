//! Objects on several nodes, and nodes that are lost one at a time: the checks of the former, the faults of the latter.
//! Not what a put or a get returns (`history`). Invariant: what is demanded here follows from what clients were told and
//! from when nodes died, never from the engine's books.

use std::collections::BTreeSet;

use hetmem_core::engine::PublishedObject;
use hetmem_core::{ClientId, Generation, Key, ObjectId};

use super::client::{Asked, Kind};
use super::guards::Hold;
use super::plan::{MS, Weather};
use super::world::{Due, GRACE_NS, World};

/// How long a cluster may take, once it is whole, until every object is on as many nodes as it is to be: the longest
/// pause of repair, and what moving takes.
pub(super) const HEAL_NS: u64 = 8_000 * MS;

/// What has been lost so far.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// When a node died last.
    last_death: Option<u64>,
    /// The node that is away, and until when.
    away: Option<(usize, u64)>,
    /// Since when the cluster was whole.
    whole_since: Option<u64>,
}

impl World {
    // What clients were told.

    /// Live nodes that show an object.
    fn holders_of(&self, object: ObjectId) -> usize {
        let shows =
            |index: &super::node::Node| index.index.values().any(|shown| shown.object.object == object);
        self.nodes.iter().filter(|node| node.alive && shows(node)).count()
    }

    /// A client asks to seal what is to be on several nodes. The answer waits for these, while another object of the key
    /// may be what they get, and the memory free.
    pub(super) fn written_for_several(&mut self, at: usize, client: ClientId, reservation: Generation) {
        let asked = self.clients.get(&client).and_then(|client| client.asked.as_ref());
        if let Some(&Asked { kind: Kind::Seal { attempt, .. }, .. }) = asked
            && self.history.attempts[attempt].wanted > 1
        {
            let own = Hold::Reserved(client, reservation);
            self.nodes[at].guards.remove_where(|hold| hold == own);
        }
    }

    /// A put was told on how many nodes its object is.
    pub(super) fn check_told(&mut self, attempt: usize) -> Result<(), String> {
        let put = &self.history.attempts[attempt];
        let (told, now) = (put.told, self.now());
        if told > u32::from(put.wanted) || told == 0 {
            return Err(format!("a put is on {told} nodes, {} were asked for", put.wanted));
        }
        let Some(object) = put.object.filter(|_| told > 1) else { return Ok(()) };
        self.tally.replicated += 1;
        let calm = self.is_calm(put.invoked, now);
        if calm && self.history.is_replicated(put) && self.holders_of(object) < told as usize {
            let there = self.holders_of(object);
            return Err(format!("a put is said to be on {told} nodes, {there} have it: {put:?}"));
        }
        Ok(())
    }

    /// An object has left a node. If it was to be on several, enough others have to have it.
    pub(super) fn replica_left(&mut self, at: usize, object: &PublishedObject) {
        let Some(attempt) = self.history.put_of(object.object) else { return };
        let put = &self.history.attempts[attempt];
        let now = self.now();
        // Two objects of one key are one value.
        let has = |node: &&super::node::Node| node.alive && node.by_key.contains_key(&object.key);
        let there = self.nodes.iter().filter(has).count();
        let least = (put.told as usize).min(self.nodes.iter().filter(|node| node.alive).count());
        let calm = self.is_calm(now.saturating_sub(GRACE_NS), now);
        // What only a reader had fetched may go, however few others have it. The directory's node announces to nobody.
        let node = &self.nodes[at];
        let promised = node.promised.contains(&object.object) || node.engine.status().keeps_directory;
        if calm && promised && self.history.is_replicated(put) && there < least {
            self.fail(format!(
                "node {at}: {:?} of {:?} left, which is on {there} nodes now and was said to be on {}",
                object.object, object.key, put.told
            ));
        }
    }

    // Deaths.

    /// Whether everyone has heard of a death by now: it was the last one, and nothing else keeps nodes apart.
    pub(super) fn is_only_death(&self, died: u64) -> bool {
        matches!(self.plan.weather, Weather::Deaths | Weather::Losses)
            && self.partitions.is_empty()
            && self.losses.last_death == Some(died)
            && self.now() > died + GRACE_NS
    }

    /// A node is about to die. What only it and nodes that died just before had is excused; all else has to live on.
    pub(super) fn node_dies(&mut self, at: usize) {
        let now = self.now();
        let spaced = self.plan.weather == Weather::Losses;
        // What the node that died before had may be on its way here yet, and whoever has a copy may give it up, as far
        // as they know: also for one that has died meanwhile.
        let unhealed = self.losses.last_death.is_some_and(|last| now < last + HEAL_NS);
        for attempt in self.history.replicated() {
            let Some(object) = self.history.attempts[attempt].object else { continue };
            let here = self.nodes[at].index.values().any(|shown| shown.object.object == object);
            let others = self.holders_of(object) - usize::from(here);
            let excused = unhealed || (others < 2 && !self.is_calm(now, now));
            if here && (others == 0 || (excused && !spaced)) {
                self.history.is_gone(attempt);
            } else if here {
                self.tally.outlived += u64::from(self.history.attempts[attempt].node == at);
            }
        }
        self.losses.last_death = Some(now);
        self.losses.whole_since = None;
    }

    /// Whether a node surely has room for an object of a key that it has none of. For a long one, the room that there is
    /// may lie in pieces; and whom the system gave no memory is asked again only after a while.
    fn could_take(&self, node: &super::node::Node, key: &Key, len: u64) -> bool {
        let tier = &node.engine.status().tiers[0];
        let slots = node.index.len() < self.plan.objects_max as usize / 2;
        let bytes = tier.used_bytes < tier.capacity_bytes / 3 && len < tier.capacity_bytes / 16;
        let refused = node.segment_failed.is_some_and(|at| self.now() < at + HEAL_NS);
        node.alive && !node.by_key.contains_key(key) && slots && bytes && !refused
    }

    /// Which objects are on fewer nodes than they are to be although another node could have them.
    fn lacking(&self) -> Vec<String> {
        let live = self.nodes.iter().filter(|node| node.alive).count();
        let lacks = |&attempt: &usize| {
            let put = &self.history.attempts[attempt];
            let key = self.key(put.key);
            // Two objects of one key are one value.
            let has = |node: &&super::node::Node| node.alive && node.by_key.contains_key(&key);
            let there = self.nodes.iter().filter(has).count();
            let could = |node: &super::node::Node| self.could_take(node, &key, put.len);
            there < usize::from(put.wanted).min(live) && self.nodes.iter().any(could)
        };
        let put = |attempt: usize| format!("{:?}", self.history.attempts[attempt]);
        self.history.replicated().into_iter().filter(lacks).map(put).collect()
    }

    /// Whether a node is just being tried for an object that lacks one.
    pub(super) fn repairs(&self) -> bool {
        let live = self.nodes.iter().filter(|node| node.alive);
        let statuses: Vec<_> = live.map(|node| node.engine.status()).collect();
        let lacks = statuses.iter().any(|status| status.keeps_directory && status.under_replicated > 0);
        lacks && statuses.iter().any(|status| status.leases + status.reservations + status.draining > 0)
    }

    /// Nobody is there, and links were whole for a while.
    pub(super) fn check_replicas_at_rest(&mut self) {
        let keepers: Vec<usize> = (0..self.nodes.len())
            .filter(|&at| self.nodes[at].alive && self.nodes[at].engine.status().keeps_directory)
            .collect();
        if keepers.len() != 1 || Some(keepers[0]) != self.heir() {
            return self.fail(format!("nodes {keepers:?} keep the directory at rest"));
        }
        if let Some(put) = self.lacking().first() {
            return self.fail(format!("at rest, on fewer nodes than it is to be: {put}"));
        }
        // What the keeper thinks is lacking, nobody can take.
        let status = self.nodes[keepers[0]].engine.status();
        for key in &status.under_replicated_keys {
            let wanted = self.history.wanted(self.key_number(key));
            let live = self.nodes.iter().filter(|node| node.alive).count();
            let longest = self.history.longest(self.key_number(key));
            let could = |node: &super::node::Node| self.could_take(node, key, longest);
            if usize::from(wanted) <= live && self.nodes.iter().any(could) {
                return self.fail(format!("at rest, the directory's node has not repaired {key:?}"));
            }
        }
        for at in (0..self.nodes.len()).filter(|&at| self.nodes[at].alive) {
            self.tally.replicas += self.nodes[at].engine.status().counters.replicas;
        }
    }

    // One loss at a time.

    /// Whether every node that may keep the directory knows of a delete that began then and ends now.
    pub(super) fn is_for_good(&mut self, began: u64) -> bool {
        let away = self.losses.away.map(|(at, _)| at);
        let known = self.plan.weather == Weather::Losses
            && self.plan.heirs > 1
            && self.losses.last_death.is_none_or(|last| last < began)
            && self.losses.whole_since.is_some_and(|since| since < began)
            && self.is_whole_without(away);
        self.tally.deleted_for_good += u64::from(known && away.is_some());
        known
    }

    /// The next fault of this weather, if it is time for one.
    pub(super) fn loss(&mut self) {
        let now = self.now();
        self.later(50 * MS, Due::Fault);
        let away = self.losses.away.map(|(at, _)| at);
        if self.losses.away.is_some_and(|(_, until)| now >= until) {
            self.losses.away = None;
            self.losses.whole_since = None;
            return;
        }
        if !self.is_whole_without(away) {
            self.losses.whole_since = None;
            return;
        }
        let since = *self.losses.whole_since.get_or_insert(now);
        if let Some(at) = away {
            // The node that keeps the directory may die meanwhile, if another one may keep it.
            let heirs = (0..self.plan.heirs).filter(|&heir| self.nodes[heir].alive).count();
            let rested =
                now > since + GRACE_NS && self.losses.last_death.is_none_or(|last| now > last + HEAL_NS);
            if let Some(keeper) = self.heir().filter(|&keeper| keeper != at && heirs > 1 && rested)
                && self.rng.percent(20)
            {
                self.lose(keeper);
            }
            return;
        }
        if !self.partitions.is_empty() || now < since + GRACE_NS {
            return;
        }
        let lacking = self.lacking();
        if !lacking.is_empty() {
            if now > since + HEAL_NS {
                self.fail(format!("not made anew for {} ms: {}", HEAL_NS / MS, lacking[0]));
            }
            return;
        }
        if self.rng.percent(20) {
            self.send_away();
        } else if self.rng.percent(10) {
            let at = self.rng.index(self.nodes.len());
            self.lose(at);
        }
    }

    /// A node that never keeps the directory is reached by nobody for a while.
    fn send_away(&mut self) {
        let plain: Vec<usize> =
            (self.plan.heirs..self.nodes.len()).filter(|&at| self.nodes[at].alive).collect();
        if plain.is_empty() {
            return;
        }
        let at = self.rng.pick(&plain);
        let time = self.rng.between(800 * MS, 5_000 * MS);
        self.tally.faults += 1;
        self.disturbed();
        for other in (0..self.nodes.len()).filter(|&other| other != at) {
            self.part(at, other, time);
        }
        self.losses.away = Some((at, self.now() + time));
        self.losses.whole_since = None;
    }

    fn lose(&mut self, at: usize) {
        let live: BTreeSet<usize> = (0..self.nodes.len()).filter(|&at| self.nodes[at].alive).collect();
        let heirs = live.iter().filter(|&&heir| heir < self.plan.heirs).count();
        let last_heir = at < self.plan.heirs && heirs < 2 && self.plan.heirs > 1;
        if live.len() < 4 || last_heir || !live.contains(&at) {
            return;
        }
        self.tally.faults += 1;
        self.kill(at);
        if (at == 0 && self.plan.heirs == 1) || self.rng.percent(70) {
            let time = self.rng.between(MS, 4_000 * MS);
            self.later(time, Due::Restart { at });
        }
    }
}
