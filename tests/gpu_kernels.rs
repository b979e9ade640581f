//! What nodes and clients leave to kernels: batches of small objects, checksums of GPU memory, conversions. On a real driver
//! (`HETMEM_TEST_CUDA=real`) or on the stand-in, whose log says what was asked of it. Not the kernels by themselves (gpu-mem's
//! tests), nor speed.

#[path = "../gpu-mem/tests/stand_in/mod.rs"]
mod stand_in;

use std::path::Path;

use hetmem_client::{
    Checksum, Converted, DType, ErrorKind, GetOptions, GpuReserved, Key, ObjectMeta, Path as By, Placed,
    PutOptions, PutOutcome, Range, Store, StoreError, Tier,
};
use hetmem_core::checksum;
use hetmem_gpu_mem::Gpus;
use hetmem_tests::content::{bytes_of, key};
use hetmem_tests::daemon::Serve;
use stand_in::{hooks, on_gpu, on_stand_in};

const GPU: Tier = Tier::Gpu(0);
const LARGE: usize = (3 << 20) + 5;

fn node(folder: &Path, name: &str) -> Serve {
    Serve::new(folder, name).flag("gpu", "64MiB")
}

/// Puts from the memory of gpu:0 in this process.
fn put_from_gpu(
    gpus: &Gpus,
    store: &Store,
    name: &str,
    meta: ObjectMeta,
    (bytes, checksum, options): (&[u8], Checksum, PutOptions),
) -> PutOutcome {
    let reserved = store.reserve_gpu(&key(name), meta, 0, &options).expect("room");
    let GpuReserved::Open(reservation) = reserved else { panic!("{reserved:?}") };
    let stream = reservation.device().stream().expect("a stream");
    let tensor = stand_in::segment(&gpus.device(0).expect("a device"), bytes.len() as u64);
    let tensor = stand_in::on_device(&tensor, 0, bytes.len());
    stand_in::fill(&stream, &tensor, bytes);
    stream.copy(&tensor, &reservation.span().expect("inside")).expect("accepted");
    reservation.seal_after(&stream, checksum).expect("sealed")
}

fn get_gpu(store: &Store, name: &str, verify: bool) -> Result<hetmem_client::GpuObject, StoreError> {
    match store.get_in(&key(name), GPU, &GetOptions { verify, ..GetOptions::default() })? {
        Placed::Gpu(object) => Ok(object),
        Placed::Host(object) => panic!("it is in host memory: {object:?}"),
    }
}

/// What is put on a GPU has a checksum of the device's, and is compared with it there: no byte of it comes back.
#[test]
fn checksums_of_gpu_objects_are_computed_where_they_are() {
    on_gpu("checksums_of_gpu_objects_are_computed_where_they_are", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "summed").start();
        let store = node.connect();
        let bytes = bytes_of("k", LARGE, 0);
        let meta = ObjectMeta::bytes(LARGE as u64).expect("a length");
        let right = Checksum::Xxh3Blocks(checksum::of(&bytes));
        put_from_gpu(gpus, &store, "k", meta, (&bytes, Checksum::None, PutOptions::default()));
        assert_eq!(store.stat(&key("k")).expect("it is here").meta.checksum, right);
        let before = (hooks::calls("cuMemcpyDtoHAsync_v2"), hooks::calls("cuLaunchKernel"));
        let object = get_gpu(&store, "k", true).expect("its checksum agrees");
        assert_eq!(object.verify(), Ok(true));
        if !stand_in::is_real() {
            assert_eq!(hooks::calls("cuMemcpyDtoHAsync_v2"), before.0, "nothing is copied back");
            assert_eq!(hooks::calls("cuLaunchKernel"), before.1.map(|calls| calls + 2));
        }
        // The node's own copies agree as well, in host memory.
        let verify = GetOptions { verify: true, ..GetOptions::default() };
        assert!(*store.get_with(&key("k"), &verify).expect("it agrees") == *bytes);
        // A part has no checksum; an object without one cannot be compared.
        let range = Range { start: 1, len_bytes: 1000 };
        let part = store.get_in(&key("k"), GPU, &GetOptions { range: Some(range), ..verify });
        let Ok(Placed::Gpu(part)) = part else { panic!("{part:?}") };
        assert_eq!(part.verify(), Ok(false));
        let without = PutOptions { checksum: false, ..PutOptions::default() };
        put_from_gpu(gpus, &store, "without", meta, (&bytes, Checksum::None, without));
        assert_eq!(get_gpu(&store, "without", true).expect("nothing to compare").verify(), Ok(false));
        // Bytes that differ from what their producer said are handed to nobody who asks.
        let wrong = Checksum::Xxh3Blocks(1);
        put_from_gpu(gpus, &store, "wrong", meta, (&bytes, wrong, PutOptions::default()));
        let error = get_gpu(&store, "wrong", true).expect_err("they differ");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("wrong") && error.to_string().contains("gpu:0"), "{error}");
        assert_eq!(
            get_gpu(&store, "wrong", false).expect("unasked").verify().expect_err("it differs").kind(),
            ErrorKind::Corrupt
        );
        drop((part, object));
        node.settles(&store, "nothing is held", |status| status.draining == 0 && status.reservations == 0);
        node.assert_sound();
    });
}

