"""From a function of pytrees to a closed jaxpr, and back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from fastgpu.errors import TraceError
from fastgpu.ir.compat import ClosedJaxpr, eval_jaxpr


@dataclass(frozen=True)
class Traced:
    """A function as data: its closed jaxpr, and the trees its arguments and outputs had.

    `in_tree` is the tree of `(args, kwargs)`; the jaxpr's inputs are its leaves in order.
    """

    closed_jaxpr: ClosedJaxpr
    in_tree: Any
    out_tree: Any

    def as_fun(self) -> Callable[..., Any]:
        """A function of the original pytrees that evaluates `closed_jaxpr`.

        >>> import jax.numpy as jnp
        >>> double = trace(lambda d: {"y": d["x"] * 2}, {"x": jnp.arange(3)}).as_fun()
        >>> double({"x": jnp.ones(3, int)})
        {'y': Array([2, 2, 2], dtype=int32)}
        """

        def fun(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            if tree != self.in_tree:
                raise TraceError(
                    "the arguments have another structure than the traced ones",
                    expected=str(self.in_tree),
                    got=str(tree),
                    fix="trace the function again with these arguments",
                )
            outputs = eval_jaxpr(self.closed_jaxpr.jaxpr, self.closed_jaxpr.consts, *leaves)
            return jax.tree.unflatten(self.out_tree, outputs)

        return fun

    def with_jaxpr(self, closed_jaxpr: ClosedJaxpr) -> "Traced":
        """The same function with another body."""
        return replace(self, closed_jaxpr=closed_jaxpr)


def trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Traced:
    """Trace `fn` to a closed jaxpr; arguments are pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises `TraceError` when an argument or an output is not an array.

    >>> import jax, jax.numpy as jnp
    >>> print(trace(jnp.sin, jax.ShapeDtypeStruct((3,), jnp.float32)).closed_jaxpr)
    { lambda ; a:f32[3]. let b:f32[3] = sin a in (b,) }
    """
    leaves, in_tree = jax.tree.flatten((args, kwargs))
    out_tree: list[Any] = []

    def flat(*flat_args: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(in_tree, flat_args)
        outputs, tree = jax.tree.flatten(fn(*args, **kwargs))
        out_tree.append(tree)
        for index, output in enumerate(outputs):
            if not _is_array(output):
                raise TraceError(
                    f"output leaf {index} of {getattr(fn, '__name__', fn)!r} is not an array",
                    expected="a pytree whose leaves are arrays or numbers",
                    got=f"{output!r} of type {type(output).__name__}",
                    fix="return only arrays; keep names and flags outside of the function",
                )
        return outputs

    # The jaxpr's debug info should name the user's function and arguments, not this wrapper's.
    flat.__name__ = flat.__qualname__ = getattr(fn, "__name__", type(fn).__name__)
    closed_jaxpr = jax.make_jaxpr(flat)(*leaves)
    return Traced(closed_jaxpr, in_tree, out_tree[-1])


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") or isinstance(value, bool | int | float | complex)
