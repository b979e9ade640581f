//! Strategies for every variant of every message, and the numbers of the variants. Values need not make sense: a
//! decoder does not know what does. Invariant: a new variant does not compile before it is given a number here.

use std::borrow::Cow;

use hetmem_core::receipt::{Carried, Moved, Path};
use hetmem_core::wire::{
    Announced, Batch, Batched, CarriedBy, Carrier, ClientMessage, ClientReply, GpuTier, Granted, Holder,
    IfExists, Listed, Located, LocatedMany, Member, NodeStatus, Origin, PeerMessage, PeerStatus, PlacedItem,
    Present, PutHints, REPLICAS_MAX, Range, Role, Status, TierStatus,
};
use hetmem_core::{
    Checksum, ClientId, DType, Epoch, Extent, Generation, KEY_LEN_MAX, Key, LeaseId, NodeId, ObjectId,
    ObjectMeta, RemoteExtent, RemoteKey, SegmentId, Shape, SlotId, StoreError, Tier, TierHint,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

fn key() -> impl Strategy<Value = Key> {
    let text = prop_oneof![
        8 => "[a-z0-9_./-]{1,40}",
        4 => "\\PC{1,60}",
        1 => Just("k".repeat(KEY_LEN_MAX)),
    ];
    text.prop_map(|text| Key::new(&text).expect("valid"))
}

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,24}"
}

fn cow() -> impl Strategy<Value = Cow<'static, str>> {
    text().prop_map(Cow::Owned)
}

/// Numbers of all lengths: postcard writes small ones shorter.
fn number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64_u32).prop_map(|(number, shift)| number >> shift)
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![Just(Tier::Host), any::<u16>().prop_map(Tier::Gpu)]
}

fn object() -> impl Strategy<Value = ObjectId> {
    (number(), number(), number()).prop_map(|(origin, epoch, number)| ObjectId {
        origin: NodeId(origin),
        epoch: Epoch(epoch),
        number,
    })
}

fn checksum() -> impl Strategy<Value = Checksum> {
    prop_oneof![Just(Checksum::None), any::<u64>().prop_map(Checksum::Xxh3Blocks)]
}

fn meta() -> impl Strategy<Value = ObjectMeta> {
    (select(DType::ALL), vec(number(), 0..=8), number(), checksum()).prop_map(
        |(dtype, dims, len_bytes, checksum)| ObjectMeta {
            dtype,
            shape: Shape::new(&dims).expect("at most eight"),
            len_bytes,
            checksum,
        },
    )
}

fn range() -> impl Strategy<Value = Option<Range>> {
    prop::option::of((number(), number()).prop_map(|(start, len_bytes)| Range { start, len_bytes }))
}

fn hints() -> impl Strategy<Value = PutHints> {
    (any::<[bool; 3]>(), prop::option::of(number()), any::<u8>(), wanted()).prop_map(
        |([pin, cache, seal_copy], ttl_ms, replicas, tier)| PutHints {
            pin,
            cache,
            ttl_ms,
            seal_copy,
            replicas,
            tier,
        },
    )
}

fn gpus() -> impl Strategy<Value = Vec<GpuTier>> {
    vec((any::<u16>(), text()).prop_map(|(ordinal, uuid)| GpuTier { ordinal, uuid }), 0..4)
}

fn wanted() -> impl Strategy<Value = Option<TierHint>> {
    prop::option::of((tier(), any::<bool>()).prop_map(|(tier, or_host)| TierHint { tier, or_host }))
}

fn origin() -> impl Strategy<Value = Origin> {
    (tier(), any::<bool>()).prop_map(|(tier, staged)| Origin { tier, staged })
}

fn if_exists() -> impl Strategy<Value = IfExists> {
    select(vec![IfExists::Keep, IfExists::Error])
}

