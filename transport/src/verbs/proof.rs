//! What is tried with real bytes before a device is used: each way in and out of each kind of memory, over a connection of
//! the device with itself. That memory could be registered proves nothing. Not the choice of a route. Invariant: only what
//! has brought the bytes that were expected works; what could not be tried is said not to have been.
//!
//! Holds unsafe code: posts work that names memory, which lives until that work is over or its connection is closed.
#![allow(unsafe_code)]

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hetmem_core::StoreError;

use super::abi;
use super::completion::explain;
use super::ladder::{Way, climb};
use super::loopback::Loopback;
use super::plugin::{Context, Greeting, Registered};
use crate::memory::{HeapRegion, RegionMemory};

/// Bytes that are moved at a time.
pub(super) const LEN: usize = 64 << 10;
/// The fastest of so many tries counts.
const TRIES: u8 = 3;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Reads out of a device's memory that take so many times as long as writes out of it are slow: some hosts let one device
/// read from another at a small part of the speed at which they let it write (NVIDIA, GPUDirect RDMA guide, "Supported
/// Systems"). The host's memory has no such sides.
const SLOW: u32 = 4;

/// A piece of memory of some kind for trying what adapters can do with it.
pub trait Scratch: Send + Sync {
    /// It, for adapters: at least 64 KiB.
    fn memory(&self) -> Arc<dyn RegionMemory>;

    /// Puts bytes into it, `offset` bytes from its start.
    ///
    /// # Errors
    /// If the bytes cannot be copied there.
    fn fill(&self, offset: usize, bytes: &[u8]) -> Result<(), StoreError>;

    /// Bytes that are in it, as a reader on its device would find them.
    ///
    /// # Errors
    /// If the bytes cannot be copied from there.
    fn look(&self, offset: usize, len_bytes: usize) -> Result<Vec<u8>, StoreError>;
}

impl Scratch for Arc<HeapRegion> {
    fn memory(&self) -> Arc<dyn RegionMemory> {
        Self::clone(self) as _
    }

    fn fill(&self, offset: usize, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(offset, bytes);
        Ok(())
    }

    fn look(&self, offset: usize, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        Ok(self.read(offset, len_bytes))
    }
}

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// The host's.
    Host,
    /// That of the device with this number, such as a GPU's.
    Device(u16),
}

impl MemoryKind {
    /// Of registered memory.
    pub(super) fn of(memory: &dyn RegionMemory) -> Self {
        memory.device().map_or(Self::Host, |device| Self::Device(device.number))
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Device(number) => write!(f, "memory of device {number}"),
        }
    }
}

/// A way in or out of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A peer reads out of it: it is an owner's.
    ReadOut,
    /// What is read from a peer goes into it.
    ReadInto,
    /// What is written into a peer's memory comes from it: an owner pushes.
    WriteOut,
    /// A peer writes into it: it is the target of a push.
    WriteInto,
}

const DIRECTIONS: [Direction; 4] =
    [Direction::ReadOut, Direction::ReadInto, Direction::WriteOut, Direction::WriteInto];

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOut => "reads out of it",
            Self::ReadInto => "reads into it",
            Self::WriteOut => "writes out of it",
            Self::WriteInto => "writes into it",
        })
    }
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The bytes came, and 64 KiB of them took so long at best.
    Works(Duration),
    /// They did not.
    Fails(String),
    /// The device does not connect to itself, so nobody knows.
    Untried(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works(_) => f.write_str("work"),
            Self::Fails(why) => write!(f, "FAIL: {why}"),
            Self::Untried(why) => write!(f, "were not tried: {why}"),
        }
    }
}

