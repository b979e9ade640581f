//! The verbs fabric: RDMA by way of a plugin that is opened at run time.

pub mod abi;