fn announced() -> impl Strategy<Value = Announced> {
    let role = select(vec![Role::Original, Role::Replica, Role::Copy]);
    (key(), object(), number(), role, 0..=REPLICAS_MAX, prop::option::of(number())).prop_map(
        |(key, object, len_bytes, role, replicas, ttl_ms)| Announced {
            key,
            object,
            len_bytes,
            role,
            replicas,
            ttl_ms,
        },
    )
}

fn holders() -> impl Strategy<Value = Vec<Holder>> {
    vec((number(), text()).prop_map(|(node, address)| Holder { node: NodeId(node), address }), 1..4)
}

fn member() -> impl Strategy<Value = Member> {
    (number(), number(), text(), text()).prop_map(|(node, epoch, name, address)| Member {
        node: NodeId(node),
        epoch: Epoch(epoch),
        name,
        address,
    })
}

fn present() -> impl Strategy<Value = Present> {
    (member(), number()).prop_map(|(member, room_bytes)| Present { member, room_bytes })
}

fn extent() -> impl Strategy<Value = Extent> {
    (any::<u32>(), number(), number()).prop_map(|(segment, offset, len_bytes)| Extent {
        segment: SegmentId(segment),
        offset,
        len_bytes,
    })
}

fn remote_extent() -> impl Strategy<Value = RemoteExtent> {
    (number(), number(), number()).prop_map(|(key, offset, len_bytes)| RemoteExtent {
        key: RemoteKey(key),
        offset,
        len_bytes,
    })
}

fn granted() -> impl Strategy<Value = Granted> {
    (remote_extent(), number(), remote_extent(), number(), any::<u32>()).prop_map(
        |(extent, generation, generation_at, lease, lease_ms)| Granted {
            extent,
            generation: Generation(generation),
            generation_at,
            lease: LeaseId(lease),
            lease_ms,
        },
    )
}

fn located() -> impl Strategy<Value = Located> {
    let carried = prop::option::of(carried().prop_map(Box::new));
    let tiers = (tier(), prop::option::of(tier()));
    (object(), meta(), extent(), tiers, number(), any::<u32>(), path(), carried).prop_map(
        |(object, meta, extent, (tier, copied_from), generation, pin, path, carried)| Located {
            object,
            meta,
            extent,
            tier,
            generation: Generation(generation),
            pin,
            path,
            copied_from,
            carried,
        },
    )
}

fn path() -> impl Strategy<Value = Path> {
    use Path::{Ahead, Copied, Eager, InPlace, Inline, Kept, Local, LocalCopy, Push, Read, Written};
    select(vec![Local, Eager, Read, Inline, InPlace, Ahead, Written, Copied, Kept, Push, LocalCopy])
}

fn carried() -> impl Strategy<Value = Carried> {
    (text(), text(), tier(), (number(), number()), any::<u32>(), number()).prop_map(
        |(fabric, from, from_tier, (bytes, staged_bytes), round_trips, threshold_bytes)| Carried {
            fabric: fabric.into(),
            from: from.into(),
            from_tier,
            moved: Moved { bytes, staged_bytes },
            round_trips,
            threshold_bytes,
        },
    )
}

fn listed() -> impl Strategy<Value = Listed> {
    (key(), number(), vec(text(), 0..4)).prop_map(|(key, len_bytes, holders)| Listed {
        key,
        len_bytes,
        holders,
    })
}

fn tier_status() -> impl Strategy<Value = TierStatus> {
    (tier(), [number(), number(), number(), number()], any::<[u32; 2]>(), text()).prop_map(
        |(tier, bytes, counts, pages)| TierStatus {
            tier,
            capacity_bytes: bytes[0],
            used_bytes: bytes[1],
            granted_bytes: bytes[2],
            ahead_bytes: bytes[3],
            segments: counts[0],
            fragmentation_percent: counts[1],
            pages,
        },
    )
}

