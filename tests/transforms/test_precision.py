"""Mixed precision: what is cast, what stays, and that the numbers are those of float32, rounded."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from fastgpu import ir, models
from fastgpu.compile import compile_for, memory_report, value_and_grad
from fastgpu.errors import ConfigurationError
from fastgpu.transforms import inspect, optimize
from fastgpu.transforms.inline import inline_calls
from fastgpu.transforms.precision import in_precision, policy_of

LOW = {"bf16-mixed": jnp.bfloat16, "fp16-mixed": jnp.float16}
# Half a unit in the last place of bfloat16 is 2^-9; in a chain of products a few add up.
BF16_NOISE = 16 * 2**-9


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mixed(fn, *args, precision: Any = "bf16-mixed"):
    """`fn`'s program in mixed precision."""
    closed = inline_calls(jax.make_jaxpr(fn)(*args))
    after = in_precision(closed, policy_of(precision))
    ir.verify_types(closed, after, label="precision")
    return after


def dtypes(closed, *names):
    """The dtypes in which the primitives called `names` are computed, in order."""
    found = [eqn for eqn in ir.walk(closed) if eqn.primitive.name in names]
    return [read(eqn).name for eqn in found]


def read(eqn):
    """The dtype of an equation's last input."""
    return eqn.invars[-1].aval.dtype


X, W, B = array(4, 8), array(8, 8, seed=1), array(8, seed=2)


# ---- what is cast and what stays


@pytest.mark.parametrize("precision", LOW)
def test_products_and_what_is_between_them_are_low_the_rest_is_not(precision):
    def fn(x, w, b):
        hidden = jnp.tanh(x @ w + b)
        return jnp.mean(jnp.sin(hidden @ w) * 2)

    closed = mixed(fn, X, W, B, precision=precision)
    low = np.dtype(LOW[precision]).name
    assert dtypes(closed, "dot_general", "add", "tanh") == [low] * 4
    assert dtypes(closed, "sin", "mul", "reduce_sum") == ["float32"] * 3
    assert [aval.dtype for aval in closed.out_avals] == [jnp.float32]


def test_convolutions_biases_activations_and_pools_are_low():
    def fn(x, k, b, w):
        x = lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nn.max_pool(jax.nn.relu(x + b), (2, 2), (2, 2))
        return x.reshape(len(x), -1) @ w

    closed = mixed(fn, array(2, 4, 4, 3), array(3, 3, 3, 5), array(5), array(20, 2))
    names = ("conv_general_dilated", "add", "reduce_window_max", "dot_general")
    assert dtypes(closed, *names) == ["bfloat16"] * 4


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(),
        nn.RMSNorm(),
        nn.GroupNorm(2),
        nn.BatchNorm(use_running_average=True),
        nn.LayerNorm(use_fast_variance=False),
    ],
    ids=["layer", "rms", "group", "batch, running", "layer, two passes"],
)
def test_norms_are_computed_in_float32(norm):
    variables = norm.init(jax.random.key(0), X)
    closed = mixed(lambda x, w: norm.apply(variables, x @ w) @ w, X, W)
    kinds = dtypes(closed, *("add", "sub", "mul", "rsqrt", "square", "reduce_sum", "div"))
    assert set(kinds) == {"float32"} and dtypes(closed, "dot_general") == ["bfloat16"] * 2


def test_batch_statistics_are_float32_of_low_activations():
    norm = nn.BatchNorm(use_running_average=False)

    def fn(variables, x, w):
        return norm.apply(variables, x @ w, mutable=["batch_stats"])

    variables = norm.init(jax.random.key(0), X)
    closed = mixed(fn, variables, X, W)
    assert {aval.dtype.name for aval in closed.out_avals} == {"float32"}
    assert set(dtypes(closed, "reduce_sum", "mul", "add", "sub")) == {"float32"}


