//! Memory of one node that several processes share: sealed segments, the index, pins, and the socket that carries
//! their descriptors. Not a place for decisions (`hetmem_core::engine`) and not a place for policy about who may
//! connect. Invariant: what another process can write is checked on every access and never panics or faults here.

// Under `--cfg loom` only the protocols are built, over loom's atomics, to be model checked (`index::model`).
#![cfg_attr(loom, allow(dead_code))]

mod index;
mod pins;
mod ring;
mod sync;

#[cfg(not(loom))]
mod alive;
#[cfg(not(loom))]
pub mod copy;
#[cfg(not(loom))]
mod file;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod memfd;
#[cfg(not(loom))]
mod os;
#[cfg(not(loom))]
mod page;
#[cfg(not(loom))]
mod pages;
#[cfg(not(loom))]
mod private;
#[cfg(not(loom))]
mod reserve;
#[cfg(not(loom))]
mod segment;
#[cfg(not(loom))]
mod session;
#[cfg(not(loom))]
pub mod socket;
#[cfg(not(loom))]
mod view;

#[cfg(all(test, not(loom)))]
mod segment_tests;
#[cfg(all(test, not(loom)))]
mod socket_tests;

#[cfg(not(loom))]
pub use {
    alive::Alive,
    file::MappedFile,
    index::{Found, IndexEntry, IndexMemory, IndexReader, IndexWriter, Pinned},
    page::{ClientPage, NodePage, PAGE_LEN, PINS},
    pages::{PageKind, PagePolicy, PagesReport, pages_report},
    private::PrivateView,
    reserve::Reserve,
    ring::{AheadChunk, AheadClaim, NodeRing, ProducerRing, Refused, Signals},
    segment::{Segment, SegmentOwner},
    session::{Answer, Session},
    view::{ExtentMut, ReadMapping, WriteMapping},
};
