"""Attention layers and their masks against Keras on JAX; float32 within 1e-5."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.importers import from_keras


def batch(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (2, *shape)).astype("float32")


def assert_close(got: Any, want: Any) -> None:
    assert got.keys() == want.keys()
    for name in want:
        pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True)
        for g, w in pairs:
            assert g.shape == w.shape, name
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "names",
    [
        ("heads", "heads_scores", "group_causal", "dot_scaled", "additive"),
        pytest.param((), marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_attention_layers_equal_keras(
    keras: Any, randomize: Any, run: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    layers = keras.layers
    q, v, k = keras.Input((4, 6)), keras.Input((5, 6)), keras.Input((5, 6))
    grid = keras.Input((3, 4, 6))
    keep = keras.ops.greater(keras.ops.matmul(q, keras.ops.swapaxes(v, 1, 2)), -3.0)
    heads = layers.MultiHeadAttention
    group = layers.GroupQueryAttention
    outputs = {
        "heads": heads(2, 3)(q, v),
        "heads_self": heads(2, 3)(q, q, use_causal_mask=True),
        "heads_key": heads(2, 3, use_bias=False)(q, v, k),
        "heads_wide": heads(2, 3, value_dim=4)(q, v, k, return_attention_scores=True),
        "heads_named": heads(2, 3)(query=q, value=v, key=k, attention_mask=keep),
        "heads_scores": heads(2, 3, output_shape=5)(
            q, v, attention_mask=keep, return_attention_scores=True
        ),
        "heads_grid": heads(2, 3, attention_axes=(2,))(grid, grid),
        "heads_both": heads(2, 3)(grid, grid),
        "heads_window": heads(2, 3, sliding_window=2, use_gate=True)(q, q),
        "heads_dropout": heads(2, 3, dropout=0.5)(q, v, use_causal_mask=True),
        "group": group(3, 4, 2)(q, v),
        "group_causal": group(3, 4, 2, use_gate=True, use_bias=False)(q, q, use_causal_mask=True),
        "group_scores": group(3, 4, 1)(q, v, k, return_attention_scores=True),
        "dot": layers.Attention()([q, v]),
        "dot_scaled": layers.Attention(use_scale=True)([q, v, k], return_attention_scores=True),
        "dot_concat": layers.Attention(use_scale=True, score_mode="concat")([q, v]),
        "dot_causal": layers.Attention()([q, q], use_causal_mask=True),
        "additive": layers.AdditiveAttention()([q, v]),
        "additive_plain": layers.AdditiveAttention(use_scale=False)([q, v, k]),
    }
    outputs = {name: outputs[name] for name in names or outputs}
    model = randomize(keras.Model([q, v, k, grid], outputs))
    model.save(tmp_path / "m.keras")
    x = [batch((4, 6)), batch((5, 6), 1), batch((5, 6), 2), batch((3, 4, 6), 3)]
    want = run(lambda *xs: model(list(xs)), *x)
    for source in (model, tmp_path / "m.keras"):
        imported = from_keras(source)
        assert_close(run(imported.module.apply, imported.variables, *x), want)


@pytest.mark.filterwarnings("ignore:Layer ")
def test_masks_of_attention_as_in_keras(keras: Any, randomize: Any, run: Any) -> None:
    layers = keras.layers
    tokens, others = keras.Input((4,), dtype="int32"), keras.Input((5,), dtype="int32")
    outputs = {}
    for name in ("heads", "heads_scores", "group", "dot", "additive", "residual"):
        q = layers.Embedding(9, 6, mask_zero=True)(tokens)
        v = layers.Embedding(9, 6, mask_zero=True)(others)
        pool = layers.GlobalAveragePooling1D()
        if name == "heads":
            outputs[name] = pool(layers.MultiHeadAttention(2, 3)(q, v))
        elif name == "heads_scores":
            outputs[name] = layers.MultiHeadAttention(2, 3)(
                q, value=v, return_attention_scores=True
            )
        elif name == "group":
            outputs[name] = pool(layers.GroupQueryAttention(3, 2, 1)(q, v))
        elif name == "residual":
            # Keras takes the mask off `q`, so that the sum has none.
            outputs[name] = pool(layers.Add()([q, layers.MultiHeadAttention(2, 3)(q, q)]))
        else:
            kind = layers.Attention if name == "dot" else layers.AdditiveAttention
            outputs[name] = pool(kind()([q, v]))
    model = randomize(keras.Model([tokens, others], outputs))
    imported = from_keras(model)
    x = [np.array([[1, 2, 0, 0], [3, 0, 4, 5]]), np.array([[1, 2, 3, 0, 0], [0, 4, 0, 5, 1]])]
    got = run(imported.module.apply, imported.variables, *x)
    assert_close(got, run(lambda *xs: model(list(xs)), *x))


@pytest.mark.slow
def test_values_may_be_wider_than_keys(keras: Any, randomize: Any, run: Any) -> None:
    """Keras on JAX fails here unless it is asked for the scores, which go another way."""
    q = keras.Input((4, 6))
    heads = keras.layers.MultiHeadAttention(2, 3, value_dim=5)
    model = randomize(keras.Model(q, heads(q, q, return_attention_scores=True)[0]))
    config = model.get_config()
    config["layers"][1]["inbound_nodes"][0]["kwargs"].pop("return_attention_scores")
    x = batch((4, 6))
    want = run(model, x)
    model.get_config = lambda: config
    imported = from_keras(model)
    np.testing.assert_allclose(
        run(imported.module.apply, imported.variables, x), want, rtol=1e-5, atol=1e-5
    )


def test_dropout_of_attention_scores(keras: Any, randomize: Any) -> None:
    """Uniform attention over values of one: the kept weights show in the output."""
    layers = keras.layers
    q = keras.Input((40, 3))
    model = keras.Model(q, layers.Attention(dropout=0.25)([q, q], return_attention_scores=True))
    imported = from_keras(model)
    x = np.ones((8, 40, 3), "float32")
    _, weights = imported.module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(np.asarray(weights).round(5))) == {0.0, np.float32(1 / 30).round(5)}
    assert float(jnp.mean(weights == 0)) == pytest.approx(0.25, abs=0.02)


@pytest.mark.slow
def test_gradients_of_attention_equal_keras(keras: Any, randomize: Any, run: Any) -> None:
    q = keras.Input((4, 6))
    layer = keras.layers.MultiHeadAttention(2, 3, name="heads")
    model = randomize(keras.Model(q, layer(q, q, use_causal_mask=True)))
    imported = from_keras(model)
    x = batch((4, 6))
    state = [v.value for v in model.non_trainable_variables]
    ours = jax.grad(lambda p: jnp.sum(imported.module.apply({"params": p}, x, train=True) ** 2))
    theirs = jax.grad(lambda w: jnp.sum(model.stateless_call(w, state, x, training=True)[0] ** 2))
    got = run(ours, imported.variables["params"])["heads"]
    want = run(theirs, [v.value for v in model.trainable_variables])
    parts = ["query_dense", "key_dense", "value_dense", "output_dense"]
    flat = [got[part][name] for part in parts for name in ("kernel", "bias")]
    for g, w in zip(flat, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
