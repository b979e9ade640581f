//! `hetmem bench calls`: system calls and processor time of one get, at the reader and at the owner, counted by the kernel
//! (perf) while they run at full speed; strace would slow them down and so change how often they wait. Not times.
//! Invariant: what is counted is a block of gets and nothing else, beside the same of `ib_send_lat`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hetmem_client::{GetOptions, Store, StoreError};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde::Serialize;

use super::perftest::{Perftest, Server, ended_in, free_port};
use super::remote::Pairing;
use super::{Carrier, Place, Size, skipped};
use crate::demo::nodes::Folder;
use crate::failure::Failure;
use crate::output::{Align, Output, Table, bytes};

/// Calls that are counted by name; others are counted together.
const CALLS: &[&str] = &[
    "write",
    "read",
    "ioctl",
    "poll",
    "ppoll",
    "epoll_ctl",
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "futex",
    "sched_yield",
    "sendmsg",
    "recvmsg",
    "sendto",
    "recvfrom",
    "writev",
    "readv",
    "madvise",
    "mmap",
    "munmap",
];
const ALL: &str = "raw_syscalls:sys_enter";
const PROGRAM_TIME: Duration = Duration::from_secs(120);

/// What one get, or one round trip, takes.
#[derive(Debug, Serialize)]
pub(super) struct Count {
    what: String,
    size_bytes: u64,
    calls: f64,
    by_name: BTreeMap<String, f64>,
}

pub(super) fn run(size: Size, place: &Place) -> Result<Vec<Count>, StoreError> {
    let pairing = Pairing::start(place)?;
    let mut counts = Vec::new();
    let ways = [("Send", u64::MAX), ("Read of a known place", 0)];
    for (len, gets) in [(1 << 10, 50), (4 << 20, 3)] {
        let gets = gets * size.rounds();
        let key = pairing.put(len)?;
        for (way, threshold_bytes) in ways {
            let options =
                GetOptions { keep: false, threshold_bytes: Some(threshold_bytes), ..GetOptions::default() };
            let all = |store: &Store, gets: usize| -> Result<(), StoreError> {
                (0..gets).try_for_each(|_| store.get_with(&key, &options).map(drop))
            };
            all(&pairing.inside, gets.min(20))?;
            for (who, process) in [("reader", std::process::id()), ("owner", pairing.owner_process())] {
                let mut perf = Perf::watch(process)?;
                perf.order("enable")?;
                all(&pairing.inside, gets)?;
                perf.order("disable")?;
                let what = format!("get over {}, {way}: {who}", place.fabric.name());
                counts.push(Count::of(what, len, perf.end()?, gets));
            }
        }
    }
    if place.fabric == Carrier::Verbs {
        match Perftest::find(&place.listen) {
            Ok(perftest) => counts.push(send_lat(&perftest, 1 << 10)?),
            Err(why) => skipped("ib_send_lat", &why),
        }
    }
    Ok(counts)
}

/// Of two runs, so that what starts and ends a run does not count.
fn send_lat(perftest: &Perftest, len: usize) -> Result<Count, StoreError> {
    const FEW: usize = 100;
    const MANY: usize = 300;
    let few = send_lat_once(perftest, len, FEW)?;
    let mut many = send_lat_once(perftest, len, MANY)?;
    for (name, count) in &mut many {
        *count -= few.get(name).copied().unwrap_or_default();
    }
    Ok(Count::of("round trip of ib_send_lat: one end".to_owned(), len, many, MANY - FEW))
}

fn send_lat_once(
    perftest: &Perftest,
    len: usize,
    iterations: usize,
) -> Result<BTreeMap<String, f64>, StoreError> {
    let os = |error| StoreError::os("count the calls of ib_send_lat", error);
    let port = free_port().map_err(os)?;
    let arguments = perftest.arguments(len, iterations, port);
    let _server = Server::start("ib_send_lat", &arguments, port)?;
    let mut command = Perf::command();
    command.args(["--", "ib_send_lat"]).args(&arguments).arg(perftest.address().to_string());
    read(command.spawn().map_err(os)?)
}

/// perf, which counts.
struct Perf {
    child: Child,
    orders: File,
    answers: BufReader<File>,
    _folder: Folder,
}

