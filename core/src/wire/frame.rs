//! Frames: the 32-byte header, the limits on its lengths, and version negotiation.
//! Not the meaning of bodies (`peer`, `client`). Invariant: a `FrameHeader` from `FrameHeader::parse` is within
//! every limit.

use postcard::ser_flavors::Flavor;
use serde::{Serialize, de::DeserializeOwned};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::StoreError;
use crate::meta::OBJECT_LEN_MAX;

/// The first four bytes of every frame: "HTM1" read as text.
pub const MAGIC: u32 = u32::from_le_bytes(*b"HTM1");
/// The oldest protocol version that this build speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// The newest protocol version that this build speaks.
pub const PROTOCOL_MAX: u16 = 1;
/// Bytes of a header.
pub const HEADER_LEN: usize = 32;
/// The longest body in bytes; lists are cut into several messages below it.
pub const BODY_LEN_MAX: u32 = 1 << 20;

/// Who understands the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// Between engines: one [`super::PeerMessage`].
    Peer = 1,
    /// From a client to its node: [`super::ClientMessage`].
    Client = 2,
    /// From a node to its client: a `Result<ClientReply, StoreError>`.
    Reply = 3,
    /// Between two ends of the TCP fabric; the engine never sees it.
    Fabric = 4,
    /// Between engines: a [`super::Batch`] of messages.
    Batch = 5,
}

impl FrameKind {
    const fn from_code(code: u16) -> Option<Self> {
        match code {
            1 => Some(Self::Peer),
            2 => Some(Self::Client),
            3 => Some(Self::Reply),
            4 => Some(Self::Fabric),
            5 => Some(Self::Batch),
            _ => None,
        }
    }
}

/// The header as bytes. Little-endian, no padding.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U16,
    kind: U16,
    request: U64,
    body_len: U32,
    reserved: U32,
    payload_len: U64,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// The protocol version of the sender.
    pub version: u16,
    /// Who understands the body.
    pub kind: FrameKind,
    /// Chosen by the asker, repeated in the answer; 0 where no answer is expected.
    pub request: u64,
    /// Bytes of body after the header.
    pub body_len: u32,
    /// Bytes of payload after the body.
    pub payload_len: u64,
}

