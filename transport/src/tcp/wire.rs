//! What two ends of the TCP fabric say to each other, and never to the engine (docs/tcp-fabric.md). Not the sockets.
//! Invariant: decoding is total, and no length that was received is believed before it was checked.

use hetmem_core::wire::{self, Frame, FrameHeader, FrameKind, HEADER_LEN};
use hetmem_core::{ErrorKind, RemoteExtent, RemoteKey, StoreError};
use serde::{Deserialize, Serialize};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The longest body of a fabric's frame; a peer that has not introduced itself cannot make anyone store more.
pub(super) const HANDSHAKE_BODY_MAX: u32 = 1024;
/// Bytes of a request on a data stream.
pub(super) const REQUEST_LEN: usize = 32;
/// Bytes of an answer's header on a data stream.
pub(super) const ANSWER_LEN: usize = 16;
/// The longest error that an answer carries.
pub(super) const ERROR_LEN_MAX: usize = 4096;
/// The first four bytes of every request.
const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"HTMR");
/// The first two bytes of every answer.
const ANSWER_MAGIC: u16 = u16::from_le_bytes(*b"HA");

/// Proves that a data stream belongs to a link: known only to the two ends of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct StreamToken(pub(super) [u8; 16]);

/// The body of a frame of kind `Fabric`.
#[derive(Clone, Serialize, Deserialize)]
pub(super) enum FabricMessage {
    /// First frame of a control stream, from who connected.
    Open {
        /// The oldest protocol version it speaks.
        version_min: u16,
        /// The newest.
        version_max: u16,
        /// Where its own fabric listens, on the address that it connects from.
        listen_port: u16,
        /// To be shown on data streams opened to it.
        token: StreamToken,
    },
    /// The answer.
    Opened {
        /// The version chosen.
        version: u16,
        /// To be shown on data streams opened to the answering end.
        token: StreamToken,
    },
    /// The other answer; the connection closes after it.
    Refused {
        /// Why.
        error: StoreError,
    },
    /// First frame of a data stream, from who will read; never answered.
    Stream {
        /// Which link it belongs to.
        token: StreamToken,
    },
}

impl FabricMessage {
    /// The message as a frame.
    ///
    /// # Errors
    /// `TooLarge` cannot occur: the longest of them is far below the limit.
    pub(super) fn frame(&self) -> Result<Frame, StoreError> {
        wire::encode(FrameKind::Fabric, 0, self, 0)
    }

