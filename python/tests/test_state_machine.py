"""The store against a dict, in steps that hypothesis chooses: puts, gets, deletes, writers, and views that outlive what
they were got from."""

import gc

import hetmem
import numpy
from conftest import until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

KEYS = st.sampled_from([f"machine/{number}" for number in range(6)])
# Small ones, and ones that get a mapping of their own where a private view is taken.
LENGTHS = st.sampled_from([0, 1, 7, 1000, 70_000, 300_000])
KINDS = st.sampled_from(["numpy", "asarray", "memoryview", "dlpack", "rows", "tensor", "copy"])

_shared = []


def the_store():
    if not _shared:
        _shared.append(hetmem.local(host="128MiB", gpu="off", max_objects=4096))
    return _shared[0]


def filled(length, value):
    return numpy.full(length, value, "u1")


class StoreMachine(RuleBasedStateMachine):
    views = Bundle("views")

    @initialize()
    def begin(self):
        self.store = the_store()
        for key in self.store.list("machine/"):
            self.store.delete(key)
        self.model = {}
        self.writers = 0

    @rule(key=KEYS, length=LENGTHS, value=st.integers(0, 255), strided=st.booleans())
    def put(self, key, length, value, strided):
        given = filled(length * 2, value)[::2] if strided else filled(length, value)
        self.store.put(key, given)
        self.model.setdefault(key, (length, value))

    @rule(key=KEYS, length=LENGTHS, value=st.integers(0, 255))
    def put_as_new(self, key, length, value):
        try:
            self.store.put(key, filled(length, value), if_exists="error")
            assert key not in self.model
            self.model[key] = (length, value)
        except hetmem.AlreadyExists:
            assert key in self.model

    @rule(key=KEYS, length=LENGTHS, value=st.integers(0, 255), keep_view=st.booleans(), fail=st.booleans())
    def write(self, key, length, value, keep_view, fail):
        view = None
        try:
            with self.store.create(key, length, "uint8") as writer:
                view = writer.numpy()
                view[:] = value
                if not keep_view:
                    view = None
                if fail:
                    raise ZeroDivisionError
            assert key not in self.model
            self.model[key] = (length, value)
        except hetmem.AlreadyExists:
            assert key in self.model
        except ZeroDivisionError:
            assert key not in self.model
        if view is not None:
            view[:] = value ^ 255

    @rule(target=views, key=KEYS, kind=KINDS)
    def get(self, key, kind):
        if key not in self.model:
            try:
                self.store.get(key)
                raise AssertionError("an object that is not there")
            except hetmem.NotFound:
                return (None, b"")
        length, value = self.model[key]
        tensor = self.store.get(key)
        assert tensor.shape == (length,)
        view = {
            "numpy": lambda: tensor.numpy(),
            "asarray": lambda: numpy.asarray(tensor),
            "memoryview": lambda: memoryview(tensor),
            "dlpack": lambda: numpy.from_dlpack(tensor),
            "rows": lambda: tensor[0:length].numpy(),
            "tensor": lambda: tensor,
            "copy": lambda: tensor.copy(),
        }[kind]()
        return (view, bytes([value]) * length)

    @rule(key=KEYS)
    def get_many(self, key):
        keys = [*self.model, key]
        for name, found in zip(keys, self.store.get_many(keys, errors="return"), strict=True):
            if name in self.model:
                length, value = self.model[name]
                assert bytes(found) == bytes([value]) * length
            else:
                assert isinstance(found, hetmem.NotFound)

    @rule(key=KEYS)
    def delete(self, key):
        assert self.store.delete(key) == (key in self.model)
        self.model.pop(key, None)

    @rule(view=views)
    def look(self, view):
        found, expected = view
        assert found is None or bytes(found) == expected

    @rule(view=consumes(views))
    def let_go(self, view):
        del view
        gc.collect()

    @invariant()
    def the_keys_are_those_of_the_dict(self):
        if hasattr(self, "store"):
            assert self.store.list("machine/") == sorted(self.model)

    def teardown(self):
        if hasattr(self, "store"):
            for key in list(self.model):
                self.store.delete(key)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreMachine = StoreMachine.TestCase


def test_nothing_is_held_when_all_machines_are_done():
    store = the_store()
    gc.collect()
    until(lambda: (lambda s: (s["objects"], s["draining"], s["reservations"]))(store.status()) == (0, 0, 0))
    _shared.pop().close()
