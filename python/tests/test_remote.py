"""Two nodes: what one has the other gets, and the receipt says how."""

import hetmem
import numpy
import pytest
from conftest import until


def test_small_and_large(pair, key):
    one, other = pair
    small, large = numpy.arange(100, dtype="f4"), numpy.arange(1 << 20, dtype="f4").reshape(1024, -1)
    one.put(key + "/small", small)
    one.put(key + "/large", large)
    found = other.get(key + "/small")
    assert (found.numpy() == small).all() and found.receipt.path == "eager" and found.receipt.fabric == "tcp"
    found = other.get(key + "/large", zero_copy="required", verify=True)
    assert (found.numpy() == large).all() and found.receipt.path == "read" and found.receipt.staged_bytes == 0
    assert other.get(key + "/large").receipt.path == "local"
    # The node that keeps the directory hears of it a moment later.
    until(lambda: sorted(one.stat(key + "/large").holders) == sorted([one.node, other.node]))


def test_rows_of_the_other_node(pair, key):
    one, other = pair
    given = numpy.arange(1 << 20, dtype="i4").reshape(1024, 1024)
    one.put(key, given)
    found = other.get_range(key, 10, 20, keep=False)
    assert found.shape == (10, 1024) and (found.numpy() == given[10:20]).all()
    assert found.receipt.nbytes == 10 * 4096


def test_many_of_the_other_node(pair, key):
    one, other = pair
    given = {f"{key}/{number:04d}": numpy.full(8, number) for number in range(3000)}
    one.put_many(given)
    found = other.get_many(list(given))
    assert all((tensor.numpy() == array).all() for tensor, array in zip(found, given.values(), strict=True))
    del found
    found = other.get_many([f"{key}/0001", f"{key}/none"], errors="return")
    assert isinstance(found[1], KeyError)


def test_wait_for_the_other_node(pair, key):
    import threading

    one, other = pair
    late = threading.Timer(0.2, lambda: one.put(key, b"here"))
    late.start()
    other.wait(key, 20)
    assert bytes(other.get(key)) == b"here"
    late.join()


def test_deleted_everywhere(pair, key):
    one, other = pair
    one.put(key, b"x")
    assert bytes(other.get(key)) == b"x"
    assert other.delete(key)
    with pytest.raises(hetmem.NotFound):
        one.get(key)


def test_replicas(pair, key):
    one, other = pair
    assert one.put(key, b"x", replicas=2).replicas == 2
    assert other.get_here(key) is not None
    assert one.get_here(key + "/none") is None
