//! The store as a client sees it: every operation, each one question at most, none for an object that is here.
//! Not the socket and not the mappings. Invariant: what the node answers is checked before it is used.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_core::wire::{
    self, ClientMessage, ClientReply, IfExists, Listed, Located, PROTOCOL_MAX, PROTOCOL_MIN, Range, Status,
};
use hetmem_core::{Checksum, ErrorKind, Extent, Key, ObjectMeta, StoreError, Tier, TierHint, checksum};
use hetmem_host_mem::{ClientPage, IndexReader, Session};

use crate::ahead::Ahead;
use crate::gpu::GpuSegments;
use crate::late;
use crate::list::Listing;
use crate::object::Object;
use crate::options::{ConnectOptions, GetOptions, PutOptions, PutOutcome, Stat, ZeroCopy};
use crate::private::SegmentFiles;
use crate::reservation::{Reservation, Reserved, Written, check_len};
use crate::segments::{Grants, ReadMappings};
use crate::session::UnixSession;
use crate::shared::{Link, Shared, unexpected};

/// What a question may take beyond the time that the node itself gives it: the node answers that its own deadline
/// has passed, and says why.
pub(crate) const ANSWER_GRACE: Duration = Duration::from_secs(2);

/// A connection to the node of this machine. Cheap to clone; all clones and threads share one socket.
#[derive(Clone)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("node", &self.shared.node).finish_non_exhaustive()
    }
}

impl Store {
    /// Connects to the node that listens at `socket`, or at [`crate::default_socket`].
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when no node listens there, [`ErrorKind::Protocol`] when it speaks another
    /// version, with both versions.
    pub fn connect(socket: Option<&Path>) -> Result<Self, StoreError> {
        Self::connect_with(&ConnectOptions {
            socket: socket.map(Path::to_path_buf),
            ..ConnectOptions::default()
        })
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`Store::connect`].
    pub fn connect_with(options: &ConnectOptions) -> Result<Self, StoreError> {
        let path = options.socket.clone().unwrap_or_else(hetmem_host_mem::socket::default_path);
        let session = Arc::new(UnixSession::connect(&path)?);
        let store = Self::greet(Link::Unix(Arc::clone(&session)), options.timeout)?;
        session.on_late(late::hook(Arc::downgrade(&store.shared)));
        Ok(store)
    }

    /// A store over another kind of session, such as a node in this process.
    ///
    /// # Errors
    /// As [`Store::connect`].
    pub fn over(session: Arc<dyn Session>) -> Result<Self, StoreError> {
        Self::greet(Link::Other(session), ConnectOptions::default().timeout)
    }

    fn greet(session: Link, timeout: Duration) -> Result<Self, StoreError> {
        let hello = ClientMessage::Hello { version_min: PROTOCOL_MIN, version_max: PROTOCOL_MAX };
        let answer = session.as_session().call(&hello, &[], timeout)?;
        let ClientReply::Welcome { version, node, inline_put_max, gpus, .. } = answer.reply else {
            return Err(unexpected(&hello, &answer.reply));
        };
        wire::negotiate(version, version)?;
        let mut descriptors = answer.descriptors.into_iter();
        let (Some(index), Some(page)) = (descriptors.next(), descriptors.next()) else {
            return Err(StoreError::protocol(
                "the node's welcome came without the descriptors of index and page (is the limit of open files \
                 reached?)",
            ));
        };
        Ok(Self {
            shared: Arc::new(Shared {
                page: ClientPage::map(page)?,
                segments: ReadMappings::new(),
                grants: Grants::default(),
                gpu: GpuSegments::of(gpus),
                files: SegmentFiles::default(),
                ahead: Ahead::default(),
                index: IndexReader::map(index)?,
                session,
                inline_put_max: u64::from(inline_put_max),
                timeout,
                node: node.into(),
            }),
        })
    }

