//! The answer to a question about many keys, and how it is cut into packets. Not the question. Invariant: the parts of
//! an answer, put together again in their order, are the answer.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::client::Located;
use super::frame::body_len;
use super::list::at_most;
use super::peer::KEYS_PER_MESSAGE_MAX;
use crate::error::StoreError;
use crate::receipt::{Carried, Moved};
use crate::tier::Tier;

/// Bytes that a part has beside its entries, at most.
const ENVELOPE_LEN: usize = 32;
/// Bytes of an object in place without its shape's dimensions, and of each of these, at most: all its numbers are of
/// the greatest length.
const PLACE_LEN_MAX: usize = 200;
const DIMENSION_LEN_MAX: usize = 10;

/// What many objects have in common that came from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carrier {
    /// The fabric's name.
    pub fabric: Arc<str>,
    /// The peer's name.
    pub from: Arc<str>,
    /// The peer's tier.
    pub from_tier: Tier,
}

/// How one of them came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedBy {
    /// The place in the list of carriers.
    pub carrier: u32,
    /// As in [`Carried`].
    pub moved: Moved,
    /// As in [`Carried`].
    pub round_trips: u32,
    /// As in [`Carried`].
    pub threshold_bytes: u64,
}

/// One of many objects, in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedItem {
    /// Where it is; how it was carried stands beside it.
    pub located: Located,
    /// How its bytes came, if they came from a peer for this get.
    pub carried: Option<CarriedBy>,
}

/// The answer to `GetMany`, or a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocatedMany {
    /// What entries refer to, behind the carriers of the parts before this one.
    pub carriers: Vec<Carrier>,
    /// One for each key, in the order of the keys; at most [`KEYS_PER_MESSAGE_MAX`].
    #[serde(deserialize_with = "at_most::<_, _, KEYS_PER_MESSAGE_MAX>")]
    pub items: Vec<Result<PlacedItem, StoreError>>,
    /// How many more follow in other parts.
    pub left: u32,
}

impl LocatedMany {
    /// The answer of these objects.
    pub fn of(located: impl IntoIterator<Item = Result<Located, StoreError>>) -> Self {
        let mut carriers: Vec<Carrier> = Vec::new();
        let mut place = |carried: Box<Carried>| {
            let Carried { fabric, from, from_tier, moved, round_trips, threshold_bytes } = *carried;
            let carrier = Carrier { fabric, from, from_tier };
            // Neighbours mostly come from one peer; and there are few.
            let known = carriers.iter().rposition(|known| *known == carrier).unwrap_or_else(|| {
                carriers.push(carrier);
                carriers.len() - 1
            });
            let carrier = u32::try_from(known).unwrap_or(u32::MAX);
            CarriedBy { carrier, moved, round_trips, threshold_bytes }
        };
        let mut item = |mut located: Located| {
            let carried = located.carried.take().map(&mut place);
            PlacedItem { located, carried }
        };
        let items = located.into_iter().map(|located| located.map(&mut item)).collect();
        Self { carriers, items, left: 0 }
    }

    /// The objects of a whole answer. A carrier that is not in the list counts as none.
    pub fn into_located(self) -> impl Iterator<Item = Result<Located, StoreError>> {
        let Self { carriers, items, .. } = self;
        items.into_iter().map(move |item| {
            item.map(|PlacedItem { mut located, carried }| {
                located.carried = carried.and_then(|by| {
                    let carrier = carriers.get(usize::try_from(by.carrier).ok()?)?;
                    let Carrier { fabric, from, from_tier } = carrier.clone();
                    let CarriedBy { moved, round_trips, threshold_bytes, .. } = by;
                    Some(Box::new(Carried { fabric, from, from_tier, moved, round_trips, threshold_bytes }))
                });
                located
            })
        })
    }

    /// Cuts the answer so that no part has more than `len_max` bytes as a body, unless a single entry has.
    #[must_use]
    pub fn parts(self, len_max: usize) -> Vec<Self> {
        let mut left = u32::try_from(self.items.len()).unwrap_or(u32::MAX);
        let mut part = Self { carriers: self.carriers, ..Self::default() };
        let mut len = ENVELOPE_LEN + body_len(&part.carriers).unwrap_or(len_max);
        let mut parts = Vec::new();
        for item in self.items {
            let item_len = match &item {
                Ok(item) => PLACE_LEN_MAX + item.located.meta.shape.dims().len() * DIMENSION_LEN_MAX,
                Err(error) => 1 + body_len(error).unwrap_or(len_max),
            };
            if len + item_len > len_max && !(part.items.is_empty() && part.carriers.is_empty()) {
                part.left = left;
                parts.push(std::mem::take(&mut part));
                len = ENVELOPE_LEN;
            }
            len += item_len;
            left = left.saturating_sub(1);
            part.items.push(item);
        }
        parts.push(part);
        parts
    }

