//! `hetmem status`: a node's view of itself and its cluster. Not what objects there are (`ls`).
//! Invariant: every field of the answer is in the JSON.

use std::io::{self, Write};
use std::path::Path;

use hetmem_client::{Status, Tier};
use serde_json::{Value, json};

use crate::commands::connect;
use crate::failure::Failure;
use crate::output::{Align, Output, Table, bytes, yes};

pub(crate) fn run(socket: Option<&Path>, out: Output) -> Result<(), Failure> {
    let status = connect(socket)?.status()?;
    out.print(|| status_json(&status), |text| write(&status, text))?;
    Ok(())
}

fn status_json(status: &Status) -> Value {
    json!({
        "node": {
            "id": status.node, "name": status.name, "epoch": status.epoch, "address": status.address,
            "keeps_directory": status.keeps_directory, "directory": status.directory,
        },
        "under_replicated": {
            "objects": status.under_replicated,
            "first_keys": status.under_replicated_keys.iter().map(|key| key.as_str()).collect::<Vec<_>>(),
        },
        "objects": status.objects,
        "draining": status.draining,
        "reservations": status.reservations,
        "leases": status.leases,
        "clients": status.clients,
        "tiers": status.tiers.iter().map(|tier| json!({
            "tier": tier.tier.to_string(), "capacity_bytes": tier.capacity_bytes,
            "used_bytes": tier.used_bytes, "ahead_bytes": tier.ahead_bytes,
            "granted_bytes": tier.granted_bytes, "segments": tier.segments,
            "fragmentation_percent": tier.fragmentation_percent, "pages": tier.pages,
        })).collect::<Value>(),
        "peers": status.peers.iter().map(|peer| json!({
            "id": peer.node, "name": peer.name, "address": peer.address, "linked": peer.linked,
            "fabric": peer.fabric, "threshold_bytes": peer.threshold_bytes,
            "threshold_why": peer.threshold_why,
            "known_from_bytes": peer.known_from_bytes, "known_from_why": peer.known_from_why,
            "room_bytes": peer.room_bytes, "round_trip_us": peer.round_trip_ns.map(|ns| ns as f64 / 1e3),
        })).collect::<Value>(),
        "counters": counters(status)
            .into_iter()
            .map(|(name, _, value)| (name.to_owned(), json!(value)))
            .collect::<Value>(),
    })
}

/// Counters with their names, once for text and JSON.
fn counters(status: &Status) -> [(&'static str, &'static str, u64); 17] {
    let counted = &status.counters;
    [
        ("puts", "objects sealed by clients", counted.puts),
        ("ahead", "of them: without asking, in room granted ahead", counted.ahead),
        ("hits", "gets answered in place by clients", counted.hits),
        ("gets", "gets that asked this node", counted.gets),
        ("eager", "of them: inside a peer's answer", counted.eager),
        ("read", "of them: by Read from a peer", counted.read),
        ("known", "of those: where it was found before, asking nobody", counted.known),
        ("outdated", "places found before that held it no more", counted.outdated),
        ("failed", "of them: failed", counted.failed),
        ("evicted", "objects evicted", counted.evicted),
        ("promoted", "objects moved to a GPU that reads them again and again", counted.promoted),
        ("demoted", "objects moved from a GPU to host memory, for room", counted.demoted),
        ("served_eager", "objects sent to peers inside an answer", counted.served_eager),
        ("served_grants", "objects granted to peers for Read", counted.served_grants),
        ("replicas", "objects held for good because others asked for it", counted.replicas),
        ("refused", "frames or sessions refused", counted.refused),
        ("fallbacks", "times TCP was used because RDMA did not reach a peer", counted.fallbacks),
    ]
}

fn write(status: &Status, text: &mut dyn Write) -> io::Result<()> {
    let directory = match &status.directory {
        _ if status.keeps_directory => ", keeps the directory".to_owned(),
        Some(name) => format!(", {name} keeps the directory"),
        None => ", no node that keeps a directory can be reached".to_owned(),
    };
    writeln!(text, "node {} at {}{directory} (epoch {})", status.name, status.address, status.epoch)?;
    writeln!(
        text,
        "{} objects, {} draining, {} reservations, {} leases, {} clients\n",
        status.objects, status.draining, status.reservations, status.leases, status.clients
    )?;
    if status.under_replicated > 0 {
        write!(text, "{} objects are on fewer nodes than they are to be", status.under_replicated)?;
        let keys = &status.under_replicated_keys;
        let names: Vec<&str> = keys.iter().map(|key| key.as_str()).collect();
        let more = if status.under_replicated > keys.len() as u64 { ", ..." } else { "" };
        match (keys.is_empty(), &status.directory) {
            (false, _) => writeln!(text, ": {}{more}\n", names.join(", "))?,
            (true, Some(name)) => writeln!(text, " (which, node {name} knows)\n")?,
            (true, None) => writeln!(text, "\n")?,
        }
    }
    tiers(status).write(text)?;
    writeln!(text)?;
    if status.peers.is_empty() {
        writeln!(text, "no peers (another node joins with: hetmem serve --join {})", status.address)?;
    } else {
        peers(status).write(text)?;
    }
    writeln!(text)?;
    for (_, what, value) in counters(status) {
        writeln!(text, "{value:>12}  {what}")?;
    }
    Ok(())
}

fn tiers(status: &Status) -> Table {
    let mut table = Table::new(&[
        ("tier", Align::Left),
        ("used", Align::Right),
        ("of", Align::Right),
        ("ahead", Align::Right),
        ("granted", Align::Right),
        ("segments", Align::Right),
        ("fragmented", Align::Right),
        ("pages", Align::Left),
    ]);
    for tier in &status.tiers {
        let on_gpu = tier.tier != Tier::Host;
        table.row([
            tier.tier.to_string(),
            bytes(tier.used_bytes),
            bytes(tier.capacity_bytes),
            // Only host memory is granted ahead.
            if on_gpu { "-".to_owned() } else { bytes(tier.ahead_bytes) },
            bytes(tier.granted_bytes),
            tier.segments.to_string(),
            format!("{} %", tier.fragmentation_percent),
            match (on_gpu, tier.segments) {
                (false, _) => tier.pages.clone(),
                (true, 0) => "none of it taken yet".to_owned(),
                (true, _) => "GPU memory".to_owned(),
            },
        ]);
    }
    table
}

fn peers(status: &Status) -> Table {
    let mut table = Table::new(&[
        ("peer", Align::Left),
        ("address", Align::Left),
        ("linked", Align::Left),
        ("fabric", Align::Left),
        ("room", Align::Right),
        ("round trip", Align::Right),
        ("threshold", Align::Right),
        ("because", Align::Left),
        ("known from", Align::Right),
        ("because", Align::Left),
    ]);
    for peer in &status.peers {
        table.row([
            peer.name.clone(),
            peer.address.clone(),
            yes(peer.linked).to_owned(),
            peer.fabric.clone(),
            peer.room_bytes.map_or_else(|| "?".to_owned(), bytes),
            peer.round_trip_ns.map_or_else(|| "?".to_owned(), |ns| format!("{:.0} us", ns as f64 / 1e3)),
            bytes(peer.threshold_bytes),
            peer.threshold_why.clone(),
            bytes(peer.known_from_bytes),
            peer.known_from_why.clone(),
        ]);
    }
    table
}
