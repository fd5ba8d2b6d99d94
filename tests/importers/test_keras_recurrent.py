"""Recurrent layers and masks against Keras on JAX; float32 within 1e-5."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.errors import BatchError
from fastgpu.importers import from_keras

STEPS, FEATURES = 5, 3


# One of each kind; the other variants are slow tests.
FEW = ("simple", "lstm", "gru_before", "stack", "both")


def sequence(seed: int = 0, batch: int = 2, shape: tuple[int, ...] = (STEPS, FEATURES)) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (batch, *shape)).astype("float32")


def assert_close(got: Any, want: Any, name: str = "") -> None:
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5, err_msg=name)


def variants(layers: Any) -> dict[str, Any]:
    """Layers of one sequence, (batch, time, features)."""
    sequences = {"return_sequences": True}
    stack = [layers.LSTMCell(3), layers.GRUCell(4), layers.SimpleRNNCell(2)]
    return {
        "simple": layers.SimpleRNN(4, activation="relu"),
        "lstm": layers.LSTM(4),
        "lstm_states": layers.LSTM(4, return_state=True, use_bias=False, **sequences),
        "lstm_backwards": layers.LSTM(3, go_backwards=True, **sequences),
        "lstm_unrolled": layers.LSTM(3, unroll=True, recurrent_activation="hard_sigmoid"),
        "gru": layers.GRU(4, **sequences),
        "gru_before": layers.GRU(4, reset_after=False, go_backwards=True),
        "gru_plain": layers.GRU(4, use_bias=False, return_state=True),
        "cell": layers.RNN(layers.GRUCell(4, reset_after=False), **sequences),
        "stack": layers.RNN(stack, return_state=True, **sequences),
        "both": layers.Bidirectional(layers.LSTM(3, **sequences)),
        "both_sum": layers.Bidirectional(layers.GRU(3), merge_mode="sum"),
        "both_mul": layers.Bidirectional(layers.SimpleRNN(3), merge_mode="mul"),
        "both_ave": layers.Bidirectional(layers.LSTM(3, return_state=True), merge_mode="ave"),
        "both_apart": layers.Bidirectional(layers.GRU(3, **sequences), merge_mode=None),
        "both_other": layers.Bidirectional(
            layers.LSTM(3), backward_layer=layers.LSTM(3, go_backwards=True, activation="relu")
        ),
    }


@pytest.fixture(params=[FEW, pytest.param((), marks=pytest.mark.slow)], ids=["few", "all"])
def recurrent(keras: Any, randomize: Any, request: pytest.FixtureRequest) -> Any:
    x = keras.Input((STEPS, FEATURES))
    kinds = variants(keras.layers)
    outputs = {name: kinds[name](x) for name in request.param or kinds}
    return randomize(keras.Model(x, outputs))


def test_recurrent_layers_equal_keras(recurrent: Any, run: Any, tmp_path: Path, keras: Any) -> None:
    x = sequence()
    want = run(recurrent, x)
    recurrent.save(tmp_path / "m.keras")
    for source in (recurrent, tmp_path / "m.keras"):
        imported = from_keras(source)
        got = run(imported.module.apply, imported.variables, x)
        for name in want:
            assert_close(got[name], want[name], name)
    assert imported.report.parameter_count == recurrent.count_params()


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_recurrent_layers_of_an_h5(recurrent: Any, tmp_path: Path) -> None:
    recurrent.save(tmp_path / "m.h5")
    jax.tree.map(
        np.testing.assert_array_equal,
        from_keras(tmp_path / "m.h5").variables,
        from_keras(recurrent).variables,
    )


@pytest.mark.slow
def test_gradients_equal_keras(keras: Any, randomize: Any, run: Any) -> None:
    inputs, kinds = keras.Input((STEPS, FEATURES)), variants(keras.layers)
    outputs = [kinds[name](inputs) for name in ("simple", "lstm_backwards", "gru", "stack")]
    recurrent = randomize(keras.Model(inputs, outputs))
    x = sequence()
    imported = from_keras(recurrent)

    def loss(outputs: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs))

    ours = jax.grad(lambda p: loss(imported.module.apply({"params": p}, x, train=True)))
    seeds = [v.value for v in recurrent.non_trainable_variables]
    theirs = jax.grad(lambda w: loss(recurrent.stateless_call(w, seeds, x, training=True)[0]))
    weights = [v.value for v in recurrent.trainable_variables]
    got, want = run(ours, imported.variables["params"]), run(theirs, weights)
    norm = lambda tree: sorted(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(tree))  # noqa: E731
    np.testing.assert_allclose(norm(got), norm(want), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Layer .reshape")
@pytest.mark.parametrize(
    "names",
    [
        ("lstm_states", "both", "pooled", "added", "lost", "with_states", "explicit"),
        pytest.param((), marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_masks_reach_every_layer_as_in_keras(
    keras: Any, randomize: Any, run: Any, names: tuple[str, ...]
) -> None:
    layers = keras.layers
    tokens = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(9, FEATURES, mask_zero=True)(tokens)
    dense = layers.Dense(FEATURES)(layers.Dropout(0.5)(x))
    outputs = {name: layer(dense) for name, layer in variants(layers).items()}
    outputs |= {
        "pooled": layers.GlobalAveragePooling1D()(layers.LayerNormalization()(dense)),
        "pooled_relu": layers.GlobalAveragePooling1D()(layers.Activation("relu")(dense)),
        "added": layers.LSTM(2)(layers.Add()([dense, layers.Masking()(keras.ops.relu(x))])),
        "half": layers.LSTM(2)(layers.Add()([dense, keras.ops.relu(x)])),
        "joined": layers.LSTM(2)(layers.Concatenate()([dense, keras.ops.relu(x)])),
        "lost": layers.LSTM(2)(layers.Reshape((FEATURES, STEPS))(x)),
        "masked_softmax": layers.Softmax(axis=1)(
            dense, mask=keras.ops.cast(keras.ops.ones_like(dense), "bool")
        ),
        "with_states": layers.GRU(2)(dense, initial_state=[layers.Dense(2)(dense[:, 0])]),
        "explicit": layers.GRU(2)(keras.ops.relu(x), mask=keras.ops.not_equal(tokens, 1)),
        "deep": layers.LSTM(2)(layers.LSTM(3, return_sequences=True)(dense)),
        "steps": layers.LSTM(2)(layers.TimeDistributed(layers.Dense(2))(dense)),
    }
    outputs = {name: outputs[name] for name in names or outputs}
    model = randomize(keras.Model(tokens, outputs))
    imported = from_keras(model)
    x = np.array([[1, 2, 3, 0, 0], [0, 4, 0, 5, 1], [6, 7, 8, 1, 2]], "int32")
    got, want = run(imported.module.apply, imported.variables, x), run(model, x)
    for name in want:
        assert_close(got[name], want[name], name)


def test_masks_of_the_outputs_for_a_loss(keras: Any, randomize: Any) -> None:
    layers = keras.layers
    tokens = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(9, FEATURES, mask_zero=True)(tokens)
    outputs = {"each": layers.LSTM(2, return_sequences=True)(x), "last": layers.LSTM(2)(x)}
    imported = from_keras(randomize(keras.Model(tokens, outputs)))
    x = np.array([[1, 2, 0, 0, 3]])
    values, masks = imported.module.apply(imported.variables, x, method="with_masks")
    assert masks["last"] is None
    np.testing.assert_array_equal(masks["each"], x != 0)
    assert values["each"].shape == (1, STEPS, 2)


def test_batch_statistics_of_masked_steps_do_not_count(
    keras: Any, randomize: Any, run: Any
) -> None:
    layers = keras.layers
    x = keras.Input((STEPS, FEATURES))
    norm = layers.BatchNormalization(name="norm")
    model = randomize(keras.Model(x, norm(layers.Masking()(x))))
    batch = sequence(batch=3)
    batch[0, 2:] = batch[2, 4:] = 0
    imported = from_keras(model)
    train = lambda v, x: imported.module.apply(v, x, train=True, mutable=["batch_stats"])  # noqa: E731
    got, state = run(train, imported.variables, batch)
    want = model(batch, training=True)
    assert_close(got, want)
    assert_close(state["batch_stats"]["norm"]["moving_mean"], norm.moving_mean.value)
    assert_close(state["batch_stats"]["norm"]["moving_variance"], norm.moving_variance.value)


def test_time_distributed_equals_keras(
    keras: Any, randomize: Any, run: Any, tmp_path: Path
) -> None:
    layers = keras.layers
    inner = keras.Sequential([keras.Input((FEATURES,)), layers.Dense(2), layers.Dense(3)])
    x = keras.Input((STEPS, FEATURES))
    outputs = [
        layers.TimeDistributed(layers.Dense(4, activation="tanh"))(x),
        layers.TimeDistributed(inner)(x),
        layers.TimeDistributed(layers.BatchNormalization(momentum=0.5), name="norm")(x),
    ]
    model = randomize(keras.Model(x, outputs))
    model.save(tmp_path / "m.keras")
    imported = from_keras(tmp_path / "m.keras")
    batch = sequence(batch=4)
    assert_close(run(imported.module.apply, imported.variables, batch), run(model, batch))
    got, state = imported.module.apply(
        imported.variables, batch, train=True, mutable=["batch_stats"]
    )
    assert_close(got, model(batch, training=True))
    norm = model.get_layer("norm").layer
    statistics = state["batch_stats"]["norm"]["layer"]
    assert_close(statistics["moving_mean"], norm.moving_mean.value)
    assert_close(statistics["moving_variance"], norm.moving_variance.value)


@pytest.mark.slow
def test_convolutional_lstms_equal_keras(keras: Any, randomize: Any, run: Any) -> None:
    layers = keras.layers
    inputs = [keras.Input((3, 6, 2)), keras.Input((3, 5, 6, 2)), keras.Input((2, 4, 4, 4, 2))]
    first = {"data_format": "channels_first"}
    outputs = [
        layers.ConvLSTM1D(2, 3, padding="same", return_sequences=True)(inputs[0]),
        layers.ConvLSTM1D(3, 2, strides=2, go_backwards=True)(inputs[0]),
        layers.ConvLSTM1D(3, 2, **first)(inputs[0]),
        layers.ConvLSTM2D(2, (2, 3), return_state=True)(inputs[1]),
        layers.ConvLSTM2D(2, 2, dilation_rate=2, use_bias=False, padding="same")(inputs[1]),
        layers.ConvLSTM3D(2, 2, return_sequences=True)(inputs[2]),
        layers.Bidirectional(layers.ConvLSTM1D(2, 3))(inputs[0]),
    ]
    model = randomize(keras.Model(inputs, outputs))
    imported = from_keras(model)
    batch = [sequence(i, shape=tuple(x.shape[1:])) for i, x in enumerate(inputs)]
    got = run(imported.module.apply, imported.variables, *batch)
    assert_close(got, run(lambda *xs: model(list(xs)), *batch))


def test_states_are_carried_in_a_collection(keras: Any, randomize: Any) -> None:
    layers = keras.layers
    x = keras.Input(batch_shape=(2, STEPS, FEATURES))
    y = layers.LSTM(3, stateful=True, return_sequences=True, name="memory")(x)
    model = randomize(keras.Model(x, layers.GRU(2, stateful=True)(y)))
    imported = from_keras(model)
    variables = imported.variables
    assert imported.report.parameter_count == model.count_params()
    for seed in range(3):
        batch = sequence(seed)
        got, state = imported.module.apply(variables, batch, mutable=["rnn_state"])
        assert_close(got, model(batch))
        variables = {**variables, **state}
    assert_close(variables["rnn_state"]["memory"]["state_1"], model.get_layer("memory").states[1])
    # Immutable, the states are where they were.
    again = imported.module.apply(imported.variables, sequence())
    assert_close(imported.module.apply(imported.variables, sequence()), again)
    with pytest.raises(BatchError, match="remembers another batch size"):
        imported.module.apply(variables, sequence(batch=3))


@pytest.mark.parametrize(
    "option", [pytest.param("dropout", marks=pytest.mark.slow), "recurrent_dropout"]
)
def test_dropout_holds_for_a_whole_sequence(keras: Any, option: str) -> None:
    """With unit weights and one-hot steps the outputs show which connections were dropped."""
    ones = {"kernel_initializer": "ones", "recurrent_initializer": "identity"}
    layer = keras.layers.SimpleRNN(
        400, activation="linear", return_sequences=True, **ones, **{option: 0.25}
    )
    model = keras.Sequential([keras.Input((3, 400)), layer])
    layer.set_weights([np.eye(400, dtype="float32")] * 2 + [np.zeros(400, "float32")])
    imported = from_keras(model)
    x = np.ones((4, 3, 400), "float32")
    y = imported.module.apply(
        imported.variables, x, train=True, rngs={"dropout": jax.random.key(0)}
    )
    kept = np.asarray(y[:, 0] if option == "dropout" else y[:, 1] - y[:, 0])
    assert set(np.unique(kept.round(4))) == {0.0, np.float32(1.3333)}
    assert np.mean(kept == 0) == pytest.approx(0.25, abs=0.04)
    later = kept if option == "dropout" else kept**2
    np.testing.assert_allclose(y[:, 2] - y[:, 1], later, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["LSTM", pytest.param("GRU", marks=pytest.mark.slow)])
def test_gates_have_masks_of_their_own_with_recurrent_dropout(keras: Any, name: str) -> None:
    layer = getattr(keras.layers, name)(3, dropout=0.5, recurrent_dropout=0.5)
    imported = from_keras(keras.Sequential([keras.Input((STEPS, FEATURES)), layer]))
    call = lambda seed: imported.module.apply(  # noqa: E731
        imported.variables, sequence(), train=True, rngs={"dropout": jax.random.key(seed)}
    )
    assert call(0).shape == (2, 3)
    text = str(jax.make_jaxpr(call)(0))
    assert text.count("name=_bernoulli") == 2 * (4 if name == "LSTM" else 3)
