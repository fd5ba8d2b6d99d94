"""Where batches come from: arrays in memory, or any iterable; and how they get to the device.

`data` is one of
- a dict of arrays with one leading axis, `{"inputs": x, "labels": y}`, cut into batches here;
- an iterable of batches that can be read again each epoch (a list, a `tf.data` dataset, a loader);
- a callable that takes the epoch's number and returns an iterable of batches;
- an object with the methods of `Batches`, such as `ArrayBatches`.
A batch's place is (epoch, batch in epoch): all that a resumed run needs to go on where it was.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from fastgpu.errors import BatchError
from fastgpu.training.leaves import is_array, leaf_type


@runtime_checkable
class Batches(Protocol):
    """A source of epochs of batches."""

    @property
    def per_epoch(self) -> int | None:
        """Batches in one epoch, if that is known."""
        ...

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` without the first `skip`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What has to be equal for two runs to see the same batches."""
        ...


@dataclass(frozen=True)
class ArrayBatches:
    """Batches of arrays in memory.

    `arrays` is a pytree of arrays of equal length. Each epoch has its own order, which depends on
    `seed` and the epoch's number alone. The last partial batch is left out if `drop_remainder`.

    >>> batches = ArrayBatches({"inputs": np.arange(5)}, 2, shuffle=False)
    >>> [batch["inputs"].tolist() for batch in batches.epoch(0)], batches.per_epoch
    ([[0, 1], [2, 3]], 2)
    """

    arrays: Any
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_remainder: bool = True

    def __post_init__(self) -> None:
        _require_equal_lengths(self.arrays)
        object.__setattr__(self, "arrays", jax.tree.map(np.asarray, self.arrays))
        if self.batch_size < 1 or (self.drop_remainder and self.batch_size > self.examples):
            raise BatchError(
                f"there is no full batch of {self.batch_size} in {self.examples} examples",
                expected=f"1 <= batch_size <= {self.examples}",
                got=f"batch_size={self.batch_size}",
                fix="choose a smaller batch_size",
            )

    @property
    def examples(self) -> int:
        """The length of the arrays."""
        return len(jax.tree.leaves(self.arrays)[0])

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch."""
        if self.drop_remainder:
            return self.examples // self.batch_size
        return math.ceil(self.examples / self.batch_size)

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` (from 0) without the first `skip`."""
        order = np.arange(self.examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, number]).permutation(self.examples)
        for index in range(skip, self.per_epoch):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield jax.tree.map(lambda array, rows=rows: array[rows], self.arrays)

    def identity(self) -> dict[str, Any]:
        """Examples, batch size, and what decides the order."""
        return {
            "examples": self.examples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed if self.shuffle else None,
        }


