#!/usr/bin/env python3
"""Round trips of tensor files between the official Python packages and hetmem.

    safetensors_interop.py HETMEM_BINARY

Starts a node, puts files that the official writers made (safetensors and numpy), gets them back, and compares every
name, shape, dtype, byte and metadata entry with the official readers; then offers hostile files. Needs the packages
`safetensors` and `numpy`; with `ml_dtypes`, bfloat16 and float8 arrays are written from real values too. Prints
`N passed, N failed`, and exits with 1 if anything failed.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy
import safetensors
from safetensors.numpy import load_file, save_file

try:  # Since safetensors 0.8; before, plain dictionaries.
    from safetensors._safetensors_rust import TensorSpec
except ImportError:
    TensorSpec = None

TIMEOUT_S = 60

# Every dtype that the format knows, with the bits of an element. The official package writes those that numpy has
# from arrays and all of them from bytes.
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

# The official reader knows them, the official serializer has no names for them.
READ_ONLY_DTYPES = {"F6_E2M3", "F6_E3M2"}

NUMPY_TYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip


class Node:
    """A node of this test alone, stopped at the end."""

    def __init__(self, binary, folder):
        self.binary = binary
        self.socket = os.path.join(folder, "node.sock")
        flags = ["--socket", self.socket, "--listen", "127.0.0.1:0", "--host", "256MiB", "--stop-with-stdin"]
        self.process = subprocess.Popen(
            [binary, "serve", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, HETMEM_LOG="error"),
        )
        line = self.process.stdout.readline()
        if not line or not json.loads(line)["ready"]:
            raise RuntimeError(f"the node did not get ready: {line!r}")

    def run(self, *args):
        """Runs one command; its exit code, output and errors."""
        done = subprocess.run(
            [self.binary, "--json", "--socket", self.socket, *args], capture_output=True, timeout=TIMEOUT_S
        )
        return done.returncode, done.stdout, done.stderr.decode()

    def must(self, *args):
        code, out, err = self.run(*args)
        assert code == 0, f"hetmem {' '.join(args)}: exit code {code}: {err}"
        return out

    def stop(self):
        self.process.stdin.close()
        assert self.process.wait(TIMEOUT_S) == 0, "the node did not stop in order"


def raw(path):
    """A file's header and its tensors' bytes, read without any package."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    metadata = header.pop("__metadata__", None)
    tensors = {
        name: (info["dtype"], info["shape"], data[slice(*info["data_offsets"])]) for name, info in header.items()
    }
    return tensors, metadata


def round_trip(node, folder, name, written):
    """Puts a file and gets it back; both must say the same, and the official reader must open it."""
    back = there_and_back(node, folder, name, written)
    with safetensors.safe_open(back, "np") as ours, safetensors.safe_open(written, "np") as official:
        assert sorted(ours.keys()) == sorted(official.keys())
        assert (ours.metadata() or {}) == (official.metadata() or {})
    return back


def there_and_back(node, folder, name, written):
    node.must("put", written, "--prefix", name)
    back = os.path.join(folder, f"{name}-back.safetensors")
    node.must("get", name, "-o", back)
    assert raw(back) == raw(written), f"{name}: the file that came back says something else"
    return back


