//! The conformance suite on RDMA verbs, where there is a device: `HETMEM_VERBS_ADDRESS` names an address of one, and
//! `HETMEM_VERBS_PLUGIN` the plugin. Not a test of any device's speed.
#![allow(clippy::print_stdout, reason = "says why nothing was tested")]

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use hetmem_transport::conformance::{Bench, Pair};
use hetmem_transport::{Fabric, FabricSink, VerbsConfig, VerbsFabric, conformance_suite, verbs_devices};

struct Device;

fn address() -> Option<IpAddr> {
    std::env::var("HETMEM_VERBS_ADDRESS").ok()?.parse().ok()
}

fn plugin() -> Option<PathBuf> {
    std::env::var_os("HETMEM_VERBS_PLUGIN").map(PathBuf::from)
}

/// Whether there is a device to test on; each test says why it is skipped.
fn is_ready() -> bool {
    if address().is_none() {
        println!("skipped: HETMEM_VERBS_ADDRESS names no address of an RDMA device");
        return false;
    }
    let devices = verbs_devices(plugin().as_deref()).expect("the plugin");
    assert!(!devices.is_empty(), "the machine has no RDMA device");
    true
}

impl Bench for Device {
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair {
        let address = address().expect("looked at before");
        let config =
            VerbsConfig { plugin: plugin(), listen: format!("{address}:0"), ..VerbsConfig::default() };
        let a = VerbsFabric::start(&config, a).expect("listen");
        let b = VerbsFabric::start(&config, b).expect("listen");
        let killed = Arc::clone(&b);
        Pair { a, b, kill_b: Box::new(move || killed.stop()) }
    }

    /// It comes into a buffer before anyone knows where it belongs.
    fn staged_max(&self, payload_len: u64) -> u64 {
        payload_len
    }

    fn nobody(&self) -> String {
        format!("{}:1", address().expect("looked at before"))
    }
}

conformance_suite!(Device, when is_ready());
