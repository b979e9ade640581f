//! How simulated clients end: with a last look at everything that has to be there, or anywhere, by dying. Not their work
//! (`client`). Invariant: a process whose session has ended writes only where it had a reservation.

use hetmem_core::ClientId;
use hetmem_core::engine::Input;
use hetmem_core::wire::ClientMessage;

use super::client::{Doing, Kind};
use super::guards::Hold;
use super::pattern;
use super::plan::MS;
use super::world::{Due, World};

impl World {
    // The last look.

    pub(super) fn tour_on(&mut self, id: ClientId) {
        let after = {
            let Some(tour) = &mut self.client(id).tour else { return };
            if let Some(key) = tour.keys.pop() {
                return self.get(id, key, None);
            }
            if !tour.lists {
                let listed: Vec<usize> = tour.listed.iter().copied().collect();
                let missing: Vec<usize> =
                    tour.expected.iter().copied().filter(|key| !tour.listed.contains(key)).collect();
                if !missing.is_empty() {
                    let at = self.client(id).node;
                    self.fail(format!("node {at}: a list of everything lacks keys {missing:?}"));
                }
                self.check_phantoms(&listed);
                return self.leave(id, true);
            }
            tour.after
        };
        let after = after.map(|key| self.key(key));
        let limit = u32::try_from(self.rng.between(1, 50)).unwrap_or(1);
        let message = ClientMessage::List { prefix: "k".to_owned(), after, limit };
        self.ask_plain(id, Kind::List { all: true }, 0, message);
    }

    /// Nobody works any more, so a key that is listed is held by someone, unless it may go while the list is read.
    fn check_phantoms(&mut self, listed: &[usize]) {
        let held = |key: usize| {
            let name = self.key(key);
            self.nodes.iter().any(|node| node.alive && node.by_key.contains_key(&name))
        };
        let phantom = listed.iter().copied().find(|&key| !held(key) && !self.history.may_go(key));
        if let Some(key) = phantom {
            self.fail(format!("key {key} is listed, and no node holds it"));
        }
    }

    // Deaths.

    /// A client dies wherever it is.
    pub(super) fn die(&mut self, id: ClientId) {
        if self.clients.get(&id).is_some_and(|client| client.alive) {
            self.tally.deaths += 1;
            let killed = self.rng.percent(60);
            self.leave(id, killed);
        }
    }

    /// A session ends: because the process was killed, or politely, while the process may still write to what was
    /// granted to it.
    pub(super) fn leave(&mut self, id: ClientId, killed: bool) {
        let (node, trusted) = {
            let client = self.client(id);
            client.alive = false;
            (client.node, client.trusted)
        };
        let epoch = self.nodes[node].epoch;
        let notice = self.rng.between(10_000, MS);
        self.later(notice, Due::Left { at: node, epoch, client: id });
        let lingering = if killed || trusted { notice } else { notice + self.rng.between(MS, 1_000 * MS) };
        if !killed && !trusted {
            self.scribble_later(id);
        }
        self.later(lingering + 1_000, Due::Gone { at: node, epoch, client: id });
    }

    fn scribble_later(&mut self, id: ClientId) {
        let delay = self.rng.between(100_000, 20 * MS);
        self.later(delay, Due::Scribble { client: id });
    }

    /// The process of a client whose session has ended writes to its reservation once more.
    pub(super) fn scribble(&mut self, id: ClientId) {
        let Some(client) = self.clients.get(&id) else { return };
        let (Some(writing), at) = (client.writing().filter(|writing| writing.in_place), client.node) else {
            return;
        };
        let mapped = client.granted.contains(&writing.extent.segment);
        if !mapped || !self.nodes[at].segments.contains_key(&writing.extent.segment) {
            return;
        }
        let own = Hold::Reserved(id, writing.reservation);
        let noise = pattern::of(self.rng.next(), 0, usize::try_from(writing.extent.len_bytes).unwrap_or(0));
        self.write(at, writing.extent, &noise, |hold| hold == own);
        self.scribble_later(id);
    }

    /// The node hears that a session has ended.
    pub(super) fn session_over(&mut self, at: usize, id: ClientId) {
        let Some(client) = self.clients.get(&id) else { return };
        let lingers = client.writing().filter(|writing| writing.in_place && !client.trusted);
        let kept = lingers.map(|writing| Hold::Reserved(id, writing.reservation));
        let begun = match &client.doing {
            Doing::Writing(writing) => Some(writing.attempt),
            Doing::PuttingAhead(putting) => Some(putting.record.attempt),
            _ => None,
        };
        if let Some(attempt) = begun {
            self.ended(attempt, super::history::Outcome::Never(self.now()));
        }
        self.drain_last(at, id);
        let node = &mut self.nodes[at];
        node.pages.remove(&id);
        node.guards.remove_where(|hold| {
            let own = matches!(hold, Hold::Pinned(of, _) if of == id)
                || matches!(hold, Hold::Reserved(of, _) if of == id)
                || matches!(hold, Hold::Ahead(of, _) if of == id);
            own && Some(hold) != kept
        });
        // As a node does it: nothing is handed in between the end of its page and this.
        self.hand_in(at, Input::ClientLeft { client: id });
        self.empty_outbox(at);
        self.nodes[at].items.retain(|(of, _), _| *of != id);
    }

    /// The process has ended: nobody writes to its segments any more.
    pub(super) fn process_over(&mut self, at: usize, id: ClientId) {
        let Some(client) = self.clients.remove(&id) else { return };
        self.nodes[at].guards.remove_where(|hold| matches!(hold, Hold::Reserved(of, _) if of == id));
        if !client.trusted {
            self.feed(at, Input::ClientProcessGone { client: id });
        }
        if !self.is_ending() {
            self.later(5 * MS, Due::Join { at, epoch: self.nodes[at].epoch });
        }
    }
}
