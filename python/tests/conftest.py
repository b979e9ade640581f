"""Nodes for the tests: small ones inside this process, each with a directory of its own."""

import gc
import itertools
import signal
import time

import hetmem
import pytest

_numbers = itertools.count()


def until(condition, timeout=20):
    """Waits for what comes about by itself."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def held(store):
    """Objects that were deleted and are still read by someone, as the node saw last."""
    gc.collect()
    return store.status()["draining"]


@pytest.fixture(scope="session")
def store():
    """A node that all tests share, each with keys of its own."""
    with hetmem.local(host="512MiB", gpu="off", max_objects=65536) as store:
        yield store


@pytest.fixture
def key():
    """A key that nobody else has."""
    return f"test/{next(_numbers)}"


@pytest.fixture(scope="session")
def pair():
    """Two nodes: what is put in the first is fetched by the second."""
    with hetmem.local(host="256MiB", gpu="off", max_objects=65536) as one:
        with hetmem.local(host="256MiB", gpu="off", max_objects=65536, join=one.address) as other:
            one.put("pair/ready", b"x")
            other.wait("pair/ready", 30)
            yield one, other


@pytest.fixture
def alarm():
    """Interrupts the test's process after some seconds, as Ctrl-C would."""
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_terminal_summary(terminalreporter):
    """Skips as every other test of this repository says them, and the count alone on the last line."""
    stats = terminalreporter.stats
    for report in stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"skipped: {reason.removeprefix('Skipped: ')}")
    failed = len(stats.get("failed", [])) + len(stats.get("error", []))
    counts = f"{len(stats.get('passed', []))} passed, {failed} failed, {len(stats.get('skipped', []))} skipped"
    terminalreporter.write_line(counts)