impl Perf {
    fn command() -> Command {
        let mut command = Command::new("perf");
        command.args(["stat", "-x,", "-e", ALL]);
        for call in CALLS.iter().filter(|call| fs::exists(event_of(call)).unwrap_or(false)) {
            command.args(["-e", &format!("syscalls:sys_enter_{call}")]);
        }
        command.args(["-e", "task-clock"]);
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Makes it ready to count what a process does.
    fn watch(process: u32) -> Result<Self, StoreError> {
        let why = |error| StoreError::unavailable("perf", format!("it does not start: {error}"));
        let folder = Folder::create()?;
        let pipe = |name: &str| {
            let path = folder.path().join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            // Both ends, so that opening it waits for nobody.
            File::options().read(true).write(true).open(&path).map(|file| (path, file))
        };
        let (orders, answers) = (pipe("orders").map_err(why)?, pipe("answers").map_err(why)?);
        let control = format!("--control=fifo:{},{}", orders.0.display(), answers.0.display());
        let mut command = Self::command();
        let child =
            command.args(["--delay=-1", &control, "-p", &process.to_string()]).spawn().map_err(why)?;
        Ok(Self { child, orders: orders.1, answers: BufReader::new(answers.1), _folder: folder })
    }

    /// Counts from here on, or from here on no more.
    fn order(&mut self, order: &str) -> Result<(), StoreError> {
        let why = |error| StoreError::unavailable("perf", format!("it does not answer: {error}"));
        if self.child.try_wait().map_err(why)?.is_some() {
            return Err(StoreError::unavailable("perf", "it counts nothing; is tracefs mounted?"));
        }
        writeln!(self.orders, "{order}").map_err(why)?;
        self.answers.read_line(&mut String::new()).map_err(why)?;
        Ok(())
    }

    /// Ends it.
    fn end(self) -> Result<BTreeMap<String, f64>, StoreError> {
        let id = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let killed = id.map(|id| rustix::process::kill_process(id, rustix::process::Signal::INT));
        match killed {
            Some(Ok(())) => read(self.child),
            _ => Err(StoreError::unavailable("perf", "it cannot be stopped")),
        }
    }
}

/// What perf says at its end.
fn read(mut child: Child) -> Result<BTreeMap<String, f64>, StoreError> {
    if !ended_in(&mut child, PROGRAM_TIME) {
        let _ = child.kill();
    }
    let output = child.wait_with_output().map_err(|error| StoreError::os("hear perf", error))?;
    Ok(counted(&String::from_utf8_lossy(&output.stderr)))
}

fn event_of(call: &str) -> String {
    format!("/sys/kernel/tracing/events/syscalls/sys_enter_{call}")
}

/// What perf says, by the calls' names.
fn counted(text: &str) -> BTreeMap<String, f64> {
    let line = |line: &str| {
        let mut columns = line.split(',');
        let count = columns.next()?.parse().ok()?;
        let name = columns.nth(1)?;
        Some((name.strip_prefix("syscalls:sys_enter_").unwrap_or(name).to_owned(), count))
    };
    text.lines().filter_map(line).collect()
}

impl Count {
    fn of(what: String, len: usize, counted: BTreeMap<String, f64>, times: usize) -> Self {
        let one = |count: f64| count / times as f64;
        let calls = one(counted.get(ALL).copied().unwrap_or(f64::NAN));
        let by_name =
            counted.iter().filter(|(name, _)| *name != ALL).map(|(name, count)| (name.clone(), one(*count)));
        Self { what, size_bytes: len as u64, calls, by_name: by_name.collect() }
    }
}

pub(super) fn print(counts: &[Count], out: Output) -> Result<(), Failure> {
    let mut table = Table::new(&[
        ("what", Align::Left),
        ("size", Align::Right),
        ("calls", Align::Right),
        ("ms of processor", Align::Right),
        ("by name", Align::Left),
    ]);
    for count in counts {
        let mut names: Vec<(&str, f64)> =
            count.by_name.iter().map(|(name, count)| (&**name, *count)).collect();
        names.retain(|(name, count)| *name != "task-clock" && *count >= 0.05);
        names.sort_by(|left, right| right.1.total_cmp(&left.1));
        let names: Vec<String> = names.iter().map(|(name, count)| format!("{name} {count:.1}")).collect();
        table.row([
            count.what.clone(),
            bytes(count.size_bytes),
            format!("{:.1}", count.calls),
            count.by_name.get("task-clock").map_or_else(String::new, |ms| format!("{ms:.3}")),
            names.join(", "),
        ]);
    }
    out.print(|| serde_json::json!(counts), |text| table.write(text))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read() {
        let text = "117,,raw_syscalls:sys_enter,252438835,100.00,,\n4,,syscalls:sys_enter_read,2,100.00,,\n\
                    <not counted>,,syscalls:sys_enter_poll,0,0.00,,\n9.50,msec,task-clock,9500000,100.00,0.1,CPUs utilized\n";
        let counted = counted(text);
        assert_eq!(counted.len(), 3);
        let count = Count::of("get".to_owned(), 1, counted, 2);
        assert!((count.calls - 58.5).abs() < 1e-9);
        assert!((count.by_name["read"] - 2.0).abs() < 1e-9);
        assert!((count.by_name["task-clock"] - 4.75).abs() < 1e-9);
    }
}
