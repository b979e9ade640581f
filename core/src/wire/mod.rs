//! What goes over sockets and fabrics: a fixed header, a postcard body, a payload (docs/wire.md).
//! Not the sockets. Invariant: decoding is total: any bytes give a value or an error, never a panic, and no length
//! that was received is believed before it was compared with its limit.

mod batch;
mod client;
mod frame;
mod list;
mod many;
mod peer;

pub use batch::{BATCH_BODY_LEN_MAX, BATCH_MESSAGES_MAX, BATCH_PAYLOAD_LEN_MAX, Batch, Batched};
pub use client::{
    ClientMessage, ClientReply, GPUS_MAX, GpuTier, IfExists, Listed, Located, NodeStatus, PeerStatus,
    PutHints, REPLICAS_MAX, Status, TierStatus,
};
pub use frame::{
    BODY_LEN_MAX, Frame, FrameHeader, FrameKind, HEADER_LEN, MAGIC, PROTOCOL_MAX, PROTOCOL_MIN, body_len,
    decode, encode, negotiate,
};
pub use many::{CarriedBy, Carrier, LocatedMany, PlacedItem};
pub use peer::{
    Announced, Granted, Holder, KEYS_PER_MESSAGE_MAX, Member, NODE_TEXT_LEN_MAX, Origin, PeerMessage,
    Present, Range, Role,
};
