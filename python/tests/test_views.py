"""What a get hands out: nothing that can change the store's bytes, and everything keeps its object in place."""

import ctypes
import gc
import hetmem
import numpy
import pytest
from conftest import held, until


def test_numpy_views_are_the_memory_itself_and_read_only(store, key):
    store.put(key, numpy.arange(100_000, dtype="f4"))
    one, other = store.get(key).numpy(), store.get(key).numpy()
    assert one.__array_interface__["data"] == other.__array_interface__["data"]
    assert not one.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 1
    with pytest.raises(ValueError):
        one.flags.writeable = True
    for view in (memoryview(store.get(key)), numpy.frombuffer(store.get(key)).data):
        assert view.readonly
    with pytest.raises(TypeError, match="not writable"):
        ctypes.c_char.from_buffer(store.get(key))


@pytest.mark.parametrize("length", [16, 1 << 20])
def test_views_keep_what_was_deleted(store, key, length):
    given = numpy.arange(length, dtype="u1")
    makers = {
        "numpy": lambda tensor: tensor.numpy(),
        "asarray": numpy.asarray,
        "memoryview": memoryview,
        "part": lambda tensor: tensor[2:].numpy()[3:],
        "tensor": lambda tensor: tensor[1:],
    }
    for name, make in makers.items():
        store.put(key, given)
        before = held(store)
        view = make(store.get(key))
        expected = bytes(view)
        store.delete(key)
        assert held(store) == before + 1, name
        # What could take its place does not.
        for number in range(8):
            store.put(f"{key}/{number}", numpy.zeros(length, "u1"))
            store.delete(f"{key}/{number}")
        assert bytes(view) == expected, name
        del view
        until(lambda: held(store) == before)


@pytest.mark.parametrize("length", [16, 1 << 20])
def test_dlpack_gives_private_memory(store, key, length):
    given = numpy.arange(length, dtype="u1").reshape(2, -1)
    store.put(key, given)
    tensor = store.get(key)
    assert tensor.__dlpack_device__() == (1, 0)
    array = numpy.from_dlpack(tensor)
    assert not array.flags.writeable and (array == given).all()
    # Whoever ignores the flag changes a view of its own: not the store, not another view.
    ctypes.memset(array.ctypes.data, 255, array.nbytes)
    assert (array == 255).all()
    assert (store.get(key).numpy() == given).all() and store.get(key).verify()
    assert (numpy.from_dlpack(tensor) == given).all()
    copy = numpy.from_dlpack(tensor, copy=True)
    copy[0, 0] = 9
    assert store.get(key).numpy()[0, 0] == given[0, 0]


def test_dlpack_keeps_what_was_deleted(store, key):
    store.put(key, numpy.ones(1 << 20, "u1"))
    before = held(store)
    array = numpy.from_dlpack(store.get(key))
    capsule = store.get(key).__dlpack__()
    store.delete(key)
    assert held(store) == before + 1
    del array
    assert held(store) == before + 1
    del capsule
    until(lambda: held(store) == before)


class Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Legacy(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p))]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


def consume(capsule, name, kind):
    """What a consumer in C does: takes the structure and renames the capsule."""
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, name)
    api.PyCapsule_SetName(capsule, b"used_" + name)
    return address, kind.from_address(address)


@pytest.mark.parametrize("versioned", [False, True])
def test_capsules_say_what_dlpack_h_says(store, key, versioned):
    given = numpy.arange(60_000, dtype="f4").reshape(3, 200, 100)
    store.put(key, given)
    before = held(store)
    if versioned:
        capsule = store.get(key).__dlpack__(max_version=(1, 0))
        address, held_tensor = consume(capsule, b"dltensor_versioned", Versioned)
        assert (held_tensor.major, held_tensor.flags) == (1, 1)
    else:
        capsule = store.get(key).__dlpack__()
        address, held_tensor = consume(capsule, b"dltensor", Legacy)
    tensor = held_tensor.tensor
    assert (tensor.device.kind, tensor.device.ordinal, tensor.ndim, tensor.byte_offset) == (1, 0, 3, 0)
    assert (tensor.code, tensor.bits, tensor.lanes) == (2, 32, 1)
    assert tensor.shape[:3] == [3, 200, 100] and tensor.strides[:3] == [20_000, 100, 1]
    assert ctypes.string_at(tensor.data, given.nbytes) == given.tobytes()
    store.delete(key)
    # The capsule is of no meaning any more: the tensor is its consumer's, until the deleter runs.
    del capsule
    assert held(store) == before + 1
    held_tensor.deleter(address)
    until(lambda: held(store) == before)


