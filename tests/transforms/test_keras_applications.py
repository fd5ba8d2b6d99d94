"""Imported models: the optimized loss and its gradient equal the original's."""

from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import fastgpu as fgpu
from fastgpu import ir

# name: (smallest sensible input size, constructor arguments)
APPLICATIONS = {
    "MobileNet": (32, {"alpha": 0.25}),
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {}),
    "EfficientNetB0": (32, {}),
    "EfficientNetV2B0": (32, {}),
    "ResNet50": (32, {}),
    "ResNet50V2": (32, {}),
    "DenseNet121": (32, {}),
    "InceptionV3": (75, {}),
    "Xception": (71, {}),
}
BATCH = 4


def imported(name, policy="float32"):
    size, arguments = APPLICATIONS[name]
    keras.utils.clear_session()  # equal names for equal layers
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        build = getattr(keras.applications, name)
        model = build(weights=None, input_shape=(size, size, 3), classes=10, **arguments)
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).uniform(-2, 2, (BATCH, size, size, 3)).astype(np.float32)
    return fgpu.from_keras(model), jnp.asarray(x, "float64" if policy == "float64" else "float32")


def loss_of(module):
    def loss(variables, x, key):
        state = [name for name in variables if name != "params"]
        out, state = module.apply(variables, x, train=True, mutable=state, rngs={"dropout": key})
        wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return jnp.sum(jnp.log(wide + 1e-3)[:, 0]), (out, state)

    return loss


def gradients(fn, variables, x):
    def of_params(params, x, key):
        return fn({**variables, "params": params}, x, key)

    return jax.value_and_grad(of_params, has_aux=True)(variables["params"], x, jax.random.key(1))


def in_scan_of_vmap(fn, variables, x):
    """Losses and input gradients of four batches, summed."""

    def body(carry, key):
        def one(x):
            return fn(variables, x, key)[0]

        value, slope = jax.vmap(jax.value_and_grad(one))(jnp.stack([x, x[::-1] * 0.5]))
        return (carry[0] + value.sum(), carry[1] + slope.sum(0)), None

    start = (jnp.zeros((), x.dtype), jnp.zeros_like(x))
    return jax.lax.scan(body, start, jax.random.split(jax.random.key(0)))[0]


def before_and_after(run, name, policy):
    """`run(loss, variables, x)` of the original loss and of the optimized one."""
    model, x = imported(name, policy)
    loss = loss_of(model.module)
    return [jax.jit(partial(run, fn))(model.variables, x) for fn in (loss, fgpu.optimize(loss))]


def assert_same(run, name, distance):
    # Batch norm over four values amplifies rounding up to a million times. So equality is shown in
    # float64, and in float32 that the optimized numbers are as near to those as the original's:
    # twice as far, because two roundings that differ are both luck.
    with jax.enable_x64(True):
        truth, got = before_and_after(run, name, "float64")
        for part, part_ in zip(got, truth, strict=True):
            assert distance(part, part_) < 1e-8
    plain, fast = before_and_after(run, name, "float32")
    for part, original, exact in zip(fast, plain, truth, strict=True):
        assert distance(part, exact) < 2 * distance(original, exact) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_ten_applications_and_their_gradients(name, distance):
    assert_same(gradients, name, distance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "EfficientNetV2B0"])
def test_applications_under_vmap_inside_of_scan(name, distance):
    assert_same(in_scan_of_vmap, name, distance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "EfficientNetV2B0"])
def test_applications_in_bfloat16_are_as_exact_as_they_were(name, distance):
    # A rounding to 8 bits that flips moves everything behind it, so the optimized numbers are held
    # to the float32 ones: they may be no further away than the original's.
    model, x = imported(name, "mixed_bfloat16")
    exact, _ = imported(name)
    _, truth = jax.jit(lambda: gradients(loss_of(exact.module), exact.variables, x))()
    loss = loss_of(model.module)
    _, plain = jax.jit(lambda: gradients(loss, model.variables, x))()
    _, fast = jax.jit(lambda: gradients(fgpu.optimize(loss), model.variables, x))()
    assert distance(fast, truth) < 1.25 * distance(plain, truth)


def test_what_the_passes_match_in_an_application():
    model, x = imported("MobileNet")
    report = fgpu.transforms.inspect(
        lambda v, x: loss_of(model.module)(v, x, jax.random.key(0))[0],
        model.variables,
        x,
        target="cpu",
    )
    labels = [ir.stands_for(eqn)[0] for eqn in ir.walk(report.after) if "lowered" in str(eqn)[:200]]
    assert labels.count("conv_general_dilated") == 13 + 13 + 1 + 1
