"""Whole state dicts under versions: all of one, or none of it."""

import threading

import hetmem
import numpy
import pytest


def weights(version):
    return {"layer.weight": numpy.full((8, 8), version, "f4"), "layer.bias": numpy.full(8, version, "f4")}


def test_versions_come_whole_and_go(store, key):
    trainer, sampler = hetmem.Generation(store, key), hetmem.Generation(store, key)
    assert sampler.latest() is None
    assert trainer.publish(weights(1)) == 1
    version, first = sampler.get()
    assert version == 1 and (first["layer.weight"].numpy() == 1).all()
    for number in range(2, 6):
        assert trainer.publish(weights(number)) == number
    assert trainer.versions() == [4, 5] and sampler.latest() == 5
    # Who has an old one keeps it.
    assert all((tensor.numpy() == 1).all() for tensor in first.values())
    version, newest = sampler.get(newer_than=4, names=["layer.bias"])
    assert version == 5 and list(newest) == ["layer.bias"] and (newest["layer.bias"].numpy() == 5).all()
    with pytest.raises(hetmem.NotFound, match="version 2"):
        sampler.get(2)
    with pytest.raises(hetmem.AlreadyExists, match="version 5"):
        trainer.publish(weights(5), version=5)
    assert trainer.publish(weights(10), version=10) == 10 and trainer.publish(weights(11)) == 11
    assert len(store.list(key)) == 2 * 3


def test_a_publish_that_fails_publishes_nothing(store, key):
    trainer = hetmem.Generation(store, key)
    with pytest.raises(TypeError):
        trainer.publish({"good": numpy.ones(3), "bad": object()})
    assert trainer.versions() == [] and store.list(key) == []
    assert trainer.publish({"good": numpy.ones(3)}) == 1


def test_a_wait_ends_with_the_version_or_a_newer_one(pair, key):
    one, other = pair
    trainer, sampler = hetmem.Generation(one, key), hetmem.Generation(other, key)
    with pytest.raises(hetmem.TimedOut, match="no version 1"):
        sampler.wait_for(1, timeout=0.05)
    later = threading.Timer(0.1, lambda: trainer.publish(weights(3), version=3))
    later.start()
    assert sampler.wait_for(2, timeout=20) == 3
    later.join()


def test_samplers_never_see_two_versions_at_once(pair, key):
    one, other = pair
    trainer = hetmem.Generation(one, key)
    trainer.publish(weights(1))
    seen, wrong = [], []

    def sample(store):
        version = 0
        while version < 15:
            version, tensors = hetmem.Generation(store, key).get(newer_than=version, timeout=30)
            values = {float(value) for tensor in tensors.values() for value in tensor.numpy().flat}
            seen.append(version)
            if values != {float(version)}:
                wrong.append((version, values))

    samplers = [threading.Thread(target=sample, args=(store,)) for store in (one, other)]
    for thread in samplers:
        thread.start()
    for version in range(2, 16):
        trainer.publish(weights(version))
    for thread in samplers:
        thread.join()
    assert not wrong and seen.count(15) == 2
