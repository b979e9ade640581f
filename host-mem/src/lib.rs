//! Memory of one node that several processes share: sealed segments, the index, pins, and the socket that carries
//! their descriptors. Not a place for decisions (`hetmem_core::engine`) and not a place for policy about who may
//! connect. Invariant: what another process can write is checked on every access and never panics or faults here.

pub mod copy;
pub mod index;
mod mapping;
pub mod page;
pub mod pages;
pub mod segment;
pub mod session;
pub mod socket;

pub use index::{Found, IndexEntry, IndexMemory, IndexReader, IndexWriter, Pinned};
pub use page::{ClientPage, NodePage};
pub use pages::{PageKind, PagePolicy, PagesReport, pages_report};
pub use segment::{ExtentMut, MappedFile, ReadMapping, Reserve, Segment, SegmentOwner, WriteMapping};
pub use session::{Answer, Session};
