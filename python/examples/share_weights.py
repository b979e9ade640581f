"""One trainer publishes its weights under versions, two samplers in processes of their own follow.

    pip install hetmem numpy
    python share_weights.py

A sampler never sees two versions at once, and what it holds stays as it is while newer versions come and old ones go.
With torch installed the trainer's state dict is a torch module's.
"""

import multiprocessing

import hetmem
import numpy

VERSIONS = 5


def state_dict(version):
    """What a trainer has after a step: every number in it is the version."""
    try:
        import torch
    except ImportError:
        return {"weight": numpy.full((256, 64), version, "f4"), "bias": numpy.full(256, version, "f4")}
    layer = torch.nn.Linear(64, 256)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(version)
    return layer.state_dict()


def sampler(socket, results):
    """Waits for each newer version until the last one is there."""
    with hetmem.connect(socket) as store:
        weights, version, seen = hetmem.Generation(store, "policy"), 0, []
        while version < VERSIONS:
            version, tensors = weights.get(newer_than=version)
            values = {float(value) for tensor in tensors.values() for value in numpy.unique(tensor.numpy())}
            seen.append((version, values))
        results.put(seen)


def main():
    processes = multiprocessing.get_context("spawn")
    with hetmem.local(host="64MiB") as store:
        results = processes.Queue()
        samplers = [processes.Process(target=sampler, args=(store.socket, results)) for _ in range(2)]
        for process in samplers:
            process.start()
        trainer = hetmem.Generation(store, "policy", keep=2)
        for version in range(1, VERSIONS + 1):
            trainer.publish(state_dict(version))
        for _ in samplers:
            seen = results.get(timeout=60)
            print("a sampler saw versions", [version for version, _ in seen])
            assert seen[-1][0] == VERSIONS and all(values == {float(version)} for version, values in seen)
        for process in samplers:
            process.join()


if __name__ == "__main__":
    main()
