"""Tensor files against the official package."""

import hetmem
import hetmem.safetensors
import ml_dtypes
import numpy
import pytest

safetensors = pytest.importorskip("safetensors.numpy")


def test_files_go_in_and_out(store, key, tmp_path):
    given = {
        "a/weight": numpy.arange(12, dtype="f4").reshape(3, 4),
        "b": numpy.ones((2, 2), ml_dtypes.bfloat16),
        "empty": numpy.zeros((0, 3), "i8"),
        "scalar": numpy.array(7, "u1"),
    }
    safetensors.save_file(given, tmp_path / "model.safetensors", metadata={"step": "100"})
    prefix = key.replace("/", "-")
    keys = hetmem.safetensors.load_file_into(store, tmp_path / "model.safetensors", prefix)
    assert sorted(keys) == sorted(f"{prefix}/{name}" for name in given)
    for name, array in given.items():
        found = store.get(f"{prefix}/{name}").numpy()
        assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()
    names = hetmem.safetensors.save_file_from(store, tmp_path / "copy.safetensors", prefix)
    assert sorted(names) == sorted(given)
    found = safetensors.load_file(tmp_path / "copy.safetensors")
    assert found.keys() == given.keys() and all((found[name] == given[name]).all() for name in given)
    with safetensors.safe_open(tmp_path / "copy.safetensors", "numpy") as opened:
        assert opened.metadata() == {"step": "100"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.safetensors", "model.safetensors"]


def test_what_is_no_such_file_is_refused_as_a_whole(store, key, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\x05\0\0\0\0\0\0\0{}")
    with pytest.raises(hetmem.Corrupt, match="bad.safetensors"):
        hetmem.safetensors.load_file_into(store, path, key)
    with pytest.raises(OSError, match="none.safetensors"):
        hetmem.safetensors.load_file_into(store, tmp_path / "none.safetensors")
    with pytest.raises(hetmem.NotFound):
        hetmem.safetensors.save_file_from(store, tmp_path / "out.safetensors", key)
    assert not (tmp_path / "out.safetensors").exists() and store.list(key) == []


def test_trees_of_jax(store, key):
    pytest.importorskip("jax")
    import hetmem.jax
    import jax.numpy as jnp

    tree = {"layers": [{"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, {"w": jnp.full((3, 1), 2.0)}], "step": jnp.int32(5)}
    hetmem.jax.put_tree(store, key, tree)
    assert f"{key}/layers/0/w" in store.list(key)
    found = hetmem.jax.get_tree(store, key, like=tree)
    assert found["step"] == 5 and (found["layers"][1]["w"] == 2).all() and found["layers"][0]["b"].shape == (3,)
