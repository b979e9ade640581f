"""What goes in comes out: element types, shapes, layouts, kinds of arrays."""

import array
import hashlib
import mmap

import hetmem
import ml_dtypes
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

NUMPY_TYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip
ML_TYPES = [
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e3m4", "float8_e8m0fnu",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_numpy_types(store, key, name):
    given = numpy.arange(24).reshape(2, 3, 4).astype(name)
    store.put(key, given)
    found = store.get(key)
    assert (found.dtype, found.shape, found.nbytes) == (name, (2, 3, 4), given.nbytes)
    for view in (found.numpy(), numpy.asarray(found), numpy.asarray(memoryview(found))):
        assert view.dtype == given.dtype and view.shape == given.shape
        assert (view == given).all()


@pytest.mark.parametrize("name", ML_TYPES)
def test_types_that_numpy_lacks(store, key, name):
    given = numpy.array([[1, 2, 0.5], [4, 8, 1]]).astype(getattr(ml_dtypes, name))
    store.put(key, given)
    found = store.get(key)
    assert (found.dtype, found.shape) == (name, (2, 3))
    assert found.numpy().dtype == given.dtype and found.numpy().tobytes() == given.tobytes()
    assert numpy.asarray(found).dtype == given.dtype
    store.put(key + "/transposed", given.T)
    assert store.get(key + "/transposed").numpy().tobytes() == given.T.tobytes()
    with pytest.raises(BufferError, match=name):
        memoryview(found)
    # To whoever asks for no type they are bytes.
    assert hashlib.sha256(found).digest() == hashlib.sha256(given.tobytes()).digest()


@pytest.mark.parametrize("length", [0, 1, 100, 65_536, 65_537, 3 << 20])
def test_bytes_of_any_length(store, key, length):
    given = bytes(i % 251 for i in range(1000)) * (length // 1000 + 1)
    given = given[:length]
    for number, form in enumerate([given, bytearray(given), memoryview(given)]):
        store.put(f"{key}/{number}", form)
        found = store.get(f"{key}/{number}")
        assert bytes(found) == given and found.shape == (length,) and found.dtype == "uint8"


def test_other_buffers(store, key):
    store.put(key + "/array", array.array("d", [1.5, 2.5]))
    assert store.get(key + "/array").numpy().tolist() == [1.5, 2.5]
    with mmap.mmap(-1, 4096) as anonymous:
        anonymous[:5] = b"hello"
        store.put(key + "/mmap", anonymous)
    assert bytes(store.get(key + "/mmap"))[:5] == b"hello"
    store.put(key + "/again", store.get(key + "/array"))
    assert store.get(key + "/again").numpy().tolist() == [1.5, 2.5]
    store.put(key + "/scalar", numpy.float32(7))
    assert store.get(key + "/scalar").shape == () and store.get(key + "/scalar").numpy() == 7


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_layout(store, data):
    """Steps, reversals, transpositions and broadcasts of arrays come out as numpy copies them."""
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=4, max_side=6))
    base = numpy.arange(numpy.prod(shape), dtype=data.draw(st.sampled_from(["u1", "f4", "c16"]))).reshape(shape)
    view = base[data.draw(arrays.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))]
    view = numpy.asarray(view)
    if data.draw(st.booleans()):
        view = view.T
    if data.draw(st.booleans()):
        view = numpy.broadcast_to(view, (3, *view.shape))
    store.put("layout", view)
    found = store.get("layout")
    assert found.shape == view.shape and (found.numpy() == view).all()
    out = numpy.empty(view.shape, view.dtype, order="F")
    store.get_into("layout", out)
    assert (out == view).all()
    store.delete("layout")


def test_large_arrays_of_any_layout_are_written_where_they_stay(store, key):
    given = numpy.arange(1 << 20, dtype="f4").reshape(1024, 1024)
    receipt = store.put(key, given.T, zero_copy="required")
    assert receipt.path == "in place" and receipt.staged_bytes == 0
    assert (store.get(key).numpy() == given.T).all() and store.get(key).verify()


def test_what_is_no_array_is_refused_with_what_to_do(store, key):
    with pytest.raises(TypeError, match="numpy.asarray"):
        store.put(key, [1, 2, 3])
    with pytest.raises(ValueError, match="big-endian"):
        store.put(key, numpy.arange(3, dtype=">f4"))
    with pytest.raises(ValueError, match="no plain number"):
        store.put(key, numpy.array(["a", "b"]))
    with pytest.raises(ValueError, match="dimensions"):
        store.put(key, numpy.zeros((1,) * 9))
    with pytest.raises(hetmem.Invalid, match="empty"):
        store.put("", b"x")
    with pytest.raises(TypeError, match="no keyword pinned"):
        store.put(key, b"x", pinned=True)
    with pytest.raises(ValueError, match="if_exists"):
        store.put(key, b"x", if_exists="replace")
    with pytest.raises(ValueError, match="cuda:N"):
        store.get(key, device="tpu")
    assert not store.exists(key)


