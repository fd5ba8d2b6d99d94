"""Iterators of `tf.data` are given back in another thread.

When an iterator is deleted, TensorFlow waits for the thread that tunes its pipeline. That thread
may have missed the call to stop, and then sleeps on for as long as the iterator had been alive:
half a minute between two epochs. It needs nothing that training needs.
"""

import functools
import threading
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

ADAPTER = "keras.src.trainers.data_adapters.tf_dataset_adapter"


def close_in_background(adapter: ModuleType) -> None:
    """Have the batches of `adapter`, Keras's module for tf.data, come from `_elsewhere`."""
    known: Any = getattr(adapter, "TFDatasetAdapter", None)
    original = getattr(known, "get_jax_iterator", None)
    if original is not None and not hasattr(original, "__wrapped__"):
        known.get_jax_iterator = _elsewhere(original)


def _elsewhere(batches: Callable[..., Generator[Any]]) -> Callable[..., Generator[Any]]:
    """The same batches; what makes them is closed by a thread of its own."""

    @functools.wraps(batches)
    def get_jax_iterator(self: Any) -> Generator[Any]:
        source = batches(self)
        try:
            for batch in source:  # noqa: UP028 -- `yield from` would close it here
                yield batch
        finally:
            threading.Thread(target=source.close, daemon=True).start()

    return get_jax_iterator
