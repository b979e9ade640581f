"""torch: views that cannot change the store, state dicts, data sets, distributed checkpoints."""

import hetmem
import numpy
import pytest
from conftest import held, until

torch = pytest.importorskip("torch")

import hetmem.torch  # noqa: E402

TYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
    "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


def same(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("name", TYPES)
def test_types(store, key, name):
    given = torch.arange(24).reshape(4, 6).to(getattr(torch, name))
    store.put(key, given)
    found = store.get(key)
    assert (found.dtype, found.shape) == (name, (4, 6))
    assert same(found.torch(), given)
    if name in ("float32", "bfloat16", "float8_e5m2"):
        store.put(key + "/t", given.t())
        assert same(store.get(key + "/t").torch(), given.t().contiguous())


@pytest.mark.parametrize("length", [16, 1 << 20])
@pytest.mark.parametrize("how", ["torch", "from_dlpack", "utils", "as_tensor", "frombuffer"])
def test_a_write_changes_that_view_alone(store, key, length, how):
    given = torch.arange(length, dtype=torch.int64)
    store.put(key, given)
    tensor = store.get(key)
    view = {
        "torch": lambda: tensor.torch(),
        "from_dlpack": lambda: torch.from_dlpack(tensor),
        "utils": lambda: torch.utils.dlpack.from_dlpack(tensor.__dlpack__()),
        "as_tensor": lambda: torch.as_tensor(tensor.torch()),
        "frombuffer": lambda: torch.frombuffer(bytearray(tensor), dtype=torch.int64),
    }[how]()
    assert torch.equal(view, given)
    view[3] = -1
    view.mul_(2)
    assert view[4] == 8 and view[3] == -2
    assert torch.equal(store.get(key).torch(), given) and store.get(key).verify()
    assert torch.equal(tensor.torch(), given) and (tensor.numpy() == given.numpy()).all()


def test_a_view_keeps_what_was_deleted(store, key):
    store.put(key, torch.ones(1 << 20))
    before = held(store)
    view = store.get(key).torch()
    part = view[5:10]
    store.delete(key)
    del view
    assert held(store) == before + 1 and part.sum() == 5
    del part
    until(lambda: held(store) == before)


def test_views_of_read_only_numpy_are_the_users_own_risk_and_torch_warns(store, key):
    """torch.from_numpy takes no notice of read-only: it warns, and a write ends the process. Views come from torch()."""
    store.put(key, torch.ones(10))
    with pytest.warns(UserWarning, match="not writable"):
        torch.from_numpy(store.get(key).numpy())


def test_parameters_and_autograd(store, key):
    layer = torch.nn.Linear(3, 2)
    store.put(key, layer.weight)
    assert torch.equal(store.get(key).torch(), layer.weight.detach())
    weight = store.get(key).torch().requires_grad_()
    (weight * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 3), 2.0))


def test_writers_and_out(store, key):
    with store.create(key, (2, 3), torch.float32) as writer:
        writer.torch().copy_(torch.arange(6.0).reshape(2, 3))
    assert writer.receipt.staged_bytes == 0
    out = torch.empty(2, 3)
    store.get_into(key, out)
    assert torch.equal(out, torch.arange(6.0).reshape(2, 3))
    with store.create(key + "/view", 4, "float32") as writer:
        view = writer.torch()
        view.fill_(1)
    view.fill_(2)
    assert (store.get(key + "/view").numpy() == 1).all()


def test_state_dicts(store, key):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(16, 4)).sum().backward()
    optimizer.step()
    hetmem.torch.put_state_dict(store, key + "/model", model.state_dict())
    hetmem.torch.put_state_dict(store, key + "/optimizer", optimizer.state_dict())
    other = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    hetmem.torch.load_state_dict(other, store, key + "/model")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    found, given = hetmem.torch.get_state_dict(store, key + "/optimizer"), optimizer.state_dict()
    assert found["param_groups"] == given["param_groups"]
    assert isinstance(found["param_groups"][0]["betas"], tuple)
    for number, state in given["state"].items():
        assert all(torch.equal(found["state"][number][name], value) for name, value in state.items())
    torch.optim.Adam(other.parameters()).load_state_dict(found)
    store.put_state_dict(key + "/plain", {"w": numpy.ones(3, "f4")})
    assert hetmem.torch.get_state_dict(store, key + "/plain")["w"].sum() == 3
    with pytest.raises(hetmem.NotFound):
        hetmem.torch.get_state_dict(store, key + "/none")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_sets_in_a_loader(pair, key, workers, start):
    """From the other node, in the sampler's order, by workers that are forked and spawned."""
    one, other = pair
    if workers == 0 and start == "spawn":
        return
    count = 120
    one.put_many({f"{key}/x/{n}": numpy.full(50, n, "f4") for n in range(count)})
    one.put_many({f"{key}/y/{n}": numpy.array(n) for n in range(count)})
    order = numpy.random.default_rng(1).permutation(count).tolist()
    keys = [(f"{key}/x/{n}", f"{key}/y/{n}") for n in range(count)]
    dataset = hetmem.torch.TensorDataset(other, keys, plan=order, ahead=40)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, sampler=order, num_workers=workers, multiprocessing_context=start if workers else None
    )
    for _ in range(2):
        seen = []
        for images, labels in loader:
            assert images.shape == (8, 50) and torch.equal(images[:, 0], labels.float())
            seen.extend(labels.tolist())
        assert seen == order
    assert len(dataset) == count and dataset[5][1] == 5