fn peer_status() -> impl Strategy<Value = PeerStatus> {
    let measured = || prop::option::of(number());
    let names = [text(), text(), text(), text(), text()];
    (number(), names, any::<bool>(), (number(), number()), measured(), measured()).prop_map(
        |(
            node,
            [name, address, fabric, threshold_why, known_from_why],
            linked,
            (threshold_bytes, known_from_bytes),
            round_trip_ns,
            room_bytes,
        )| PeerStatus {
            node: NodeId(node),
            name,
            address,
            linked,
            fabric,
            threshold_bytes,
            threshold_why,
            known_from_bytes,
            known_from_why,
            round_trip_ns,
            room_bytes,
        },
    )
}

fn status() -> impl Strategy<Value = Status> {
    let counters = any::<[u64; 17]>().prop_map(|n| NodeStatus {
        puts: n[0],
        hits: n[1],
        gets: n[2],
        eager: n[3],
        read: n[4],
        failed: n[5],
        evicted: n[6],
        served_eager: n[7],
        served_grants: n[8],
        refused: n[9],
        known: n[10],
        outdated: n[11],
        ahead: n[12],
        replicas: n[13],
        fallbacks: n[14],
        promoted: n[15],
        demoted: n[16],
    });
    let lists = (vec(tier_status(), 0..3), vec(peer_status(), 0..3));
    let lacking = (prop::option::of(text()), vec(key(), 0..4));
    (any::<[u64; 7]>(), text(), text(), any::<bool>(), any::<u32>(), lists, counters, lacking).prop_map(
        |(n, name, address, keeps_directory, clients, (tiers, peers), counters, (directory, keys))| Status {
            node: NodeId(n[0]),
            name,
            epoch: Epoch(n[1]),
            address,
            keeps_directory,
            directory,
            under_replicated: n[6],
            under_replicated_keys: keys,
            objects: n[2],
            draining: n[3],
            reservations: n[4],
            leases: n[5],
            clients,
            tiers,
            peers,
            counters,
        },
    )
}

pub(crate) fn error() -> BoxedStrategy<StoreError> {
    prop_oneof![
        (cow(), text()).prop_map(|(operation, subject)| StoreError::NotFound { operation, subject }),
        text().prop_map(|key| StoreError::AlreadyExists { key }),
        (cow(), tier(), number(), number()).prop_map(|(operation, tier, requested, free)| {
            StoreError::NoSpace { operation, tier, requested, free }
        }),
        (cow(), cow(), number(), number()).prop_map(|(operation, what, value, limit)| StoreError::TooLarge {
            operation,
            what,
            value,
            limit
        }),
        (cow(), cow()).prop_map(|(operation, what)| StoreError::Busy { operation, what }),
        (cow(), text(), number()).prop_map(|(operation, subject, timeout_ms)| StoreError::TimedOut {
            operation,
            subject,
            timeout_ms
        }),
        (cow(), cow()).prop_map(|(what, why)| StoreError::Unavailable { what, why }),
        (cow(), text(), text(), cow()).prop_map(|(operation, subject, peer, why)| StoreError::PeerLost {
            operation,
            subject,
            peer,
            why
        }),
        (cow(), text(), cow()).prop_map(|(operation, subject, why)| StoreError::Stale {
            operation,
            subject,
            why
        }),
        (text(), cow()).prop_map(|(subject, why)| StoreError::Corrupt { subject, why }),
        cow().prop_map(|why| StoreError::Protocol { why }),
        (cow(), cow()).prop_map(|(operation, why)| StoreError::Denied { operation, why }),
        (cow(), cow()).prop_map(|(operation, why)| StoreError::Os { operation, why }),
        (cow(), cow()).prop_map(|(what, why)| StoreError::Invalid { what, why }),
    ]
    .boxed()
}

