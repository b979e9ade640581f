#!/usr/bin/env python3
"""hetmem from Python beside Plasma, the shared-memory store that Arrow had until version 11, and beside numpy.

    python3.11 -m venv plasma
    plasma/bin/pip install pyarrow==11.0.0 'numpy<2' hetmem-*.whl
    plasma/bin/python benches/python/against_plasma.py [--json] [--quick]

One process, one run: the two take turns, round after round, and a ratio is the median of the rounds'. Arrays are float32.
Rows have the shape of `hetmem bench --json`. Needs 2.5 GB of free memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import hetmem
import numpy

warnings.simplefilter("ignore")
from pyarrow import plasma  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
MANY = 10_000


def percentile(samples, percent):
    return sorted(samples)[min(len(samples) - 1, len(samples) * percent // 100)]


def timed(call):
    started = time.perf_counter()
    result = call()
    took = (time.perf_counter() - started) * 1e6
    # What it returned goes outside of the time, for both.
    del result
    return took


def measure(op, size, beside, theirs, ours, *, target, rounds, samples, moves=False):
    """One row: `theirs` and `ours` each give the time of one call in microseconds."""
    kind, limit = target
    ratios, all_theirs, all_ours = [], [], []
    for round in range(rounds + 1):
        found = {}
        for name in ("theirs", "ours") if round % 2 == 0 else ("ours", "theirs"):
            call = theirs if name == "theirs" else ours
            found[name] = [call() for _ in range(samples)]
        # The first round warms both up and does not count.
        if round:
            ratio = statistics.median(found["ours"]) / statistics.median(found["theirs"])
            ratios.append(ratio if kind == "time at most" else 1 / ratio)
            all_theirs += found["theirs"]
            all_ours += found["ours"]
    p50 = percentile(all_ours, 50)
    return {
        "workload": "python",
        "op": op,
        "size_bytes": size,
        "p50_us": p50,
        "p99_us": percentile(all_ours, 99),
        "gib_per_s": size / p50 * 1e6 / (1 << 30) if moves else None,
        "ceiling_name": beside,
        "ceiling_p50_us": percentile(all_theirs, 50),
        "ratio_to_ceiling": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "target": f"{kind} {limit}",
    }


def gets(store, client, quick):
    for size in (4 * KIB, 4 * MIB, 256 * MIB):
        array = numpy.arange(size // 4, dtype="f4")
        store.put(f"get/{size}", array)
        there = client.put(array)
        key = f"get/{size}"
        yield measure(
            "get to a numpy view",
            size,
            "Plasma get",
            lambda: timed(lambda: client.get(there)),
            lambda: timed(lambda: store.get(key).numpy()),
            target=("time at most", 1 / 20),
            rounds=3 if quick else 15,
            samples=100 if quick else 1000,
        )
        assert (client.get(there)[-5:] == store.get(key).numpy()[-5:]).all()
        store.delete(key)
        client.delete([there])


def many(store, client, quick):
    keys = [f"many/{number}" for number in range(MANY)]
    there = [client.put(numpy.full(256, number, "f4")) for number in range(MANY)]
    store.put_many([(key, numpy.full(256, number, "f4")) for number, key in enumerate(keys)])
    yield measure(
        f"get_many of {MANY} to numpy views",
        1024,
        "Plasma get",
        lambda: timed(lambda: client.get(there)),
        lambda: timed(lambda: [tensor.numpy() for tensor in store.get_many(keys)]),
        target=("rate at least", 5),
        rounds=2 if quick else 7,
        samples=1 if quick else 3,
    )


def puts(store, quick):
    array = numpy.random.default_rng(0).integers(0, 255, 64 * MIB, "u1")
    warm = numpy.ones_like(array)

    def put(**keywords):
        took = timed(lambda: store.put("put", array, **keywords))
        store.delete("put")
        return took

    for op, keywords in [("put", {}), ("put without a checksum", {"checksum": False})]:
        yield measure(
            op,
            array.nbytes,
            "numpy.copyto into warm memory",
            lambda: timed(lambda: numpy.copyto(warm, array)),
            lambda keywords=keywords: put(**keywords),
            target=("rate at least", 0.85),
            rounds=3 if quick else 15,
            samples=3 if quick else 10,
            moves=True,
        )


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", action="store_true", help="rows of JSON")
    options.add_argument("--quick", action="store_true", help="a look, no figures")
    options = options.parse_args()
    folder = tempfile.mkdtemp()
    socket = os.path.join(folder, "plasma.sock")
    program = os.path.join(os.path.dirname(sys.executable), "plasma_store")
    server = subprocess.Popen([program, "-m", str(1 << 30), "-s", socket], stderr=subprocess.DEVNULL)
    try:
        client = plasma.connect(socket, num_retries=50)
        with hetmem.local(host="1GiB", gpu="off") as store:
            rows = [*gets(store, client, options.quick), *many(store, client, options.quick), *puts(store, options.quick)]
    finally:
        server.kill()
        server.wait()
    for row in rows:
        if options.json:
            print(json.dumps(row))
            continue
        low, high = row["ratio_spread"]
        print(
            f"{row['op']:32} {row['size_bytes']:>10} B  {row['p50_us']:>10.2f} us  {row['ceiling_name']} "
            f"{row['ceiling_p50_us']:.2f} us  ratio {row['ratio_to_ceiling']:.4f} ({low:.4f}..{high:.4f})  {row['target']}"
        )


if __name__ == "__main__":
    main()
