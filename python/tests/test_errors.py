"""Exceptions: one for each kind, each also a built-in, each with what it is about."""

import hetmem
import hetmem._core
import hetmem.errors
import numpy
import pytest

BUILT_IN = {
    "NotFound": KeyError, "AlreadyExists": ValueError, "NoSpace": MemoryError, "TooLarge": ValueError,
    "Busy": RuntimeError, "TimedOut": TimeoutError, "Unavailable": ConnectionError, "PeerLost": ConnectionError,
    "Stale": RuntimeError, "Corrupt": ValueError, "Protocol": ConnectionError, "Denied": PermissionError,
    "Os": OSError, "Invalid": ValueError,
}  # fmt: skip


def test_every_kind_has_a_class_and_every_class_a_kind():
    kinds = hetmem._core.error_kinds()
    assert sorted(kinds) == sorted(BUILT_IN)
    for kind in kinds:
        error = getattr(hetmem, kind)
        assert error.__name__ == kind and error is getattr(hetmem.errors, kind) and error.__doc__
        assert issubclass(error, hetmem.Error) and issubclass(error, BUILT_IN[kind])
        assert str(error("a message")) == "a message"
        with pytest.raises(BUILT_IN[kind]):
            raise error("a message")
    classes = {name for name, value in vars(hetmem.errors).items() if isinstance(value, type)}
    assert classes == {*kinds, "Error"}


def test_messages_name_key_values_and_remedy(store, key, tmp_path):
    with pytest.raises(KeyError) as caught:
        store.get(key)
    assert isinstance(caught.value, hetmem.NotFound) and key in str(caught.value)
    with pytest.raises(ValueError) as caught:
        store.put(key, numpy.zeros(600 << 20, "u1"))
    assert isinstance(caught.value, hetmem.TooLarge) and str(600 << 20) in str(caught.value)
    with pytest.raises(TimeoutError) as caught:
        store.wait(key, 0.01)
    assert key in str(caught.value) and "10 ms" in str(caught.value)
    with pytest.raises(ConnectionError) as caught:
        hetmem.connect(tmp_path / "nobody.sock")
    assert "nobody.sock" in str(caught.value) and "hetmem serve" in str(caught.value)
    with pytest.raises(ValueError, match="-1"):
        store.wait(key, -1)
    with pytest.raises(ValueError, match="thresold.*threshold"):
        hetmem.local(host="16MiB", thresold=0)


def test_a_closed_store_says_so(tmp_path):
    store = hetmem.local(host="16MiB", gpu="off", max_objects=1024)
    store.put("x", numpy.arange(100_000))
    tensor = store.get("x")
    store.close()
    store.close()
    with pytest.raises(ConnectionError, match="closed"):
        store.get("x")
    assert tensor.numpy()[99_999] == 99_999


def test_a_lost_node_is_a_connection_error():
    node = hetmem.local(host="16MiB", gpu="off", max_objects=1024)
    store = hetmem.connect(node.socket)
    store.put("x", b"x")
    node.close()
    with pytest.raises(hetmem.PeerLost):
        store.stat("x")


def test_a_full_node_is_a_memory_error():
    with hetmem.local(host="16MiB", gpu="off", max_objects=1024) as store:
        with pytest.raises(MemoryError) as caught:
            for number in range(40):
                store.put(f"{number}", numpy.zeros(1 << 20, "u1"))
        assert isinstance(caught.value, hetmem.NoSpace)
        assert "host" in str(caught.value) and str(1 << 20) in str(caught.value)