pub(crate) fn peer_message() -> BoxedStrategy<PeerMessage> {
    use PeerMessage as M;
    prop_oneof![
        (member(), any::<[u16; 2]>(), any::<bool>()).prop_map(
            |(member, [version_min, version_max], keeps)| {
                M::Hello { member, version_min, version_max, keeps }
            }
        ),
        vec(present(), 0..4).prop_map(|members| M::Members { members }),
        (number(), number())
            .prop_map(|(room_bytes, under_replicated)| M::Heartbeat { room_bytes, under_replicated }),
        (key(), range(), number()).prop_map(|(key, range, inline_max)| M::Get { key, range, inline_max }),
        (object(), meta(), origin()).prop_map(|(object, meta, origin)| M::Data { object, meta, origin }),
        (object(), meta(), origin(), granted()).prop_map(|(object, meta, origin, granted)| M::Grant {
            object,
            meta,
            origin,
            granted: Box::new(granted)
        }),
        holders().prop_map(|holders| M::Located { holders }),
        number().prop_map(|lease| M::Release { lease: LeaseId(lease) }),
        error().prop_map(|error| M::Failed { error }),
        (vec(announced(), 0..5), any::<bool>())
            .prop_map(|(objects, exclusive)| M::Announce { objects, exclusive }),
        vec(key(), 0..5).prop_map(|refused| M::Announced { refused }),
        vec(announced(), 0..5).prop_map(|objects| M::Withdraw { objects }),
        key().prop_map(|key| M::Ask { key }),
        prop::option::of(announced()).prop_map(|object| M::Asked { object }),
        key().prop_map(|key| M::Watch { key }),
        (key(), holders()).prop_map(|(key, holders)| M::Exists { key, holders }),
        key().prop_map(|key| M::Delete { key }),
        (key(), object()).prop_map(|(key, object)| M::Drop { key, object }),
        any::<bool>().prop_map(|existed| M::Dropped { existed }),
        (text(), prop::option::of(key()), any::<u32>()).prop_map(|(prefix, after, limit)| M::List {
            prefix,
            after,
            limit
        }),
        (vec(announced(), 0..5), any::<bool>()).prop_map(|(objects, more)| M::Listed { objects, more }),
        Just(M::Alive),
        any::<bool>().prop_map(|keeps| M::Keeps { keeps }),
        any::<bool>().prop_map(|heir| M::Join { heir }),
        Just(M::Leave),
        vec(object(), 0..5).prop_map(|objects| M::Deletions { objects }),
        (announced(), holders()).prop_map(|(object, holders)| M::Replicate { object, holders }),
        Just(M::Replicated),
        (key(), object(), vec((number(), number()), 1..4)).prop_map(|(key, object, lasting)| {
            let lasting = lasting.into_iter().map(|(node, epoch)| (NodeId(node), Epoch(epoch))).collect();
            M::Surplus { key, object, lasting }
        }),
        key().prop_map(|key| M::Locate { key }),
    ]
    .boxed()
}

/// The number of a variant on the wire. What is added here has to be added to [`peer_message`] too.
pub(crate) const fn peer_variant(message: &PeerMessage) -> usize {
    use PeerMessage as M;
    match message {
        M::Hello { .. } => 0,
        M::Members { .. } => 1,
        M::Heartbeat { .. } => 2,
        M::Get { .. } => 3,
        M::Data { .. } => 4,
        M::Grant { .. } => 5,
        M::Located { .. } => 6,
        M::Release { .. } => 7,
        M::Failed { .. } => 8,
        M::Announce { .. } => 9,
        M::Announced { .. } => 10,
        M::Withdraw { .. } => 11,
        M::Ask { .. } => 12,
        M::Asked { .. } => 13,
        M::Watch { .. } => 14,
        M::Exists { .. } => 15,
        M::Delete { .. } => 16,
        M::Drop { .. } => 17,
        M::Dropped { .. } => 18,
        M::List { .. } => 19,
        M::Listed { .. } => 20,
        M::Alive => 21,
        M::Keeps { .. } => 22,
        M::Join { .. } => 23,
        M::Leave => 24,
        M::Deletions { .. } => 25,
        M::Replicate { .. } => 26,
        M::Replicated => 27,
        M::Surplus { .. } => 28,
        M::Locate { .. } => 29,
    }
}

