import jax
import numpy as np
import pytest


@pytest.fixture
def distance():
    """A function: how far one tree is from another, relative to it, in the Euclidean norm."""

    def distance(got, expected):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        off = sum(float(np.sum((a - b) ** 2)) for a, b in wide)
        return (off / sum(float(np.sum(b**2)) for _, b in wide)) ** 0.5

    return distance
