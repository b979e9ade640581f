//! What goes over sockets and fabrics: a fixed header, a postcard body, a payload (docs/wire.md).
//! Not the sockets. Invariant: decoding is total: any bytes give a value or an error, never a panic, and no length
//! that was received is believed before it was compared with its limit.

mod client;
mod frame;
mod peer;

pub use client::{
    ClientMessage, ClientReply, IfExists, Listed, Located, NodeStatus, PeerStatus, PutHints, REPLICAS_MAX,
    Status, TierStatus,
};
pub use frame::{
    BODY_LEN_MAX, Frame, FrameHeader, FrameKind, HEADER_LEN, MAGIC, PROTOCOL_MAX, PROTOCOL_MIN, decode,
    encode, negotiate,
};
pub use peer::{
    Announced, Granted, Holder, KEYS_PER_MESSAGE_MAX, Member, NODE_TEXT_LEN_MAX, PeerMessage, Present, Range,
    Role,
};