@pytest.mark.parametrize("softmax", [jax.nn.softmax, lambda x: jnp.exp(jax.nn.log_softmax(x))])
def test_softmaxes_see_scores_in_float32(softmax):
    closed = mixed(lambda q, k: softmax(q @ k.T / 3.0) @ k, X, X)
    assert dtypes(closed, "div", "reduce_max", "exp", "reduce_sum")[0] == "float32"
    assert set(dtypes(closed, "exp", "sub", "div", "reduce_max")) == {"float32"}
    assert dtypes(closed, "dot_general") == ["bfloat16"] * 2


def test_losses_are_float32():
    def fn(x, w, y):
        logits = x @ w
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4))
        return jnp.mean((logits - y) ** 2) + cross.mean() + optax.huber_loss(logits, y).sum()

    assert set(dtypes(mixed(fn, X, W, X), "sub", "abs", "exp", "mul")) == {"float32"}


def test_custom_derivatives_run_as_written_and_their_results_are_low():
    for activation in (jax.nn.relu, jax.nn.gelu, jax.nn.softplus):
        closed = mixed(lambda x, w, f=activation: f(x @ w) @ w, X, W)
        low = [
            eqn.outvars[0].aval.dtype for eqn in closed.jaxpr.eqns if "dot" in str(eqn.primitive)
        ]
        assert low == [jnp.bfloat16] * 2
        fast = optimize(lambda x, w, f=activation: f(x @ w) @ w, (), precision="bf16-mixed")
        exact = jax.jvp(jax.jit(lambda x, f=activation: f(x @ W) @ W), (X,), (X,))
        low = jax.jvp(functools.partial(fast, w=W), (X,), (X,))
        for got, expected in zip(low, exact, strict=True):
            np.testing.assert_allclose(got, expected, atol=3e-2 * float(abs(expected).max()))


def test_data_and_parameters_are_rounded_for_products_only():
    def update(w, x):
        gradient = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)
        for _ in range(2):  # the second time it is no longer the parameter itself
            w = w - 1e-3 * gradient
        return x @ w, w

    closed = mixed(update, W, X)
    assert set(dtypes(closed, "sub")) == {"float32"}
    assert set(dtypes(closed, "dot_general")) == {"bfloat16"}


def test_embeddings_start_a_stream_of_low_activations():
    def fn(table, tokens, w):
        x = table[tokens]
        return jnp.sum((x + x @ w) @ w)

    assert dtypes(mixed(fn, array(10, 8), jnp.arange(3), W), "add")[-1] == "bfloat16"
    # Of data that is looked up, differences are exact.
    neighbours = mixed(lambda x, i, w: (x[i] - x[i + 1]) @ w, array(10, 8), jnp.arange(3), W)
    assert dtypes(neighbours, "sub") == ["float32"]


def test_what_the_user_decided_is_left_alone():
    def fn(x, w):
        low = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
        exact = jnp.matmul(x, w, precision="highest")
        wide = lax.dot(low, low.T, preferred_element_type=jnp.float32)
        whole = jnp.arange(4) @ jnp.arange(4)
        return low, exact, wide, whole

    closed = inline_calls(jax.make_jaxpr(fn)(X, W))
    assert str(in_precision(closed, policy_of("bf16-mixed"))) == str(closed)
    with jax.enable_x64(True):
        x = np.ones((2, 2))
        closed = mixed(lambda x: jnp.tanh(x @ x) @ x, x)
        assert set(dtypes(closed, "tanh", "dot_general")) == {"float64"}


def test_constants_are_not_rounded():
    def fn(x, w):
        return (x @ w / 0.9) @ w

    closed = mixed(fn, X, W)
    assert dtypes(closed, "div") == ["float32"]
    assert dtypes(closed, "dot_general") == ["bfloat16"] * 2
    assert dtypes(mixed(lambda x, w: (x @ w / 0.5) @ w, X, W), "div") == ["bfloat16"]