/// What was found of one device and one kind of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Of the memory.
    pub kind: MemoryKind,
    /// By direction.
    pub outcomes: [(Direction, Outcome); 4],
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [(_, first), rest @ ..] = &self.outcomes;
        if rest.iter().all(|(_, outcome)| outcome == first) && !matches!(first, Outcome::Works(_)) {
            return write!(f, "{}: reads and writes, out of it and into it, {first}", self.kind);
        }
        write!(f, "{}", self.kind)?;
        for (number, (direction, outcome)) in self.outcomes.iter().enumerate() {
            write!(f, "{} {direction} {outcome}", if number == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

impl Proof {
    fn outcome(&self, of: Direction) -> Option<&Outcome> {
        self.outcomes.iter().find(|(direction, _)| *direction == of).map(|(_, outcome)| outcome)
    }

    /// Whether everything works.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.outcomes.iter().all(|(_, outcome)| matches!(outcome, Outcome::Works(_)))
    }

    /// Whether peers' bytes can come into such memory, whichever way they choose.
    pub(super) fn is_target(&self) -> bool {
        let works = |of| matches!(self.outcome(of), Some(Outcome::Works(_)));
        works(Direction::ReadInto) && works(Direction::WriteInto)
    }

    /// Whether an owner of such memory pushes rather than has it read.
    ///
    /// # Errors
    /// `Unavailable` if neither works; for the host's memory, if reads do not, since there the generation words are, which
    /// are read.
    pub(super) fn by_push(&self) -> Result<bool, StoreError> {
        let (read, write) = (self.outcome(Direction::ReadOut), self.outcome(Direction::WriteOut));
        match (self.kind, read, write) {
            (MemoryKind::Host, Some(Outcome::Fails(why)), _) => {
                Err(StoreError::unavailable("the host's memory by way of the device", why.clone()))
            }
            (MemoryKind::Device(_), Some(Outcome::Fails(_)), Some(Outcome::Works(_))) => Ok(true),
            (MemoryKind::Device(_), Some(Outcome::Fails(why)), _) => {
                Err(StoreError::unavailable("a device's memory by way of the RDMA device", why.clone()))
            }
            (MemoryKind::Device(_), Some(Outcome::Works(read)), Some(Outcome::Works(write))) => {
                Ok(*read > *write * SLOW)
            }
            _ => Ok(false),
        }
    }
}

/// Tries what the device that has this address can do with a piece of memory.
pub(super) fn prove(context: &Context, at: SocketAddr, scratch: &dyn Scratch) -> Proof {
    let memory = scratch.memory();
    let kind = MemoryKind::of(&*memory);
    // Once it has failed, a connection is good for nothing.
    let mut trial: Option<Trial<'_>> = None;
    let outcomes = DIRECTIONS.map(|direction| {
        let ready = match trial.take() {
            Some(ready) => Ok(ready),
            None => Trial::begin(context, at, scratch),
        };
        let outcome = match ready {
            Err(outcome) => outcome,
            Ok(mut ready) => match ready.fastest(direction) {
                Ok(took) => {
                    trial = Some(ready);
                    Outcome::Works(took)
                }
                Err(why) => Outcome::Fails(why.to_string()),
            },
        };
        (direction, outcome)
    });
    Proof { kind, outcomes }
}

/// A connection and the memory at either end of what is tried on it.
struct Trial<'a> {
    // Ends before what they name.
    loopback: Loopback,
    scratch: &'a dyn Scratch,
    partner: Arc<HeapRegion>,
    registered: Registered,
    partner_registered: Registered,
    turn: u8,
}

impl<'a> Trial<'a> {
    fn begin(context: &Context, at: SocketAddr, scratch: &'a dyn Scratch) -> Result<Self, Outcome> {
        let untried = |why: StoreError| Outcome::Untried(why.to_string());
        let own = context.another().map_err(untried)?;
        let greeting = Greeting::new(b"", (1, 1));
        let loopback = Loopback::connect(&own, at, greeting, PATIENCE).map_err(untried)?;
        let access = abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_READ | abi::ACCESS_REMOTE_WRITE;
        let register = |memory: &Arc<dyn RegionMemory>| {
            let by = |way| loopback.device.register(memory, (0, LEN as u64), way, access);
            match memory.device() {
                None => by(Way::Host).map_err(StoreError::from),
                Some(device) => climb(&device, by).map(|(registered, _)| registered),
            }
        };
        let partner = Arc::new(HeapRegion::new(LEN));
        let failed = |why: StoreError| Outcome::Fails(why.to_string());
        let registered = register(&scratch.memory()).map_err(failed)?;
        let partner_registered = register(&(Arc::clone(&partner) as _)).map_err(failed)?;
        Ok(Self { loopback, scratch, partner, registered, partner_registered, turn: 0 })
    }

    fn fastest(&mut self, direction: Direction) -> Result<Duration, StoreError> {
        let mut fastest = Duration::MAX;
        for _ in 0..TRIES {
            fastest = fastest.min(self.once(direction)?);
        }
        Ok(fastest)
    }

