//! What clients of the engines under test ask and are answered, and what a world at rest looks like. Not what carries it
//! out (`world`).

use bytes::Bytes;

use super::world::*;
use crate::engine::Input;
use crate::error::{ErrorKind, StoreError};
use crate::meta::ObjectMeta;
use crate::tier::{ClientId, Generation};
use crate::wire::{
    ClientMessage, ClientReply, IfExists, Located, PROTOCOL_MAX, PROTOCOL_MIN, PutHints, Status,
};
use crate::{Checksum, ObjectId};

impl World {
    pub(super) fn client(&mut self, node: usize, number: u32) -> ClientId {
        let client = ClientId(number);
        self.feed(node, Input::ClientJoined { client, trusted: false });
        let hello = ClientMessage::Hello { version_min: PROTOCOL_MIN, version_max: PROTOCOL_MAX };
        let answer = self.call(node, client, hello);
        assert!(matches!(answer, Ok(ClientReply::Welcome { .. })), "{answer:?}");
        client
    }

    pub(super) fn ask_with(
        &mut self,
        node: usize,
        client: ClientId,
        message: ClientMessage,
        payload: &[u8],
    ) -> u64 {
        let request = self.nodes[node].next_request;
        self.nodes[node].next_request += 1;
        let payload = Bytes::copy_from_slice(payload);
        self.feed(node, Input::ClientRequest { client, request, message, payload });
        request
    }

    pub(super) fn ask(&mut self, node: usize, client: ClientId, message: ClientMessage) -> u64 {
        self.ask_with(node, client, message, &[])
    }

    pub(super) fn answer(&mut self, node: usize, client: ClientId, request: u64) -> Option<Answer> {
        self.nodes[node].answers.remove(&(client, request))
    }

    pub(super) fn call(&mut self, node: usize, client: ClientId, message: ClientMessage) -> Answer {
        let request = self.ask(node, client, message);
        self.settle();
        self.answer(node, client, request).expect("an answer")
    }

    pub(super) fn put(&mut self, node: usize, client: ClientId, name: &str, bytes: &[u8]) -> ObjectId {
        let answer = self.try_put(node, client, name, bytes, PutHints::default(), IfExists::Keep);
        match answer {
            Ok(ClientReply::Sealed { object, .. }) => object,
            other => panic!("put {name}: {other:?}"),
        }
    }

    pub(super) fn try_put(
        &mut self,
        node: usize,
        client: ClientId,
        name: &str,
        bytes: &[u8],
        hints: PutHints,
        if_exists: IfExists,
    ) -> Answer {
        let meta = ObjectMeta::bytes(bytes.len() as u64).expect("a length");
        let message = ClientMessage::Put { key: key(name), meta, hints, if_exists };
        let request = self.ask_with(node, client, message, bytes);
        self.settle();
        self.answer(node, client, request).expect("an answer")
    }

    pub(super) fn reserve(&mut self, node: usize, client: ClientId, name: &str, len_bytes: u64) -> Answer {
        self.reserve_with(node, client, name, len_bytes, PutHints::default())
    }

    pub(super) fn reserve_with(
        &mut self,
        node: usize,
        client: ClientId,
        name: &str,
        len_bytes: u64,
        hints: PutHints,
    ) -> Answer {
        let meta = ObjectMeta::bytes(len_bytes).expect("a length");
        let message = ClientMessage::Reserve {
            key: key(name),
            meta,
            hints,
            if_exists: IfExists::Keep,
            writes: crate::Tier::Host,
        };
        self.call(node, client, message)
    }

    pub(super) fn seal(&mut self, node: usize, client: ClientId, reservation: Generation) -> Answer {
        let message = ClientMessage::Seal { reservation, checksum: Checksum::None };
        self.call(node, client, message)
    }

    pub(super) fn ask_get(&mut self, node: usize, client: ClientId, name: &str, keep: bool) -> u64 {
        let message = ClientMessage::Get {
            key: key(name),
            range: None,
            timeout_ms: 3_000,
            keep,
            threshold_bytes: None,
            tier: None,
        };
        self.ask(node, client, message)
    }

