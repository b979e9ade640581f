"""For torch: state dicts, data sets that prefetch in the sampler's order, distributed checkpoints.

Tensors that come out are private views of the store's memory where they are on the CPU: writing to one changes it alone.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from . import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._core import Device, Receipt, Store

__all__ = ["TensorDataset", "get_state_dict", "load_state_dict", "put_state_dict"]

_STRUCTURE = ".structure"
_TENSOR = "hetmem.tensor"


def put_state_dict(store: Store, prefix: str, state_dict: Mapping[str, Any], **keywords: Any) -> list[Receipt]:
    """Puts a state dict of a module or an optimizer, nested or not, under `prefix/`: tensors each as an object, the rest in
    one. Keywords as of `Store.put`. What it is made of comes last, so who finds that finds everything.

    To publish new weights again and again see `hetmem.Generation`.
    """
    tensors: OrderedDict[str, torch.Tensor] = OrderedDict()

    def without_tensors(path: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = "/".join(path)
            while name in tensors:
                name += "_"
            tensors[name] = value
            return (_TENSOR, name)
        if isinstance(value, dict):
            return {key: without_tensors((*path, str(key)), item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [without_tensors((*path, str(at)), item) for at, item in enumerate(value)]
            return items if isinstance(value, list) else ("", *items)
        return value

    structure = io.BytesIO()
    torch.save(without_tensors((), state_dict), structure)
    receipts = store.put_many([(f"{prefix}/{name}", tensor) for name, tensor in tensors.items()], **keywords)
    store.put(f"{prefix}/{_STRUCTURE}", structure.getbuffer(), **{k: v for k, v in keywords.items() if k != "device"})
    return receipts


def get_state_dict(store: Store, prefix: str, device: Device = None, *, timeout: float | None = None) -> dict[str, Any]:
    """What `put_state_dict` put, or every tensor under `prefix/` by its name if it was put in another way.

    device: "cpu" (the default) or "cuda:N". Raises hetmem.NotFound.
    """
    try:
        packed = store.get(f"{prefix}/{_STRUCTURE}", timeout=timeout)
    except errors.NotFound:
        found = store.get_state_dict(prefix, device, timeout=timeout)
        return {name: tensor.torch() for name, tensor in found.items()}
    structure = torch.load(io.BytesIO(bytes(packed)), weights_only=True)
    names: list[str] = []

    def find(value: Any) -> None:
        if isinstance(value, tuple) and value[:1] == (_TENSOR,):
            names.append(value[1])
        elif isinstance(value, dict):
            for item in value.values():
                find(item)
        elif isinstance(value, list | tuple):
            for item in value:
                find(item)

    find(structure)
    tensors = store.get_many([f"{prefix}/{name}" for name in names], device, timeout=timeout)
    by_name = {name: tensor.torch() for name, tensor in zip(names, tensors, strict=True)}

    def with_tensors(value: Any) -> Any:
        if isinstance(value, tuple) and value[:1] == (_TENSOR,):
            return by_name[value[1]]
        if isinstance(value, dict):
            return {key: with_tensors(item) for key, item in value.items()}
        if isinstance(value, list):
            return [with_tensors(item) for item in value]
        if isinstance(value, tuple):
            return tuple(with_tensors(item) for item in value[1:])
        return value

    whole: dict[str, Any] = with_tensors(structure)
    return whole


def load_state_dict(
    module: torch.nn.Module, store: Store, prefix: str, *, strict: bool = True, timeout: float | None = None
) -> Any:
    """Copies the tensors under `prefix/` into a module; returns what `module.load_state_dict` returns."""
    return module.load_state_dict(get_state_dict(store, prefix, timeout=timeout), strict=strict)


class TensorDataset(Dataset[Any]):
    """Objects of the store as a data set for a DataLoader.

        dataset = hetmem.torch.TensorDataset(store, keys, plan=order)
        loader = DataLoader(dataset, batch_size=64, sampler=order, num_workers=4)

    store: a `hetmem.Store`; workers that are forked or spawned connect by themselves. keys: one for each sample, or a tuple
    of them for a sample of several tensors. plan: the indices in the order in which they will be read, such as
    `list(sampler)`: what comes next is then fetched ahead of its turn, in the background, and held until it is read.
    ahead: how many samples. transform: called with each sample. The batches of a DataLoader are got many at once.
    """

    def __init__(
        self,
        store: Store,
        keys: Iterable[str | Sequence[str]],
        plan: Iterable[int] | None = None,
        *,
        ahead: int = 256,
        device: Device = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.store = store
        self.keys = list(keys)
        self.ahead = ahead
        self.device = device
        self.transform = transform
        self.set_plan(plan)

    def set_plan(self, plan: Iterable[int] | None) -> None:
        """Takes a new order, as for the next epoch."""
        self.plan = None if plan is None else [int(index) for index in plan]
        self._fresh()

    def _fresh(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[list[Any]]] = {}
        self._at = 0

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_process", "_lock", "_pool", "_coming", "_at")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if self._process != os.getpid():
            self._fresh()
        indices = [int(index) for index in indices]
        coming = None
        if self.plan is not None:
            with self._lock:
                at = self._place(indices)
                if at is not None:
                    coming = self._coming.pop(at, None)
                    self._fetch_ahead(at, len(indices))
        found = self._get(indices) if coming is None else coming.result()
        if self.transform is not None:
            found = [self.transform(sample) for sample in found]
        return found

    def _place(self, indices: list[int]) -> int | None:
        """Where in the plan these are next; None if they are not the plan's next."""
        plan = self.plan or []
        for start in (self._at, 0):
            try:
                at = plan.index(indices[0], start)
            except ValueError:
                continue
            if plan[at : at + len(indices)] == indices:
                self._at = at + len(indices)
                return at
        return None

    def _fetch_ahead(self, at: int, length: int) -> None:
        worker = get_worker_info()
        # A DataLoader gives each of its workers every n-th batch.
        step = length * (1 if worker is None else worker.num_workers)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="hetmem-prefetch")
        for place in [place for place in self._coming if place <= at]:
            self._coming.pop(place).cancel()
        for round in range(1, max(1, self.ahead // length) + 1):
            place = at + round * step
            wanted = (self.plan or [])[place : place + length]
            if wanted and place not in self._coming:
                self._coming[place] = self._pool.submit(self._get, wanted)

    def _get(self, indices: Sequence[int]) -> list[Any]:
        keys: list[str] = []
        lengths: list[int | None] = []
        for index in indices:
            sample = self.keys[index]
            lengths.append(None if isinstance(sample, str) else len(sample))
            keys.extend([sample] if isinstance(sample, str) else sample)
        tensors = iter([tensor.torch() for tensor in self.store.get_many(keys, self.device)])
        return [next(tensors) if length is None else tuple(next(tensors) for _ in range(length)) for length in lengths]


def __getattr__(name: str) -> Any:
    # torch.distributed is large, and not in every build of torch.
    if name in ("StorageReader", "StorageWriter"):
        from . import _torch_checkpoint

        return getattr(_torch_checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