    /// Adds the part that follows.
    pub fn append(&mut self, part: Self) {
        self.carriers.extend(part.carriers);
        self.items.extend(part.items);
        self.left = part.left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::{DType, ObjectMeta};
    use crate::receipt::Path;
    use crate::tier::{Epoch, Extent, Generation, NodeId, ObjectId, SegmentId};

    fn located(number: u64, from: Option<&str>) -> Located {
        let carried = from.map(|from| {
            let moved = Moved { bytes: number, staged_bytes: 1 };
            let (fabric, from) = ("tcp".into(), from.into());
            let from_tier = Tier::Host;
            Box::new(Carried { fabric, from, from_tier, moved, round_trips: 1, threshold_bytes: 9 })
        });
        Located {
            object: ObjectId { origin: NodeId(1), epoch: Epoch(2), number },
            meta: ObjectMeta::bytes(number).expect("a length"),
            extent: Extent { segment: SegmentId(1), offset: 64 * number, len_bytes: number },
            tier: Tier::Host,
            generation: Generation(number + 1),
            pin: 5,
            path: Path::Eager,
            copied_from: None,
            carried,
        }
    }

    fn answer(count: u64) -> Vec<Result<Located, StoreError>> {
        let one = |number: u64| match number % 5 {
            0 => Err(StoreError::not_found("get", format!("k{number}"))),
            1 => Ok(located(number, None)),
            2 => Ok(located(number, Some("other"))),
            _ => Ok(located(number, Some("peer"))),
        };
        (0..count).map(one).collect()
    }

    #[test]
    fn what_is_common_is_said_once_and_nothing_is_lost() {
        let many = LocatedMany::of(answer(100));
        assert_eq!((many.carriers.len(), many.items.len(), many.left), (2, 100, 0));
        assert_eq!(many.into_located().collect::<Vec<_>>(), answer(100));
        let stranger = CarriedBy { carrier: 7, moved: Moved::default(), round_trips: 1, threshold_bytes: 1 };
        let item = Ok(PlacedItem { located: located(3, None), carried: Some(stranger) });
        let odd = LocatedMany { items: vec![item], ..LocatedMany::default() };
        assert_eq!(odd.into_located().collect::<Vec<_>>(), [Ok(located(3, None))]);
    }

    #[test]
    fn parts_fit_and_make_the_answer_again() {
        for len_max in [1, 300, 1_000, 64 << 10] {
            let whole = LocatedMany::of(answer(1_000));
            let parts = whole.clone().parts(len_max);
            let mut again = LocatedMany::default();
            let mut left = 1_000;
            for part in parts {
                let len = body_len(&part).expect("it encodes");
                let single = part.items.len() <= 1;
                assert!(len <= len_max || single, "{len} bytes of {} items", part.items.len());
                left -= part.items.len();
                assert_eq!(part.left as usize, left);
                again.append(part);
            }
            assert_eq!((again, left), (whole, 0));
        }
        let parts = LocatedMany::default().parts(100);
        assert_eq!(parts, [LocatedMany::default()], "an answer without items is one all the same");
    }

    #[test]
    fn the_longest_entry_is_as_long_as_it_is_taken_for() {
        let most = u64::MAX;
        let mut meta = ObjectMeta::tensor(DType::U8, &[1; 8]).expect("a shape");
        meta.shape = crate::meta::Shape::new(&[most; 8]).expect("8 dimensions");
        meta.len_bytes = most;
        meta.checksum = crate::checksum::Checksum::Xxh3Blocks(most);
        let moved = Moved { bytes: most, staged_bytes: most };
        let carried =
            Some(CarriedBy { carrier: u32::MAX, moved, round_trips: u32::MAX, threshold_bytes: most });
        let located = Located {
            object: ObjectId { origin: NodeId(most), epoch: Epoch(most), number: most },
            meta,
            extent: Extent { segment: SegmentId(u32::MAX), offset: most, len_bytes: most },
            tier: Tier::Gpu(u16::MAX),
            generation: Generation(most),
            pin: u32::MAX,
            path: Path::Kept,
            copied_from: Some(Tier::Gpu(u16::MAX)),
            carried: None,
        };
        let item: Result<PlacedItem, StoreError> = Ok(PlacedItem { located, carried });
        let len = body_len(&item).expect("it encodes");
        assert!(len <= PLACE_LEN_MAX + 8 * DIMENSION_LEN_MAX, "{len} bytes");
    }
}
