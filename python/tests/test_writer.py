"""Objects written in place: sealed when the block ends, given up if it raises, never changed after."""

import gc

import hetmem
import numpy
import pytest
from conftest import until


def test_what_is_written_is_there_after_the_block(store, key):
    with store.create(key, (3, 4), "float32") as writer:
        assert (writer.key, writer.shape, writer.dtype, writer.nbytes) == (key, (3, 4), "float32", 48)
        assert not store.exists(key) and writer.receipt is None
        numpy.copyto(writer.numpy(), numpy.arange(12).reshape(3, 4))
    assert (store.get(key).numpy() == numpy.arange(12).reshape(3, 4)).all()
    assert writer.receipt.path == "in place" and writer.receipt.staged_bytes == 0
    assert store.get(key).verify()
    with pytest.raises(RuntimeError, match="sealed"):
        writer.numpy()


def test_a_block_that_raises_gives_it_up(store, key):
    before = store.status()["reservations"]
    with pytest.raises(ZeroDivisionError):
        with store.create(key, 10, numpy.int64) as writer:
            writer.numpy()[:] = 1
            raise ZeroDivisionError
    assert not store.exists(key) and writer.receipt is None
    gc.collect()
    until(lambda: store.status()["reservations"] == before)
    store.create(key, 10, "int8").discard()
    assert not store.exists(key)


@pytest.mark.parametrize("make", ["numpy", "memoryview", "dlpack"])
def test_a_view_that_stays_alive_cannot_change_the_object(store, key, make):
    before = store.status()["reservations"]
    with store.create(key, 1 << 20, "uint8") as writer:
        if make == "dlpack":
            view = numpy.from_dlpack(writer)
            assert view.flags.writeable
        else:
            view = getattr(writer, make)()
        view[:] = numpy.full(1 << 20, 7, "u1")
    assert writer.receipt.staged_bytes == 1 << 20
    view[5] = 9
    # Nor what is put next.
    store.put(key + "/next", numpy.ones(1 << 20, "u1"))
    view[6] = 9
    assert (store.get(key).numpy() == 7).all() and (store.get(key + "/next").numpy() == 1).all()
    assert store.get(key).verify() and store.get(key + "/next").verify()
    assert store.status()["reservations"] == before + 1
    del view
    gc.collect()
    until(lambda: store.status()["reservations"] == before)


def test_required_zero_copy_says_which_view_is_alive(store, key):
    with pytest.raises(hetmem.Unavailable, match="still alive"):
        with store.create(key, 4, "uint8", zero_copy="required") as writer:
            view = writer.numpy()
    assert view.shape == (4,) and not store.exists(key)


def test_a_key_that_exists_is_refused(store, key):
    store.put(key, b"x")
    with pytest.raises(hetmem.AlreadyExists):
        store.create(key, 1, "uint8")


def test_types_by_name_or_by_object(store, key):
    import ml_dtypes

    for number, dtype in enumerate(["bfloat16", numpy.float16, numpy.dtype("c8"), ml_dtypes.bfloat16]):
        with store.create(f"{key}/{number}", (2,), dtype) as writer:
            writer.numpy()[:] = 1
        assert (store.get(f"{key}/{number}").numpy() == 1).all()
    with pytest.raises(ValueError, match="float33"):
        store.create(key, 2, "float33")