@dataclass(frozen=True)
class IterableBatches:
    """Batches of an iterable, or of what a callable returns for an epoch's number."""

    source: Any  # an iterable, or a callable epoch -> iterable

    @property
    def per_epoch(self) -> int | None:
        """Batches in one epoch, if the iterable has a length."""
        return len(self.source) if hasattr(self.source, "__len__") else None

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` without the first `skip`, which are read and dropped."""
        batches = self.source if isinstance(self.source, Iterable) else self.source(number)
        return itertools.islice(iter(batches), skip, None)

    def identity(self) -> dict[str, Any]:
        """Nothing is known of it."""
        return {}


def batches_of(
    data: Any, batch_size: int | None, *, seed: int = 0, shuffle: bool, drop_remainder: bool
) -> Batches:
    """`data` (see this module) as a source of batches.

    Raises `BatchError` if it is none of these kinds, if a dict of arrays comes without
    `batch_size`, or other data with one.
    """
    if isinstance(data, Mapping):
        if batch_size is None:
            raise BatchError(
                "a dict of arrays has to be cut into batches",
                expected="batch_size, the number of examples in a batch",
                got="no batch_size",
                fix="pass batch_size=32, or an iterable of batches in place of the dict",
            )
        return ArrayBatches(dict(data), batch_size, seed, shuffle, drop_remainder)
    if batch_size is None and isinstance(data, Batches):
        return data
    if not isinstance(data, Iterable) and not callable(data):
        raise BatchError(
            "the data cannot be read",
            expected="a dict of arrays, an iterable of batches, or a callable epoch -> iterable",
            got=type(data).__name__,
            fix="pass {'inputs': x, 'labels': y} and batch_size",
        )
    if batch_size is not None:
        raise BatchError(
            "batch_size says nothing about an iterable, which is made of batches already",
            expected="batch_size beside a dict of arrays only",
            got=f"batch_size={batch_size} beside a {type(data).__name__}",
            fix="leave batch_size out",
        )
    return IterableBatches(data)


def prefetch(batches: Iterable[Any]) -> Iterator[Any]:
    """`batches` on the device, one ahead: the next one is copied while the last one is used."""
    ahead = None
    for batch in batches:
        on_device = to_device(batch)
        if ahead is not None:
            yield ahead[0]
        ahead = (on_device,)
    if ahead is not None:
        yield ahead[0]


def to_device(batch: Any) -> Any:
    """Arrays of any kind (NumPy, TensorFlow, torch) as JAX arrays; what is no array stays."""

    def put(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__"):
            return leaf
        # A copy of our own: the source may write its next batch into this memory while JAX, which
        # copies later or not at all, still reads it.
        array = np.array(leaf)
        return jax.device_put(array) if is_array(array) else leaf

    return jax.tree.map(put, batch)


def padded(batches: Iterable[Any], *, pad: bool = True) -> Iterator[tuple[Any, int]]:
    """Each batch with the number of its examples; a smaller one is padded to the first one's size.

    The padding repeats the last example with weight 0, so every batch gets "weights".

    >>> batches = [{"x": np.ones(2)}, {"x": np.ones(1)}]
    >>> [(batch["weights"].tolist(), count) for batch, count in padded(batches)]
    [([1.0, 1.0], 2), ([1.0, 0.0], 1)]
    """
    size = None
    for batch in batches:
        count = batch_length(batch)
        if count == 0:
            continue
        size = size or count
        yield (_pad(batch, count, max(size, count)) if pad else batch), count


def batch_length(batch: Any) -> int:
    """The length of the leading axis; raises `BatchError` if the leaves disagree."""
    return _require_equal_lengths(batch)


def _pad(batch: Any, count: int, size: int) -> Any:
    if not isinstance(batch, Mapping):
        raise BatchError(
            "the batch cannot be padded",
            expected="a dict, which can take 'weights'",
            got=type(batch).__name__,
            fix="make batches dicts",
        )
    weights = np.asarray(batch.get("weights", np.ones(count, np.float32)))
    if size == count:
        return {**batch, "weights": weights}
    rows = np.minimum(np.arange(size), count - 1)
    filled = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], dict(batch))
    real = (np.arange(size) < count).reshape(-1, *[1] * (weights.ndim - 1))
    return {**filled, "weights": np.where(real, weights[rows], 0).astype(weights.dtype)}


def _require_equal_lengths(tree: Any) -> int:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    lengths = {}
    for path, leaf in paths:
        shape = np.shape(leaf)
        if not shape:
            raise BatchError(
                f"batch{jax.tree_util.keystr(path)} has no leading axis of examples",
                expected="an array [examples, ...]",
                got=leaf_type(leaf),
                fix="repeat it once per example, or make it part of the model",
            )
        lengths[jax.tree_util.keystr(path)] = shape[0]
    if len(set(lengths.values())) != 1:
        raise BatchError(
            "the arrays differ in their number of examples" if lengths else "the data is empty",
            expected="arrays of one length",
            got=", ".join(f"{path}: {length}" for path, length in lengths.items()) or "no arrays",
            fix="check how the arrays were cut",
        )
    return next(iter(lengths.values()))
