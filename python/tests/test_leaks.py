"""10,000 puts and gets leave nothing behind: no memory, no descriptor, no mapping, no pin."""

import gc
import os

import hetmem
import numpy
from conftest import until


def resident_bytes():
    with open("/proc/self/statm") as text:
        return int(text.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def mappings():
    with open("/proc/self/maps") as text:
        return sum(1 for _ in text)


def one_round(store, number):
    small, large = numpy.full(100, number, "f4"), numpy.full(40_000, number, "f4")
    store.put("leak/small", small)
    store.put("leak/large", large.reshape(200, 200).T)
    assert store.get("leak/small").numpy()[0] == number
    tensor = store.get("leak/large")
    view, private, rows = tensor.numpy(), numpy.from_dlpack(tensor), memoryview(tensor[3:5])
    assert view[0, 0] == private[1, 1] == rows[0, 0] == number
    tensor.__dlpack__(max_version=(1, 0))
    numpy.asarray(tensor, copy=True)
    with store.create("leak/written", 1000, "uint8") as writer:
        writer.numpy()[:] = 1
    try:
        store.get("leak/none")
    except hetmem.NotFound:
        pass
    for key in ("leak/small", "leak/large", "leak/written"):
        store.delete(key)


def test_no_leak_over_ten_thousand_puts_and_gets():
    with hetmem.local(host="64MiB", gpu="off", max_objects=4096) as node:
        store = hetmem.connect(node.socket)
        for number in range(600):
            one_round(store, number)
        gc.collect()
        before = resident_bytes(), descriptors(), mappings()
        # Three puts and a handful of gets in each.
        for number in range(3_334):
            one_round(store, number)
        gc.collect()
        until(lambda: (lambda s: (s["objects"], s["draining"], s["reservations"]))(store.status()) == (0, 0, 0))
        after = resident_bytes(), descriptors(), mappings()
        print("resident bytes, descriptors, mappings:", before, after)
        assert after[0] - before[0] < 8 << 20
        assert after[1] <= before[1] + 2 and after[2] <= before[2] + 8


def test_sessions_leave_nothing():
    with hetmem.local(host="32MiB", gpu="off", max_objects=1024) as node:
        node.put("x", numpy.zeros(100_000))

        def session():
            with hetmem.connect(node.socket) as store:
                numpy.from_dlpack(store.get("x"))
                store.put("x", b"")

        for _ in range(20):
            session()
        gc.collect()
        clients = node.status()["clients"]
        before = descriptors(), mappings()
        for _ in range(100):
            session()
        gc.collect()
        until(lambda: node.status()["clients"] == clients)
        assert descriptors() <= before[0] + 2 and mappings() <= before[1] + 8


def test_nodes_leave_nothing():
    def node():
        with hetmem.local(host="16MiB", gpu="off", max_objects=1024) as store:
            store.put("x", b"x")
            folder = os.path.dirname(store.socket)
            assert bytes(store.get("x")) == b"x"
        del store
        gc.collect()
        assert not os.path.exists(folder)

    for _ in range(3):
        node()
    before = descriptors(), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        node()
    assert (descriptors(), len(os.listdir("/proc/self/task"))) <= before
