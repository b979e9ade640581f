//! A stand-in for the CUDA driver library: devices that are threads and memory files. Not a GPU, and no figure taken
//! on it says anything about one. Invariant: every function answers with a code of cuda.h; none panics across C.
//!
//! `exports` holds the C functions by subject; each is a few lines over the state below:
//! `device` (memory accounts, contexts, errors), `space` (what is at which address), `physical` (the memory
//! files), `stream` and `event` (order), `copy` (what a copy may touch) and `run` (what a worker does).
#![doc = include_str!("../README.md")]

#[macro_use]
mod call;
mod abi;
mod code;
mod config;
mod copy;
mod device;
mod dma_buf;
mod driver;
mod event;
mod exports;
mod handles;
mod module;
mod physical;
mod pinned;
mod pointers;
mod raw;
mod run;
mod space;
mod stream;
