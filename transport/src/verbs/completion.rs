//! What a completion that failed means: whose fault it is, what is to be done, and what a person is told. Not doing it
//! (`state`). Invariant: every status of `enum ibv_wc_status`, known or not, has a class.

use hetmem_core::StoreError;

use super::abi;

/// What follows from a completion that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The work names memory that is not there any more, here or at the peer: it fails, and what was under way beside it is
    /// begun anew over another connection.
    Work,
    /// The connection is over, and another one may be made.
    Reconnect,
    /// The peer does not keep to the protocol: its link ends, and that is counted.
    Peer,
    /// This end, its adapter or its driver is at fault.
    Here,
}

/// Codes of `enum ibv_wc_status` (rdma-core, libibverbs/verbs.h), which are the same everywhere.
struct Status {
    code: u32,
    class: Class,
    name: &'static str,
    hint: &'static str,
}

const fn status(code: u32, class: Class, name: &'static str, hint: &'static str) -> Status {
    Status { code, class, name, hint }
}

const BUG: &str = "this is a defect of hetmem or of the driver; please report it";

static STATUSES: [Status; 21] = [
    status(
        1,
        Class::Here,
        "local length error",
        "a message is longer than its buffer; do both nodes have one release?",
    ),
    status(2, Class::Here, "local queue pair operation error", "the port may be down"),
    status(3, Class::Here, "local EE context operation error", BUG),
    status(4, Class::Work, "local protection error", "the local segment was deregistered"),
    status(5, Class::Reconnect, "flushed", "the connection has ended"),
    status(6, Class::Here, "memory window bind error", BUG),
    status(7, Class::Peer, "bad response", "do both nodes have one release?"),
    status(8, Class::Here, "local access error", BUG),
    status(9, Class::Work, "remote invalid request", "the peer does not allow it, or has less memory there"),
    status(10, Class::Work, "remote access error", "the owner has withdrawn the memory"),
    status(11, Class::Work, "remote operation error", "the owner's adapter could not carry it out"),
    status(
        12,
        Class::Reconnect,
        "retries exceeded",
        "the peer acknowledges nothing: it, or the network between, is gone",
    ),
    status(13, Class::Reconnect, "receiver not ready", "the peer has had no receive buffer for too long"),
    status(14, Class::Here, "local RDD violation", BUG),
    status(15, Class::Peer, "remote invalid RD request", BUG),
    status(16, Class::Reconnect, "remote aborted", "the peer has ended the connection"),
    status(17, Class::Here, "invalid EE context number", BUG),
    status(18, Class::Here, "invalid EE context state", BUG),
    status(19, Class::Here, "fatal error", "the adapter is broken; look into the kernel's log"),
    status(20, Class::Reconnect, "response timeout", "the peer answers nothing"),
    status(21, Class::Here, "general error", "the adapter is broken; look into the kernel's log"),
];

/// What follows from the completion.
pub(super) fn class_of(done: &abi::Completion) -> Class {
    found(done).map_or(Class::Here, |status| status.class)
}

fn found(done: &abi::Completion) -> Option<&'static Status> {
    STATUSES.iter().find(|status| status.code == done.status)
}

/// What is told of it: name, status, what the adapter's maker says beside, and a hint.
pub(super) fn explain(done: &abi::Completion) -> StoreError {
    let (name, hint) = found(done).map_or(("unknown failure", BUG), |status| (status.name, status.hint));
    let why = format!("{name} (status {}, vendor syndrome {:#x}): {hint}", done.status, done.vendor);
    match class_of(done) {
        Class::Work => StoreError::stale("transfer", "its memory", why),
        Class::Reconnect => StoreError::unavailable("its connection", why),
        Class::Peer => StoreError::protocol(why),
        Class::Here => StoreError::os("RDMA", why),
    }
}

#[cfg(test)]
mod tests {
    use hetmem_core::ErrorKind;

    use super::*;

    #[test]
    fn every_status_has_a_class_and_says_all_that_is_known() {
        for code in 0..64 {
            let done = abi::Completion { status: code, vendor: 0x81, ..abi::Completion::default() };
            let said = explain(&done).to_string();
            assert!(said.contains(&format!("status {code}, vendor syndrome 0x81")), "{said}");
            assert!(STATUSES.iter().filter(|status| status.code == code).count() <= 1);
        }
        assert!((1..=21).all(|code| STATUSES.iter().any(|status| status.code == code)));
    }

    #[test]
    fn what_is_nobody_elses_fault_is_not_called_so() {
        let kind = |status| explain(&abi::Completion { status, ..abi::Completion::default() }).kind();
        assert_eq!(kind(10), ErrorKind::Stale);
        assert_eq!(kind(12), ErrorKind::Unavailable);
        assert_eq!(kind(7), ErrorKind::Protocol);
        for here in [2, 19, 22, 99] {
            assert_eq!(kind(here), ErrorKind::Os, "{here}");
        }
    }
}