/// A driver that takes no kernel: a put has no checksum, a get compares what it copies back, numbers say what to do.
#[test]
fn without_kernels_gpu_objects_are_put_and_compared_all_the_same() {
    let switches = [("FAIL", "cuModuleLoadData=UNSUPPORTED_PTX_VERSION")];
    on_stand_in("without_kernels_gpu_objects_are_put_and_compared_all_the_same", &switches, || {
        let gpus = Gpus::open().expect("the stand-in");
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "plain").start();
        let store = node.connect();
        let bytes = bytes_of("k", LARGE, 0);
        let meta = ObjectMeta::bytes(LARGE as u64).expect("a length");
        let right = Checksum::Xxh3Blocks(checksum::of(&bytes));
        put_from_gpu(&gpus, &store, "none", meta, (&bytes, Checksum::None, PutOptions::default()));
        assert_eq!(store.stat(&key("none")).expect("it is here").meta.checksum, Checksum::None);
        put_from_gpu(&gpus, &store, "given", meta, (&bytes, right, PutOptions::default()));
        put_from_gpu(&gpus, &store, "wrong", meta, (&bytes, Checksum::Xxh3Blocks(2), PutOptions::default()));
        assert_eq!(get_gpu(&store, "given", true).expect("it agrees").verify(), Ok(true));
        assert_eq!(get_gpu(&store, "wrong", true).expect_err("it differs").kind(), ErrorKind::Corrupt);
        let numbers = ObjectMeta::tensor(DType::F32, &[100]).expect("a shape");
        put_from_gpu(&gpus, &store, "numbers", numbers, (&[0; 400], Checksum::None, PutOptions::default()));
        let error =
            store.get_as(&key("numbers"), GPU, DType::BF16, &GetOptions::default()).expect_err("no kernel");
        assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("580"), "{error}");
        let Ok(Converted::Host { bytes, .. }) =
            store.get_as(&key("numbers"), Tier::Host, DType::BF16, &GetOptions::default())
        else {
            panic!("the processor converts")
        };
        assert_eq!(bytes, [0; 200]);
        node.assert_sound();
    });
}

/// How often a process has called a function, by the stand-in's log.
fn calls_in(log: &str, pid: u32, function: &str) -> usize {
    let log = std::fs::read_to_string(log).expect("the log");
    log.lines().filter(|line| line.starts_with(&format!("{pid} {function} "))).count()
}

/// Ten thousand objects of 4 KiB from GPU memory to host memory, and to another node: a launch for each question of up to
/// 1,024 keys, and not one copy by itself.
#[test]
fn many_small_objects_leave_a_gpu_by_one_launch_a_batch() {
    const COUNT: usize = 10_000;
    const LEN: usize = 4096;
    let log = tempfile::NamedTempFile::new().expect("a file");
    let path = log.path().display().to_string();
    on_stand_in("many_small_objects_leave_a_gpu_by_one_launch_a_batch", &[("LOG", &path)], || {
        let path = std::env::var("HETMEM_STANDIN_LOG").expect("set above");
        let folder = tempfile::tempdir().expect("a folder");
        let mut home = node(folder.path(), "home").host("256MiB").start();
        let store = home.connect();
        let keys: Vec<Key> = (0..COUNT).map(|number| key(&format!("small-{number}"))).collect();
        let on_gpu = PutOptions { tier: Some(GPU.into()), ..PutOptions::default() };
        let meta = ObjectMeta::bytes(LEN as u64).expect("a length");
        for (number, key) in keys.iter().enumerate() {
            let bytes = bytes_of(&format!("small-{number}"), LEN, 0);
            store.put_with(key, meta, &bytes, &on_gpu).expect("room");
        }
        let counts = || {
            let of = |function: &str| calls_in(&path, home.pid(), function);
            let copies = of("cuMemcpyDtoHAsync_v2") + of("cuMemcpyBatchAsync");
            (of("cuLaunchKernel"), copies)
        };
        let right = |objects: Vec<Result<hetmem_client::Object, StoreError>>, by: By| {
            assert_eq!(objects.len(), COUNT);
            for (number, object) in objects.into_iter().enumerate() {
                let object = object.expect("it was put");
                assert_eq!(object.receipt().path, by, "small-{number}");
                assert!(*object == *bytes_of(&format!("small-{number}"), LEN, 0), "small-{number}");
            }
        };
        let before = counts();
        right(store.get_many(&keys), By::LocalCopy);
        let after = counts();
        let launches = after.0 - before.0;
        assert_eq!(after.1, before.1, "no copy by itself");
        assert!((1..=COUNT.div_ceil(1024)).contains(&launches), "{launches} launches");
        println!("{COUNT} objects of {LEN} bytes to host memory: {launches} launches, no other copy");

        let mut away = node(folder.path(), "away").join(&home.address).host("256MiB").start();
        let there = away.connect();
        away.settles(&there, "the link", |status| status.peers.iter().any(|peer| peer.linked));
        let before = counts();
        right(there.get_many(&keys), By::Eager);
        let after = counts();
        let launches = after.0 - before.0;
        assert_eq!(after.1, before.1, "no copy by itself");
        println!("{COUNT} objects of {LEN} bytes to another node: {launches} launches, no other copy");
        assert!((1..=COUNT.div_ceil(256)).contains(&launches), "{launches} launches");
        away.assert_sound();
        home.assert_sound();
    });
}

