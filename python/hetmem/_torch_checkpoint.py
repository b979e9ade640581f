"""torch.distributed.checkpoint in the store: `hetmem.torch.StorageWriter` and `StorageReader`."""

from __future__ import annotations

import dataclasses
import io
import pickle
import secrets
from typing import Any

from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from . import errors
from ._core import Store

_METADATA = ".metadata"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class StorageWriter(storage.StorageWriter):
    """Writes a distributed checkpoint into the store, under `prefix/`.

        torch.distributed.checkpoint.save(state_dict, storage_writer=hetmem.torch.StorageWriter(store, "run/100"))

    Each rank puts what its plan says into its own node. The checkpoint is there from the moment when its metadata is; a
    checkpoint that was there under the prefix is replaced then. Keywords as of `Store.put`: `replicas=2` survives a node.
    """

    def __init__(self, store: Store, prefix: str, **keywords: Any) -> None:
        self.store = store
        self.prefix = prefix
        self.keywords = keywords

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return bool(str(checkpoint_id))

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id is not None:
            self.prefix = str(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **keywords: Any) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        # Keys of its own for each save: objects under keys that exist keep their bytes.
        folder = f"{self.prefix}/data/{secrets.token_hex(8)}"
        return [dataclasses.replace(plan, storage_data=f"{folder}/{rank}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        results = []
        for number, item in enumerate(plan.items):
            key = f"{plan.storage_data}/{number}"
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                data = data.getbuffer()
                length = data.nbytes
            else:
                data = data.detach()
                length = data.numel() * data.element_size()
            self.store.put(key, data, **self.keywords)
            results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=key))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        metadata.storage_meta = self.storage_meta()
        key = f"{self.prefix}/{_METADATA}"
        replaced = []
        try:
            replaced = list(pickle.loads(bytes(self.store.get(key))).storage_data.values())
            self.store.delete(key)
        except errors.NotFound:
            pass
        self.store.put(key, pickle.dumps(metadata), **{k: v for k, v in self.keywords.items() if k != "device"})
        for old in replaced:
            self.store.delete(old)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.prefix)


class StorageReader(storage.StorageReader):
    """Reads a distributed checkpoint that `StorageWriter` wrote, from whatever node has its parts.

    torch.distributed.checkpoint.load(state_dict, storage_reader=hetmem.torch.StorageReader(store, "run/100"))
    """

    def __init__(self, store: Store, prefix: str, *, timeout: float | None = None) -> None:
        self.store = store
        self.prefix = prefix
        self.timeout = timeout

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return bool(str(checkpoint_id))

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id is not None:
            self.prefix = str(checkpoint_id)

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        found = pickle.loads(bytes(self.store.get(f"{self.prefix}/{_METADATA}", timeout=self.timeout)))
        assert isinstance(found, Metadata)
        return found

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *arguments: Any, **keywords: Any) -> None:
        self._keys: Any = metadata.storage_data

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return plans

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        keys = [self._keys[item.storage_index] for item in plan.items]
        for item, found in zip(plan.items, self.store.get_many(keys, timeout=self.timeout), strict=True):
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(bytes(found)))
                continue
            part = found.torch()
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)
