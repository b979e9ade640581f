//! A client of a node with a GPU, as a process of its own: it reads what another one has put, or holds GPU memory until it
//! is killed. Not a benchmark.
//!
//! Arguments: the node's socket, a mode, a key. `get`: gets the object on gpu:0, compares all bytes with what the tests
//! put under this key, and writes `same` and the receipt's path. `host`: the same through host memory. `hold`: gets the
//! object on gpu:0 and reserves as much beside it, writes `holding`, and waits until its standard input closes.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use hetmem_client::{GetOptions, GpuReserved, Key, ObjectMeta, Placed, PutOptions, Store, StoreError, Tier};
use hetmem_gpu_mem::{HostMemory, Memory, PinnedBuffer, Span};
use hetmem_tests::content::{bytes_of, key};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, mode, name] = &arguments[..] else {
        say("usage: SOCKET get|host|hold KEY");
        return ExitCode::from(2);
    };
    match run(Path::new(socket), mode, name) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn run(socket: &Path, mode: &str, name: &str) -> Result<(), StoreError> {
    let store = Store::connect(Some(socket))?;
    let key = key(name);
    match mode {
        "get" => get(&store, &key, name),
        "host" => {
            let object = store.get(&key)?;
            say(if *object == *bytes_of(name, object.len(), 0) { "same" } else { "other bytes" });
            say(&object.receipt().path.to_string());
            Ok(())
        }
        _ => hold(&store, &key),
    }
}

fn get(store: &Store, key: &Key, name: &str) -> Result<(), StoreError> {
    let Placed::Gpu(object) = store.get_in(key, Tier::Gpu(0), &GetOptions::default())? else {
        return Err(StoreError::protocol("it is in host memory"));
    };
    let target = Arc::new(PinnedBuffer::new(object.device(), object.len_bytes())?);
    let to = Span::new(Memory::Host(Arc::clone(&target) as Arc<dyn HostMemory>), 0, object.len_bytes())?;
    let stream = object.device().stream()?;
    stream.copy(&object.span()?, &to)?;
    stream.synchronize()?;
    let mut bytes = vec![0; usize::try_from(object.len_bytes()).unwrap_or_default()];
    target.read(0, &mut bytes)?;
    say(if bytes == bytes_of(name, bytes.len(), 0) { "same" } else { "other bytes" });
    say(&object.receipt().path.to_string());
    Ok(())
}

fn hold(store: &Store, key: &Key) -> Result<(), StoreError> {
    let Placed::Gpu(object) = store.get_in(key, Tier::Gpu(0), &GetOptions::default())? else {
        return Err(StoreError::protocol("it is in host memory"));
    };
    let meta = ObjectMeta::bytes(object.len_bytes())?;
    let beside = store.reserve_gpu(&Key::new("beside")?, meta, 0, &PutOptions::default())?;
    let GpuReserved::Open(beside) = beside else {
        return Err(StoreError::protocol("no GPU memory was reserved"));
    };
    say("holding");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    drop((object, beside));
    Ok(())
}