/// Numbers come in the format that is asked for, converted where they are; bits agree between the two places.
#[test]
fn numbers_come_in_another_format_converted_where_they_are() {
    on_gpu("numbers_come_in_another_format_converted_where_they_are", |gpus| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut node = node(folder.path(), "numbers").start();
        let store = node.connect();
        let numbers: Vec<f32> =
            (0..30_000_u16).map(|number| f32::from(number) * 1.234_567e-4 - 1.0).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let meta = ObjectMeta::tensor(DType::F32, &[300, 100]).expect("a shape");
        put_from_gpu(gpus, &store, "numbers", meta, (&bytes, Checksum::None, PutOptions::default()));
        let options = GetOptions { verify: true, ..GetOptions::default() };
        for (dtype, element) in [(DType::BF16, 2), (DType::F16, 2), (DType::F32, 4)] {
            let launches = hooks::calls("cuLaunchKernel");
            let on_gpu = store.get_as(&key("numbers"), GPU, dtype, &options).expect("converted");
            let converted = u64::from(dtype != DType::F32);
            if !stand_in::is_real() {
                let expected = launches.map(|launches| launches + 1 + converted);
                assert_eq!(hooks::calls("cuLaunchKernel"), expected, "compared and converted there");
            }
            assert_eq!((on_gpu.meta().dtype, on_gpu.meta().shape.dims()), (dtype, &[300, 100][..]));
            let stream = gpus.device(0).expect("gpu:0").stream().expect("a stream");
            let span = on_gpu.span().expect("on the GPU").expect("inside");
            let there = stand_in::bytes_of(&stream, &span);
            let in_host = store.get_as(&key("numbers"), Tier::Host, dtype, &options).expect("converted");
            let Converted::Host { bytes: here, meta } = in_host else { panic!("{in_host:?}") };
            assert_eq!((here.len(), meta.len_bytes), (30_000 * element, 30_000 * element as u64));
            assert!(there == here, "{dtype} on the device and by the processor");
            if dtype == DType::BF16 {
                assert_eq!(here[..2], [0x80, 0xbf], "-1");
            }
        }
        let put = |name: &str, dtype, dims: &[u64], bytes: &[u8]| {
            store.put(&key(name), ObjectMeta::tensor(dtype, dims).expect("a shape"), bytes).expect("room");
        };
        put("whole numbers", DType::I32, &[4], &[0; 16]);
        put("half", DType::F16, &[2], &[0, 0x3c, 0xff, 0x7f]);
        for tier in [Tier::Host, GPU] {
            let error = store.get_as(&key("whole numbers"), tier, DType::F32, &options).expect_err("no pair");
            assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("int32"), "{error}");
        }
        let widened = store.get_as(&key("half"), Tier::Host, DType::F32, &options).expect("converted");
        let Converted::Host { bytes, .. } = widened else { panic!("{widened:?}") };
        assert_eq!(bytes, [0, 0, 0x80, 0x3f, 0, 0xe0, 0xff, 0x7f], "1, and the NaN with its payload");
        let part = GetOptions { range: Some(Range { start: 0, len_bytes: 2 }), ..options };
        let error = store.get_as(&key("half"), Tier::Host, DType::F32, &part).expect_err("a part");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        node.settles(&store, "nothing is held", |status| status.draining == 0);
        node.assert_sound();
    });
}
