"""The command-line tool that comes with the wheel, and a node of its own that Python connects to."""

import json
import pathlib
import subprocess
import sys

import hetmem
import numpy
import pytest

PROGRAM = pathlib.Path(sys.executable).with_name("hetmem")


@pytest.mark.skipif(not PROGRAM.exists(), reason="this wheel was built without the program hetmem")
def test_a_node_that_the_program_runs(tmp_path):
    socket = str(tmp_path / "node.sock")
    flags = ["--host", "32MiB", "--gpu", "off", "--listen", "127.0.0.1:0", "--max-objects", "1024"]
    node = subprocess.Popen([PROGRAM, "serve", "--socket", socket, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert json.loads(node.stdout.readline())
        with hetmem.connect(socket) as store:
            store.put("x", numpy.arange(6, dtype="f4"))
            numpy.save(tmp_path / "y.npy", numpy.eye(3))
            subprocess.run([PROGRAM, "--socket", socket, "put", tmp_path / "y.npy", "--key", "y"], check=True)
            assert (store.get("y").numpy() == numpy.eye(3)).all()
            listed = subprocess.run([PROGRAM, "--socket", socket, "ls"], check=True, capture_output=True, text=True)
            assert "x" in listed.stdout.split() and "y" in listed.stdout.split()
    finally:
        node.terminate()
        assert node.wait(30) == 0