    /// The name of the node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.shared.node
    }

    /// An object, in place. One that is on this node is found without asking anybody.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::TimedOut`], [`ErrorKind::Busy`] when this client holds more objects
    /// than it has pins, [`ErrorKind::PeerLost`].
    #[inline]
    pub fn get(&self, key: &Key) -> Result<Object, StoreError> {
        match self.local(key) {
            Some(found) => found,
            None => self.get_with(key, &GetOptions::default()),
        }
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`Store::get`]; [`ErrorKind::Invalid`] for a range outside the object; with `verify`,
    /// [`ErrorKind::Corrupt`] if the bytes do not match their checksum.
    pub fn get_with(&self, key: &Key, options: &GetOptions) -> Result<Object, StoreError> {
        if let Some(object) = self.local_part(key, options) {
            return object;
        }
        let started = Instant::now();
        let message = get_message(key, options, Some(IN_HOST));
        let answer = self.shared.call(&message, &[], options.timeout + ANSWER_GRACE)?;
        match answer.reply {
            ClientReply::Located(located) => self.remote(key, located, options, started.elapsed()),
            reply => Err(unexpected(&message, &reply)),
        }
    }

    /// `len_bytes` bytes of an object, from `start`.
    ///
    /// # Errors
    /// As [`Store::get_with`].
    pub fn get_range(&self, key: &Key, start: u64, len_bytes: u64) -> Result<Object, StoreError> {
        let options = GetOptions { range: Some(Range { start, len_bytes }), ..GetOptions::default() };
        self.get_with(key, &options)
    }

    /// An object, if it is in host memory of this node, without asking anybody.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when this client holds more objects than it has pins.
    pub fn get_here(&self, key: &Key) -> Result<Option<Object>, StoreError> {
        self.local(key).transpose()
    }

    /// Has calls that wait for the node ask `is_over` once a signal has interrupted them, and every second; where it
    /// says yes they end at once with [`ErrorKind::Busy`]. It is asked without a lock held. Only the first call counts,
    /// and a node in this process is not asked.
    pub fn interrupt_when(&self, is_over: fn() -> bool) {
        if let Link::Unix(session) = &self.shared.session {
            session.interrupt_when(is_over);
        }
    }

    /// The descriptor of the node's socket, if there is one. A process that was forked from this one must not speak on
    /// it, and closes it lest the node think that this client lives.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.shared.session {
            Link::Unix(session) => Some(session.socket()),
            Link::Other(_) => None,
        }
    }

    /// Many objects: those on this node in place, the others asked for all at once, which costs a few messages and
    /// not one for each. One result per key, in order: what cannot be had is an error in its place, and the others are
    /// there all the same. Returns when the last has come or failed. A client holds at most 16,384 objects at a time.
    #[must_use]
    pub fn get_many(&self, keys: &[Key]) -> Vec<Result<Object, StoreError>> {
        self.get_many_with(keys, &GetOptions::default())
    }

    /// The same with options.
    #[must_use]
    pub fn get_many_with(&self, keys: &[Key], options: &GetOptions) -> Vec<Result<Object, StoreError>> {
        let mut results: Vec<_> = keys.iter().map(|key| self.local_part(key, options)).collect();
        let missing: Vec<usize> = (0..keys.len()).filter(|&at| results[at].is_none()).collect();
        if !missing.is_empty() {
            let wanted: Vec<&Key> = missing.iter().map(|&at| &keys[at]).collect();
            for (at, object) in missing.into_iter().zip(self.ask_for_many(&wanted, options)) {
                results[at] = Some(object);
            }
        }
        results.into_iter().map(|result| result.unwrap_or_else(unanswered)).collect()
    }

    /// Stores an object. Its bytes can be read by everyone when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `bytes` is not as long as the metadata says, [`ErrorKind::NoSpace`],
    /// [`ErrorKind::PeerLost`].
    pub fn put(&self, key: &Key, meta: ObjectMeta, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
        self.put_with(key, meta, bytes, &PutOptions::default())
    }

    /// Stores plain bytes.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub fn put_bytes(&self, key: &Key, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
        self.put(key, ObjectMeta::bytes(bytes.len() as u64)?, bytes)
    }

    /// The same as [`Store::put`] with options.
    ///
    /// # Errors
    /// As [`Store::put`]; [`ErrorKind::AlreadyExists`] if the options ask for it.
    pub fn put_with(
        &self,
        key: &Key,
        meta: ObjectMeta,
        bytes: &[u8],
        options: &PutOptions,
    ) -> Result<PutOutcome, StoreError> {
        check_len(key, &meta, bytes)?;
        meta.check()?;
        if let Some(outcome) = self.shared.put_ahead(key, &meta, bytes, options)? {
            return Ok(outcome);
        }
        let started = Instant::now();
        // Inside a message bytes pass through the packet.
        let stages = options.zero_copy == ZeroCopy::Preferred;
        if meta.len_bytes > self.shared.inline_put_max || !stages {
            return match self.reserve_unbuffered(key, meta, options)? {
                Reserved::Open(reservation) => reservation.fill(bytes),
                Reserved::Kept(outcome) => Ok(outcome),
            };
        }
        let checksum = match options.checksum {
            true => Checksum::Xxh3Blocks(checksum::of(bytes)),
            false => Checksum::None,
        };
        let message = ClientMessage::Put {
            key: key.clone(),
            meta: meta.with_checksum(checksum),
            hints: options.hints(),
            if_exists: options.if_exists,
        };
        let reply = self.shared.call(&message, bytes, options.timeout)?.reply;
        let outcome = self.shared.outcome(&reply, meta.len_bytes, started);
        outcome.ok_or_else(|| unexpected(&message, &reply))
    }

    /// Asks for memory to write an object into, in place where the node grants it.
    ///
    /// # Errors
    /// As [`Store::put_with`].
    pub fn reserve(&self, key: &Key, meta: ObjectMeta, options: &PutOptions) -> Result<Reserved, StoreError> {
        match self.reserve_unbuffered(key, meta, options)? {
            Reserved::Open(reservation) => reservation.with_buffer().map(Reserved::Open),
            kept @ Reserved::Kept(_) => Ok(kept),
        }
    }

    fn reserve_unbuffered(
        &self,
        key: &Key,
        meta: ObjectMeta,
        options: &PutOptions,
    ) -> Result<Reserved, StoreError> {
        let started = Instant::now();
        let meta = meta.with_checksum(Checksum::None);
        meta.check()?;
        let required = options.zero_copy == ZeroCopy::Required;
        if required && options.seal_copy {
            let why = format!("put {key:?}: seal_copy moves the bytes once more at seal");
            return Err(StoreError::unavailable("zero copy", why));
        }
        if let Some(TierHint { tier: tier @ Tier::Gpu(_), .. }) = options.tier.filter(|_| required) {
            let why =
                format!("put {key:?}: bytes of host memory come to {tier} by way of the node's host memory");
            return Err(StoreError::unavailable("zero copy", why));
        }
        let message = ClientMessage::Reserve {
            key: key.clone(),
            meta,
            hints: options.hints(),
            if_exists: options.if_exists,
            writes: Tier::Host,
        };
        let answer = self.shared.call(&message, &[], options.timeout)?;
        let (reservation, extent, map) = match answer.reply {
            ClientReply::Reserved { reservation, extent, map, .. } => (reservation, extent, map),
            reply => {
                let kept = self.shared.outcome(&reply, meta.len_bytes, started);
                let kept = kept.filter(|_| options.if_exists == IfExists::Keep);
                return kept.map(Reserved::Kept).ok_or_else(|| unexpected(&message, &reply));
            }
        };
        // Made first, so that every error from here on gives the memory back.
        let place = Written::Sent(Vec::new());
        let shared = Arc::clone(&self.shared);
        let reserved = Reservation::new(shared, key.clone(), meta, *options, reservation, place);
        let granted = (map, answer.descriptors.into_iter().next());
        self.place_in_host(reserved, key, &extent, granted, options).map(Reserved::Open)
    }

    /// Finds the place where a reservation in host memory is written.
    pub(crate) fn place_in_host(
        &self,
        mut reserved: Reservation,
        key: &Key,
        extent: &Extent,
        (map, fd): (Option<u64>, Option<OwnedFd>),
        options: &PutOptions,
    ) -> Result<Reservation, StoreError> {
        if let Some(segment_len) = map {
            if let Some(fd) = fd {
                self.shared.grants.add(extent.segment, fd, segment_len);
            }
            if extent.len_bytes != reserved.meta().len_bytes {
                return Err(wrong_length(key, extent, reserved.meta().len_bytes));
            }
            reserved.write_into(self.shared.granted(extent, options.timeout)?);
        } else if options.zero_copy == ZeroCopy::Required {
            let why = format!(
                "put {key:?}: the node has no memory left that this client may write itself; free some, or raise \
                 client_quota"
            );
            return Err(StoreError::unavailable("zero copy", why));
        }
        Ok(reserved)
    }

    /// Returns when an object of this key exists anywhere.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when there is none after `timeout`.
    pub fn wait(&self, key: &Key, timeout: Duration) -> Result<(), StoreError> {
        if self.shared.index.find(key, key.fingerprint())?.is_some() {
            return Ok(());
        }
        let message = ClientMessage::Wait { key: key.clone(), timeout_ms: millis(timeout) };
        match self.shared.call(&message, &[], timeout.saturating_add(ANSWER_GRACE))?.reply {
            ClientReply::Exists => Ok(()),
            reply => Err(unexpected(&message, &reply)),
        }
    }

    /// Whether an object of this key exists anywhere, now.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`].
    pub fn exists(&self, key: &Key) -> Result<bool, StoreError> {
        if self.shared.index.find(key, key.fingerprint())?.is_some() {
            return Ok(true);
        }
        let message = ClientMessage::Wait { key: key.clone(), timeout_ms: 0 };
        match self.shared.call(&message, &[], self.shared.timeout) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            // The node's own word: an answer that never came has waited longer than it was asked to.
            Err(StoreError::TimedOut { timeout_ms: 0, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What is known about an object, without its bytes.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::TimedOut`].
    pub fn stat(&self, key: &Key) -> Result<Stat, StoreError> {
        let message = ClientMessage::Stat { key: key.clone(), timeout_ms: millis(self.shared.timeout) };
        match self.shared.call(&message, &[], self.shared.timeout + ANSWER_GRACE)?.reply {
            ClientReply::Stat { object, meta, tier, pinned, holders } => {
                Ok(Stat { object, meta, tier, pinned, holders })
            }
            reply => Err(unexpected(&message, &reply)),
        }
    }

    /// Objects whose keys start with `prefix` (empty: all), in order of keys, from the whole cluster.
    #[must_use]
    pub fn list(&self, prefix: &str) -> Listing {
        Listing::new(Arc::clone(&self.shared), prefix.to_owned())
    }

    /// At most `limit` of them after the key `after`, and whether there are more.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`].
    pub fn list_page(
        &self,
        prefix: &str,
        after: Option<Key>,
        limit: u32,
    ) -> Result<(Vec<Listed>, bool), StoreError> {
        self.shared.list_page(prefix, after, limit)
    }

    /// Deletes an object on every node; whether there was one. Readers keep what they hold.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`].
    pub fn delete(&self, key: &Key) -> Result<bool, StoreError> {
        let message = ClientMessage::Delete { key: key.clone() };
        match self.shared.call(&message, &[], self.shared.timeout)?.reply {
            ClientReply::Deleted { existed } => Ok(existed),
            reply => Err(unexpected(&message, &reply)),
        }
    }

    /// Sets or clears whether this node ever evicts the object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not on this node.
    pub fn pin(&self, key: &Key, pin: bool) -> Result<(), StoreError> {
        let key = key.clone();
        self.shared.ask_done(&ClientMessage::Pin { key, pin })
    }

    /// Drops this node's copy of an object that another node holds too, or any copy with `force`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Denied`] for the last copy.
    pub fn evict(&self, key: &Key, force: bool) -> Result<(), StoreError> {
        let key = key.clone();
        self.shared.ask_done(&ClientMessage::Evict { key, force })
    }

    /// The node's view of itself and its cluster.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`].
    pub fn status(&self) -> Result<Status, StoreError> {
        match self.shared.call(&ClientMessage::Status, &[], self.shared.timeout)?.reply {
            ClientReply::Status(status) => Ok(*status),
            reply => Err(unexpected(&ClientMessage::Status, &reply)),
        }
    }

    /// The whole object, if it is on this node. Takes no lock and asks nobody once its segment is mapped; what it
    /// costs beyond the index is to keep what the index says in an allocation of its own.
    #[inline]
    fn local(&self, key: &Key) -> Option<Result<Object, StoreError>> {
        let shared = &self.shared;
        match shared.index.get(key, key.fingerprint(), &shared.page) {
            Ok(Some(pinned)) if shared.is_mapped(&pinned.entry.extent, pinned.entry.tier) => {
                Some(Ok(Object::local(shared, &pinned)))
            }
            // The node copies it: these bytes are for processors. The pin goes with the object.
            Ok(Some(pinned)) if pinned.entry.tier != Tier::Host => {
                drop(Object::local(shared, &pinned));
                None
            }
            Ok(Some(pinned)) => Some(self.map(Object::local(shared, &pinned))),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Maps an object's segment. The object owns its pin, so an error gives it back.
    #[cold]
    pub(crate) fn map(&self, object: Object) -> Result<Object, StoreError> {
        self.shared.map(object.extent(), object.tier())?;
        Ok(object)
    }

    /// The part that the options ask for, if the object is on this node.
    fn local_part(&self, key: &Key, options: &GetOptions) -> Option<Result<Object, StoreError>> {
        let part = |mut object: Object| {
            object.narrow(key, options.range)?;
            verified(key, object, options)
        };
        self.local(key).map(|found| found.and_then(part))
    }

    /// The object that the node has located and pinned.
    pub(crate) fn remote(
        &self,
        key: &Key,
        located: Located,
        options: &GetOptions,
        elapsed: Duration,
    ) -> Result<Object, StoreError> {
        let wanted = options.range.map_or(located.meta.len_bytes, |range| range.len_bytes);
        // Made first, so that every error from here on gives the pin back.
        let object = Object::located(&self.shared, located, elapsed);
        if object.extent().len_bytes != wanted {
            return Err(wrong_length(key, object.extent(), wanted));
        }
        refuse_staged(key, &object, options)?;
        if self.shared.is_mapped(object.extent(), object.tier()) {
            return verified(key, object, options);
        }
        verified(key, self.map(object)?, options)
    }
}

pub(crate) fn verified(key: &Key, object: Object, options: &GetOptions) -> Result<Object, StoreError> {
    if options.verify {
        object.verify_as(key)?;
    }
    Ok(object)
}

/// Lets go of bytes that came by a way that the caller does not want.
pub(crate) fn refuse_staged(key: &Key, object: &Object, options: &GetOptions) -> Result<(), StoreError> {
    let receipt = object.receipt();
    if options.zero_copy == ZeroCopy::Preferred || receipt.staged_bytes == 0 {
        return Ok(());
    }
    let why = format!(
        "get {key:?}: {} of {} bytes came through a buffer of fabric {} from {}",
        receipt.staged_bytes,
        receipt.bytes,
        receipt.fabric.as_deref().unwrap_or("?"),
        receipt.from
    );
    Err(StoreError::unavailable("zero copy", why))
}

/// Where the bytes of an [`Object`] are.
pub(crate) const IN_HOST: TierHint = TierHint { tier: Tier::Host, or_host: true };

pub(crate) fn get_message(key: &Key, options: &GetOptions, tier: Option<TierHint>) -> ClientMessage {
    ClientMessage::Get {
        key: key.clone(),
        range: options.range,
        timeout_ms: millis(options.timeout),
        keep: options.keep,
        threshold_bytes: options.threshold(),
        tier,
    }
}

pub(crate) fn unanswered<T>() -> Result<T, StoreError> {
    Err(StoreError::protocol("a get has no answer"))
}

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn wrong_length(key: &Key, extent: &Extent, wanted: u64) -> StoreError {
    StoreError::protocol(format!(
        "the node answered {} bytes for {key:?} where {wanted} belong",
        extent.len_bytes
    ))
}
