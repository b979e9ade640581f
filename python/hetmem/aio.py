"""The store with async and await: `hetmem.aio.connect`, `hetmem.aio.local`.

    async with await hetmem.aio.connect() as store:
        await store.put("x", array)
        x = await store.get("x")

Calls have the names, arguments and results of `hetmem.Store`. A call runs on a thread while the event loop goes on; a get of
an object that is on this node needs none. A call that is cancelled goes on by itself, and its result is dropped.
"""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

import hetmem

# Waiting calls hold a thread each; the store itself serves any number.
_THREADS = 32


class Store:
    """A `hetmem.Store`, which `sync` gives, whose calls are awaited."""

    def __init__(self, sync, *, threads=_THREADS):
        self.sync = sync
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hetmem-aio")

    def __repr__(self):
        return f"hetmem.aio.Store({self.sync.socket!r})"

    async def _run(self, call, *arguments, **keywords):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, functools.partial(call, *arguments, **keywords))

    async def get(self, key, device=None, **keywords):
        here = None if device is not None or keywords else self.sync.get_here(key)
        return here if here is not None else await self._run(self.sync.get, key, device, **keywords)

    get.__doc__ = hetmem.Store.get.__doc__

    def create(self, key, shape, dtype, **keywords):
        """As `hetmem.Store.create`, for `async with`."""
        return _Creating(self, key, shape, dtype, keywords)

    async def close(self):
        """Ends the session, and the node if it runs in this process."""
        await self._run(self.sync.close)
        self._pool.shutdown(wait=False)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        await self.close()


class _Creating:
    def __init__(self, store, key, shape, dtype, keywords):
        self._store = store
        self._open = functools.partial(store.sync.create, key, shape, dtype, **keywords)

    async def __aenter__(self):
        self._writer = await self._store._run(self._open)
        return self._writer

    async def __aexit__(self, *exception):
        await self._store._run(self._writer.__exit__, *exception)


def _awaited(name):
    plain = getattr(hetmem.Store, name)

    async def call(self, *arguments, **keywords):
        return await self._run(getattr(self.sync, name), *arguments, **keywords)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = plain.__doc__
    call.__text_signature__ = getattr(plain, "__text_signature__", None)
    return call


for _name in (
    "put",
    "put_many",
    "put_state_dict",
    "get_many",
    "get_state_dict",
    "get_range",
    "get_into",
    "wait",
    "exists",
    "stat",
    "list",
    "delete",
    "pin",
    "evict",
    "status",
):
    setattr(Store, _name, _awaited(_name))


async def connect(socket=None, *, timeout=30.0):
    """As `hetmem.connect`."""
    return Store(await asyncio.to_thread(hetmem.connect, socket, timeout=timeout))


async def local(host="4GiB", gpu="auto", **keywords):
    """As `hetmem.local`."""
    return Store(await asyncio.to_thread(hetmem.local, host, gpu, **keywords))
