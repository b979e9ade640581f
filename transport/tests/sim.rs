//! The conformance suite on the simulated network, without faults and with all of them.

use std::sync::Arc;

use hetmem_transport::conformance::{Bench, Pair};
use hetmem_transport::{FabricSink, SimFaults, SimNet, conformance_suite};

struct Simulated {
    seed: u64,
    faults: SimFaults,
}

impl Bench for Simulated {
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair {
        let net = SimNet::new(self.seed, self.faults.clone());
        let a = net.fabric("a", a).expect("a free name");
        let b = net.fabric("b", b).expect("a free name");
        Pair { a, b, kill_b: Box::new(move || net.kill("b")) }
    }

    fn nobody(&self) -> String {
        "nobody".to_owned()
    }
}

mod calm {
    use super::*;

    conformance_suite!(Simulated { seed: 1, faults: SimFaults::none() });
}

mod stormy {
    use super::*;

    conformance_suite!(Simulated { seed: 2, faults: SimFaults::default() });
}
