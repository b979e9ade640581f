//! What several test programs share: nodes as processes (`daemon`), clients as processes (`load`), packets by hand
//! (`packets`), objects whose bytes tell who they are (`content`), and a whole cluster in one thread (`sim`). Not
//! tests. Invariant: nothing in here asserts
//! how fast anything is.

pub mod content;
pub mod daemon;
pub mod fuzz;
pub mod load;
pub mod packets;
pub mod sim;