    /// The message at the start of `bytes` and its length, or none if more bytes are needed.
    ///
    /// # Errors
    /// `Protocol` if this is no such message.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, StoreError> {
        let Some((head, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = FrameHeader::parse(head)?;
        if header.kind != FrameKind::Fabric || header.payload_len != 0 || header.body_len > HANDSHAKE_BODY_MAX
        {
            return Err(StoreError::protocol(format!(
                "a connection begins with a fabric frame of at most {HANDSHAKE_BODY_MAX} bytes, not with {:?} of {} \
                 and {} bytes",
                header.kind, header.body_len, header.payload_len
            )));
        }
        match rest.get(..header.body_len as usize) {
            Some(body) => Ok(Some((wire::decode(body)?, HEADER_LEN + body.len()))),
            None => Ok(None),
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRequest {
    magic: U32,
    number: U32,
    key: U64,
    offset: U64,
    len_bytes: U64,
}

const _: () = assert!(size_of::<RawRequest>() == REQUEST_LEN);

/// Asks for the bytes of an extent, on a data stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Repeated in the answer.
    pub(super) number: u32,
    pub(super) extent: RemoteExtent,
}

impl Request {
    pub(super) fn to_bytes(self) -> [u8; REQUEST_LEN] {
        zerocopy::transmute!(RawRequest {
            magic: U32::new(REQUEST_MAGIC),
            number: U32::new(self.number),
            key: U64::new(self.extent.key.0),
            offset: U64::new(self.extent.offset),
            len_bytes: U64::new(self.extent.len_bytes),
        })
    }

    /// # Errors
    /// `Protocol` if these bytes are no request.
    pub(super) fn parse(bytes: [u8; REQUEST_LEN]) -> Result<Self, StoreError> {
        let raw: RawRequest = zerocopy::transmute!(bytes);
        if raw.magic.get() != REQUEST_MAGIC {
            return Err(StoreError::protocol(format!(
                "a read request starts with {:08x}, not with {REQUEST_MAGIC:08x}",
                raw.magic.get()
            )));
        }
        Ok(Self {
            number: raw.number.get(),
            extent: RemoteExtent {
                key: RemoteKey(raw.key.get()),
                offset: raw.offset.get(),
                len_bytes: raw.len_bytes.get(),
            },
        })
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawAnswer {
    magic: U16,
    status: U16,
    number: U32,
    len_bytes: U64,
}

const _: () = assert!(size_of::<RawAnswer>() == ANSWER_LEN);

/// What precedes the bytes of an answer. Answers come in the order of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// None: the asked bytes follow. Otherwise a `StoreError` in postcard follows.
    pub(super) error: Option<ErrorKind>,
    /// From the request.
    pub(super) number: u32,
    /// Bytes that follow.
    pub(super) len_bytes: u64,
}

impl Answer {
    pub(super) fn to_bytes(self) -> [u8; ANSWER_LEN] {
        zerocopy::transmute!(RawAnswer {
            magic: U16::new(ANSWER_MAGIC),
            status: U16::new(self.error.map_or(0, ErrorKind::code)),
            number: U32::new(self.number),
            len_bytes: U64::new(self.len_bytes),
        })
    }

    /// Reads the answer to a request of this number and length.
    ///
    /// # Errors
    /// `Protocol` if these bytes cannot be it.
    pub(super) fn parse(bytes: [u8; ANSWER_LEN], number: u32, asked_len: u64) -> Result<Self, StoreError> {
        let raw: RawAnswer = zerocopy::transmute!(bytes);
        let (status, len_bytes) = (raw.status.get(), raw.len_bytes.get());
        let error = ErrorKind::from_code(status);
        let len_fits = match error {
            None => len_bytes == asked_len,
            Some(_) => len_bytes <= ERROR_LEN_MAX as u64,
        };
        let known = status == 0 || error.is_some();
        if raw.magic.get() != ANSWER_MAGIC || raw.number.get() != number || !known || !len_fits {
            return Err(StoreError::protocol(format!(
                "the answer to read request {number} of {asked_len} bytes is {:04x}, status {status}, number {}, {len_bytes} bytes",
                raw.magic.get(),
                raw.number.get()
            )));
        }
        Ok(Self { error, number, len_bytes })
    }
}

/// An error as the bytes after an answer.
pub(super) fn error_bytes(error: &StoreError) -> Vec<u8> {
    // A frame's body is the same postcard; the limit holds because errors about remote extents are a line long.
    match wire::encode(FrameKind::Fabric, 0, error, 0) {
        Ok(frame) if frame.as_bytes().len() - HEADER_LEN <= ERROR_LEN_MAX => {
            frame.as_bytes()[HEADER_LEN..].to_vec()
        }
        _ => Vec::new(),
    }
}

/// The error in the bytes after an answer.
pub(super) fn error_from(kind: ErrorKind, bytes: &[u8]) -> StoreError {
    wire::decode(bytes).unwrap_or_else(|_| {
        StoreError::protocol(format!("the owner refused a read ({}) without a reason", kind.name()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshakes_return_and_wait_for_their_bytes() {
        let token = StreamToken([7; 16]);
        let message = FabricMessage::Open { version_min: 1, version_max: 2, listen_port: 9, token };
        let frame = message.frame().expect("small").into_bytes();
        for cut in 0..frame.len() {
            assert!(FabricMessage::parse(&frame[..cut]).expect("no garbage").is_none());
        }
        let (parsed, len) = FabricMessage::parse(&frame).expect("whole").expect("whole");
        assert_eq!(len, frame.len());
        assert!(matches!(parsed, FabricMessage::Open { listen_port: 9, .. }));
    }

    #[test]
    fn requests_and_answers_return_or_name_what_came() {
        let extent = RemoteExtent { key: RemoteKey(3), offset: 4, len_bytes: 5 };
        let request = Request { number: 2, extent };
        assert_eq!(Request::parse(request.to_bytes()), Ok(request));
        assert!(Request::parse([0x55; REQUEST_LEN]).is_err());

        let answer = Answer { error: None, number: 2, len_bytes: 5 };
        assert_eq!(Answer::parse(answer.to_bytes(), 2, 5), Ok(answer));
        assert!(Answer::parse(answer.to_bytes(), 3, 5).is_err());
        assert!(Answer::parse(answer.to_bytes(), 2, 6).is_err());
        let refused = Answer { error: Some(ErrorKind::Denied), number: 2, len_bytes: 1 << 20 };
        let error = Answer::parse(refused.to_bytes(), 2, 5).expect_err("too long").to_string();
        assert!(error.contains("1048576"), "{error}");
    }

    #[test]
    fn errors_return() {
        let error = StoreError::denied("read", "not yours");
        assert_eq!(error_from(ErrorKind::Denied, &error_bytes(&error)), error);
        assert!(error_from(ErrorKind::Denied, &[0xff]).to_string().contains("Denied"));
    }
}
