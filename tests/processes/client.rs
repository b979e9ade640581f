//! A client as a process of its own, to be killed: it puts, gets, holds and deletes as fast as it can until its
//! standard input closes. Not a benchmark. Invariant: it writes down a put after it returned and a delete before it
//! begins, so whoever kills it knows what must be there; and every byte that it gets is checked.
//!
//! Arguments: the node's socket, a prefix for its keys, a seed, and `wild`, `steady`, `wait` or `batches`. A wild client
//! also leaves reservations open and holds objects. One that waits does nothing but that, for the object whose key is
//! its prefix, and says `waiting` before. One for batches gets all objects that have its prefix at once, again and
//! again, and says `batch` before each time. The lines that the others write: `put KEY`, `del KEY`, at the end `done`.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hetmem_client::{
    ErrorKind, GetOptions, Object, ObjectMeta, PutOptions, Reservation, Reserved, Store, StoreError,
};
use hetmem_tests::content::{below, key};
use hetmem_tests::load::{LEN_MAX, SHARED, content_of, name_of};

/// Objects that a client keeps in the store.
const OWN_MAX: usize = 12;
/// Objects that a wild client holds, and reservations that it leaves open.
const HELD_MAX: usize = 8;
const OPEN_MAX: usize = 3;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, prefix, seed, mode] = &arguments[..] else {
        say("usage: SOCKET PREFIX SEED wild|steady");
        return ExitCode::from(2);
    };
    if mode == "batches" {
        return batches(Path::new(socket), prefix);
    }
    if mode == "wait" {
        return wait(Path::new(socket), prefix);
    }
    match run(Path::new(socket), prefix, seed.parse().unwrap_or(0), mode == "wild") {
        Ok(()) => {
            say("done");
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn wait(socket: &Path, name: &str) -> ExitCode {
    let waited = Store::connect(Some(socket)).and_then(|store| {
        say("waiting");
        store.wait(&key(name), Duration::from_secs(600))
    });
    say(&format!("waited: {waited:?}"));
    ExitCode::SUCCESS
}

fn batches(socket: &Path, prefix: &str) -> ExitCode {
    let run = || -> Result<(), StoreError> {
        let store = Store::connect(Some(socket))?;
        let keys =
            store.list(prefix).map(|listed| Ok(listed?.key)).collect::<Result<Vec<_>, StoreError>>()?;
        let options = GetOptions { keep: false, ..GetOptions::default() };
        loop {
            say("batch");
            for (key, object) in keys.iter().zip(store.get_many_with(&keys, &options)) {
                if *object? != *content_of(key.as_str()) {
                    return Err(StoreError::corrupt(key, "these are another object's bytes"));
                }
            }
        }
    };
    if let Err(error) = run() {
        say(&format!("failed: {error}"));
    }
    ExitCode::FAILURE
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Whoever started this process reads until its end, or has gone.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

struct Client {
    store: Store,
    prefix: String,
    state: u64,
    number: u64,
    own: VecDeque<String>,
    held: VecDeque<Object>,
    open: VecDeque<Reservation>,
}

fn run(socket: &Path, prefix: &str, seed: u64, wild: bool) -> Result<(), StoreError> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Relaxed);
    });
    let mut client = Client {
        store: Store::connect(Some(socket))?,
        prefix: prefix.to_owned(),
        state: seed,
        number: 0,
        own: VecDeque::new(),
        held: VecDeque::new(),
        open: VecDeque::new(),
    };
    while !stop.load(Ordering::Relaxed) {
        match below(&mut client.state, if wild { 8 } else { 5 }) {
            0 | 1 => client.put()?,
            2 => client.get_shared()?,
            3 => client.get_own()?,
            4 => client.delete_oldest(OWN_MAX)?,
            5 => client.reserve()?,
            6 => client.hold()?,
            _ => client.scribble(),
        }
    }
    client.held.clear();
    client.open.clear();
    client.delete_oldest(0)
}

impl Client {
    fn put(&mut self) -> Result<(), StoreError> {
        let name = self.next_name();
        let bytes = content_of(&name);
        match self.store.put_bytes(&key(&name), &bytes) {
            Ok(_) => {
                say(&format!("put {name}"));
                self.own.push_back(name);
            }
            Err(error) if error.kind() == ErrorKind::NoSpace => self.delete_oldest(0)?,
            Err(error) => return Err(error),
        }
        self.delete_oldest(OWN_MAX)
    }

    fn next_name(&mut self) -> String {
        self.number += 1;
        // Most are small.
        let len = match below(&mut self.state, 4) {
            0 => below(&mut self.state, LEN_MAX),
            _ => below(&mut self.state, 20_000),
        };
        name_of(&self.prefix, self.number, len)
    }

    fn get_shared(&mut self) -> Result<(), StoreError> {
        let name = SHARED[below(&mut self.state, SHARED.len())];
        self.checked(name).map(drop)
    }

    fn get_own(&mut self) -> Result<(), StoreError> {
        if self.own.is_empty() {
            return Ok(());
        }
        let at = below(&mut self.state, self.own.len());
        let name = self.own[at].clone();
        self.checked(&name).map(drop)
    }

    fn checked(&self, name: &str) -> Result<Object, StoreError> {
        let options = GetOptions { verify: true, ..GetOptions::default() };
        let object = self.store.get_with(&key(name), &options)?;
        if *object == *content_of(name) {
            return Ok(object);
        }
        Err(StoreError::corrupt(name, "these are another object's bytes"))
    }

    fn delete_oldest(&mut self, keep: usize) -> Result<(), StoreError> {
        while self.own.len() > keep
            && let Some(name) = self.own.pop_front()
        {
            say(&format!("del {name}"));
            if !self.store.delete(&key(&name))? {
                return Err(StoreError::not_found("delete", name));
            }
        }
        Ok(())
    }

    fn reserve(&mut self) -> Result<(), StoreError> {
        let name = self.next_name();
        let meta = ObjectMeta::bytes(content_of(&name).len() as u64)?;
        match self.store.reserve(&key(&name), meta, &PutOptions::default()) {
            Ok(Reserved::Open(reservation)) => self.open.push_back(reservation),
            Ok(Reserved::Kept(_)) => return Err(StoreError::corrupt(name, "nobody has put it yet")),
            Err(error) if error.kind() == ErrorKind::NoSpace => self.open.clear(),
            Err(error) => return Err(error),
        }
        if self.open.len() > OPEN_MAX {
            self.open.pop_front();
        }
        Ok(())
    }

    fn hold(&mut self) -> Result<(), StoreError> {
        let name = SHARED[below(&mut self.state, SHARED.len())];
        let object = self.checked(name)?;
        self.held.push_back(object);
        if self.held.len() > HELD_MAX {
            self.held.pop_front();
        }
        Ok(())
    }

    /// Writes into what is reserved, and never seals it.
    fn scribble(&mut self) {
        if let Some(open) = self.open.back_mut() {
            open.bytes_mut().fill(0xaa);
        }
    }
}
