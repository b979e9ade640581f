"""Threads, forked and spawned children, signals, the end of the interpreter."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import hetmem
import numpy
import pytest


def in_child(work):
    """Runs `work` in a forked child; its exit code is 0 if it returned True, and nothing of the parent's is run."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            code = 0 if work() is True else 2
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run(code, *arguments, **keywords):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60, cwd="/", **keywords)


def test_a_forked_child_connects_by_itself(store, key):
    store.put(key, numpy.arange(1 << 18))
    tensor = store.get(key)
    view = tensor.numpy()
    writer = store.create(key + "/written", 10, "uint8")
    clients = store.status()["clients"]

    def work():
        assert (store.get(key).numpy() == numpy.arange(1 << 18)).all()
        store.put(key + "/child", b"from the child")
        assert store.status()["clients"] == clients + 1
        # What the parent got is the parent's.
        for use in (tensor.numpy, tensor.__dlpack__, lambda: memoryview(tensor), tensor.verify):
            with pytest.raises(hetmem.Stale, match="get it again"):
                use()
        with pytest.raises(hetmem.Stale, match="parent"):
            writer.seal()
        writer.discard()
        return True

    assert in_child(work) == 0
    assert bytes(store.get(key + "/child")) == b"from the child"
    writer.numpy()[:] = 3
    writer.seal()
    assert bytes(store.get(key + "/written")) == bytes([3] * 10)
    # The child has dropped its copies of the parent's objects, which are pinned as before.
    store.delete(key)
    store.put(key + "/other", numpy.zeros(1 << 18, "i8"))
    assert (view == numpy.arange(1 << 18)).all() and (tensor.numpy() == view).all()


def test_a_child_that_ends_as_python_does_leaves_the_parent_alone(store, key):
    store.put(key, b"x")
    held = [store.get(key) for _ in range(10)]
    code = multiprocessing.get_context("fork").Process(target=lambda: [store.get(key), held.clear()])
    code.start()
    code.join(60)
    assert code.exitcode == 0 and bytes(store.get(key)) == b"x" and bytes(held[3]) == b"x"


def test_a_fork_while_other_threads_work(store, key):
    """A child never waits for a lock that a thread of its parent's held at the fork."""
    store.put(key, numpy.arange(1000))
    over = threading.Event()

    def work():
        while not over.is_set():
            store.get(key).numpy()
            store.exists(key + "/none")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert in_child(lambda: bool(store.get(key).numpy()[999] == 999) and not store.exists(key + "/none")) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()


def child_of_spawn(store, key, queue):
    queue.put(store.get(key).numpy().sum())
    store.put(key + "/child", b"x")


def test_a_spawned_child_gets_the_socket(store, key):
    store.put(key, numpy.arange(100))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=child_of_spawn, args=(store, key, queue))
    child.start()
    assert queue.get(timeout=60) == 4950
    child.join(60)
    assert child.exitcode == 0 and store.exists(key + "/child")


def test_the_node_of_a_process_that_is_gone_is_an_error_not_a_hang(tmp_path):
    """A grandchild whose parent, which was the node, was killed."""
    socket = str(tmp_path / "node.sock")
    code = (
        "import hetmem, os, signal, sys, time\n"
        "store = hetmem.local(host='16MiB', gpu='off', max_objects=1024, socket=sys.argv[1], timeout=2)\n"
        "store.put('x', b'x')\n"
        "node = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    assert bytes(store.get('x')) == b'x'\n"
        "    os.kill(node, signal.SIGKILL)\n"
        "    while os.getppid() == node: time.sleep(0.01)\n"
        "    try: store.exists('y')\n"
        "    except hetmem.Error as error: print(type(error).__name__, flush=True)\n"
        "    os._exit(0)\n"
        "time.sleep(60)\n"
    )
    found = run(code, socket)
    assert found.returncode == -signal.SIGKILL
    assert found.stdout.strip() in ("PeerLost", "TimedOut", "Unavailable"), found


def test_the_gil_is_free_while_a_call_waits_or_copies(store, key):
    ticks = []
    over = threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        store.wait(key, 0.5)
    waited = [at for at in ticks if at > started]
    big = numpy.ones(128 << 20, "u1")
    started = time.monotonic()
    store.put(key, big)
    ended = time.monotonic()
    over.set()
    thread.join()
    assert len(waited) > 20
    assert any(started < at < ended for at in ticks)
    store.delete(key)


def test_threads_share_a_store(store, key):
    wrong = []

    def work(number):
        for round in range(100):
            name = f"{key}/{number}/{round}"
            store.put(name, numpy.full(100, number))
            if not (store.get(name).numpy() == number).all():
                wrong.append(name)
            store.delete(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store.list(key) == []


@pytest.mark.parametrize("others", [0, 2])
def test_ctrl_c_interrupts_a_wait(store, key, alarm, others):
    """Also where another thread reads the socket for the one that is interrupted."""
    waits = [threading.Thread(target=lambda: store.wait(key + "/late", 30)) for _ in range(others)]
    for thread in waits:
        thread.start()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        alarm(0.3)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            store.wait(key, 60)
        assert time.monotonic() - started < 20
        # A handler that raises nothing interrupts nothing.
        heard = []
        signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
        alarm(0.1)
        with pytest.raises(TimeoutError):
            store.wait(key, 1.5)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        store.put(key + "/late", b"x")
        for thread in waits:
            thread.join()


def test_the_interpreter_ends_cleanly():
    code = (
        "import hetmem, numpy, threading, atexit, os, sys\n"
        "store = hetmem.local(host='32MiB', gpu='off', max_objects=1024)\n"
        "store.put('x', numpy.arange(100000))\n"
        "tensor = store.get('x'); view = tensor.numpy(); private = numpy.from_dlpack(tensor)\n"
        "other = hetmem.connect(store.socket)\n"
        "def wait():\n"
        "    try: other.wait('never', 30)\n"
        "    except hetmem.PeerLost: pass\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "writer = store.create('y', 10, 'int8'); array = writer.numpy()\n"
        "print(os.path.dirname(store.socket))\n"
    )
    found = run(code)
    assert found.returncode == 0 and found.stderr == "", found
    assert not os.path.exists(found.stdout.strip())


def test_a_process_that_is_killed_holds_nothing(store, key):
    store.put(key, numpy.arange(1 << 18))
    clients = store.status()["clients"]
    code = (
        "import hetmem, os, signal, sys\n"
        "store = hetmem.connect(sys.argv[1])\n"
        "held = store.get(sys.argv[2]).numpy(); writer = store.create(sys.argv[2] + '/half', 1000, 'int8')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run(code, store.socket, key).returncode == -signal.SIGKILL
    store.delete(key)
    deadline = time.monotonic() + 20
    while True:
        status = store.status()
        if (status["clients"], status["draining"], status["reservations"]) == (clients, 0, 0):
            break
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
