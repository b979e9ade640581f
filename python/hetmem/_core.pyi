"""The native part: see the package's documentation."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, TypeAlias, final, overload

from numpy.typing import NDArray

__version__: str

# Anything with DLPack or the buffer protocol: numpy, torch, jax and cupy arrays, bytes, memoryview.
Array: TypeAlias = Any
# "cpu", "cuda:N" as this process numbers devices, "gpu:N" as the node does; or an object that prints so.
Device: TypeAlias = Any
ZeroCopy: TypeAlias = Literal["preferred", "required"]

@final
class Receipt:
    """How one get or put really moved its bytes."""

    @property
    def path(self) -> str: ...
    @property
    def fabric(self) -> str | None: ...
    @property
    def source(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def staged_bytes(self) -> int: ...
    @property
    def round_trips(self) -> int: ...
    @property
    def threshold_bytes(self) -> int | None: ...
    @property
    def elapsed(self) -> float | None: ...
    @property
    def kept(self) -> bool: ...
    @property
    def replicas(self) -> int: ...

@final
class Stat:
    """What is known about an object without its bytes."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tier(self) -> str | None: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def holders(self) -> list[str]: ...

@final
class Tensor:
    """An array in the store, or a copy of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def receipt(self) -> Receipt | None: ...
    def numpy(self) -> NDArray[Any]: ...
    def torch(self) -> Any: ...
    def jax(self) -> Any: ...
    def copy(self) -> Tensor: ...
    def verify(self) -> bool: ...
    def __bytes__(self) -> bytes: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int | slice, /) -> Tensor: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...

@final
class Writer:
    """An object that is being written where it will stay."""

    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def receipt(self) -> Receipt | None: ...
    def numpy(self) -> NDArray[Any]: ...
    def torch(self) -> Any: ...
    def memoryview(self) -> memoryview: ...
    def seal(self) -> None: ...
    def discard(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: object, value: object, traceback: object) -> None: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...

@final
class Store:
    """A connection to a node."""

    @property
    def node(self) -> str: ...
    @property
    def socket(self) -> str: ...
    @property
    def address(self) -> str | None: ...
    def put(
        self,
        key: str,
        tensor: Array,
        *,
        if_exists: Literal["keep", "error"] = "keep",
        device: Device = None,
        pin: bool = False,
        cache: bool = False,
        ttl: float | None = None,
        replicas: int = 1,
        checksum: bool = True,
        seal_copy: bool = False,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
    ) -> Receipt: ...
    def put_many(
        self,
        tensors: Mapping[str, Array] | Iterable[tuple[str, Array]],
        *,
        if_exists: Literal["keep", "error"] = "keep",
        device: Device = None,
        pin: bool = False,
        cache: bool = False,
        ttl: float | None = None,
        replicas: int = 1,
        checksum: bool = True,
        seal_copy: bool = False,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
    ) -> list[Receipt]: ...
    def put_state_dict(
        self,
        prefix: str,
        state_dict: Mapping[str, Array],
        *,
        if_exists: Literal["keep", "error"] = "keep",
        device: Device = None,
        pin: bool = False,
        cache: bool = False,
        ttl: float | None = None,
        replicas: int = 1,
        checksum: bool = True,
        seal_copy: bool = False,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
    ) -> list[Receipt]: ...
    def create(
        self,
        key: str,
        shape: int | Sequence[int],
        dtype: Any,
        *,
        if_exists: Literal["keep", "error"] = "keep",
        device: Device = None,
        pin: bool = False,
        cache: bool = False,
        ttl: float | None = None,
        replicas: int = 1,
        checksum: bool = True,
        seal_copy: bool = False,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
    ) -> Writer: ...
    def get(
        self,
        key: str,
        device: Device = None,
        *,
        dtype: Any = None,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
        copy: bool = False,
        verify: bool = False,
        keep: bool = True,
    ) -> Tensor: ...
    def get_here(self, key: str) -> Tensor | None: ...
    @overload
    def get_many(
        self,
        keys: Iterable[str],
        device: Device = None,
        *,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
        verify: bool = False,
        keep: bool = True,
        errors: Literal["raise"] = "raise",
    ) -> list[Tensor]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[str],
        device: Device = None,
        *,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
        verify: bool = False,
        keep: bool = True,
        errors: Literal["return"],
    ) -> list[Tensor | Exception]: ...
    def get_state_dict(
        self,
        prefix: str,
        device: Device = None,
        *,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
    ) -> dict[str, Tensor]: ...
    def get_range(
        self,
        key: str,
        start: int,
        stop: int | None = None,
        *,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
        keep: bool = True,
    ) -> Tensor: ...
    def get_into(
        self,
        key: str,
        out: Array,
        *,
        zero_copy: ZeroCopy = "preferred",
        timeout: float | None = None,
        verify: bool = False,
        keep: bool = True,
    ) -> Receipt: ...
    def wait(self, key: str, timeout: float = 30.0) -> None: ...
    def exists(self, key: str) -> bool: ...
    def __contains__(self, key: str, /) -> bool: ...
    def stat(self, key: str) -> Stat: ...
    def delete(self, key: str) -> bool: ...
    def pin(self, key: str, pinned: bool = True) -> None: ...
    def evict(self, key: str, force: bool = False) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def _load_safetensors(self, path: str, prefix: str, **keywords: Any) -> list[str]: ...
    def _save_safetensors(self, path: str, prefix: str, timeout: float | None, verify: bool) -> list[str]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    # Last: below it `list` is this.
    def list(self, prefix: str = "") -> list[str]: ...

def connect(socket: str | PathLike[str] | None = None, *, timeout: float = 30.0) -> Store: ...
def embed(keys: list[tuple[str, str]], timeout: float) -> Store: ...
def error_kinds() -> list[str]: ...
