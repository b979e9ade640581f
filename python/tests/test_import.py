"""What importing costs, and what it does not load."""

import subprocess
import sys


def run(code):
    command = [sys.executable, "-c", code]
    # Elsewhere, so that it is the installed package that is imported.
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120, cwd="/").stdout


def test_import_loads_no_framework_and_no_driver():
    loaded = run(
        "import hetmem, sys\n"
        "print(*[name for name in ('numpy', 'torch', 'jax', 'ml_dtypes', 'asyncio', 'json', 'tempfile') if name in sys.modules])\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(*[name for name in ('libcuda', 'libnvidia', 'libibverbs', 'librdmacm', 'libcudart') if name in maps])\n"
        "print(len(__import__('os').listdir('/proc/self/task')))\n"
    )
    assert loaded.split() == ["1"]


def test_import_is_quick():
    """Reported, and held to what no machine should take: the median of five, less what Python itself takes."""
    code = "import time; start = time.perf_counter(); import hetmem; print((time.perf_counter() - start) * 1e3)"
    times = sorted(float(run(code)) for _ in range(5))
    print(f"import hetmem: {times[2]:.1f} ms (median of {len(times)})")
    assert times[0] < 100, times


def test_help_reads_well():
    text = run("import hetmem; help(hetmem.Store); help(hetmem.local); help(hetmem.Tensor)")
    for words in ("get(self, /, key, device=None, *, dtype=None, zero_copy='preferred'", "hetmem.NotFound (a KeyError)", "in seconds"):
        assert words in text, words
    undocumented = run(
        "import hetmem\n"
        "for kind in (hetmem.Store, hetmem.Tensor, hetmem.Writer, hetmem.Receipt, hetmem.Stat, hetmem.Generation):\n"
        "    print(*[f'{kind.__name__}.{name}' for name, value in vars(kind).items()\n"
        "            if not name.startswith('_') and not value.__doc__ and name not in ('store', 'name', 'keep')])\n"
    )
    assert undocumented.split() == []


def test_every_name_of_the_stub_exists():
    import ast
    import inspect
    import pathlib

    import hetmem
    import hetmem._core

    stub = ast.parse(pathlib.Path(hetmem.__file__).with_name("_core.pyi").read_text())
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            real = getattr(hetmem._core, node.name)
            named = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            public = {name for name in vars(real) if not name.startswith("_")}
            assert public <= named, public - named
            assert {name for name in named if not name.startswith("_")} <= public
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and callable(vars(real).get(item.name)):
                    if item.args.kwonlyargs and "keywords" not in str(inspect.signature(vars(real)[item.name])):
                        parameters = inspect.signature(vars(real)[item.name]).parameters
                        assert {argument.arg for argument in item.args.kwonlyargs} <= set(parameters), item.name
        elif isinstance(node, ast.FunctionDef):
            assert callable(getattr(hetmem._core, node.name))
