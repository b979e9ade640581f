"""A node inside this process: `hetmem.local`."""

from __future__ import annotations

import atexit
import os
import shutil
import weakref

from . import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

_open: weakref.WeakSet[_core.Store] = weakref.WeakSet()


def local(
    host: str | int = "4GiB",
    gpu: str | int = "auto",
    *,
    socket: str | PathLike[str] | None = None,
    listen: str = "127.0.0.1:0",
    join: str | Iterable[str] | None = None,
    timeout: float = 30.0,
    **keys: str | int,
) -> _core.Store:
    """Starts a node inside this process and connects to it; `close()`, the end of a `with` block, or the end of the process
    stops it.

    host: memory of the host tier, taken at once: bytes, "512MiB", "4GiB", or a share of the machine's such as "25%".
    gpu: memory of the GPU tiers, taken when objects come: "auto", "off", bytes or a share of each, or "0=4GiB,1=auto".
    socket: the path where other processes connect; a private one if none, which `store.socket` tells.
    listen: where other nodes connect, which `store.address` tells. join: "HOST:PORT" of a node to join, or a list.
    timeout: how long a call may wait for the node, in seconds. keys: the other keys of the node's configuration:
    name, max_objects, huge_pages, threshold, lease_ms, heartbeat_ms, client_quota, streams, fabric.

    Raises hetmem.Invalid for a key or value that the node does not know, hetmem.Os where there is too little memory.
    """
    folder = None
    if socket is None:
        import tempfile

        folder = tempfile.mkdtemp(prefix="hetmem-")
        socket = os.path.join(folder, "node.sock")
    keys.update(host=host, gpu=gpu, socket=os.fspath(socket), listen=listen)
    if join is not None:
        keys["join"] = join if isinstance(join, str) else ",".join(join)
    try:
        store = _core.embed([(name, str(value)) for name, value in keys.items()], timeout)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if folder is not None:
        weakref.finalize(store, _remove, folder, os.getpid())
    _open.add(store)
    return store


def _remove(folder: str, made_by: int) -> None:
    # A forked child does not own it.
    if os.getpid() == made_by:
        shutil.rmtree(folder, ignore_errors=True)


@atexit.register
def _close_all() -> None:
    for store in list(_open):
        store.close()