    pub(super) fn get(&mut self, node: usize, client: ClientId, name: &str) -> Result<Located, StoreError> {
        let request = self.ask_get(node, client, name, true);
        self.settle();
        let answer = self.answer(node, client, request).expect("an answer");
        answer.map(|reply| match reply {
            ClientReply::Located(located) => located,
            other => panic!("get {name}: {other:?}"),
        })
    }

    pub(super) fn ask_many(&mut self, node: usize, client: ClientId, names: &[String], keep: bool) -> u64 {
        let keys = names.iter().map(|name| key(name)).collect();
        let message =
            ClientMessage::GetMany { keys, timeout_ms: 3_000, keep, threshold_bytes: None, tier: None };
        self.ask(node, client, message)
    }

    pub(super) fn many(
        &mut self,
        node: usize,
        client: ClientId,
        request: u64,
    ) -> Option<Vec<Result<Located, StoreError>>> {
        match self.answer(node, client, request)? {
            Ok(ClientReply::LocatedMany(many)) => Some(many.into_located().collect()),
            other => panic!("{other:?} answers a question about many keys"),
        }
    }

    /// Gets, compares and unpins; says how the bytes came.
    pub(super) fn fetch(
        &mut self,
        node: usize,
        client: ClientId,
        name: &str,
        expected: &[u8],
    ) -> crate::receipt::Path {
        let located = self.get(node, client, name).expect("the object");
        assert_eq!(self.nodes[node].bytes(located.extent), expected, "the bytes of {name}");
        self.unpin(node, client, located.generation);
        located.path
    }

    pub(super) fn unpin(&mut self, node: usize, client: ClientId, generation: Generation) {
        let pins = self.nodes[node].pins.get_mut(&client).expect("pins");
        let at = pins.iter().position(|pinned| *pinned == generation).expect("a pin");
        pins.swap_remove(at);
    }

    pub(super) fn leave(&mut self, node: usize, client: ClientId) {
        self.nodes[node].pins.remove(&client);
        self.feed(node, Input::ClientLeft { client });
        self.nodes[node].rings.remove(&client);
        self.nodes[node].items.retain(|(of, _), _| *of != client);
        self.settle();
    }

    pub(super) fn status(&self, node: usize) -> Status {
        self.nodes[node].engine.status()
    }

    pub(super) fn used(&self, node: usize) -> u64 {
        self.status(node).tiers.iter().map(|tier| tier.used_bytes).sum()
    }

    /// Live nodes that have an object of this key, in order.
    pub(super) fn holders(&self, name: &str) -> Vec<usize> {
        let name = key(name);
        let has = |node: &usize| self.nodes[*node].index.values().any(|object| object.key == name);
        (0..self.nodes.len()).filter(|node| !self.dead.contains(node)).filter(has).collect()
    }

    /// The same once a client has left.
    pub(super) fn assert_drained_but(&mut self, node: usize, client: ClientId) {
        self.leave(node, client);
        self.assert_drained();
    }

    /// Nothing is held by anyone.
    pub(super) fn assert_drained(&mut self) {
        self.advance(200);
        for node in (0..self.nodes.len()).filter(|node| !self.dead.contains(node)) {
            let status = self.status(node);
            assert_eq!(
                (status.draining, status.reservations, status.leases),
                (0, 0, 0),
                "node {node}: draining, reservations, leases"
            );
            let objects = self.nodes[node].index.values();
            let sealed: u64 = objects.map(|o| o.extent.len_bytes.max(1).div_ceil(64) * 64).sum();
            assert_eq!(sealed, self.used(node), "node {node}: bytes in use are those of sealed objects");
        }
    }

    pub(super) fn assert_kind<T: std::fmt::Debug>(answer: Result<T, StoreError>, kind: ErrorKind) {
        let error = answer.expect_err("an error");
        assert_eq!(error.kind(), kind, "{error}");
    }
}
