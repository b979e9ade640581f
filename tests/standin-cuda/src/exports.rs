//! The C functions, by subject. Not their state. Invariant: names and prototypes are those of cuda.h for CUDA 12.8, with
//! `CUresult` as the integer that it is and pointers as the types of `pointers`.

mod contexts;
mod copies;
mod devices;
mod handles;
mod memory;
mod modules;
mod queries;
mod streams;
