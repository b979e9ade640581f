//! A client of a node with a GPU, as a process of its own: it reads what another one has put, or holds GPU memory until it
//! is killed. Not a benchmark.
//!
//! Arguments: the node's socket, a mode, a key. `get`: gets the object on gpu:0, compares all bytes with what the tests
//! put under this key, and writes `same` and the receipt's path. `host`: the same through host memory. `hold`: gets the
//! object on gpu:0 and reserves as much beside it, writes `holding`, and waits until its standard input closes. `compare`:
//! gets the objects KEY-0, KEY-1 and so on, as many as there are, again and again, on gpu:0 and in host memory by turns, and
//! compares all their bytes, until its standard input closes; then writes how many it got.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hetmem_client::{
    GetOptions, GpuObject, GpuReserved, Key, ObjectMeta, Placed, PutOptions, Store, StoreError, Tier,
    TierHint,
};
use hetmem_gpu_mem::{HostMemory, Memory, PinnedBuffer, Span};
use hetmem_tests::content::{bytes_of, key};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, mode, name] = &arguments[..] else {
        say("usage: SOCKET get|host|hold|compare KEY");
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
        "compare" => compare(&store, name),
        _ => hold(&store, &key),
    }
}

fn get(store: &Store, key: &Key, name: &str) -> Result<(), StoreError> {
    let Placed::Gpu(object) = store.get_in(key, Tier::Gpu(0), &GetOptions::default())? else {
        return Err(StoreError::protocol("it is in host memory"));
    };
    let bytes = copied(&object)?;
    say(if bytes == bytes_of(name, bytes.len(), 0) { "same" } else { "other bytes" });
    say(&object.receipt().path.to_string());
    Ok(())
}

fn copied(object: &GpuObject) -> Result<Vec<u8>, StoreError> {
    let target = Arc::new(PinnedBuffer::new(object.device(), object.len_bytes())?);
    let to = Span::new(Memory::Host(Arc::clone(&target) as Arc<dyn HostMemory>), 0, object.len_bytes())?;
    let stream = object.device().stream()?;
    stream.copy(&object.span()?, &to)?;
    stream.synchronize()?;
    let mut bytes = vec![0; usize::try_from(object.len_bytes()).unwrap_or_default()];
    target.read(0, &mut bytes)?;
    Ok(bytes)
}

fn compare(store: &Store, prefix: &str) -> Result<(), StoreError> {
    let listed = store.list(&format!("{prefix}-"));
    let names: Vec<String> =
        listed.map(|listed| Ok(listed?.key.to_string())).collect::<Result<_, StoreError>>()?;
    let over = AtomicBool::new(false);
    let mut count = 0_usize;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            over.store(true, Ordering::Release);
        });
        while !over.load(Ordering::Acquire) {
            // Some more often than others, each by either way.
            let name = &names[count.pow(2) / 3 % names.len()];
            let tier = if count.is_multiple_of(3) { Tier::Host } else { Tier::Gpu(0) };
            let hint = TierHint { tier, or_host: true };
            let bytes = match store.get_in(&Key::new(name)?, hint, &GetOptions::default())? {
                Placed::Host(object) => object.to_vec(),
                Placed::Gpu(object) => copied(&object)?,
            };
            if bytes != bytes_of(name, bytes.len(), 0) {
                return Err(StoreError::corrupt(name, "other bytes than were put"));
            }
            count += 1;
        }
        say(&count.to_string());
        Ok(())
    })
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
