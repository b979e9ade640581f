//! What is paid once: importing a segment in another process, and registering host memory with the driver. Not what is paid
//! for each object. Invariant: an import is timed in the process that makes it, and undone before the next.

use std::sync::Arc;

use hetmem_client::StoreError;
use hetmem_core::SegmentId;
use hetmem_host_mem::{PageKind, PagePolicy, Segment, SegmentOwner};

use super::other_end::Importer;
use super::{Bench, GIB, MIB, NO_TARGET};
use crate::bench::rows::{Pair, Row, Target, timed};
use crate::bench::skipped;
use crate::demo::nodes::Folder;

/// The segment whose import others are compared with.
const SMALL: u64 = 2 * MIB;

pub(super) fn measure(bench: &Bench, rows: &mut Vec<Row>) -> Result<(), StoreError> {
    let folder = Folder::create()?;
    let mut importer = Importer::start(folder.path(), bench.device.ordinal())?;
    for len in bench.lens([256 * MIB, GIB, 4 * GIB], 1)? {
        rows.push(import(bench, &mut importer, len)?);
    }
    for (pages, name) in [(PagePolicy::Off, "4 KiB pages"), (PagePolicy::Auto, "2 MiB pages")] {
        match registration(bench, pages, name) {
            Ok(row) => rows.push(row),
            Err(why) => skipped(&format!("registering {name}"), &why.to_string()),
        }
    }
    Ok(())
}

/// A long segment beside a short one: whether the cost grows with the length.
fn import(bench: &Bench, importer: &mut Importer, len: u64) -> Result<Row, StoreError> {
    let short = bench.device.create_segment(SMALL)?;
    let long = bench.device.create_segment(len)?;
    let ask = std::cell::RefCell::new(importer);
    let pair = Pair {
        workload: bench.workload,
        op: "import a segment, another process",
        size_bytes: long.len_bytes(),
        moves: false,
        ceiling_name: "import 2 MiB",
        target: Target::AtMost(1.0),
        rounds: bench.size.rounds(),
        samples: 3,
    };
    let mut row =
        pair.measure(&mut || ask.borrow_mut().import(&short), &mut || ask.borrow_mut().import(&long))?;
    NO_TARGET.clone_into(&mut row.target);
    Ok(row)
}

/// Registering shared memory, a GiB where there is room for it, beside making and clearing it.
fn registration(bench: &Bench, pages: PagePolicy, name: &str) -> Result<Row, StoreError> {
    let len = GIB.min(bench.up_to);
    let make = || Segment::create(SegmentId(1), len, SegmentOwner::Node, pages);
    let segment = make()?;
    let small = matches!(segment.pages(), PageKind::Small);
    if small != (pages == PagePolicy::Off) {
        let why = format!("the memory is on {} (see `hetmem doctor`)", segment.pages());
        return Err(StoreError::unavailable(name.to_owned(), why));
    }
    let memory = hetmem_node::copied_memory(Arc::new(segment));
    let op = format!("register host memory, {name}");
    let pair = Pair {
        workload: bench.workload,
        op: &op,
        size_bytes: len,
        moves: true,
        ceiling_name: "making and clearing it",
        target: Target::AtMost(1.0),
        rounds: bench.size.rounds().min(7),
        samples: 1,
    };
    let mut row = pair.measure(
        &mut || {
            let (us, made) = timed(make);
            made.map(|_| us)
        },
        &mut || {
            let (us, registered) = timed(|| bench.gpus.register_host(Arc::clone(&memory), false));
            registered.map(|_| us)
        },
    )?;
    NO_TARGET.clone_into(&mut row.target);
    Ok(row)
}
