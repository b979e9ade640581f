"""GPU memory: gets in place, puts from a stranger's memory, capsules as a consumer in C reads them.

Needs a driver: HETMEM_TEST_CUDA is `real`, or the path of the stand-in library (tests/standin-cuda). On the stand-in it shows
that the calls are right, and nothing about a GPU: not that a kernel sees the bytes, not how fast anything is.
"""

import ctypes
import os

import hetmem
import numpy
import pytest
from conftest import held, until
from test_views import Legacy, Versioned, consume

CUDA = os.environ.get("HETMEM_TEST_CUDA")

pytestmark = pytest.mark.skipif(not CUDA, reason="HETMEM_TEST_CUDA names no driver")


class Driver:
    """The few calls of libcuda that a framework would make."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        self("cuInit", 0)
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)

    def __call__(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def allocate(self, array):
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
        self("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        return address.value

    def read(self, address, length):
        found = ctypes.create_string_buffer(length)
        self("cuMemcpyDtoH_v2", found, ctypes.c_uint64(address), ctypes.c_size_t(length))
        return found.raw


class CudaArray:
    """A producer of DLPack over memory of device 0, as a framework's tensor is."""

    def __init__(self, driver, array, strides=None):
        self.address = driver.allocate(array)
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = None if strides is None else (ctypes.c_int64 * array.ndim)(*strides)
        self.streams = []
        self.deleted = 0

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.streams.append(stream)
        managed = self.managed = Versioned()
        managed.major, managed.minor = 1, 0
        managed.tensor.data = self.address
        managed.tensor.device.kind = 2
        managed.tensor.ndim = len(self.shape)
        managed.tensor.code, managed.tensor.bits, managed.tensor.lanes = 2, 32, 1
        managed.tensor.shape = self.shape
        if self.strides is not None:
            managed.tensor.strides = self.strides
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(managed), b"dltensor_versioned", None)


@pytest.fixture(scope="module")
def driver():
    return Driver("libcuda.so.1" if CUDA == "real" else CUDA)


@pytest.fixture(scope="module")
def gpu_store(driver):
    with hetmem.local(host="64MiB", gpu="512MiB", max_objects=4096) as store:
        yield store


def test_a_get_is_in_place_and_its_capsule_names_the_device(gpu_store, driver, key):
    given = numpy.arange(60_000, dtype="f4").reshape(3, 200, 100)
    receipt = gpu_store.put(key, given, device="cuda:0")
    assert "gpu:0" in receipt.target and gpu_store.stat(key).tier == "gpu:0"
    before = held(gpu_store)
    tensor = gpu_store.get(key, device="cuda:0")
    assert (tensor.device, tensor.dtype, tensor.shape) == ("cuda:0", "float32", (3, 200, 100))
    assert tensor.__dlpack_device__() == (2, 0) and tensor.receipt.nbytes == 0
    address, managed = consume(tensor.__dlpack__(stream=1, max_version=(1, 1)), b"dltensor_versioned", Versioned)
    found = managed.tensor
    assert managed.flags == 1 and (found.device.kind, found.device.ordinal) == (2, 0)
    assert found.shape[:3] == [3, 200, 100] and found.strides[:3] == [20_000, 100, 1]
    assert driver.read(found.data + found.byte_offset, given.nbytes) == given.tobytes()
    again = gpu_store.get(key, device="gpu:0")
    other, managed_again = consume(again.__dlpack__(), b"dltensor", Legacy)
    assert managed_again.tensor.data == found.data
    managed_again.deleter(other)
    for use in (tensor.numpy, lambda: memoryview(tensor), tensor.copy, lambda: bytes(tensor)):
        with pytest.raises((BufferError, hetmem.Error), match="GPU|cuda"):
            use()
    # The capsule's consumer keeps the object, and nobody else.
    gpu_store.delete(key)
    del tensor, again
    until(lambda: held(gpu_store) == before + 1)
    managed.deleter(address)
    until(lambda: held(gpu_store) == before)


def test_the_host_gets_a_copy_and_the_receipt_counts_it(gpu_store, key):
    given = numpy.arange(100_000, dtype="i4")
    gpu_store.put(key, given, device="cuda:0")
    found = gpu_store.get(key)
    assert (found.numpy() == given).all() and found.receipt.path == "local copy"
    assert found.receipt.nbytes == given.nbytes


def test_puts_of_gpu_memory_wait_for_the_producers_stream(gpu_store, driver, key):
    given = numpy.arange(30_000, dtype="f4").reshape(100, 300)
    tensor = CudaArray(driver, given)
    receipt = gpu_store.put(key, tensor)
    assert tensor.streams == [1]
    assert gpu_store.stat(key).tier == "gpu:0" and receipt.staged_bytes == 0
    assert (gpu_store.get(key).numpy() == given).all()
    assert gpu_store.put(key, tensor).kept
    gpu_store.put(key + "/host", tensor, device="cpu")
    assert gpu_store.stat(key + "/host").tier == "host"
    assert (gpu_store.get(key + "/host").numpy() == given).all()


def test_gpu_memory_that_cannot_be_put_says_why(gpu_store, driver, key):
    given = numpy.arange(12, dtype="f4").reshape(3, 4)
    with pytest.raises(ValueError, match="row-major"):
        gpu_store.put(key, CudaArray(driver, given, strides=(1, 3)))
    with pytest.raises(hetmem.Unavailable, match="device 7"):
        gpu_store.get(key, device="cuda:7")
    with pytest.raises(hetmem.Error):
        gpu_store.get(key, device="gpu:7")


def test_without_a_gpu_the_error_names_what_is_missing(store, key):
    store.put(key, b"x")
    with pytest.raises(hetmem.Unavailable, match="tier|gpu"):
        store.get(key, device="cuda:0")


def test_checksums_are_compared_and_numbers_converted_on_the_device(gpu_store, driver, key):
    given = numpy.linspace(-3, 3, 30_001, dtype="f4")
    gpu_store.put(key, given, device="cuda:0")
    assert gpu_store.get(key, device="cuda:0").verify()
    assert gpu_store.get(key, device="cuda:0", verify=True).device == "cuda:0"
    half = gpu_store.get(key, device="cuda:0", dtype="float16")
    assert (half.device, half.dtype, half.shape, half.receipt) == ("cuda:0", "float16", (30_001,), None)
    address, managed = consume(half.__dlpack__(max_version=(1, 0)), b"dltensor_versioned", Versioned)
    assert driver.read(managed.tensor.data, half.nbytes) == given.astype("f2").tobytes()
    gpu_store.delete(key)
    managed.deleter(address)


def test_many_and_rows_on_a_gpu(gpu_store, driver, key):
    given = {f"{key}/{number}": numpy.full((4, 4), number, "f4") for number in range(5)}
    gpu_store.put_many(given, device="cuda:0")
    found = gpu_store.get_many(list(given), "cuda:0")
    for tensor, array in zip(found, given.values(), strict=True):
        assert tensor.device == "cuda:0"
        capsule = tensor[1:3].__dlpack__(max_version=(1, 0))
        _, managed = consume(capsule, b"dltensor_versioned", Versioned)
        assert driver.read(managed.tensor.data, 32) == array[1:3].tobytes()
