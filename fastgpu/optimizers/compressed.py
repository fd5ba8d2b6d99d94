"""`compressed`: any optax transform, its moments stored in 8 bits.

The transform itself runs unchanged: before each update its moments are decoded, afterwards they are
encoded again. Within a compiled step the decoded moments of a leaf live only as long as that leaf
is updated; between steps there are only bytes and scales.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from fastgpu.errors import OptimizerError
from fastgpu.optimizers.blockwise import Blockwise, dequantize, quantize

_MAX_BLOCK_SIZE = 2**20


class CompressedState(NamedTuple):
    """The state of `compressed(tx)`.

    step: int32 scalar, the updates done: what dithered rounding counts with.
    inner_state: the state of `tx`, with `Blockwise` in the place of the large moments.

    >>> state = compressed(optax.adam(1e-3)).init({"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)})
    >>> adam = state.inner_state[0]
    >>> adam.mu["w"].codes.dtype, adam.mu["b"].dtype
    (dtype('uint8'), dtype('float32'))
    """

    step: ArrayLike
    inner_state: Any


def compressed(
    tx: optax.GradientTransformation,
    *,
    block_size: int = 256,
    min_size: int = 4096,
    rounding: Literal["dithered", "nearest"] = "dithered",
) -> optax.GradientTransformationExtraArgs:
    """`tx`, with its state in 8 bits a value: about a quarter of the bytes of float32.

    After "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2021, arXiv:2110.02861),
    with the logarithmic code of `fastgpu.optimizers.blockwise`. Stored are the leaves of the state
    that are floating-point, have the shape of a parameter, and start without looking at the
    parameters' values; everything else stays as it is: counts, hyperparameters, small leaves, and
    copies of the parameters (schedule-free, DoG), in which 8 bits would lose the steps.

    Args:
      tx: any optax transform, chains and wrappers included. Wrap the whole: `compressed(chain)`.
      block_size: values per scale. Smaller blocks follow the values more closely and cost more.
      min_size: smaller leaves (biases, norms) stay as they are.
      rounding: "dithered" rounds up or down such that the mean over the steps is right, without
        random numbers: equal inputs give equal bits. Under "nearest", averages that change by less
        than half a code (6%) a step come to rest, such as Adam's second moment and the momentum of
        Lion; docs/training.md has the figures.

    Updates have the dtypes that `tx` gives them. Structure and dtypes of the state never change.
    What is stored of Adam's moments overstates |m| / sqrt(v) by at most 19% (nearest: 9%), because
    second moments never round to zero, and values out of range move to the side where the update
    shrinks. The exception: an m below 2e-13 of the largest of a block without negatives.

    Raises `OptimizerError` for a `tx` that is no transform, for settings out of range, and for a
    state that another optimizer made.

    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = compressed(optax.adam(0.1))
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones((64, 64))}, state, params)
    >>> round(float(updates["w"][0, 0]), 4)
    -0.1
    """
    _require_settings(tx, block_size, min_size, rounding)
    inner = optax.with_extra_args_support(tx)

    def encode(leaf: jax.Array, step: ArrayLike) -> Blockwise:
        dither = step if rounding == "dithered" else None
        return quantize(leaf, block_size=block_size, dither=dither)

    def init(params: Any) -> CompressedState:
        step = jnp.zeros((), jnp.int32)
        leaves, tree = jax.tree.flatten(inner.init(params))
        chosen = _moments(inner.init, params, leaves, min_size)
        leaves = [
            encode(leaf, step) if is_moment else leaf
            for leaf, is_moment in zip(leaves, chosen, strict=True)
        ]
        return CompressedState(step, jax.tree.unflatten(tree, leaves))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, CompressedState]:
        if not isinstance(state, CompressedState):
            raise _foreign_state(state)
        before = state.inner_state
        decoded = jax.tree.map(_decoded, before, is_leaf=_is_blockwise)
        updates, after = inner.update(updates, decoded, params, **extra_args)
        step = optax.safe_increment(state.step)

        def keep(old: Any, new: Any) -> Any:
            # The dtype that the leaf began with, also if `tx` promotes it.
            return encode(new.astype(old.dtype), step) if _is_blockwise(old) else new

        after = jax.tree.map(keep, before, after, is_leaf=_is_blockwise)
        return updates, CompressedState(step, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_blockwise(node: Any) -> bool:
    return isinstance(node, Blockwise)


def _decoded(node: Any) -> Any:
    return dequantize(node) if _is_blockwise(node) else node


def _moments(init: Any, params: Any, leaves: list[Any], min_size: int) -> list[bool]:
    """Which leaves of the state `init(params)` are worth 8 bits and bear them."""
    shapes = {np.shape(param) for param in jax.tree.leaves(params)}
    copies = _made_of_values(init, params)
    return [
        np.shape(leaf) in shapes
        and np.size(leaf) >= min_size
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and leaf.dtype.itemsize > 1
        and not is_copy
        for leaf, is_copy in zip(leaves, copies, strict=True)
    ]


def _made_of_values(init: Any, params: Any) -> list[bool]:
    """Which leaves of `init(params)` depend on the values of `params`, not only on their types."""
    jaxpr = jax.make_jaxpr(init)(params).jaxpr
    reached = set(map(id, jaxpr.invars))
    for equation in jaxpr.eqns:
        if any(id(variable) in reached for variable in equation.invars):
            reached.update(map(id, equation.outvars))
    return [id(variable) in reached for variable in jaxpr.outvars]


def _require_settings(tx: Any, block_size: Any, min_size: Any, rounding: Any) -> None:
    if not isinstance(tx, optax.GradientTransformation):
        raise OptimizerError(
            "`compressed` got something else than an optimizer",
            expected="an optax GradientTransformation, such as optax.adam(1e-3)",
            got=f"{type(tx).__name__} {getattr(tx, '__name__', '')}".strip(),
            fix="call it with its learning rate first: compressed(optax.adam(1e-3))",
        )
    if not _is_integer(block_size) or not 1 <= block_size <= _MAX_BLOCK_SIZE:
        raise OptimizerError(
            "`block_size` is out of range",
            expected=f"an integer from 1 to {_MAX_BLOCK_SIZE}",
            got=repr(block_size),
            fix="leave it out for 256; 64 follows the values more closely and costs 5% more",
        )
    if not _is_integer(min_size) or min_size < 0:
        raise OptimizerError(
            "`min_size` is out of range",
            expected="an integer, 0 or more: the elements from which a leaf is compressed",
            got=repr(min_size),
            fix="leave it out for 4096",
        )
    if rounding not in ("dithered", "nearest"):
        raise OptimizerError(
            "`rounding` is not one that there is",
            expected="'dithered' or 'nearest'",
            got=repr(rounding),
            fix="leave it out for 'dithered'",
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _foreign_state(state: Any) -> OptimizerError:
    return OptimizerError(
        "this state is not one of `compressed`",
        expected="the CompressedState that compressed(tx).init(params) returns",
        got=f"{type(state).__name__}",
        fix="make state and step with the same optimizer: "
        "tx = compressed(optax.adam(1e-3)); TrainState.create(variables, tx, rng=0)",
    )
