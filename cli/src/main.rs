//! x
#![allow(dead_code)]
mod formats;
fn main() {}
