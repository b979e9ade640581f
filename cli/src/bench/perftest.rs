//! perftest's programs as ceilings of the verbs fabric: `ib_read_bw` and `ib_send_lat`, run as two processes on this
//! machine. Not a benchmark of ours. Invariant: no process outlives its run, which ends in time whatever they do.

use std::fs;
use std::net::{IpAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hetmem_client::StoreError;

/// How long a server may take to listen, and a run to end.
const LISTEN_TIME: Duration = Duration::from_secs(30);
const RUN_TIME: Duration = Duration::from_secs(120);
/// Between two looks at what takes its time.
const LOOK: Duration = Duration::from_millis(20);
/// What a device may be tried: under load a run can fail though nothing is wrong.
const TRIES: usize = 3;

/// perftest on the device that has this address.
pub(super) struct Perftest {
    address: IpAddr,
    /// The device and the number of the address among its addresses, if it is found there.
    device: Vec<String>,
}

/// Figures of a run of `ib_send_lat`, in microseconds: half a round trip, as it says them.
pub(super) struct Latency {
    pub(super) typical_us: f64,
    pub(super) mean_us: f64,
}

impl Perftest {
    /// # Errors
    /// What is missing.
    pub(super) fn find(address: &str) -> Result<Self, String> {
        let address: IpAddr = address.parse().map_err(|_| format!("{address} is not an IP address"))?;
        for program in ["ib_read_bw", "ib_send_lat"] {
            let run =
                Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            run.map_err(|error| format!("perftest is not installed ({program}: {error})"))?;
        }
        Ok(Self { address, device: device_of(address).unwrap_or_default() })
    }

    /// How long a read of `len` bytes takes `ib_read_bw` on average, in microseconds; `depth` of them are posted at a
    /// time, or as many as it likes.
    pub(super) fn read_us(
        &self,
        len: usize,
        iterations: usize,
        depth: Option<usize>,
    ) -> Result<f64, StoreError> {
        let mut more = Vec::new();
        if let Some(depth) = depth {
            more.extend(["-t".to_owned(), depth.to_string()]);
        }
        // Its MB are MiB; a run that has failed says 0.
        self.run("ib_read_bw", len, iterations, &more, |columns| match columns {
            [_, _, _, mib_per_s, ..] if *mib_per_s > 0.0 => {
                Some(len as f64 / (1 << 20) as f64 / mib_per_s * 1e6)
            }
            _ => None,
        })
    }

    /// What `ib_send_lat` says of messages of `len` bytes.
    pub(super) fn send_latency(&self, len: usize, iterations: usize) -> Result<Latency, StoreError> {
        self.run("ib_send_lat", len, iterations, &[], |columns| match columns {
            [_, _, _, _, typical_us, mean_us, ..] if *mean_us > 0.0 => {
                Some(Latency { typical_us: *typical_us, mean_us: *mean_us })
            }
            _ => None,
        })
    }

    /// The command line of either end.
    pub(super) fn arguments(&self, len: usize, iterations: usize, port: u16) -> Vec<String> {
        let mut all = self.device.clone();
        // -F: the processor's frequency may change, which it would only complain of.
        let words = ["-F", "-s", &len.to_string(), "-n", &iterations.to_string(), "-p", &port.to_string()];
        all.extend(words.map(str::to_owned));
        all
    }

    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    fn run<T>(
        &self,
        program: &'static str,
        len: usize,
        iterations: usize,
        more: &[String],
        read: impl Fn(&[f64]) -> Option<T>,
    ) -> Result<T, StoreError> {
        let mut last = failed(program, "it was not tried");
        for _ in 0..TRIES {
            match self.run_once(program, len, iterations, more) {
                Ok(columns) => match read(&columns) {
                    Some(found) => return Ok(found),
                    None => last = failed(program, &format!("it says {columns:?}")),
                },
                Err(why) => last = why,
            }
        }
        Err(last)
    }

    fn run_once(
        &self,
        program: &'static str,
        len: usize,
        iterations: usize,
        more: &[String],
    ) -> Result<Vec<f64>, StoreError> {
        let os = |error| failed(program, &format!("{error}"));
        let port = free_port().map_err(os)?;
        let mut arguments = self.arguments(len, iterations, port);
        arguments.extend_from_slice(more);
        let _server = Server::start(program, &arguments, port)?;
        let mut client = Command::new(program)
            .args(&arguments)
            .arg(self.address.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(os)?;
        let ended = ended_in(&mut client, RUN_TIME);
        if !ended {
            let _ = client.kill();
        }
        // Its few lines fit a pipe, so that it never waits for a reader.
        let output = client.wait_with_output().map_err(os)?;
        if !ended {
            return Err(failed(program, "it did not end in time"));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        figures(&text, len).ok_or_else(|| failed(program, "it printed no figures"))
    }
}

/// A server of a run.
pub(super) struct Server(Child);

impl Server {
    /// Starts one and waits until it listens.
    pub(super) fn start(program: &'static str, arguments: &[String], port: u16) -> Result<Self, StoreError> {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| failed(program, &error.to_string()))?;
        let mut server = Self(child);
        let until = Instant::now() + LISTEN_TIME;
        while !is_listened_on(port) {
            if server.0.try_wait().ok().flatten().is_some() {
                return Err(failed(program, "its server stopped at once"));
            }
            if Instant::now() > until {
                return Err(failed(program, "its server did not listen in time"));
            }
            std::thread::sleep(LOOK);
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After a run it ends by itself, and should: one that is killed leaves its queue pairs to the kernel.
        if !ended_in(&mut self.0, Duration::from_secs(2)) {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

fn failed(program: &str, why: &str) -> StoreError {
    StoreError::unavailable(program.to_owned(), why.to_owned())
}

/// Whether a process ends in time. The standard library waits without a deadline only, so this asks in turns.
pub(super) fn ended_in(child: &mut Child, time: Duration) -> bool {
    let until = Instant::now() + time;
    while Instant::now() < until {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(LOOK),
            _ => return true,
        }
    }
    false
}

pub(super) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("0.0.0.0:0")?.local_addr()?.port())
}

/// Whether somebody listens on a TCP port, without connecting: the server would take that for its client.
fn is_listened_on(port: u16) -> bool {
    let listens = |table: &str| {
        let table = fs::read_to_string(table).unwrap_or_default();
        table.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            let local = words.next().unwrap_or_default();
            local.ends_with(&format!(":{port:04X}")) && words.nth(1) == Some("0A")
        })
    };
    listens("/proc/net/tcp") || listens("/proc/net/tcp6")
}

/// How perftest is told of the device with this address, and of the address.
fn device_of(address: IpAddr) -> Option<Vec<String>> {
    let mapped = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let wanted = mapped.segments().map(|part| format!("{part:04x}")).join(":");
    for device in fs::read_dir("/sys/class/infiniband").ok()?.flatten() {
        let addresses = device.path().join("ports/1/gids");
        for number in 0..256 {
            let Ok(text) = fs::read_to_string(addresses.join(number.to_string())) else { break };
            if text.trim() == wanted {
                let name = device.file_name().to_string_lossy().into_owned();
                return Some(vec!["-d".to_owned(), name, "-x".to_owned(), number.to_string()]);
            }
        }
    }
    None
}

/// The columns of the line of figures, which begins with the length.
fn figures(text: &str, len: usize) -> Option<Vec<f64>> {
    let line = text.lines().rev().find(|line| line.split_whitespace().next() == Some(&len.to_string()))?;
    line.split_whitespace().map(|word| word.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_among_words() {
        let text = "----\n local address: LID 0000 QPN 0x0012\n #bytes #iterations    BW peak[MB/sec]\n \
                    4194304    20               58.14              38.59  \t\t   0.000010\n------\n";
        let columns = figures(text, 4 << 20).expect("a line of figures");
        assert_eq!(columns.len(), 5);
        assert!((columns[3] - 38.59).abs() < 1e-9);
        assert_eq!(figures(text, 1024), None);
        assert_eq!(figures("1024 20 words", 1024), None);
    }
}
