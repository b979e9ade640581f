"""Files of the safetensors format, into the store and out of it. The package safetensors is not needed.

hetmem.safetensors.load_file_into(store, "model.safetensors", "model")   # one object per tensor: model/NAME
hetmem.safetensors.save_file_from(store, "copy.safetensors", "model")
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._core import Store


def load_file_into(store: Store, path: str | os.PathLike[str], prefix: str | None = None, **keywords: Any) -> list[str]:
    """Puts every tensor of the file under `prefix/NAME`; returns the keys. prefix: the file's name without its extension if
    none is given. Metadata of the file goes under `prefix/__metadata__`. Keywords as of `Store.put`.

    The file is checked as a whole first. Raises hetmem.Corrupt if it is no such file, and whatever a put raises.
    """
    path = os.fspath(path)
    if prefix is None:
        prefix = os.path.splitext(os.path.basename(path))[0]
    return store._load_safetensors(path, prefix, **keywords)


def save_file_from(
    store: Store,
    path: str | os.PathLike[str],
    prefix: str,
    *,
    timeout: float | None = None,
    verify: bool = True,
) -> list[str]:
    """Writes every object under `prefix/` to the file; returns the names of the tensors. verify: compare each with its
    checksum. The file appears under its name when it is complete.

    Raises hetmem.NotFound if there is nothing under the prefix, hetmem.Corrupt if a checksum differs.
    """
    return store._save_safetensors(os.fspath(path), prefix, timeout, verify)
