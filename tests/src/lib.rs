//! What several test programs share: nodes as processes (`daemon`), clients as processes (`load`), packets by hand
//! (`packets`) and objects whose bytes tell who they are (`content`). Not tests. Invariant: nothing in here asserts
//! how fast anything is.

pub mod content;
pub mod daemon;
pub mod load;
pub mod packets;
