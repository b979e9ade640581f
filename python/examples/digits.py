"""Trains a classifier on scikit-learn's digits, with batches that a second node fetches from the first.

    pip install hetmem scikit-learn
    python digits.py

One node has the data, as a machine that loads and cleans it would; the trainer has a node of its own and gets each batch
from the other by rows. With torch installed the same batches train the same model once more, as torch tensors.
"""

import hetmem
import numpy
from sklearn.datasets import load_digits

EPOCHS = 20
BATCH = 128


def load(store):
    """Puts images and labels, shuffled once, into the loader's node."""
    digits = load_digits()
    order = numpy.random.default_rng(0).permutation(len(digits.target))
    store.put("digits/images", (digits.data[order] / 16).astype("f4"))
    store.put("digits/labels", digits.target[order].astype("i8"))


def batches(store, rows, epoch):
    """Images and labels of one epoch, batch after batch, as hetmem tensors."""
    starts = numpy.random.default_rng(epoch).permutation(range(0, rows, BATCH))
    for start in starts.tolist():
        stop = min(start + BATCH, rows)
        yield store.get_range("digits/images", start, stop), store.get_range("digits/labels", start, stop)


def train_numpy(store, rows):
    """Softmax regression by gradient descent."""
    weights, bias = numpy.zeros((64, 10), "f4"), numpy.zeros(10, "f4")
    for epoch in range(EPOCHS):
        for images, labels in batches(store, rows, epoch):
            images, labels = images.numpy(), labels.numpy()
            scores = images @ weights + bias
            likely = numpy.exp(scores - scores.max(axis=1, keepdims=True))
            likely /= likely.sum(axis=1, keepdims=True)
            likely[numpy.arange(len(labels)), labels] -= 1
            weights -= 0.5 / len(labels) * images.T @ likely
            bias -= 0.5 / len(labels) * likely.sum(axis=0)
    return lambda images: (images @ weights + bias).argmax(axis=1)


def train_torch(store, rows):
    """The same model in torch."""
    import torch

    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(EPOCHS):
        for images, labels in batches(store, rows, epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images.torch()), labels.torch()).backward()
            optimizer.step()
    return lambda images: model(torch.from_numpy(images)).argmax(dim=1).numpy()


def main():
    with hetmem.local(host="64MiB") as loader, hetmem.local(host="64MiB", join=loader.address) as trainer:
        load(loader)
        trainer.wait("digits/labels")
        rows = trainer.stat("digits/images").shape[0] * 4 // 5
        held_out = trainer.get_range("digits/images", rows).numpy().copy()
        labels = trainer.get_range("digits/labels", rows).numpy()
        ways = {"numpy": train_numpy}
        try:
            import torch  # noqa: F401

            ways["torch"] = train_torch
        except ImportError:
            print("torch is not installed: numpy only")
        for name, train in ways.items():
            accuracy = (train(trainer, rows)(held_out) == labels).mean()
            print(f"{name}: {accuracy:.3f} of {len(labels)} digits that it has not seen are right")
            assert accuracy > 0.9
        print(trainer.get_range("digits/images", 0, BATCH).receipt)


if __name__ == "__main__":
    main()
