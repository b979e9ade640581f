"""State of jax programs in the store: pytrees of arrays.

hetmem.jax.put_tree(store, "step/100", params)
params = hetmem.jax.get_tree(store, "step/100", like=params)
"""

from __future__ import annotations

from typing import Any

import jax

from ._core import Receipt, Store


def _named(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], structure


def put_tree(store: Store, prefix: str, tree: Any, **keywords: Any) -> list[Receipt]:
    """Puts every array of a pytree under `prefix/PATH`; returns the receipts. Keywords as of `Store.put`."""
    leaves, _ = _named(tree)
    return store.put_many([(f"{prefix}/{name}", leaf) for name, leaf in leaves], **keywords)


def get_tree(store: Store, prefix: str, like: Any, *, timeout: float | None = None) -> Any:
    """The arrays that `put_tree` put, in the structure of the pytree `like`, whose leaves are not looked at.

    On the CPU they share memory with private views of the objects. Raises hetmem.NotFound for a path that is not there.
    """
    leaves, structure = _named(like)
    tensors = store.get_many([f"{prefix}/{name}" for name, _ in leaves], timeout=timeout)
    return jax.tree_util.tree_unflatten(structure, [tensor.jax() for tensor in tensors])
