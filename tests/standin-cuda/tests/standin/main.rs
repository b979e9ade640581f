//! The stand-in libcuda as programs use it: the built library, opened in processes of their own. Not a test of the store.
//! Invariant: every test that opens the library does so in a child process, since its switches are read once.

mod copies;
mod driver;
mod kernels;
mod library;
mod process;
mod sharing;
mod streams;
mod switches;
mod threads;
mod virtual_memory;