pub(crate) fn client_message() -> BoxedStrategy<ClientMessage> {
    use ClientMessage as M;
    let generation = || number().prop_map(Generation);
    let segment = || any::<u32>().prop_map(SegmentId);
    prop_oneof![
        any::<[u16; 2]>().prop_map(|[version_min, version_max]| M::Hello { version_min, version_max }),
        (key(), meta(), hints(), if_exists()).prop_map(|(key, meta, hints, if_exists)| M::Put {
            key,
            meta,
            hints,
            if_exists
        }),
        (key(), meta(), hints(), if_exists(), tier()).prop_map(|(key, meta, hints, if_exists, writes)| {
            M::Reserve { key, meta, hints, if_exists, writes }
        }),
        segment().prop_map(|segment| M::Mapped { segment }),
        (generation(), number()).prop_map(|(reservation, offset)| M::Write { reservation, offset }),
        (generation(), checksum()).prop_map(|(reservation, checksum)| M::Seal { reservation, checksum }),
        generation().prop_map(|reservation| M::Abort { reservation }),
        (key(), range(), number(), any::<bool>(), prop::option::of(number()), wanted()).prop_map(
            |(key, range, timeout_ms, keep, threshold_bytes, tier)| M::Get {
                key,
                range,
                timeout_ms,
                keep,
                threshold_bytes,
                tier
            }
        ),
        segment().prop_map(|segment| M::Segment { segment }),
        segment().prop_map(|segment| M::Return { segment }),
        (key(), number()).prop_map(|(key, timeout_ms)| M::Wait { key, timeout_ms }),
        (key(), number()).prop_map(|(key, timeout_ms)| M::Stat { key, timeout_ms }),
        (text(), prop::option::of(key()), any::<u32>()).prop_map(|(prefix, after, limit)| M::List {
            prefix,
            after,
            limit
        }),
        key().prop_map(|key| M::Delete { key }),
        (key(), any::<bool>()).prop_map(|(key, pin)| M::Pin { key, pin }),
        (key(), any::<bool>()).prop_map(|(key, force)| M::Evict { key, force }),
        Just(M::Status),
        any::<bool>().prop_map(|ring| M::Ahead { ring }),
        Just(M::Drain),
        (vec(key(), 0..5), number(), any::<bool>(), prop::option::of(number()), wanted()).prop_map(
            |(keys, timeout_ms, keep, threshold_bytes, tier)| M::GetMany {
                keys,
                timeout_ms,
                keep,
                threshold_bytes,
                tier
            }
        ),
    ]
    .boxed()
}

/// As [`peer_variant`].
pub(crate) const fn client_variant(message: &ClientMessage) -> usize {
    use ClientMessage as M;
    match message {
        M::Hello { .. } => 0,
        M::Put { .. } => 1,
        M::Reserve { .. } => 2,
        M::Mapped { .. } => 3,
        M::Write { .. } => 4,
        M::Seal { .. } => 5,
        M::Abort { .. } => 6,
        M::Get { .. } => 7,
        M::Segment { .. } => 8,
        M::Return { .. } => 9,
        M::Wait { .. } => 10,
        M::Stat { .. } => 11,
        M::List { .. } => 12,
        M::Delete { .. } => 13,
        M::Pin { .. } => 14,
        M::Evict { .. } => 15,
        M::Status => 16,
        M::Ahead { .. } => 17,
        M::Drain => 18,
        M::GetMany { .. } => 19,
    }
}

