"""What training changes: one pytree, so that it can be donated, scanned over and saved whole."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import unfreeze

from fastgpu.errors import FastGPUError
from fastgpu.training.loss_scale import LossScale
from fastgpu.transforms import Precision, policy_of


class TrainState(struct.PyTreeNode):
    """The state of a training run.

    step: int32 scalar, the number of steps done.
    params: any pytree of floating-point arrays, what the optimizer changes.
    model_state: what the model itself changes, such as `{"batch_stats": ...}`; `{}` if nothing.
    opt_state: optax's.
    rng: a random key; each step uses it folded with `step`, so it never changes and a resumed run
      draws the same numbers.
    loss_scale: what a step in "fp16-mixed" scales its loss by; `None` for every other.

    >>> tx = optax.adam(1e-3)
    >>> state = TrainState.create({"params": {"w": jnp.ones(3)}, "batch_stats": {}}, tx, rng=0)
    >>> state.step, state.model_state
    (Array(0, dtype=int32), {'batch_stats': {}})
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: jax.Array
    loss_scale: LossScale | None = None

    @classmethod
    def create(
        cls,
        variables: Mapping[str, Any],
        tx: optax.GradientTransformation,
        *,
        rng: jax.Array | int,
        precision: Precision = None,
    ) -> "TrainState":
        """The state before the first step.

        `variables` are Flax's: "params" is trained, every other collection becomes `model_state`.
        Arrays are copied, because a step donates its state: `variables` stay yours. `rng` is a
        random key, or a seed. `precision` is the step's: "fp16-mixed" needs a loss scale, which is
        part of the state. Raises `FastGPUError` if "params" is missing or holds a leaf that is not
        floating-point.

        >>> state = TrainState.create({"params": {"w": jnp.ones(3)}}, optax.sgd(0.1), rng=0)
        >>> state.step, state.variables
        (Array(0, dtype=int32), {'params': {'w': Array([1., 1., 1.], dtype=float32)}})
        """
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise FastGPUError(
                "the variables have no collection 'params'",
                expected="{'params': ..., 'batch_stats': ...}, as module.init returns",
                got=f"the keys {sorted(variables)}"
                if isinstance(variables, Mapping)
                else type(variables).__name__,
                fix="pass TrainState.create({'params': params}, tx, rng=key)",
            )
        collections = {name: _owned(tree) for name, tree in unfreeze(dict(variables)).items()}
        params = collections.pop("params")
        _require_floating(params)
        opt_state = _distinct(tx.init(params), params)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=collections,
            opt_state=opt_state,
            rng=_owned(_typed_key(rng)),
            loss_scale=LossScale.create() if policy_of(precision).scales_loss else None,
        )

    @property
    def variables(self) -> dict[str, Any]:
        """`{"params": params, **model_state}`, for `module.apply` and for exporting."""
        return {"params": self.params, **self.model_state}


def strong(tree: Any) -> Any:
    """`tree` with every weakly typed leaf made strong: a weak type is another program to JAX."""

    def make(leaf: Any) -> Any:
        if isinstance(leaf, bool | int | float | complex):
            leaf = jnp.asarray(leaf)
        if getattr(leaf, "weak_type", False):
            return jax.lax.convert_element_type(leaf, leaf.dtype)
        return leaf

    return jax.tree.map(make, tree)


def _owned(tree: Any) -> Any:
    return strong(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree))


def _distinct(opt_state: Any, params: Any) -> Any:
    """Some optimizers keep `params` itself; a buffer can be donated only once, so copy those."""
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def make(leaf: Any) -> Any:
        if id(leaf) in seen or not isinstance(leaf, jax.Array):
            leaf = jnp.array(leaf, copy=True)
        seen.add(id(leaf))
        return leaf

    return strong(jax.tree.map(make, opt_state))


def _typed_key(rng: jax.Array | int) -> jax.Array:
    if isinstance(rng, int):
        return jax.random.key(rng)
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    return jax.random.wrap_key_data(rng)


def _require_floating(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise FastGPUError(
                f"params{jax.tree_util.keystr(path)} cannot be trained",
                expected="a floating-point array",
                got=f"{leaf.dtype}{list(leaf.shape)}",
                fix="keep it in another collection of the variables than 'params'",
            )
