//! Several messages between engines in one frame, so that whatever one pass of an engine says to a peer costs one send
//! and one receive. Not what the messages mean: each counts as if it had come alone. Invariant: decoding stops at
//! [`BATCH_MESSAGES_MAX`] messages, whatever the body has, and no batch is inside another.

use serde::{Deserialize, Serialize};

use super::list::at_most;
use super::peer::PeerMessage;
use crate::error::StoreError;

/// The most messages in one batch.
pub const BATCH_MESSAGES_MAX: usize = 1024;
/// What engines put into one batch, in bytes of its body: a frame is held up by those before it, and so are heartbeats.
/// A longer message goes alone.
pub const BATCH_BODY_LEN_MAX: usize = 256 << 10;
/// The same for its payload. A longer one goes with the one message that it belongs to.
pub const BATCH_PAYLOAD_LEN_MAX: u64 = 1 << 20;

/// One message of a batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batched {
    /// What would be the request number in the header of a frame of its own.
    pub request: u64,
    /// How many bytes of the frame's payload are this message's, behind those of the messages before it.
    pub payload_len: u64,
    /// The message.
    pub message: PeerMessage,
}

/// Messages in the order in which they were said. The body of a frame of kind [`super::FrameKind::Batch`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Batch(
    #[serde(deserialize_with = "at_most::<_, _, BATCH_MESSAGES_MAX>")]
    /// Each of them.
    pub Vec<Batched>,
);

impl Batch {
    /// Checks what decoding alone does not: that it says anything, that its messages may be in a batch, and that their
    /// payloads are together the frame's. Not the messages themselves.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Protocol`] with the values.
    pub fn check(&self, payload_len: u64) -> Result<(), StoreError> {
        if self.0.is_empty() || self.0.len() > BATCH_MESSAGES_MAX {
            let why = format!("a batch of {} messages, 1 to {BATCH_MESSAGES_MAX} are accepted", self.0.len());
            return Err(StoreError::protocol(why));
        }
        let mut sum = Some(0_u64);
        for Batched { payload_len, message, .. } in &self.0 {
            let may_have_any = matches!(message, PeerMessage::Data { .. });
            if matches!(message, PeerMessage::Hello { .. }) || (*payload_len > 0 && !may_have_any) {
                let why = format!("a batch has {} with a payload of {payload_len} bytes", message.name());
                return Err(StoreError::protocol(why));
            }
            sum = sum.and_then(|sum| sum.checked_add(*payload_len));
        }
        if sum != Some(payload_len) {
            let why = format!("a batch has {payload_len} bytes of payload, its messages {sum:?}");
            return Err(StoreError::protocol(why));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ObjectMeta;
    use crate::tier::{Epoch, LeaseId, NodeId, ObjectId};
    use crate::wire::{FrameHeader, FrameKind, HEADER_LEN, Member, decode, encode};

    fn data(payload_len: u64) -> Batched {
        let object = ObjectId { origin: NodeId(1), epoch: Epoch(2), number: 3 };
        let meta = ObjectMeta::bytes(payload_len).expect("a length");
        Batched {
            request: 7,
            payload_len,
            message: PeerMessage::Data { object, meta, origin: crate::wire::Origin::HOST },
        }
    }

    fn plain(payload_len: u64) -> Batched {
        Batched { request: 0, payload_len, message: PeerMessage::Release { lease: LeaseId(1) } }
    }

    #[test]
    fn a_batch_returns_and_its_payloads_add_up() {
        let batch = Batch(vec![data(5), plain(0), data(7)]);
        let frame = encode(FrameKind::Batch, 0, &batch, 12).expect("small");
        let (head, body) = frame.as_bytes().split_first_chunk::<HEADER_LEN>().expect("a header");
        let header = FrameHeader::parse(head).expect("ours");
        assert_eq!((header.kind, header.payload_len), (FrameKind::Batch, 12));
        let back: Batch = decode(body).expect("ours");
        assert_eq!((back.check(12), &back), (Ok(()), &batch));
    }

    #[test]
    fn two_messages_have_the_documented_bytes() {
        let other = Batched { message: PeerMessage::Release { lease: LeaseId(2) }, ..plain(0) };
        let frame = encode(FrameKind::Batch, 0, &Batch(vec![plain(0), other]), 0).expect("small");
        let mut bytes = b"HTM1\x01\0\x05\0".to_vec();
        bytes.extend([0; 8]);
        bytes.extend([9, 0, 0, 0]);
        bytes.extend([0; 12]);
        bytes.extend([2, 0, 0, 7, 1, 0, 0, 7, 2]);
        assert_eq!(frame.as_bytes(), bytes);
    }

    #[test]
    fn what_no_engine_says_is_refused_with_its_values() {
        let member =
            Member { node: NodeId(1), epoch: Epoch(1), name: "n".to_owned(), address: "a".to_owned() };
        let hello = PeerMessage::Hello { member, version_min: 1, version_max: 1, keeps: false };
        let hello = Batched { request: 0, payload_len: 0, message: hello };
        for (messages, payload_len, word) in [
            (vec![], 0, "0 messages"),
            (vec![plain(0); BATCH_MESSAGES_MAX + 1], 0, "1025 messages"),
            (vec![data(5), data(7)], 11, "11 bytes"),
            (vec![data(5), data(7)], 13, "13 bytes"),
            (vec![data(1), data(1 << 20), Batched { payload_len: u64::MAX, ..data(9) }], 0, "None"),
            (vec![data(5), plain(3)], 8, "RELEASE with a payload of 3"),
            (vec![hello, plain(0)], 0, "HELLO"),
        ] {
            let error = Batch(messages).check(payload_len).expect_err("hostile");
            assert!(error.to_string().contains(word), "{error} should say {word}");
        }
    }

    /// Each message takes far more memory than bytes, so a body of the greatest length must not be decoded whole.
    #[test]
    fn decoding_stops_where_no_batch_goes_on() {
        let many = vec![plain(0); BATCH_MESSAGES_MAX];
        let frame = encode(FrameKind::Batch, 0, &Batch(many.clone()), 0).expect("small");
        assert!(decode::<Batch>(&frame.as_bytes()[HEADER_LEN..]).is_ok());
        let more = Batch(many.into_iter().chain([plain(0)]).collect());
        let frame = encode(FrameKind::Batch, 0, &more, 0).expect("small");
        let error = decode::<Batch>(&frame.as_bytes()[HEADER_LEN..]).expect_err("one too many");
        assert!(error.to_string().contains("no message"), "{error}");
    }
}
