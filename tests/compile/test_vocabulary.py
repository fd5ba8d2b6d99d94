"""A loss over a large vocabulary, without a budget: the same gradients, without the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fastgpu as fgpu
from fastgpu import ir
from fastgpu.compile import compile_for
from fastgpu.compile.gradient import gradient_of

WORDS, WIDTH = 50257, 64


def loss(params, x, labels):
    scores = jnp.tanh(x @ params["hidden"]) @ params["words"]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean(), {"largest": losses.max()}


def arguments(rows, words=WORDS):
    rng = np.random.default_rng(0)
    shapes = {"hidden": (WIDTH, WIDTH), "words": (WIDTH, words)}
    params = {k: jnp.asarray(rng.normal(size=s) / 8, jnp.float32) for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.float32)
    return params, x, jnp.asarray(rng.integers(0, words, rows))


def loops(fn, *args):
    closed = jax.make_jaxpr(fn)(*args)
    return [eqn for eqn in ir.walk(closed) if eqn.primitive.name == "scan"]


def close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), got, expected)


def test_value_and_grad_keeps_its_numbers_and_needs_an_eighth_of_the_memory():
    args = arguments(256)
    ours = fgpu.value_and_grad(loss, has_aux=True)
    exact = jax.value_and_grad(loss, has_aux=True)(*args)
    close(ours(*args), exact)
    close(jax.jit(lambda *args: ours(*args))(*args), exact)
    assert len(loops(lambda *args: ours(*args), *args)) == 1

    shapes = {"hidden": (768, 768), "words": (768, WORDS)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, labels = (jax.ShapeDtypeStruct((4096, *rest), jnp.float32) for rest in ((768,), ()))
    structs = params, x, labels.update(dtype=jnp.int32)
    plain, small = (
        compile_for(fn, structs, "h100").memory_analysis().temp_size_in_bytes
        for fn in (
            jax.value_and_grad(loss, has_aux=True),
            fgpu.value_and_grad(loss, has_aux=True, target="h100"),
        )
    )
    assert small <= 0.25 * plain


def test_a_training_step_runs_it_in_chunks_too():
    params, x, labels = arguments(256)

    def loss_fn(params, model_state, batch, rng):
        value, metrics = loss(params, batch["x"], batch["labels"])
        return value, (model_state, metrics)

    batch, tx = {"x": x, "labels": labels}, optax.sgd(0.1)
    step = fgpu.train_step(loss_fn, tx, donate=False)
    state = fgpu.TrainState.create({"params": params}, tx, rng=0)
    after, metrics = step(state, batch)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, x, labels)
    close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    close(metrics, {"loss": value, **aux})
    assert len(loops(step._build(step._value_and_grad()), state, batch)) == 1


def test_small_losses_and_other_arguments_are_left_as_they_are():
    params, x, labels = arguments(256, words=1000)
    assert not loops(gradient_of(loss, "default", "cpu"), params, x, labels)
    # Wide, but nothing to gain; and an argument that is no array.
    wide = arguments(4)
    assert not loops(gradient_of(loss, "default", "cpu"), *wide)

    def named(params, x, labels, kind="mean"):
        value, aux = loss(params, x, labels)
        return (value if kind == "mean" else value * len(x)), aux

    ours = fgpu.value_and_grad(named, has_aux=True)(*wide, kind="sum")
    close(ours[0][0], jax.value_and_grad(loss, has_aux=True)(*wide)[0][0] * 4)
