"""Versions of a whole state dict, each published at once: `hetmem.Generation`."""

from __future__ import annotations

import time

from . import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from ._core import Array, Device, Store, Tensor


class Generation:
    """Publishes state dicts under growing versions, and gets them: weights from a trainer to its samplers.

        weights = hetmem.Generation(store, "policy")
        weights.publish(model.state_dict())                # the trainer; returns the version
        version, tensors = weights.get(newer_than=version) # a sampler

    A version is there as a whole or not at all: its tensors come first, and it exists from the moment when the list of them
    does. Readers of an older version keep what they hold, undisturbed, after it was dropped.

    store: a hetmem.Store. name: what the keys start with. keep: how many versions stay in the store; older ones are
    deleted when a newer one is published.
    """

    def __init__(self, store: Store, name: str, *, keep: int = 2) -> None:
        if keep < 1:
            raise errors.Invalid(f"invalid keep: {keep}: 1 or more versions are kept")
        self.store = store
        self.name = name
        self.keep = keep

    def __repr__(self) -> str:
        return f"hetmem.Generation({self.store!r}, {self.name!r})"

    def _manifest(self, version: int) -> str:
        # Sorts as numbers do.
        return f"{self.name}/versions/{version:020d}"

    def versions(self) -> list[int]:
        """The versions that are there, in order."""
        prefix = f"{self.name}/versions/"
        return [int(key[len(prefix) :]) for key in self.store.list(prefix)]

    def latest(self) -> int | None:
        """The newest version that is there; None if there is none."""
        return max(self.versions(), default=None)

    def publish(self, state_dict: Mapping[str, Array], version: int | None = None, **keywords: Any) -> int:
        """Publishes `state_dict`, a dict of names and arrays, and returns its version: `version`, or the one after the
        newest. Keywords as of `Store.put`.

        Raises hetmem.AlreadyExists if that version is there, and whatever a put raises; then nothing is published.
        """
        import json
        import secrets

        known = self.versions()
        if version is None:
            version = max(known, default=0) + 1
        elif version < 1:
            raise errors.Invalid(f"invalid version: {version}: versions count from 1")
        if version in known:
            raise errors.AlreadyExists(f"publish {self.name!r}: version {version} is there")
        # Keys of its own for each attempt: an object that an attempt left behind keeps its bytes.
        prefix = f"{self.name}/tensors/{version:020d}-{secrets.token_hex(8)}/"
        names = {name: prefix + name for name in state_dict}
        keywords.pop("if_exists", None)
        try:
            self.store.put_many([(names[name], tensor) for name, tensor in state_dict.items()], **keywords)
            manifest = json.dumps({"version": version, "tensors": names}).encode()
            manifest_keywords = {k: v for k, v in keywords.items() if k in ("pin", "replicas", "timeout", "ttl")}
            self.store.put(self._manifest(version), manifest, if_exists="error", **manifest_keywords)
        except BaseException:
            self._delete(names.values())
            raise
        for old in sorted(known)[: max(0, len(known) + 1 - self.keep)]:
            self.drop(old)
        return version

    def drop(self, version: int) -> bool:
        """Deletes a version; who has it keeps it. Returns whether it was there."""
        names = self._names(version)
        if names is None:
            return False
        existed = self.store.delete(self._manifest(version))
        self._delete(names.values())
        return existed

    def _delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self.store.delete(key)
            except errors.Error:
                pass  # What remains is found by no one, and the error that led here is the one to tell.

    def _names(self, version: int) -> dict[str, str] | None:
        import json

        try:
            found: dict[str, str] = json.loads(bytes(self.store.get(self._manifest(version))))["tensors"]
            return found
        except errors.NotFound:
            return None

    def wait_for(self, version: int, timeout: float = 30.0) -> int:
        """Waits until `version` or a newer one is there, at most `timeout` seconds; returns the newest.

        Raises hetmem.TimedOut.
        """
        deadline = time.monotonic() + timeout
        while True:
            latest = self.latest()
            if latest is not None and latest >= version:
                return latest
            left = deadline - time.monotonic()
            if left <= 0:
                raise errors.TimedOut(f"wait for {self.name!r}: no version {version} within {timeout} s (newest: {latest})")
            try:
                # A version that was skipped never comes: between two waits a newer one is looked for.
                self.store.wait(self._manifest(max(version, (latest or 0) + 1)), min(left, 0.5))
            except errors.TimedOut:
                pass

    def get(
        self,
        version: int | None = None,
        *,
        newer_than: int | None = None,
        timeout: float = 30.0,
        device: Device = None,
        names: Iterable[str] | None = None,
    ) -> tuple[int, dict[str, Tensor]]:
        """A version and its tensors: `(version, {name: hetmem.Tensor})`, of this version, or of the newest one, waiting at
        most `timeout` seconds until there is one newer than `newer_than`. `names`: only these.

        The tensors are of one version, whatever is published meanwhile. Raises hetmem.NotFound if the version is not
        there, hetmem.TimedOut.
        """
        deadline = time.monotonic() + timeout
        while True:
            wanted = version
            if wanted is None:
                wanted = self.wait_for((newer_than or 0) + 1, max(0.0, deadline - time.monotonic()))
            keys = self._names(wanted)
            if keys is not None:
                chosen = list(keys) if names is None else list(names)
                try:
                    tensors = self.store.get_many([keys[name] for name in chosen], device)
                    return wanted, dict(zip(chosen, tensors, strict=True))
                except errors.NotFound:
                    pass  # It was dropped between its list and its tensors.
            if version is not None:
                raise errors.NotFound(f"get {self.name!r}: no version {version} (there are {self.versions()})")
            if time.monotonic() >= deadline:
                raise errors.TimedOut(f"get {self.name!r}: versions were dropped faster than they were read")
