"""The store with async and await."""

import asyncio

import hetmem
import hetmem.aio
import numpy
import pytest


def test_calls_are_awaited(store, key):
    async def work():
        async with await hetmem.aio.connect(store.socket) as aio:
            receipt = await aio.put(key, numpy.arange(6).reshape(2, 3))
            assert receipt.target.startswith(store.node)
            assert (await aio.get(key)).numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
            assert (await aio.get(key, verify=True)).shape == (2, 3)
            assert await aio.exists(key) and await aio.list(key) == [key]
            async with aio.create(key + "/new", 3, "int8") as writer:
                writer.numpy()[:] = 5
            assert bytes(await aio.get(key + "/new")) == b"\5\5\5"
            with pytest.raises(ZeroDivisionError):
                async with aio.create(key + "/failed", 3, "int8"):
                    raise ZeroDivisionError
            assert not await aio.exists(key + "/failed")
            with pytest.raises(KeyError):
                await aio.get(key + "/none")
            assert len(await aio.get_many([key, key])) == 2
            assert await aio.delete(key)

    asyncio.run(work())


def test_a_wait_leaves_the_loop_free(store, key):
    async def work():
        async with await hetmem.aio.connect(store.socket) as aio:
            waiting = asyncio.gather(*(aio.wait(f"{key}/{number}", 30) for number in range(10)))
            await asyncio.sleep(0.05)
            for number in range(10):
                await aio.put(f"{key}/{number}", b"x")
            await asyncio.wait_for(waiting, 30)

    asyncio.run(work())


def test_every_call_of_the_store_is_there():
    plain = {name for name in vars(hetmem.Store) if not name.startswith("_")}
    missing = plain - set(vars(hetmem.aio.Store)) - {"node", "socket", "address", "get_here"}
    assert not missing, missing
    assert "hetmem.NotFound" in hetmem.aio.Store.get.__doc__
