//! Gets of many objects that are not on this node: a few questions for all of them, sent before the first answer is
//! waited for. Not what is on this node (`store`). Invariant: one result per key, in order; a pin that came with an
//! answer belongs to a result or is given back.

use std::time::{Duration, Instant};

use hetmem_core::wire::{ClientMessage, ClientReply, KEYS_PER_MESSAGE_MAX, LocatedMany};
use hetmem_core::{Key, StoreError};
use hetmem_host_mem::Answer;
use hetmem_host_mem::socket::BODY_LEN_MAX;

use crate::object::Object;
use crate::options::GetOptions;
use crate::shared::unexpected;
use crate::store::{ANSWER_GRACE, IN_HOST, Store, get_message, millis, unanswered};

/// Bytes of a question beside its keys, and of a key beside its text, at most.
const ENVELOPE_LEN: usize = 32;
const KEY_ENVELOPE_LEN: usize = 2;

/// Cuts keys so that each question fits into a packet. Of several questions the first is answered while the node still
/// fetches for the last.
fn questions<'k>(keys: &'k [&'k Key]) -> impl Iterator<Item = &'k [&'k Key]> {
    let mut rest = keys;
    std::iter::from_fn(move || {
        let mut len = ENVELOPE_LEN;
        let fitting = rest.iter().take(KEYS_PER_MESSAGE_MAX).take_while(|key| {
            len += KEY_ENVELOPE_LEN + key.as_str().len();
            len <= BODY_LEN_MAX
        });
        let (some, others) = rest.split_at(fitting.count());
        rest = others;
        (!some.is_empty()).then_some(some)
    })
}

impl Store {
    /// Asks the node for objects that are not on it.
    pub(crate) fn ask_for_many(
        &self,
        keys: &[&Key],
        options: &GetOptions,
    ) -> Vec<Result<Object, StoreError>> {
        let started = Instant::now();
        let timeout = options.timeout + ANSWER_GRACE;
        let session = self.shared.session.as_session();
        if options.range.is_some() {
            let messages: Vec<_> = keys.iter().map(|key| get_message(key, options, Some(IN_HOST))).collect();
            let answers = session.call_many(&messages, timeout);
            let each = keys.iter().zip(&messages).zip(answers);
            return each.map(|((key, m), answer)| self.one(key, m, answer, options, started)).collect();
        }
        let cut: Vec<&[&Key]> = questions(keys).collect();
        let messages: Vec<_> = cut.iter().map(|keys| many_message(keys, options)).collect();
        let mut results = Vec::with_capacity(keys.len());
        for ((keys, message), answer) in cut.iter().zip(&messages).zip(session.call_many(&messages, timeout))
        {
            match answer.map(|answer| answer.reply) {
                Ok(ClientReply::LocatedMany(many)) => {
                    results.extend(self.many(keys, many, options, started.elapsed()));
                }
                Ok(reply) => results.extend(keys.iter().map(|_| Err(unexpected(message, &reply)))),
                Err(error) => results.extend(keys.iter().map(|_| Err(error.clone()))),
            }
        }
        results
    }

    fn one(
        &self,
        key: &Key,
        message: &ClientMessage,
        answer: Result<Answer, StoreError>,
        options: &GetOptions,
        started: Instant,
    ) -> Result<Object, StoreError> {
        match answer?.reply {
            ClientReply::Located(located) => self.remote(key, located, options, started.elapsed()),
            reply => Err(unexpected(message, &reply)),
        }
    }

    fn many<'a>(
        &'a self,
        keys: &'a [&Key],
        many: LocatedMany,
        options: &'a GetOptions,
        elapsed: Duration,
    ) -> impl Iterator<Item = Result<Object, StoreError>> + 'a {
        let mut located = many.into_located();
        let mut objects = keys.iter();
        std::iter::from_fn(move || match (objects.next(), located.next()) {
            (Some(key), Some(item)) => {
                Some(item.and_then(|located| self.remote(key, located, options, elapsed)))
            }
            (Some(_), None) => Some(unanswered()),
            (None, surplus) => {
                // Pins of what nobody has asked for.
                let surplus = surplus.into_iter().chain(located.by_ref());
                surplus.flatten().for_each(|located| self.shared.page.unpin(located.pin));
                None
            }
        })
    }
}

fn many_message(keys: &[&Key], options: &GetOptions) -> ClientMessage {
    ClientMessage::GetMany {
        keys: keys.iter().copied().cloned().collect(),
        timeout_ms: millis(options.timeout),
        keep: options.keep,
        threshold_bytes: options.threshold(),
        tier: Some(IN_HOST),
    }
}

#[cfg(test)]
mod tests {
    use hetmem_core::wire::{FrameKind, HEADER_LEN, encode};

    use super::*;

    #[test]
    fn questions_fit_into_packets_and_leave_no_key_out() {
        for (count, len) in [(1, 1), (10_000, 12), (3_000, 512), (1_024, 60), (1_025, 60)] {
            let keys: Vec<Key> =
                (0..count).map(|number| Key::new(&format!("{number:0len$}")).expect("a key")).collect();
            let wanted: Vec<&Key> = keys.iter().collect();
            let cut: Vec<&[&Key]> = questions(&wanted).collect();
            assert!(cut.concat() == wanted, "every key once, in order");
            for some in &cut {
                let options = GetOptions { threshold_bytes: Some(u64::MAX), ..GetOptions::default() };
                let options = GetOptions { timeout: Duration::MAX, ..options };
                let message = many_message(some, &options);
                let frame = encode(FrameKind::Client, u64::MAX, &message, 0).expect("a frame");
                assert!(frame.as_bytes().len() - HEADER_LEN <= BODY_LEN_MAX);
            }
            assert!(cut.len() <= 1 + count / 100, "{} questions for {count} keys", cut.len());
        }
        assert_eq!(questions(&[]).count(), 0);
    }
}
