//! The conformance suite on TCP over loopback.

use std::sync::Arc;

use hetmem_transport::conformance::{Bench, Pair};
use hetmem_transport::{Fabric, FabricSink, TcpConfig, TcpFabric, conformance_suite};

struct Loopback {
    streams: usize,
}

impl Bench for Loopback {
    fn pair(&self, a: Arc<dyn FabricSink>, b: Arc<dyn FabricSink>) -> Pair {
        let config = TcpConfig {
            streams: self.streams,
            ..TcpConfig::default()
        };
        let a = TcpFabric::start(config.clone(), a).expect("listen");
        let b = TcpFabric::start(config, b).expect("listen");
        let killed = Arc::clone(&b);
        Pair {
            a,
            b,
            kill_b: Box::new(move || killed.stop()),
        }
    }

    fn nobody(&self) -> String {
        "127.0.0.1:1".to_owned()
    }
}

mod one_stream {
    use super::*;

    conformance_suite!(Loopback { streams: 1 });
}

mod three_streams {
    use super::*;

    conformance_suite!(Loopback { streams: 3 });
}
