"""What people do by hand about memory: `jax.checkpoint` around blocks, and Keras's `RematScope`.

Every way is a context in which the models of `fastgpu.models` are traced:

- a block (residual block, transformer block, stage of a VGG) under `jax.checkpoint`, with each of
  JAX's policies that needs no names;
- what `keras.RematScope` does, on the Flax layers that stand where Keras has its own: "full" puts
  every layer under `jax.checkpoint` by itself, "larger_than" those with a large result,
  "activations" the activation functions, "list_of_layers" those that a person names, here every
  second block. (All blocks named are the policy `nothing_saveable`.)
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import linen as nn

from fastgpu.compile.plan import modelled_whole
from fastgpu.hardware import device
from fastgpu.ir import rewrite
from fastgpu.ir.compat import ClosedJaxpr, JaxprEqn
from fastgpu.ir.rewrite import interpret
from fastgpu.models import llama, transformer

# A class and its method that a person would put under `jax.checkpoint`.
Block = tuple[type[nn.Module], str]
Way = Callable[[], AbstractContextManager[Any]]
# Which call it is -> whether it goes under `jax.checkpoint`.
Chosen = Callable[[tuple[str, ...]], bool]

POLICIES = (
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "nothing_saveable",
)
# Keras has one layer for each of these.
_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Conv, nn.ConvTranspose, nn.Dense, nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.Dropout),
    *(transformer.SelfAttention, llama.GroupedQueryAttention),
)
_ACTIVATIONS = ("relu", "relu6", "gelu", "silu")
_POOLS = ("max_pool",)
# Results that are "larger than": these quantiles of the sizes of all layers' results.
_QUANTILES = (0.5, 0.75)
# A layer inside of a layer under `jax.checkpoint` would be computed a third time.
_inside: ContextVar[bool] = ContextVar("inside", default=False)


def ways(block: Block, trace: Callable[[], Any]) -> dict[str, Way]:
    """Every way to save memory by hand, by name; `trace()` initializes the model once."""
    policies = {name: getattr(jax.checkpoint_policies, name) for name in POLICIES}
    sizes = _result_sizes(trace)
    limits = [int(np.quantile(list(sizes.values()), q)) for q in _QUANTILES]
    return {
        **{f"blocks: {name}": partial(_blocks, block, p) for name, p in policies.items()},
        "RematScope list_of_layers: every second block": partial(_blocks, block, None, every=2),
        "RematScope full": partial(_layers, lambda call: True),
        **{
            f"RematScope larger_than: {limit}": partial(
                _layers, lambda call, limit=limit: sizes.get(call, 0) > limit
            )
            for limit in limits
        },
        "RematScope activations": partial(_functions, _ACTIVATIONS),
    }


def measure(way: Way, build: Callable[[], Any], target: str, known: dict[str, dict]) -> dict:
    """Compiled peak and roofline seconds of the step that `build` gives when traced in `way`.

    `known` keeps what was compiled: a policy about matrix products leaves convolutions as they are.
    """
    with way():
        step, state, batch = build()
        search, whole, args = step.search((state, batch), target)
    text = str(search.planner.unconstrained.program.jaxpr)
    program = re.sub(r"policy=.*", "", text)
    if program not in known:
        first = search.unconstrained
        priced = whole(_expanded(first.modelled.program))
        seconds = modelled_whole(priced, args, device(target)).seconds
        known[program] = {"peak_bytes": first.peak, "step_seconds": seconds}
    return known[program]


def _expanded(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program as XLA gets it: what `jax.checkpoint` computes again, behind a barrier."""
    return rewrite(program, {"remat2": _behind_a_barrier, "checkpoint": _behind_a_barrier})


def _behind_a_barrier(eqn: JaxprEqn) -> Callable[..., list[Any]]:
    def run(*args: Any) -> list[Any]:
        return interpret(eqn.params["jaxpr"], (), jax.lax.optimization_barrier(args), {})

    return run


@contextmanager
def _blocks(block: Block, policy: Any, every: int = 1) -> Iterator[None]:
    """Every block, or every second one, under `jax.checkpoint`."""
    order: dict[tuple[str, ...], int] = {}

    def chosen(call: tuple[str, ...]) -> bool:
        return order.setdefault(call, len(order)) % every == 0

    with _method(*block, chosen, policy):
        yield


@contextmanager
def _layers(chosen: Chosen) -> Iterator[None]:
    """Layers under `jax.checkpoint`, each by itself."""
    with ExitStack() as stack:
        for layer in _LAYERS:
            stack.enter_context(_method(layer, "__call__", chosen, None))
        if chosen(()):
            stack.enter_context(_functions((*_ACTIVATIONS, *_POOLS)))
        yield


@contextmanager
def _functions(names: tuple[str, ...]) -> Iterator[None]:
    """Functions without parameters under `jax.checkpoint`."""
    with ExitStack() as stack:
        for name in names:
            original = getattr(nn, name)
            stack.enter_context(mock.patch.object(nn, name, _function_under_checkpoint(original)))
        yield


def _function_under_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, *settings: Any, **more: Any) -> Any:
        if _inside.get():
            return original(x, *settings, **more)
        return jax.checkpoint(lambda x: original(x, *settings, **more))(x)

    return run


def _method(
    owner: type[nn.Module], name: str, chosen: Chosen, policy: Any
) -> AbstractContextManager[Any]:
    """`owner`'s method `name` under `jax.checkpoint`, for the calls that are chosen."""
    original = getattr(owner, name)

    def run(self: Any, *arrays: Any, **settings: Any) -> Any:
        if _inside.get() or not chosen(_call(self, settings)):
            return original(self, *arrays, **settings)
        token = _inside.set(True)
        try:
            # Keywords such as `train` are no arrays.
            checkpointed = nn.remat(lambda me, *xs: original(me, *xs, **settings), policy=policy)
            return checkpointed(self, *arrays)
        finally:
            _inside.reset(token)

    return mock.patch.object(owner, name, run)


def _call(module: nn.Module, settings: dict[str, Any]) -> tuple[str, ...]:
    """Which call it is: where the module is in the model, and the name if it is a part of it."""
    return (*module.path, settings.get("name", ""))


def _result_sizes(trace: Callable[[], Any]) -> dict[tuple[str, ...], int]:
    """The number of elements that each layer gives."""
    sizes: dict[tuple[str, ...], int] = {}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *arrays: Any, **settings: Any) -> Any:
            result = original(self, *arrays, **settings)
            sizes[_call(self, settings)] = result.size
            return result

        return run

    with ExitStack() as stack:
        for layer in _LAYERS:
            stack.enter_context(mock.patch.object(layer, "__call__", recording(layer.__call__)))
        trace()
    return sizes