def test_numbers_that_float16_does_not_have_stay_in_float32():
    def fn(x, w):
        y = x @ w
        return (jnp.where(y > 0, y / (jnp.abs(y) + 1e-9), -1e9) @ w).astype(jnp.float32)

    assert set(dtypes(mixed(fn, X, W, precision="fp16-mixed"), "div", "select_n")) == {"float32"}
    assert set(dtypes(mixed(fn, X, W), "div", "select_n")) == {"bfloat16"}


# ---- loops, calls and derivatives


def layers(x, w):
    return lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x @ w[0], w)[0]


def recurrent(x, w):
    def cell(carry, row):
        state, total = carry
        state = jnp.tanh(row @ w[0] + state @ w[1])
        return (state, total + state), jax.nn.sigmoid(state)

    zeros = jnp.zeros(x.shape[-1:])
    (_, total), outs = lax.scan(cell, (zeros, zeros), x)
    return outs @ w[2] + total


def repeated(x, w):
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[0]), x)


def branching(x, w):
    y = x @ w[0]
    chosen = lax.cond(x[0, 0] > 0, lambda y: jnp.tanh(y @ w[1]), lambda y: y * 0.5, y)
    return chosen @ w[2]


@jax.custom_vjp
def halved(x):
    return x * 1.0


halved.defvjp(lambda x: (x * 1.0, None), lambda _, g: (g / 2,))


def own_gradient(x, w):
    return halved(x @ w[0]) @ w[1]


def recomputed(x, w):
    return jax.checkpoint(lambda x: jax.checkpoint(jnp.tanh)(x @ w[0]) @ w[1])(x @ w[2])


def mapped(x, w):
    return jax.vmap(jax.jit(lambda row, w: jnp.tanh(row @ w[0]) @ w[1]), (0, None))(x, w)


def split(x, w):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("i")

    def of_rows(x, w):
        return lax.psum(jnp.tanh(x @ w[0]) @ w[1], "i")

    specs = {"in_specs": (rows, PartitionSpec()), "out_specs": PartitionSpec()}
    return jax.shard_map(of_rows, mesh=mesh, **specs)(x @ w[2], w)


PROGRAMS = (layers, recurrent, repeated, branching, own_gradient, recomputed, mapped, split)


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_every_kind_of_program_keeps_its_types_and_numbers(fn, distance):
    x, w = array(4, 8), 0.5 * array(3, 8, 8, seed=1)
    closed = mixed(fn, x, w)
    assert set(dtypes(closed, "dot_general")) == {"bfloat16"}
    assert str(in_precision(closed, policy_of("bf16-mixed"))) == str(closed)
    fast = optimize(fn, (), precision="bf16-mixed")

    def both(fn):
        def loss(x, w):
            return jnp.sum(jnp.sin(fn(x, w)))

        if getattr(fn, "__wrapped__", fn) is repeated:  # a loop without reverse mode
            return fn(x, w), jax.jvp(fn, (x, w), (x, w))[1]
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)

    got, expected = both(fast), both(fn)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}
    assert distance(got, expected) < BF16_NOISE


