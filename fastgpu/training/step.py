"""`train_step`: a loss and an optimizer in, one compiled step out.

The gradient is `jax.value_and_grad(optimize(loss_fn))`: fastgpu's passes see the forward program,
JAX differentiates what they return. With a memory budget, what the backward half keeps is decided
for the whole step, optimizer included. The one warning: the step donates the state it is given, so
that parameters and optimizer state exist once on the device. Keep the state it returns.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastgpu.compile import (
    Attempt,
    CountSearch,
    Gradient,
    Search,
    compile_for,
    gradient_distance,
    gradient_of,
    options_for,
    shape_of,
)
from fastgpu.errors import BatchError, FastGPUError, LossError, TraceError
from fastgpu.hardware import Device, Target, resolve_target
from fastgpu.ir.compat import ClosedJaxpr, Tracer, platform
from fastgpu.training.leaves import first_difference, is_array, leaf_type, leaf_types
from fastgpu.training.loss_scale import all_finite, chosen, scaled, unscaled
from fastgpu.training.microbatch import (
    accumulated,
    batch_examples,
    check_accumulate_steps,
    check_global_batch,
    divisors,
    first_axis_split,
    require_divisible,
    require_global_batch,
    resized,
)
from fastgpu.training.state import TrainState, strong
from fastgpu.training.ways_out import ways_out
from fastgpu.transforms import Precision, optimize, policy_of, whole_step
from fastgpu.transforms.remat import check_compress

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, Mapping[str, Any]]]]


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    passes: Any = "default",
    target: Any = None,
    donate: bool = True,
    recompile: Literal["error", "allow"] = "error",
    memory_budget: int | float | str | None = None,
    accumulate_steps: int | Literal["auto"] = 1,
    global_batch: int | None = None,
    compress: str | None = None,
    precision: Precision = None,
) -> "TrainStep":
    """A compiled `(state, batch) -> (state, metrics)`.

    Args:
      loss_fn: `(params, model_state, batch, rng) -> (loss, (model_state, metrics))`: `loss` a
        floating-point scalar, `model_state` of the structure, shapes and dtypes that came in,
        `metrics` a dict of arrays. `rng` is `state.rng` folded with `state.step`.
        `supervised_loss` makes one of a Flax module.
      optimizer: an optax `GradientTransformation`. It is given `value=loss`, for those that ask.
      passes, target: handed to `fastgpu.optimize`; `passes=()` leaves the program as it is.
      donate: reuse the memory of the state that came in for the one that goes out.
      recompile: what a batch of another structure, shape or dtype than the first one means:
        "error", or "allow" (one compilation per kind of batch).
      memory_budget: bytes that the compiled step may take at its peak, "16GiB", or "60%" of its
        peak without a budget: state, batch, temporaries and code, on one device. What does not fit
        is computed again in the backward half; the numbers stay. Found by compiling, at most four
        times, when the step meets its first batch.
      accumulate_steps: microbatches that each batch is cut into along axis 0, one after the other;
        gradients, loss and metrics are those of the whole batch (`batch["weights"]` counts as in
        `supervised_loss`) if the loss is a mean over examples that do not see each other, within
        rounding. Not equal: batch normalization sees a microbatch at a time, and updates
        `model_state` once for each; dropout draws other masks (each microbatch's key is the
        step's folded with its number). "auto" picks the number and what to keep together, for the
        least roofline seconds within `memory_budget`, by default the memory of the target; it
        compiles for each number that it tries, mostly one or two.
      global_batch: the number of examples in a batch, those of all devices and hosts together;
        batches of another size are refused. `fastgpu.plan` takes the step to be for this size,
        whatever the size of the batch it is given.
      compress: "int8" or "bfloat16" allows a plan to keep values for the backward half in fewer
        bits; gradients then differ a little, as `TrainStep.gradient_error` measures.
      precision: "bf16-mixed", "fp16-mixed", "float32", "tf32", or a dict from scopes to these, as
        for `fastgpu.optimize`; `None` is what `configure` set. Parameters, optimizer state,
        gradients, `model_state` and metrics keep their dtypes. "fp16-mixed" scales the loss: the
        state has to be made with the same precision, a step whose gradients overflow is skipped
        (all but `state.step` stays, and the scale is halved), and there is a metric "loss_scale".

    The metrics are `{"loss": loss, **metrics}`, on the device: a step never waits for them.
    Composes with `jax.jit` and `jax.lax.scan`; there, batches are not compared.

    Raises `LossError` when `loss_fn` returns something else, before anything is compiled, and
    `BatchError` when a later batch differs from the first, cannot be cut into microbatches or is
    not of `global_batch`; `BudgetError` when no plan fits; `ConfigurationError` for settings that
    make no sense.

    >>> def loss_fn(params, model_state, batch, rng):
    ...     error = batch["x"] @ params["w"] - batch["y"]
    ...     return (error**2).mean(), (model_state, {"error": abs(error).mean()})
    >>> step = train_step(loss_fn, optax.sgd(0.1))
    >>> state = TrainState.create({"params": {"w": jnp.zeros(2)}}, optax.sgd(0.1), rng=0)
    >>> state, metrics = step(state, {"x": jnp.ones((4, 2)), "y": jnp.ones(4)})
    >>> state.params["w"], metrics["loss"], int(state.step)
    (Array([0.2, 0.2], dtype=float32), Array(1., dtype=float32), 1)
    """
    return TrainStep(
        loss_fn,
        optimizer,
        passes,
        target,
        donate,
        recompile,
        memory_budget,
        accumulate_steps,
        global_batch,
        compress,
        precision,
    )


class TrainStep:
    """What `train_step` returns. Call it; `lower` it; `loss_fn` and `optimizer` are kept."""

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        passes: Any = "default",
        target: Any = None,
        donate: bool = True,
        recompile: Literal["error", "allow"] = "error",
        memory_budget: int | float | str | None = None,
        accumulate_steps: int | Literal["auto"] = 1,
        global_batch: int | None = None,
        compress: str | None = None,
        precision: Precision = None,
    ) -> None:
        if recompile not in ("error", "allow"):
            raise ValueError(f"`recompile` is 'error' or 'allow', not {recompile!r}")
        check_accumulate_steps(accumulate_steps)
        if global_batch is not None:
            check_global_batch(global_batch, accumulate_steps)
        self.loss_fn, self.optimizer = loss_fn, optimizer
        self.passes, self.target = passes, target
        self.donate = donate
        self.recompile: Literal["error", "allow"] = recompile
        self.memory_budget = memory_budget
        self.accumulate_steps: int | Literal["auto"] = accumulate_steps
        self.global_batch = global_batch
        check_compress(compress)
        self.compress = compress
        self.precision = policy_of(precision)
        self._first_batch: tuple[dict[str, str], Any] | None = None
        self._known_batches: set[tuple[Any, ...]] = set()
        self._fresh = True
        self._searches: dict[Any, tuple[Search | CountSearch, Callable[..., Any]]] = {}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Do one step."""
        leaves, tree = jax.tree.flatten(batch)
        if any(isinstance(leaf, Tracer) for leaf in (state.step, *leaves)):
            # A compiled program with options of its own cannot be part of another one.
            step = self._planned if self._plans else self._jitted
            return step(state, batch)
        if self.recompile == "error":
            self._check_batch(batch, leaves, tree)
        require_alive("state", state.step)
        if self._fresh:  # afterwards states come from a step, which makes strong types only
            state = strong(state)
        try:
            result = self._jitted(state, batch)
        except ValueError:
            for name, arg in (("state", state), ("batch", batch)):
                require_alive(name, arg)
            raise
        self._fresh = False
        return result

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """Trace and lower for these shapes (arrays or `jax.ShapeDtypeStruct`), without running."""
        return self._jitted.lower(state, batch)

    def search(
        self, args: Sequence[Any], target: str | Device | Target | None
    ) -> tuple[Search | CountSearch, Callable[..., Callable[..., Any]], tuple[Any, ...]]:
        """What `fastgpu.plan` asks: the search for these shapes, what it compiles, and on what."""
        state, batch = jax.tree.map(shape_of, tuple(args))
        if self.global_batch is not None:
            batch = resized(batch, self.global_batch)
        state = jax.tree.map(lambda leaf: leaf.update(weak_type=False), state)
        target = self.target if target is None else target
        types = leaf_types((state, batch))
        key = tuple(types.items()), str(target), _shardings((state, batch))
        if key not in self._searches:
            self._searches[key] = self._new_search(state, batch, target)
        return *self._searches[key], (state, batch)

    def gradient_error(self, state: TrainState, batch: Any) -> float:
        """How far the plan's gradients are from exact ones, measured by running both.

        The norm of the difference as a part of the norm, for the first microbatch. Needs the memory
        of the microbatch's step without a budget. 0.0 for a step that is not planned.
        """
        if not self._plans:
            return 0.0
        attempt, _ = self._attempt(state, batch)
        assert attempt.version is not None
        exact = attempt.version.planner.unconstrained.program
        microbatch = jax.tree.map(lambda leaf: leaf[:: attempt.accumulate_steps], batch)
        rng = jax.random.fold_in(state.rng, state.step)
        rest = (self._beside_params(state), microbatch, rng)
        return gradient_distance(exact, attempt.modelled.program, state.params, rest)

    def compile(self, state: TrainState, batch: Any, target: Any = None) -> Any:
        """The step without a memory budget, compiled for `target` (by default its own), not run."""
        state, batch = jax.tree.map(shape_of, (state, batch))
        target = self.target if target is None else target
        return self._compiled(self._build(self._value_and_grad(), target), state, batch, target)

    def _compiled(self, fn: Any, state: TrainState, batch: Any, target: Any) -> Any:
        return compile_for(fn, (state, batch), target, **self._donation(), **_same_places(state))

    def _new_search(
        self, state: TrainState, batch: Any, target: Any
    ) -> tuple[Search | CountSearch, Callable[..., Callable[..., Any]]]:
        @functools.cache
        def with_count(count: int) -> tuple[Search, Callable[..., Callable[..., Any]]]:
            return self._search_with(count, state, batch, target)

        if self.accumulate_steps != "auto":
            return with_count(self.accumulate_steps)
        examples, device = batch_examples(batch), resolve_target(target).device
        # Over devices, every one has a part of every microbatch.
        parts = math.lcm(*map(first_axis_split, jax.tree.leaves(batch)))
        search = CountSearch(
            divisors(max(1, examples // parts)),
            lambda count: with_count(count)[0],
            device,
            gradient_bytes=sum(
                leaf.size * max(4, leaf.dtype.itemsize) for leaf in jax.tree.leaves(state.params)
            ),
            default_budget=device.memory_bytes,
        )
        # A program reads parameters, model_state and a microbatch, in this order.
        first = len(jax.tree.leaves((state.params, self._beside_params(state))))

        def build(program: ClosedJaxpr) -> Callable[..., Any]:
            microbatch: Any = program.in_avals[first]
            return with_count(examples // microbatch.shape[0])[1](program)

        return search, build

    def _search_with(
        self, count: int, state: TrainState, batch: Any, target: Any
    ) -> tuple[Search, Callable[..., Callable[..., Any]]]:
        def loss_of(params: Any, rest: Any) -> Any:
            return self._differentiated()(params, *rest)

        if count > 1:
            microbatch = resized(batch, require_divisible(batch, count) // count)
        else:
            microbatch = batch
        rng = jax.eval_shape(lambda rng, step: jax.random.fold_in(rng, step), state.rng, state.step)
        gradient = Gradient(
            loss_of,
            state.params,
            (self._beside_params(state), microbatch, rng),
            target,
            self.passes,
            self.compress,
            self.precision,
        )

        def build(program: ClosedJaxpr) -> Callable[..., Any]:
            def value_and_grad(params: Any, *rest: Any) -> Any:
                return gradient.evaluate(program, params, rest)

            return self._build(accumulated(value_and_grad, self._differentiated(), count), target)

        def compiled(program: ClosedJaxpr) -> Any:
            return self._compiled(build(program), state, batch, target)

        search = gradient.search(compiled)
        search.accumulate_steps = count
        search.ways_out = ways_out(self, state, batch, gradient)
        return search, build

    @property
    def _plans(self) -> bool:
        return self.memory_budget is not None or self.accumulate_steps == "auto"

    @cached_property
    def _jitted(self) -> Any:
        if not self._plans:
            return jax.jit(self._build(self._value_and_grad(), self.target), **self._donation())
        # The plan is made while JAX traces: once for each kind of batch.
        options = options_for(platform())
        return jax.jit(self._planned, compiler_options=options, **self._donation())

    def _planned(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        self._require_examples(batch)
        attempt, build = self._attempt(state, batch)
        return build(attempt.modelled.program)(state, batch)

    def _attempt(self, state: TrainState, batch: Any) -> tuple[Attempt, Callable[..., Any]]:
        search, build, _ = self.search((state, batch), None)
        budget = search.default_budget if self.memory_budget is None else self.memory_budget
        assert budget is not None
        return search.within(budget), build

    def _donation(self) -> dict[str, Any]:
        return {"donate_argnums": (0,) if self.donate else ()}

    def _cache_size(self) -> int:
        return self._jitted._cache_size()

    def _value_and_grad(self) -> Callable[..., Any]:
        loss_fn = self._differentiated()
        value_and_grad = gradient_of(loss_fn, self.passes, self.target, self.precision)
        if self.accumulate_steps == "auto":  # decided elsewhere; here, the batch at once
            return value_and_grad
        return accumulated(value_and_grad, loss_fn, self.accumulate_steps)

    def _differentiated(self) -> LossFn:
        """The loss as it is differentiated: checked, and scaled where the precision needs it."""
        loss_fn = _checked(self.loss_fn)
        return scaled(loss_fn) if self.precision.scales_loss else loss_fn

    def _beside_params(self, state: TrainState) -> Any:
        """What the differentiated loss takes as `model_state`."""
        if not self.precision.scales_loss:
            return state.model_state
        if state.loss_scale is None:
            raise FastGPUError(
                "a step in 'fp16-mixed' scales its loss, and the state has no scale",
                expected="a state with a `loss_scale`",
                got="loss_scale=None",
                fix="create it with TrainState.create(variables, tx, rng=..., "
                "precision='fp16-mixed')",
            )
        return state.model_state, state.loss_scale.scale

    def _build(
        self, value_and_grad: Callable[..., Any], target: Any = None
    ) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
        optimizer = optax.with_extra_args_support(self.optimizer)
        scales = self.precision.scales_loss
        if scales:
            value_and_grad = unscaled(value_and_grad)

        def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
            self._require_examples(batch)
            rng = jax.random.fold_in(state.rng, state.step)
            (loss, (model_state, metrics)), grads = value_and_grad(
                state.params, self._beside_params(state), batch, rng
            )
            if scales:
                model_state, _ = model_state
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
            after = state.replace(
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                model_state=model_state,
                opt_state=opt_state,
            )
            after = strong(after)
            if scales:
                after, metrics = _unless_overflown(state, after, grads, metrics)
            _require_same_state(state, after)
            return after, {**metrics, "loss": loss}

        passes = whole_step(self.passes, target)
        # The loss has its precision already.
        return optimize(train_step, passes, target, precision={}) if passes else train_step

    def _check_batch(self, batch: Any, leaves: list[Any], tree: Any) -> None:
        # Shapes and dtypes as they stand, so that the check of an equal batch costs microseconds.
        seen = tree, *((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        if seen in self._known_batches:
            return
        _require_arrays(batch)
        self._require_examples(batch)
        if self._first_batch is None:
            self._first_batch = leaf_types(batch), tree
        types, first_tree = self._first_batch
        difference = first_difference(types, leaf_types(batch))
        if difference is None and tree != first_tree:
            difference = "", str(first_tree), str(tree)
        if difference is not None:
            raise _changed_batch(*difference)
        self._known_batches.add(seen)

    def _require_examples(self, batch: Any) -> None:
        if self.global_batch is not None:
            require_global_batch(batch, self.global_batch)
        if self.accumulate_steps != "auto" and self.accumulate_steps > 1:
            require_divisible(batch, self.accumulate_steps)


def _unless_overflown(
    state: TrainState, after: TrainState, grads: Any, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """`after` if the gradients are finite, else `state` one step on; with the next loss scale."""
    assert state.loss_scale is not None
    finite = all_finite(grads)
    kept = chosen(finite, after.replace(step=state.step), state).replace(step=after.step)
    metrics = {**metrics, "loss_scale": state.loss_scale.scale}
    return kept.replace(loss_scale=state.loss_scale.after(finite)), metrics


def _shardings(tree: Any) -> tuple[Any, ...]:
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def _same_places(state: TrainState) -> dict[str, Any]:
    """A sharded state comes out of the step where it went in."""
    if not any(_shardings(state)):
        return {}
    return {"out_shardings": (jax.tree.map(lambda leaf: leaf.sharding, state), None)}


def _checked(loss_fn: LossFn) -> LossFn:
    """`loss_fn`, whose result is checked while it is traced: before anything is compiled."""

    def loss_with_checked_result(params: Any, model_state: Any, batch: Any, rng: jax.Array):
        result = loss_fn(params, model_state, batch, rng)
        match result:
            case (loss, (new_model_state, metrics)) if isinstance(metrics, Mapping):
                pass
            case _:
                raise LossError(
                    "the loss function returns another structure than a step can use",
                    expected="(loss, (model_state, metrics)), metrics a dict",
                    got=_outline(result),
                    fix="return (loss, (model_state, {})) if there are no metrics",
                )
        _require_float_scalar(loss)
        _require_same_model_state(model_state, new_model_state)
        return loss, (new_model_state, dict(metrics))

    return loss_with_checked_result


def _outline(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_outline, value))})"
    if isinstance(value, Mapping):
        return f"a dict with keys {list(value)}"
    return leaf_type(value)


def _require_float_scalar(loss: Any) -> None:
    got = leaf_type(loss)
    if not is_array(loss) or np.shape(loss) != ():
        raise LossError(
            "the loss is not a scalar",
            expected="float32[]",
            got=got,
            fix="reduce it in the loss function, for example with .mean()",
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise LossError(
            "the loss cannot be differentiated",
            expected="a floating-point scalar",
            got=got,
            fix="compute the loss in float32",
        )


def _require_same_model_state(before: Any, after: Any) -> None:
    difference = first_difference(leaf_types(before), leaf_types(after))
    if difference is None and jax.tree.structure(before) != jax.tree.structure(after):
        difference = "", str(jax.tree.structure(before)), str(jax.tree.structure(after))
    if difference is not None:
        path, expected, got = difference
        raise LossError(
            f"the loss function changes the type of model_state{path}",
            expected=expected,
            got=got,
            fix="return model_state with the structure, shapes and dtypes that came in",
        )


def _require_same_state(before: TrainState, after: TrainState) -> None:
    difference = first_difference(leaf_types(before), leaf_types(after))
    if difference is not None:
        path, expected, got = difference
        raise TraceError(
            f"the optimizer changes the type of state{path}",
            expected=expected,
            got=got,
            fix="create the state with the optimizer that the step was made with",
        )


def _require_arrays(batch: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if not is_array(leaf):
            raise BatchError(
                f"batch{jax.tree_util.keystr(path)} is not an array",
                expected="a pytree whose leaves are arrays of numbers",
                got=f"{leaf_type(leaf)} {str(leaf)[:40]!r}",
                fix="keep names and other text outside of the batch",
            )


def _changed_batch(path: str, expected: str, got: str) -> BatchError:
    return BatchError(
        f"batch{path} changed since the first call: the step would recompile",
        expected=expected,
        got=got,
        fix="drop the last partial batch (drop_remainder); or pad it and give the padding weight 0 "
        "(batch['weights']); or pass train_step(..., recompile='allow')",
    )


def require_alive(name: str, tree: Any) -> None:
    """Raise `FastGPUError` if an array of `tree` was donated to a step before."""
    if any(map(_is_deleted, jax.tree.leaves(tree))):
        raise FastGPUError(
            f"the {name} was already used up: a step donates the state it is given, "
            "so that the memory can be used again",
            expected=f"a {name} whose arrays are alive, such as the state of the last step",
            got=f"a {name} with deleted arrays",
            fix="write `state, metrics = step(state, batch)`; or use train_step(..., donate=False)",
        )


def _is_deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