    /// Moves bytes that were not moved before, and compares them.
    fn once(&mut self, direction: Direction) -> Result<Duration, StoreError> {
        self.turn = self.turn.wrapping_add(1);
        let turn = usize::from(self.turn);
        #[allow(clippy::cast_possible_truncation, reason = "a pattern of bytes")]
        let bytes: Vec<u8> = (0..LEN).map(|at| (at * (2 * turn + 1) + (at >> 8) * 31 + turn) as u8).collect();
        let out = matches!(direction, Direction::ReadOut | Direction::WriteOut);
        let (source, target): (&dyn Scratch, &dyn Scratch) =
            if out { (self.scratch, &self.partner) } else { (&self.partner, self.scratch) };
        source.fill(0, &bytes)?;
        target.fill(0, &vec![!bytes[0]; LEN])?;
        let reading = matches!(direction, Direction::ReadOut | Direction::ReadInto);
        // Local is the target of a read, and the source of a write.
        let scratch_is_local = out != reading;
        let ends = [
            (self.scratch.memory().base() as u64, self.registered.keys()),
            (self.partner.base() as u64, self.partner_registered.keys()),
        ];
        let (local, remote) = if scratch_is_local { (ends[0], ends[1]) } else { (ends[1], ends[0]) };
        let piece =
            abi::Piece { address: local.0, len_bytes: u32::try_from(LEN).unwrap_or(0), key: local.1.local };
        let work = abi::Work {
            id: 7,
            pieces: &raw const piece,
            piece_count: 1,
            kind: if reading { abi::WORK_READ } else { abi::WORK_WRITE },
            flags: abi::FLAG_SIGNALED,
            immediate: 0,
            remote_address: remote.0,
            remote_key: remote.1.remote,
            _reserved: 0,
        };
        let since = Instant::now();
        // SAFETY: the piece is there, and names memory that lives as long as the connection.
        unsafe { self.loopback.a.post(&[work]) }.map_err(|(_, why)| why)?;
        let done = self.loopback.ended(PATIENCE)?;
        let took = since.elapsed();
        if done.status != 0 {
            return Err(explain(&done));
        }
        if target.look(0, LEN)? != bytes {
            return Err(StoreError::os("RDMA", "it was said to be done, and other bytes came"));
        }
        Ok(took)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn works(us: u64) -> Outcome {
        Outcome::Works(Duration::from_micros(us))
    }

    fn proof(kind: MemoryKind, read: Outcome, write: Outcome) -> Proof {
        let outcomes = [
            (Direction::ReadOut, read),
            (Direction::ReadInto, works(1)),
            (Direction::WriteOut, write),
            (Direction::WriteInto, works(1)),
        ];
        Proof { kind, outcomes }
    }

    #[test]
    fn an_owner_pushes_where_reads_of_its_memory_are_broken_or_slow() {
        use MemoryKind::{Device, Host};
        let fails = || Outcome::Fails("status 10".to_owned());
        let untried = || Outcome::Untried("no loopback".to_owned());
        for (kind, read, write, expected) in [
            (Host, works(10), works(10), Some(false)),
            (Host, works(1_000), works(10), Some(false)),
            (Host, fails(), works(10), None),
            (Host, untried(), untried(), Some(false)),
            (Device(0), works(10), works(10), Some(false)),
            (Device(0), works(40), works(10), Some(false)),
            (Device(0), works(41), works(10), Some(true)),
            (Device(0), works(41), fails(), Some(false)),
            (Device(0), fails(), works(10), Some(true)),
            (Device(0), fails(), fails(), None),
            (Device(0), fails(), untried(), None),
            (Device(0), untried(), untried(), Some(false)),
        ] {
            let proof = proof(kind, read, write);
            assert_eq!(proof.by_push().ok(), expected, "{proof}");
        }
    }

    #[test]
    fn bytes_of_peers_are_put_only_where_both_ways_of_putting_them_were_seen_to_work() {
        let with = |into: Outcome, pushed: Outcome| {
            let mut proof = proof(MemoryKind::Device(3), works(1), works(1));
            for (direction, outcome) in &mut proof.outcomes {
                match direction {
                    Direction::ReadInto => *outcome = into.clone(),
                    Direction::WriteInto => *outcome = pushed.clone(),
                    _ => {}
                }
            }
            proof.is_target()
        };
        let (fails, untried) = (Outcome::Fails("status 4".to_owned()), Outcome::Untried("alone".to_owned()));
        assert!(with(works(1), works(1)));
        for other in [fails, untried] {
            assert!(!with(works(1), other.clone()) && !with(other, works(1)));
        }
    }

    #[test]
    fn a_proof_says_all_that_was_found() {
        let said = proof(MemoryKind::Device(0), Outcome::Fails("status 10".to_owned()), works(5)).to_string();
        for part in [
            "memory of device 0: reads out of it FAIL: status 10,",
            "reads into it work",
            "writes out of it work",
        ] {
            assert!(said.contains(part), "{said}");
        }
        assert!(!proof(MemoryKind::Host, Outcome::Untried(String::new()), works(1)).is_whole());
        assert!(proof(MemoryKind::Host, works(1), works(1)).is_whole());
    }
}
