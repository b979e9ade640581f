//! Real processes: nodes and clients that are killed, stopped and fed with garbage. Not a simulation, and not speed.
//! Invariant: every test has nodes, folders and ports of its own, so that all of them can run at once.

mod ahead;
mod bad_puts;
mod batches;
mod cli;
mod cluster;
mod hostile_peers;
mod hostile_unix;
mod kill_clients;
mod kill_nodes;
mod leaks;
mod limits;
mod locations;
mod private;
mod public_defects;
mod readers;
mod receipts;
mod replicas;
mod stop;
mod succession;
