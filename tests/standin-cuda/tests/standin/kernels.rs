//! Launches: what they are held to, what a kernel may touch, and that they keep a stream's order. Not what kernels compute
//! (`hetmem-kernels`).

use crate::driver::{
    Driver, GRANULE, ILLEGAL_ADDRESS, INVALID_VALUE, NOT_FOUND, NOT_SUPPORTED, c, host_bytes, start,
};
use crate::process::isolated;

/// The head of the real kernel's PTX; only its entry counts.
const PTX: &str =
    ".version 9.0\n.target sm_80\n.entry hetmem_gather(.param .u64 a,.param .u64 b)\n.maxntid 256\n{}";

fn function(driver: &Driver, text: &str, name: &str) -> usize {
    let (mut module, mut function) = (0, 0);
    driver.load_module(&mut module, &c(text)).expect("PTX");
    driver.function_into(&mut function, module, &c(name)).expect("it is there");
    function
}

/// Launches with these parameters; `blocks` blocks of `threads` threads.
fn launch(
    driver: &Driver,
    function: usize,
    (blocks, threads): (u32, u32),
    values: [u64; 2],
    stream: usize,
) -> Result<(), i32> {
    let pointers = values.each_ref().map(|value| std::ptr::from_ref(value).expose_provenance());
    let parameters = pointers.as_ptr().expose_provenance();
    driver.launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, 0)
}

fn word(pointer: usize) -> u64 {
    pointer as u64
}

/// A list of moves in pinned memory, as devices see it.
fn list(driver: &Driver, moves: &[[u64; 3]]) -> u64 {
    let (mut host, mut pointer) = (0, 0);
    let bytes: Vec<u8> = moves.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    driver.host_alloc(&mut host, bytes.len(), 0).expect("host memory");
    host_bytes(host, bytes.len()).copy_from_slice(&bytes);
    driver.host_pointer(&mut pointer, host, 0).expect("pinned");
    word(pointer)
}

#[test]
fn a_kernel_moves_bytes_between_memories_in_the_order_of_its_stream() {
    isolated(&[], || {
        let driver = start();
        let stream = driver.stream(1);
        let (a, b) = (driver.alloc(4096), driver.alloc(4096));
        let (mut host, mut seen) = (0, 0);
        driver.host_alloc(&mut host, 4096, 0).expect("host memory");
        driver.host_pointer(&mut seen, host, 0).expect("pinned");
        driver.set_async(a, 7, 4096, stream).expect("fill");
        let moves = list(driver, &[[word(a), word(b) + 1, 100], [word(a) + 5, word(seen) + 3, 4000]]);
        let gather = function(driver, PTX, "hetmem_gather");
        launch(driver, gather, (2, 256), [moves, 2], stream).expect("accepted");
        driver.d2d_async(a, b, 4096, stream).expect("behind the kernel");
        driver.stream_synchronize(stream).expect("done");
        let copied = driver.read(a, 4096).expect("there");
        assert_eq!((copied[0], &copied[1..101], copied[101]), (0, &[7; 100][..], 0));
        assert_eq!((host_bytes(host, 4096)[2], &host_bytes(host, 4096)[3..4003]), (0, &[7; 4000][..]));
        assert_eq!(driver.calls("cuLaunchKernel"), 1);
    });
}

#[test]
fn launches_are_held_to_the_entry_and_the_twin() {
    isolated(&[], || {
        let driver = start();
        let gather = function(driver, PTX, "hetmem_gather");
        for shape in [(0, 256), (1, 0), (1, 257)] {
            assert_eq!(launch(driver, gather, shape, [0, 0], 0), Err(INVALID_VALUE), "{shape:?}");
        }
        assert_eq!(
            driver.launch(gather, 1, 1, 1, 256, 1, 1, 0, 0, 0, 0),
            Err(INVALID_VALUE),
            "no parameters"
        );
        launch(driver, gather, (1, 256), [0, 0], 0).expect("no moves");
        driver.synchronize().expect("nothing was touched");
        let renamed = PTX.replace("gather", "gathers");
        let (mut module, mut none) = (0, 0);
        driver.load_module(&mut module, &c(&renamed)).expect("PTX");
        assert_eq!(driver.function_into(&mut none, module, &c("hetmem_gather")), Err(NOT_FOUND));
        let other = function(driver, &renamed, "hetmem_gathers");
        assert_eq!(launch(driver, other, (1, 256), [0, 0], 0), Err(NOT_SUPPORTED), "it has no twin");
    });
}

/// Each in a process of its own: the context stays in the error.
#[test]
fn what_a_kernel_may_not_touch_ends_its_context() {
    isolated(&[], || {
        let driver = start();
        let (a, b) = (driver.alloc(4096), driver.alloc(4096));
        let gather = function(driver, PTX, "hetmem_gather");
        let moves = list(driver, &[[word(a) + 4000, word(b), 97]]);
        launch(driver, gather, (1, 256), [moves, 1], 0).expect("accepted");
        assert_eq!(driver.synchronize(), Err(ILLEGAL_ADDRESS), "a byte behind the allocation");
        assert_eq!(driver.set(b, 0, 1), Err(ILLEGAL_ADDRESS), "it stays");
    });
}

#[test]
fn a_kernel_needs_the_rights_that_a_copy_needs() {
    isolated(&[], || {
        let driver = start();
        let source = driver.alloc(64);
        let read_only = driver.mapped(driver.create(GRANULE), GRANULE);
        driver.grant(read_only, GRANULE, 0, 1).expect("rights");
        let gather = function(driver, PTX, "hetmem_gather");
        let fine = list(driver, &[[word(read_only), word(source), 64]]);
        launch(driver, gather, (1, 256), [fine, 1], 0).expect("accepted");
        driver.synchronize().expect("reading is allowed");
        let wrong = list(driver, &[[word(source), word(read_only), 64]]);
        launch(driver, gather, (1, 256), [wrong, 1], 0).expect("accepted");
        assert_eq!(driver.synchronize(), Err(ILLEGAL_ADDRESS));
    });
}