def test_what_the_plan_says_is_fetched_ahead(pair, key):
    one, other = pair
    one.put_many({f"{key}/{n}": numpy.full(10, n) for n in range(100)})
    dataset = hetmem.torch.TensorDataset(other, [f"{key}/{n}" for n in range(100)], plan=range(100), ahead=20)
    dataset.__getitems__(list(range(10)))
    until(lambda: other.get_here(f"{key}/29") is not None)
    assert other.get_here(f"{key}/45") is None
    # Out of the plan's order it is still right.
    assert [int(sample[0]) for sample in dataset.__getitems__([70, 3])] == [70, 3]


def test_distributed_checkpoints(store, key):
    import torch.distributed.checkpoint as checkpoint

    def state(value):
        return {
            "model": {"weight": torch.full((4, 6), value), "bias": torch.full((6,), value, dtype=torch.bfloat16)},
            "step": int(value),
        }

    for value in (1.0, 2.0):
        checkpoint.save(state(value), storage_writer=hetmem.torch.StorageWriter(store, key), no_dist=True)
        loaded = state(0.0)
        checkpoint.load(loaded, storage_reader=hetmem.torch.StorageReader(store, key), no_dist=True)
        assert loaded["step"] == value and (loaded["model"]["weight"] == value).all()
        assert loaded["model"]["bias"].dtype == torch.bfloat16 and (loaded["model"]["bias"] == value).all()
    # The first checkpoint is gone with its parts.
    assert len(store.list(key)) == 4


def test_generations_of_a_module(store, key):
    layer = torch.nn.Linear(3, 3)
    weights = hetmem.Generation(store, key)
    assert weights.publish(layer.state_dict()) == 1
    version, tensors = weights.get()
    assert version == 1 and torch.equal(tensors["weight"].torch(), layer.weight.detach())
    layer.load_state_dict({name: tensor.torch() for name, tensor in tensors.items()})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_cuda_tensors(key):
    with hetmem.local(host="256MiB", gpu="1GiB") as store:
        given = torch.arange(1 << 20, device="cuda:0", dtype=torch.float32).reshape(1024, 1024)
        store.put(key, given * 2)
        found = store.get(key, device="cuda:0")
        assert found.torch().device.type == "cuda" and torch.equal(found.torch(), given * 2)
        assert torch.equal(store.get(key).torch(), (given * 2).cpu())
        store.put(key + "/t", given.t())
        assert torch.equal(store.get(key + "/t", device="cuda:0").torch(), given.t())
        store.put(key + "/up", torch.ones(10), device="cuda:0")
        assert store.get(key + "/up", device="cuda:0").torch().sum() == 10


def rank_of_two(rank, socket, key, rendezvous):
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        with hetmem.connect(socket) as store:
            whole = torch.arange(40.0).reshape(10, 4)
            mesh = init_device_mesh("cpu", (2,))
            state = {"weight": distribute_tensor(whole, mesh, [Shard(0)]), "bias": torch.full((3,), 7.0)}
            checkpoint.save(state, storage_writer=hetmem.torch.StorageWriter(store, key))
            # Read back cut the other way.
            other = {"weight": distribute_tensor(torch.zeros(10, 4), mesh, [Shard(1)]), "bias": torch.zeros(3)}
            checkpoint.load(other, storage_reader=hetmem.torch.StorageReader(store, key))
            assert torch.equal(other["weight"].full_tensor(), whole) and (other["bias"] == 7).all()
    finally:
        dist.destroy_process_group()


def test_distributed_checkpoints_of_two_ranks(store, key, tmp_path):
    import torch.distributed.checkpoint as checkpoint

    torch.multiprocessing.spawn(rank_of_two, (store.socket, key, str(tmp_path / "rendezvous")), nprocs=2)
    # A program of one process reads what two have written.
    loaded = {"weight": torch.zeros(10, 4), "bias": torch.zeros(3)}
    checkpoint.load(loaded, storage_reader=hetmem.torch.StorageReader(store, key), no_dist=True)
    assert torch.equal(loaded["weight"], torch.arange(40.0).reshape(10, 4)) and (loaded["bias"] == 7).all()