impl FrameHeader {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Protocol`] for another magic, version, kind, reserved bits that are set, or a length
    /// over its limit; the message names what was received and what is accepted.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, StoreError> {
        let raw = RawHeader::read_from_bytes(bytes)
            .map_err(|_| StoreError::protocol("a frame header has 32 bytes"))?;
        if raw.magic.get() != MAGIC {
            return Err(StoreError::protocol(format!(
                "frame starts with {:08x}, not with {MAGIC:08x}: the other end does not speak hetmem",
                raw.magic.get()
            )));
        }
        let version = raw.version.get();
        if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&version) {
            return Err(version_error(version, version));
        }
        let Some(kind) = FrameKind::from_code(raw.kind.get()) else {
            return Err(StoreError::protocol(format!("frame kind {} is unknown", raw.kind.get())));
        };
        if raw.reserved.get() != 0 {
            return Err(StoreError::protocol(format!("reserved header bits are {:x}", raw.reserved.get())));
        }
        let (body_len, payload_len) = (raw.body_len.get(), raw.payload_len.get());
        if body_len > BODY_LEN_MAX {
            return Err(StoreError::protocol(format!(
                "body of {body_len} bytes, at most {BODY_LEN_MAX} are accepted"
            )));
        }
        if payload_len > OBJECT_LEN_MAX {
            return Err(StoreError::protocol(format!(
                "payload of {payload_len} bytes, at most {OBJECT_LEN_MAX} are accepted"
            )));
        }
        Ok(Self { version, kind, request: raw.request.get(), body_len, payload_len })
    }

    /// The header's bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U16::new(self.version),
            kind: U16::new(self.kind as u16),
            request: U64::new(self.request),
            body_len: U32::new(self.body_len),
            reserved: U32::new(0),
            payload_len: U64::new(self.payload_len),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }
}

/// A whole frame without its payload: header and body, as they go over a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

impl Frame {
    /// Header and body in one piece.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Header and body in one piece.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// What a body is written to. Most of what is written has one or a few bytes, for which a call to copy them would cost
/// more than the bytes.
struct Body(Vec<u8>);

impl Flavor for Body {
    type Output = Vec<u8>;

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        const SHORT: usize = 10;
        if bytes.len() > SHORT {
            self.0.extend_from_slice(bytes);
        } else {
            bytes.iter().for_each(|byte| self.0.push(*byte));
        }
        Ok(())
    }

    fn finalize(self) -> postcard::Result<Vec<u8>> {
        Ok(self.0)
    }
}

/// Makes a frame of a message.
///
/// # Errors
/// [`crate::ErrorKind::TooLarge`] if the body is over [`BODY_LEN_MAX`].
pub fn encode<T: Serialize>(
    kind: FrameKind,
    request: u64,
    body: &T,
    payload_len: u64,
) -> Result<Frame, StoreError> {
    let bytes = postcard::serialize_with_flavor(body, Body(vec![0_u8; HEADER_LEN]))
        .map_err(|error| StoreError::protocol(format!("a message could not be encoded: {error}")))?;
    let body_len = bytes.len() - HEADER_LEN;
    let body_len = match u32::try_from(body_len) {
        Ok(len) if len <= BODY_LEN_MAX => len,
        _ => {
            let limit = u64::from(BODY_LEN_MAX);
            return Err(StoreError::too_large("encode", "message body in bytes", body_len as u64, limit));
        }
    };
    let mut bytes = bytes;
    let header = FrameHeader { version: PROTOCOL_MAX, kind, request, body_len, payload_len };
    bytes[..HEADER_LEN].copy_from_slice(&header.to_bytes());
    Ok(Frame(bytes))
}

/// Bytes that a body takes; none if it cannot be encoded at all.
pub fn body_len<T: Serialize>(body: &T) -> Option<usize> {
    postcard::experimental::serialized_size(body).ok()
}

/// Reads a body. Bytes after the message are an error.
///
/// # Errors
/// [`crate::ErrorKind::Protocol`] if the bytes are not such a message.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, StoreError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(StoreError::protocol(format!("{} bytes follow the message", rest.len()))),
        Err(error) => {
            Err(StoreError::protocol(format!("a body of {} bytes is no message: {error}", body.len())))
        }
    }
}

/// Chooses the newest version that both sides speak.
///
/// # Errors
/// [`crate::ErrorKind::Protocol`] naming both sides' versions if there is none.
pub fn negotiate(peer_min: u16, peer_max: u16) -> Result<u16, StoreError> {
    let version = peer_max.min(PROTOCOL_MAX);
    if version < peer_min || version < PROTOCOL_MIN {
        return Err(version_error(peer_min, peer_max));
    }
    Ok(version)
}

fn version_error(peer_min: u16, peer_max: u16) -> StoreError {
    StoreError::protocol(format!(
        "the other end speaks hetmem protocol {peer_min} to {peer_max}, this one {PROTOCOL_MIN} to {PROTOCOL_MAX}: \
         use the same release on both"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_return() {
        let header = FrameHeader {
            version: 1,
            kind: FrameKind::Peer,
            request: 7,
            body_len: 9,
            payload_len: OBJECT_LEN_MAX,
        };
        assert_eq!(FrameHeader::parse(&header.to_bytes()), Ok(header));
    }

    #[test]
    fn hostile_headers_are_refused_with_what_they_said() {
        let good = FrameHeader { version: 1, kind: FrameKind::Peer, request: 7, body_len: 9, payload_len: 0 };
        for (at, value, word) in [
            (0, 0xff_u8, "does not speak hetmem"),
            (4, 9, "protocol 9"),
            (6, 99, "kind 99"),
            (20, 1, "reserved"),
            (19, 0xff, "body"),
            (31, 0xff, "payload"),
        ] {
            let mut bytes = good.to_bytes();
            bytes[at] = value;
            let error = FrameHeader::parse(&bytes).expect_err("hostile");
            assert!(error.to_string().contains(word), "{error} should say {word}");
        }
    }

    #[test]
    fn versions_meet_or_name_both() {
        assert_eq!(negotiate(1, 7), Ok(1));
        let error = negotiate(2, 7).expect_err("too new").to_string();
        assert!(error.contains("2 to 7") && error.contains("1 to 1"), "{error}");
    }
}