def from_bytes(tensors, path, metadata=None):
    """Writes a file with the official serializer from (dtype, shape, bytes)."""
    specs, kept = {}, []
    for name, (dtype, shape, data) in tensors.items():
        # An element of the serializer's 4-bit type is a byte of two.
        shape = [*shape[:-1], shape[-1] // 2] if dtype == "F4" else shape
        if TensorSpec is None:
            specs[name] = {"dtype": serializer_name(dtype), "shape": shape, "data": data}
            continue
        # The serializer reads from this address: the array lives until the file is written.
        kept.append(numpy.frombuffer(data, numpy.uint8))
        address = kept[-1].ctypes.data
        specs[name] = TensorSpec(
            dtype=serializer_name(dtype), shape=shape, data_ptr=address, data_len=len(data)
        )
    with open(path, "wb") as file:
        file.write(safetensors.serialize(specs, metadata))


def serializer_name(dtype):
    """The serializer takes its own names for dtypes."""
    names = {
        "BOOL": "bool", "F4": "float4_e2m1fn_x2", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "BF16": "bfloat16", "C64": "complex64",
    }  # fmt: skip
    kinds = {"U": "uint", "I": "int", "F": "float"}
    return names.get(dtype) or kinds[dtype[0]] + dtype[1:]


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def numpy_arrays(node, folder):
    arrays = {}
    random = numpy.random.default_rng(7)
    for name in NUMPY_TYPES[:-1]:
        dtype = numpy.dtype(name)
        values = random.bytes(60 * dtype.itemsize) if name != "bool" else bytes(i % 2 for i in range(60))
        arrays[f"layer.{name}"] = numpy.frombuffer(values, dtype).reshape(3, 4, 5)
    arrays["scalar"] = numpy.array(3.5, numpy.float32)
    arrays["none"] = numpy.zeros((0, 7), numpy.int64)
    arrays["ünïcode/with/slashes"] = numpy.arange(10, dtype=numpy.int16)
    path = os.path.join(folder, "arrays.safetensors")
    save_file(arrays, path, {"format": "np", "quote": 'a "b" \\'})
    back = load_file(round_trip(node, folder, "arrays", path))
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
        assert back[name].tobytes() == array.tobytes(), name


def dtype_test(dtype, bits):
    def test(node, folder):
        shape = [2, 8]
        data = bytes((7 * at + bits) % 2 if dtype == "BOOL" else (7 * at + bits) % 256 for at in range(2 * bits))
        path = os.path.join(folder, f"{dtype}.safetensors")
        if dtype in READ_ONLY_DTYPES:
            header = {"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
            write_raw(path, header, data)
        else:
            from_bytes({"t": (dtype, shape, data), "u": ("U8", [1], b"x")}, path, {"dtype": dtype})
        assert raw(path)[0]["t"] == (dtype, shape, data)
        back = there_and_back(node, folder, dtype, path)
        with open(back, "rb") as file:
            official = dict(safetensors.deserialize(file.read()))
        assert bytes(official["t"]["data"]) == data
        stat = json.loads(node.must("stat", f"{dtype}/t"))
        assert stat["shape"] == shape and stat["bytes"] == len(data), stat

    test.__name__ = f"dtype {dtype}"
    return test


def real_bfloat16_and_float8(node, folder):
    try:
        import ml_dtypes
    except ImportError:
        return "ml_dtypes is not installed"
    values = numpy.linspace(-3, 3, 64, dtype=numpy.float32)
    arrays = {
        name: values.astype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    }
    tags = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    path = os.path.join(folder, "small.safetensors")
    from_bytes({name: (tags[name], [64], array.tobytes()) for name, array in arrays.items()}, path)
    back, _ = raw(round_trip(node, folder, "small", path))
    for name, array in arrays.items():
        assert back[name] == (tags[name], [64], array.tobytes()), name
    return None


def metadata_alone_and_nothing(node, folder):
    for name, metadata in (("only-metadata", {"a": "b"}), ("empty", None)):
        path = os.path.join(folder, f"{name}.safetensors")
        from_bytes({}, path, metadata)
        node.must("put", path)
        code, _, err = node.run("get", name, "-o", os.path.join(folder, f"{name}-back.safetensors"))
        if metadata is None:
            assert code == 3, f"nothing was put, so nothing can be got: {code} {err}"
        else:
            assert raw(os.path.join(folder, f"{name}-back.safetensors")) == ({}, metadata)


def one_tensor_alone(node, folder):
    path = os.path.join(folder, "single.safetensors")
    save_file({"w": numpy.arange(6, dtype=numpy.float32).reshape(2, 3)}, path)
    node.must("put", path)
    back = os.path.join(folder, "w.safetensors")
    node.must("get", "single/w", "-o", back)
    assert load_file(back)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    as_numpy = os.path.join(folder, "w.npy")
    node.must("get", "single/w", "-o", as_numpy)
    assert numpy.load(as_numpy).tolist() == [[0, 1, 2], [3, 4, 5]]
    as_bytes = os.path.join(folder, "w.bin")
    node.must("get", "single/w", "-o", as_bytes)
    with open(as_bytes, "rb") as file:
        assert file.read() == numpy.arange(6, dtype=numpy.float32).tobytes()


def npy_files(node, folder):
    for name in NUMPY_TYPES:
        for shape in ((), (5,), (2, 3), (0, 4)):
            array = numpy.frombuffer(bytes(range(1, 97)), numpy.uint8)[: 16 * 6]
            count = int(numpy.prod(shape))
            array = numpy.resize(array, count * numpy.dtype(name).itemsize)
            array = (array % 2 if name == "bool" else array).astype(numpy.uint8).tobytes()
            array = numpy.frombuffer(array, name).reshape(shape)
            path = os.path.join(folder, "in.npy")
            numpy.save(path, array)
            key = f"npy/{name}/{len(shape)}/{count}"
            node.must("put", path, "--key", key)
            back = os.path.join(folder, "out.npy")
            node.must("get", key, "-o", back)
            loaded = numpy.load(back)
            assert (loaded.dtype, loaded.shape, loaded.tobytes()) == (array.dtype, array.shape, array.tobytes()), key


def npy_refusals(node, folder):
    path = os.path.join(folder, "refused.npy")
    for array, word in (
        (numpy.asfortranarray(numpy.ones((2, 3))), "ascontiguousarray"),
        (numpy.ones(3, ">f4"), "astype('float32')"),
        (numpy.zeros(2, [("x", "<f4")]), "records"),
        (numpy.array(["text"]), "no plain number"),
    ):
        numpy.save(path, array)
        code, _, err = node.run("put", path)
        assert code != 0 and word in err, (word, err)
    code, _, err = node.run("get", "BF16/t", "-o", os.path.join(folder, "bf16.npy"))
    assert code == 1 and ".safetensors" in err, err
    assert not os.path.exists(os.path.join(folder, "bf16.npy"))


def hostile_files(node, folder):
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = os.path.join(folder, "hostile.safetensors")
    for header, data, word in (
        ({"t": tensor}, b"\0" * 7, "truncated"),
        ({"t": tensor}, b"\0" * 9, "9 bytes of data"),
        ({"t": dict(tensor, dtype="F31")}, b"\0" * 8, "F31"),
        ({"t": dict(tensor, shape=[3])}, b"\0" * 8, "12 bytes"),
        ({"t": dict(tensor, shape=[2**62, 2**62])}, b"\0" * 8, "64-bit"),
        ({"t": tensor, "u": tensor}, b"\0" * 8, "overlaps"),
        (b'{"t": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "t": {}}', b"", "twice"),
        (b"{" * 100_000, b"", "header"),
        (b"\xff\xfe", b"", "UTF-8"),
    ):
        write_raw(path, header, data)
        code, _, err = node.run("put", path)
        assert code == 5 and word in err, (word, code, err)
    with open(path, "wb") as file:
        file.write(b"\xff" * 8)
    code, _, err = node.run("put", path)
    assert code == 5 and "18446744073709551615" in err, err
    code, out, _ = node.run("ls", "hostile")
    assert code == 0 and json.loads(out) == [], "nothing of a refused file may be put"


def main():
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    tests = [
        numpy_arrays,
        *(dtype_test(dtype, bits) for dtype, bits in DTYPES.items()),
        real_bfloat16_and_float8,
        metadata_alone_and_nothing,
        one_tensor_alone,
        npy_files,
        npy_refusals,
        hostile_files,
    ]
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory() as folder:
        node = Node(os.path.abspath(sys.argv[1]), folder)
        try:
            for test in tests:
                try:
                    why = test(node, folder)
                except Exception as error:
                    failed += 1
                    print(f"failed: {test.__name__}: {type(error).__name__}: {error}")
                    continue
                if why:
                    skipped += 1
                    print(f"skipped: {test.__name__}: {why}")
                else:
                    passed += 1
        finally:
            node.stop()
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