def test_a_stack_of_layers_carries_low_activations_a_sum_does_not():
    def carried(closed):
        scan = next(eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan")
        return [v.aval.dtype.name for v in scan.outvars[: scan.params["num_carry"]]]

    assert carried(mixed(layers, X, array(3, 8, 8))) == ["bfloat16"]

    def added_up(x, w):  # bfloat16 would lose what is below a 256th of the sum
        return lax.scan(lambda c, row: (c + jnp.sum(row @ w), None), 0.0, x)[0]

    ones = jnp.ones((1000, 1))
    assert carried(mixed(added_up, ones, jnp.ones((1, 1)))) == ["float32"]
    assert optimize(added_up, precision="bf16-mixed")(ones, jnp.ones((1, 1))) == 1000


def test_gradients_of_products_are_low_products_with_float32_results():
    def fn(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    fast = optimize(fn, (), precision="bf16-mixed")
    closed = inline_calls(jax.make_jaxpr(jax.grad(fast, (0, 1)))(X, W))
    assert dtypes(closed, "dot_general") == ["bfloat16"] * 6
    assert {aval.dtype.name for aval in closed.out_avals} == {"float32"}
    # What a shared parameter's gradients add up to is not rounded in between.
    assert dtypes(closed, "add_any")[-1] == "float32"


def test_forward_mode_second_derivatives_and_vmap(distance):
    def fn(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    fast = optimize(fn, (), precision="bf16-mixed")
    for change in (
        lambda f: jax.jvp(jax.grad(f, 1), (X, W), (X, W))[1],
        lambda f: jax.vmap(jax.grad(f, 1), (0, None))(X, W),
    ):
        got, expected = (jax.jit(functools.partial(change, f))() for f in (fast, fn))
        assert distance(got, expected) < BF16_NOISE


# ---- scopes, and the other precisions


class Net(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(8, name="body", dtype=self.dtype)(x))
        return nn.Dense(3, name="head", dtype=self.dtype)(x)


def test_scopes_have_precisions_of_their_own():
    variables = Net().init(jax.random.key(0), X)
    exact = {"*": "bf16-mixed", "head": "float32"}
    after = inspect(Net().apply, variables, X, precision=exact, passes=["inline"]).after
    products = [eqn for eqn in ir.walk(after) if eqn.primitive.name == "dot_general"]
    assert [read(eqn) for eqn in products] == [jnp.bfloat16, jnp.float32]
    assert products[1].params["precision"] == (lax.Precision.HIGHEST,) * 2
    # The last that matches holds, and what matches nothing is left alone.
    for precision, names in (
        ({"head": "float32", "*": "bf16-mixed"}, ["bfloat16"] * 2),
        ({"Net/b?dy": "bf16-mixed"}, ["bfloat16", "float32"]),
        ({}, ["float32"] * 2),
    ):
        after = inspect(Net().apply, variables, X, precision=precision).after
        assert dtypes(after, "dot_general") == names

    def named(x, w):
        def body(c, w):
            with jax.named_scope("inner"):
                return jnp.tanh(c @ w), None

        with jax.named_scope("outer"):
            return lax.scan(body, x, w)[0]

    precision = {"outer/inner": "bf16-mixed"}
    assert dtypes(mixed(named, X, W[None], precision=precision), "dot_general") == ["bfloat16"]


@pytest.mark.parametrize(
    "precision, asked",
    [
        ("float32", lax.Precision.HIGHEST),
        ("tf32", lax.Precision.HIGH),
        ("default", lax.Precision.DEFAULT),
    ],
)
def test_float32_products_are_asked_for_a_precision(precision, asked):
    def fn(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ jnp.matmul(w, w, precision="high"))

    with jax.default_matmul_precision("bfloat16"):  # as `configure` sets it: overruled
        fast = optimize(fn, (), precision=precision)
        closed = inline_calls(jax.make_jaxpr(jax.grad(fast))(X, W))
    found = {str(eqn.params["precision"]) for eqn in ir.walk(closed) if "dot" in str(eqn.primitive)}
    assert found == {str((p, p)) for p in (asked, lax.Precision.HIGH)}
    np.testing.assert_array_equal(fast(X, W), jax.jit(fn)(X, W))


@pytest.mark.parametrize(
    "precision, says",
    [
        ("bf16", r"(?s)precision='bf16'.*'bf16-mixed'"),
        ({"head": "float8"}, r"precision='float8'"),
        (16, r"precision=16"),
        ({"a": "bf16-mixed", "b": "fp16-mixed"}, r"(?s)one low dtype.*bf16-mixed, fp16-mixed"),
    ],
)
def test_unknown_precisions_are_refused_at_once(precision, says):
    for transform in (optimize, value_and_grad):
        with pytest.raises(ConfigurationError, match=says):
            transform(jnp.sin, precision=precision)


def test_a_scope_that_is_not_there_is_named_with_those_that_are():
    variables = Net().init(jax.random.key(0), X)
    fast = optimize(Net().apply, precision={"*": "bf16-mixed", "haed": "float32"})
    with pytest.raises(ConfigurationError, match=r"(?s)no scope is called 'haed'.*Net/head"):
        fast(variables, X)


def test_verification_compares_types_only(monkeypatch):
    monkeypatch.setenv("FASTGPU_VERIFY", "1")
    optimize(lambda x, w: jnp.tanh(x @ w) @ w, ["inline"], precision="bf16-mixed")(X, W)


# ---- models


def loss_of(model, rest, spec):
    def loss(params, x):
        out = model.apply({"params": params, **rest}, x)
        classes = jnp.cos(jnp.arange(out.shape[-1]))
        return jnp.mean(jnp.sum(jax.nn.log_softmax(out) * classes, -1))

    return loss


SLOW = [family for family in models.families() if family != "mlp"]


@pytest.mark.parametrize(
    "family", ["mlp", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)]
)
def test_models_are_as_near_to_float32_as_modules_written_in_bfloat16(family, distance):
    model, spec = models.tiny(family)
    by_hand, _ = models.tiny(family, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    whole = jnp.issubdtype(spec.dtype, jnp.integer)
    x = rng.integers(0, 3, spec.shape) if whole else rng.normal(size=spec.shape)
    x = jnp.asarray(x, spec.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def gradient(model, **settings):
        loss = loss_of(model, rest, spec)
        return jax.jit(value_and_grad(loss, passes=(), **settings))(params, x)

    exact = gradient(model)
    fast = gradient(model, precision="bf16-mixed")
    written = gradient(by_hand)
    assert jax.tree.map(lambda leaf: leaf.dtype, fast) == jax.tree.map(
        lambda leaf: leaf.dtype, exact
    )
    assert 1e-5 < distance(fast, exact) < 1.5 * distance(written, exact)
    assert distance(fast, written) < 4e-2


class Block(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, dtype=self.dtype)(
            nn.LayerNorm(dtype=self.dtype)(x)
        )
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        return x + dense(256)(nn.gelu(dense(1024)(nn.LayerNorm(dtype=self.dtype)(x))))


class Transformer(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(100, 256, dtype=self.dtype)(tokens)
        for _ in range(2):
            x = Block(self.dtype)(x)
        return nn.Dense(100, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


TOKENS = jax.ShapeDtypeStruct((4, 512), jnp.int32)


def next_token_loss(module):
    def loss(variables, tokens):
        logits = module.apply(variables, tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return loss


def test_attention_of_a_float32_model_runs_in_the_kernel():
    variables = jax.eval_shape(Transformer().init, jax.random.key(0), TOKENS)
    found = {
        precision: [
            eqn.primitive.name
            for eqn in ir.walk(
                inspect(
                    next_token_loss(Transformer()),
                    variables,
                    TOKENS,
                    target="h100",
                    precision=precision,
                ).after
            )
        ].count("attention")
        for precision in ("float32", "bf16-mixed", "fp16-mixed")
    }
    assert found == {"float32": 0, "bf16-mixed": 2, "fp16-mixed": 2}


@pytest.mark.slow
def test_the_temporaries_on_an_h100_are_those_of_a_module_written_in_bfloat16():
    variables = jax.eval_shape(Transformer().init, jax.random.key(0), TOKENS)

    def temporaries(module, precision):
        fn = optimize(next_token_loss(module), target="h100", precision=precision)
        return memory_report(compile_for(jax.grad(fn), (variables, TOKENS), "h100")).temp_bytes

    wide = temporaries(Transformer(), {})
    by_hand = temporaries(Transformer(jnp.bfloat16), {})
    assert temporaries(Transformer(), "bf16-mixed") < min(1.05 * by_hand, 0.5 * wide)