pub(crate) fn client_reply() -> BoxedStrategy<ClientReply> {
    use ClientReply as R;
    prop_oneof![
        (any::<u16>(), any::<[u32; 3]>(), text(), gpus()).prop_map(|(version, n, node, gpus)| R::Welcome {
            gpus,
            version,
            client: ClientId(n[0]),
            node,
            objects_max: n[1],
            inline_put_max: n[2],
        }),
        (number(), extent(), tier(), prop::option::of(number())).prop_map(
            |(reservation, extent, tier, map)| R::Reserved {
                reservation: Generation(reservation),
                extent,
                tier,
                map
            }
        ),
        (object(), any::<bool>(), prop::option::of(any::<u32>()), tier(), path(), number(), any::<u32>())
            .prop_map(|(object, kept, slot, tier, path, staged_bytes, replicas)| R::Sealed {
                tier,
                object,
                kept,
                slot: slot.map(SlotId),
                path,
                staged_bytes,
                replicas
            }),
        Just(R::Done),
        located().prop_map(R::Located),
        (number(), tier(), vec(any::<u32>().prop_map(SegmentId), 0..5))
            .prop_map(|(len_bytes, tier, retired)| R::Segment { len_bytes, tier, retired }),
        Just(R::Exists),
        (object(), meta(), prop::option::of(tier()), any::<bool>(), vec(text(), 0..4)).prop_map(
            |(object, meta, tier, pinned, holders)| R::Stat { object, meta, tier, pinned, holders }
        ),
        (vec(listed(), 0..4), any::<bool>()).prop_map(|(objects, more)| R::Listed { objects, more }),
        any::<bool>().prop_map(|existed| R::Deleted { existed }),
        status().prop_map(|status| R::Status(Box::new(status))),
        (number(), extent(), any::<u32>(), number(), any::<bool>()).prop_map(
            |(chunk, extent, objects, segment_len, ring)| R::Ahead {
                chunk,
                extent,
                objects,
                segment_len,
                ring
            }
        ),
        located_many().prop_map(R::LocatedMany),
    ]
    .boxed()
}

fn located_many() -> impl Strategy<Value = LocatedMany> {
    let carrier = (text(), text(), tier()).prop_map(|(fabric, from, from_tier)| Carrier {
        fabric: fabric.into(),
        from: from.into(),
        from_tier,
    });
    let by = (any::<[u32; 2]>(), number(), number(), number()).prop_map(
        |([carrier, round_trips], bytes, staged_bytes, threshold_bytes)| CarriedBy {
            carrier,
            moved: Moved { bytes, staged_bytes },
            round_trips,
            threshold_bytes,
        },
    );
    let item =
        (located(), prop::option::of(by)).prop_map(|(located, carried)| PlacedItem { located, carried });
    let item = prop_oneof![item.prop_map(Ok), error().prop_map(Err)];
    (vec(carrier, 0..3), vec(item, 0..4), any::<u32>()).prop_map(|(carriers, items, left)| LocatedMany {
        carriers,
        items,
        left,
    })
}

pub(crate) fn batch() -> BoxedStrategy<Batch> {
    let batched = (number(), number(), peer_message()).prop_map(|(request, payload_len, message)| Batched {
        request,
        payload_len,
        message,
    });
    vec(batched, 0..4).prop_map(Batch).boxed()
}

/// As [`peer_variant`].
pub(crate) const fn reply_variant(reply: &ClientReply) -> usize {
    use ClientReply as R;
    match reply {
        R::Welcome { .. } => 0,
        R::Reserved { .. } => 1,
        R::Sealed { .. } => 2,
        R::Done => 3,
        R::Located(_) => 4,
        R::Segment { .. } => 5,
        R::Exists => 6,
        R::Stat { .. } => 7,
        R::Listed { .. } => 8,
        R::Deleted { .. } => 9,
        R::Status(_) => 10,
        R::Ahead { .. } => 11,
        R::LocatedMany(_) => 12,
    }
}

pub(crate) fn answer() -> BoxedStrategy<Result<ClientReply, StoreError>> {
    prop_oneof![client_reply().prop_map(Ok), error().prop_map(Err)].boxed()
}