def test_keys_exist_once(store, key):
    assert store.put(key, b"first").kept is False
    store.put(key, b"second")
    assert bytes(store.get(key)) == b"first"
    with pytest.raises(hetmem.AlreadyExists, match=key):
        store.put(key, b"third", if_exists="error")
    assert key in store and store.exists(key)
    assert store.delete(key) is True and store.delete(key) is False
    assert key not in store and not store.exists(key)


def test_get_into_compares_first(store, key):
    store.put(key, numpy.arange(6, dtype="f4").reshape(2, 3))
    out = numpy.zeros((2, 3), "f4")
    assert store.get_into(key, out).path == "local"
    assert (out == numpy.arange(6).reshape(2, 3)).all()
    for wrong in (numpy.zeros((3, 2), "f4"), numpy.zeros((2, 3), "f8"), numpy.zeros(5, "f4")):
        with pytest.raises(ValueError, match="float32"):
            store.get_into(key, wrong)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="written"):
        store.get_into(key, out)


def test_rows(store, key):
    given = numpy.arange(40, dtype="i8").reshape(10, 2, 2)
    store.put(key, given)
    for start, stop in [(0, 10), (2, 5), (9, 10), (4, 4), (3, None), (0, 99)]:
        assert (store.get_range(key, start, stop).numpy() == given[start:stop]).all()
    with pytest.raises(ValueError, match="rows"):
        store.get_range(key, 5, 2)
    tensor = store.get(key)
    assert len(tensor) == 10 and (tensor[3:7].numpy() == given[3:7]).all()
    assert (tensor[-1].numpy() == given[-1]).all() and (tensor[2:8][1:3].numpy() == given[3:5]).all()
    assert tensor[5:2].shape == (0, 2, 2)
    assert [row.numpy().tolist() for row in tensor] == given.tolist()
    with pytest.raises(IndexError):
        tensor[10]


def test_many(store, key):
    given = {f"{key}/{number}": numpy.full(number % 7 + 1, number, "i4") for number in range(500)}
    receipts = store.put_many(given)
    assert len(receipts) == 500
    found = store.get_many(list(given))
    assert all((tensor.numpy() == array).all() for tensor, array in zip(found, given.values(), strict=True))
    with pytest.raises(KeyError, match="missing"):
        store.get_many([*given, key + "/missing"])
    mixed = store.get_many([f"{key}/1", key + "/missing"], errors="return")
    assert mixed[0].shape == (2,) and isinstance(mixed[1], hetmem.NotFound)
    assert store.list(key + "/") == sorted(given)


def test_state_dicts(store, key):
    given = {"a.weight": numpy.ones((3, 3), "f4"), "a.bias": numpy.zeros(3, "f4")}
    store.put_state_dict(key, given)
    found = store.get_state_dict(key)
    assert found.keys() == given.keys() and all((found[name].numpy() == given[name]).all() for name in given)
    with pytest.raises(KeyError):
        store.get_state_dict(key + "/none")


def test_what_is_known(store, key):
    store.put(key, numpy.zeros((2, 5), "f8"), pin=True)
    stat = store.stat(key)
    assert (stat.dtype, stat.shape, stat.nbytes, stat.tier, stat.pinned) == ("float64", [2, 5], 80, "host", True)
    assert stat.holders == [store.node]
    store.pin(key, False)
    assert not store.stat(key).pinned
    with pytest.raises(KeyError):
        store.stat(key + "/none")
    status = store.status()
    assert status["name"] == store.node and status["objects"] > 0
    store.put(key + "/ttl", b"x", ttl=0.05)
    with pytest.raises(hetmem.NotFound):
        for _ in range(200):
            store.get(key + "/ttl")
            with pytest.raises(TimeoutError):
                store.wait(key + "/never", 0.05)


def test_checksums(store, key):
    store.put(key, numpy.arange(1000), checksum=True)
    assert store.get(key, verify=True).verify() is True
    assert store.get(key)[1:2].verify() is False
    store.put(key + "/none", numpy.arange(1000), checksum=False)
    assert store.get(key + "/none").verify() is False


def test_numbers_are_converted_on_the_way(store, key):
    values = numpy.array([0.0, 1.0, 1.0 / 3, 65504, 1e-7, -2.5, numpy.inf], dtype="f4")
    store.put(key, values)
    for name in ("float16", "float32", numpy.float16):
        found = store.get(key, dtype=name)
        expected = values.astype(numpy.dtype(name))
        assert found.numpy().dtype == expected.dtype and (found.numpy() == expected).all()
    brain = store.get(key, dtype="bfloat16")
    assert (brain.dtype, brain.shape, brain.nbytes) == ("bfloat16", (7,), 14)
    words = numpy.frombuffer(bytes(brain), "u2").astype("u4") << 16
    assert numpy.allclose(words.view("f4"), values, rtol=1 / 256)
    store.put(key + "/bytes", b"abc")
    with pytest.raises(hetmem.Invalid, match="uint8|bytes"):
        store.get(key + "/bytes", dtype="float16")