def test_copies_are_of_this_process(store, key):
    store.put(key, numpy.arange(1 << 18))
    before = held(store)
    for copy in (store.get(key, copy=True), store.get(key).copy()):
        assert copy.receipt is None and (copy.numpy() == numpy.arange(1 << 18)).all()
    store.delete(key)
    until(lambda: held(store) == before)
    assert copy.numpy()[5] == 5


def test_too_many_are_held_at_once(store, key):
    store.put(key, b"x")
    tensors = []
    with pytest.raises(hetmem.Busy, match="pin"):
        for _ in range(20_000):
            tensors.append(store.get(key))
    assert len(tensors) > 10_000
    del tensors
    gc.collect()
    assert bytes(store.get(key)) == b"x"


def test_arrays_convert(store, key):
    store.put(key, numpy.arange(4, dtype="f4"))
    tensor = store.get(key)
    assert numpy.array(tensor, dtype="f8").tolist() == [0, 1, 2, 3]
    assert numpy.array(tensor, copy=True).flags.writeable
    assert (tensor.ndim, tensor.size, tensor.device) == (1, 4, "cpu")
    assert repr(tensor) == "hetmem.Tensor(shape=(4,), dtype=float32, device=cpu)"
    assert "local" in repr(tensor.receipt)


def test_jax(store, key):
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    for name in ("float32", "bfloat16", "int8", "bool", "float8_e4m3fn"):
        given = jnp.arange(48).reshape(4, 12).astype(name)
        store.put(f"{key}/{name}", given)
        found = store.get(f"{key}/{name}")
        assert found.dtype == name and found.shape == (4, 12)
        assert found.jax().dtype == given.dtype and (found.jax() == given).all()
    store.put(f"{key}/t", jnp.arange(12.0).reshape(3, 4).T)
    assert (jax.device_get(store.get(f"{key}/t").jax()) == numpy.arange(12.0).reshape(3, 4).T).all()


class Hostile:
    """A producer whose capsule says what it wants."""

    def __init__(self, **fields):
        self.managed = Versioned()
        self.managed.major = fields.pop("major", 1)
        self.shape = (ctypes.c_int64 * 2)(*fields.pop("shape", (2, 3)))
        self.strides = (ctypes.c_int64 * 2)(*fields.pop("strides", (3, 1)))
        self.bytes = ctypes.create_string_buffer(64)
        tensor = self.managed.tensor
        tensor.data = ctypes.addressof(self.bytes)
        tensor.ndim, tensor.shape, tensor.strides = 2, self.shape, self.strides
        tensor.device.kind, tensor.code, tensor.bits, tensor.lanes = 1, 2, 32, 1
        for name, value in fields.items():
            setattr(tensor, name, value)

    def __dlpack_device__(self):
        return (self.managed.tensor.device.kind, 0)

    def __dlpack__(self, **keywords):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor_versioned", None)


def test_hostile_capsules_are_refused(store, key):
    store.put(key + "/good", Hostile())
    assert store.get(key + "/good").shape == (2, 3)
    for fields in (
        {"major": 2},
        {"ndim": -1},
        {"ndim": 1000},
        {"shape": (-1, 3)},
        {"shape": (1 << 62, 1 << 62)},
        {"strides": (1 << 62, 1)},
        {"code": 3},
        {"bits": 33},
        {"lanes": 4},
        {"data": None},
        {"shape": None},
    ):
        if fields.get("shape", 0) is None:
            hostile = Hostile()
            hostile.managed.tensor.shape = ctypes.POINTER(ctypes.c_int64)()
        else:
            hostile = Hostile(**fields)
        with pytest.raises((ValueError, BufferError)):
            store.put(key, hostile)
    assert not store.exists(key)
