"""Tensors in shared memory and GPU memory, in and out of a training job without copies.

    import hetmem, numpy

    store = hetmem.local(host="1GiB")            # a node inside this process; hetmem.connect() uses one that runs
    store.put("x", numpy.arange(12).reshape(3, 4))
    x = store.get("x")                            # in place: no copy, no message
    x.numpy()                                     # a read-only view that keeps the object where it is

`connect` and `local` give a `Store`; its `get` gives a `Tensor`, its `create` a `Writer`. The same with async and await is
`hetmem.aio`. `hetmem.torch`, `hetmem.jax` and `hetmem.safetensors` are for those; `Generation` publishes a whole state dict
under a version. Every exception is a `hetmem.Error` and the built-in that one would catch.

Importing this loads no framework and no driver, and creates no CUDA context.
"""

from ._core import Receipt, Stat, Store, Tensor, Writer, __version__, connect
from ._local import local
from .errors import (
    AlreadyExists,
    Busy,
    Corrupt,
    Denied,
    Error,
    Invalid,
    NoSpace,
    NotFound,
    Os,
    PeerLost,
    Protocol,
    Stale,
    TimedOut,
    TooLarge,
    Unavailable,
)
from .generation import Generation

__all__ = [
    "AlreadyExists",
    "Busy",
    "Corrupt",
    "Denied",
    "Error",
    "Generation",
    "Invalid",
    "NoSpace",
    "NotFound",
    "Os",
    "PeerLost",
    "Protocol",
    "Receipt",
    "Stale",
    "Stat",
    "Store",
    "Tensor",
    "TimedOut",
    "TooLarge",
    "Unavailable",
    "Writer",
    "__version__",
    "connect",
    "local",
]

_MODULES = ("aio", "jax", "safetensors", "torch")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        from importlib import import_module

        return import_module("." + name, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
