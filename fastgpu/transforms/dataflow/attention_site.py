"""An attention that was recognised, and how to compute it as one operation.

Every dimension of what takes part has a name: a number, the same for dimensions that belong
together. The names are sorted by what they are for; from that follows how each operand has to be
arranged.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.ir.compat import JaxprEqn, scope
from fastgpu.transforms.dataflow.fused_attention import Form, attention
from fastgpu.transforms.inline import inline_calls, instantiated

# A dimension's name, for each dimension of a value; `None` where there is one element.
Names = tuple[int | None, ...]
# The name of the features of queries, keys and values.
FEATURES = -1
# What the dimensions of the arguments of `attention` are made of.
_Q = (("batch",), ("queries",), ("groups", "heads"), ("features",))
_K = (("batch",), ("keys",), ("groups",), ("features",))
_ARGUMENTS = (_Q, _K, _K)
_SCORES = (("batch",), ("groups", "heads"), ("queries",), ("keys",))


@dataclass
class Site:
    """An attention: the equation that gives its result, and how to compute that from `operands`.

    `operands` are q, k, v, biases and masks as they stand in the program; `names` has the name of
    each of their dimensions. `order` are the names in kinds: batch, queries, key-value heads, query
    heads of each, keys, features.
    """

    result: JaxprEqn
    form: Form
    operands: list[Any]
    names: list[Names]
    order: dict[str, tuple[int, ...]]
    sizes: dict[int, int]
    biases: list[tuple[int, float]]
    masks: list[tuple[int, bool]]
    out: Names

    def fused(self) -> list[JaxprEqn]:
        """The equations in place of `result`."""
        structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.operands]
        program = inline_calls(jax.make_jaxpr(self.compute)(*structs))
        assert not program.consts
        return instantiated(program.jaxpr, self.operands, self.result.outvars)[0]

    def compute(self, *values: Any) -> jax.Array:
        """What `result` gives, of the operands' values."""
        with scope(self.result):
            out = attention(self.form, *self.arguments(*values))
            names = [n for group in _Q for kind in group for n in self.order[kind]]
            out = out.reshape([self.sizes[n] for n in names])
            out = out.transpose([names.index(n) for n in self.out if n is not None])
            aval: Any = self.result.outvars[0].aval
            return out.reshape(aval.shape).astype(aval.dtype)

    def arguments(self, *values: Any) -> list[jax.Array]:
        """q, k, v, bias and mask as `attention` takes them."""
        q, k, v = (self._arranged(i, values[i], kinds) for i, kinds in enumerate(_ARGUMENTS))
        extras = []
        if self.biases:
            terms = [self._arranged(i, values[i], _SCORES) * factor for i, factor in self.biases]
            extras.append(sum(terms[1:], start=terms[0]))
        if self.masks:
            terms = [self._arranged(i, values[i], _SCORES) == keep for i, keep in self.masks]
            seen = terms[0]
            for term in terms[1:]:
                seen = seen & term
            extras.append(seen)
        if extras:
            # The kernel reads a bias for every query and key.
            shape = (q.shape[1], k.shape[1])
            extras = [jnp.broadcast_to(x, (*x.shape[:2], *shape)) for x in extras]
        return [q, k, v, *extras]

    def _arranged(self, index: int, x: Any, kinds: Sequence[Sequence[str]]) -> jax.Array:
        """`x` with one dimension for each of `kinds`, of size 1 for those that it lacks."""
        names = self.names[index]
        present = [n for n in names if n is not None]
        groups = [[n for kind in group for n in self.order[kind]] for group in kinds]
        flat = [n for group in groups for n in group]
        x = x.reshape([size for size, n in zip(x.shape, names, strict=True) if n is not None])
        x = x.transpose([present.index(n) for n in flat if n in present])
        x = x.reshape([self.sizes[n] if n in present else 1 for n in flat])
        # What has one of several dimensions that become one is broadcast along the others.
        full = [
            [self.sizes[n] if any(m in present for m in group) else 1 for n in group]
            for group in groups
        ]
        x = jnp.broadcast_to(x, list(itertools.chain(*full)))
        return x.reshape([math.prod(sizes) for sizes in full])
