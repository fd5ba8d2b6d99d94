"""`supervised_loss` against Keras, optax and NumPy, and its errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastgpu import ir
from fastgpu.errors import BatchError, LossError
from fastgpu.training import supervised_loss
from fastgpu.training.losses import weighted_mean
from fastgpu.training.named_losses import LABELS
from fastgpu.training.probabilities import (
    binary_crossentropy,
    categorical_crossentropy,
    ends_in,
    sparse_categorical_crossentropy,
)
from fastgpu.training.scores import accuracy, binary_accuracy, top_5_accuracy

RNG = jax.random.key(0)


class Echo(nn.Module):
    """Gives back its input, through an activation."""

    activation: object = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, x):
        return self.activation(x)


def echo_loss(outputs, labels, weights=None, activation=lambda x: x, **options):
    """Loss and metrics of a model whose outputs these are."""
    loss = supervised_loss(Echo(activation), **options)
    batch = {"inputs": jnp.asarray(outputs), "labels": jnp.asarray(labels)}
    if weights is not None:
        batch["weights"] = jnp.asarray(weights)
    value, (_, metrics) = loss({}, {}, batch, RNG)
    return float(value), {name: float(metric) for name, metric in metrics.items()}


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


LABELS_4 = np.array([0, 2, 1, 2])
ONE_HOT_4 = np.eye(3, dtype=np.float32)[LABELS_4]


def hard_probabilities():
    """Rows that need Keras's clipping: an exact 0 and 1, and one that does not sum to 1."""
    return np.array([[1, 0, 0], [1, 0, 0], [0.2, 0.5, 0.3], [0.4, 0.4, 0.8]], np.float32)


def test_probabilities_give_keras_values():
    keras = pytest.importorskip("keras")
    p = hard_probabilities()
    # One float32 log and one sum: a few units in the last place.
    np.testing.assert_allclose(
        sparse_categorical_crossentropy(p, LABELS_4),
        keras.losses.sparse_categorical_crossentropy(LABELS_4, p),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        categorical_crossentropy(p, ONE_HOT_4),
        keras.losses.categorical_crossentropy(ONE_HOT_4, p),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        jnp.mean(binary_crossentropy(p, ONE_HOT_4), axis=-1),
        keras.losses.binary_crossentropy(ONE_HOT_4, p),
        rtol=1e-6,
    )
    mean, _ = echo_loss(p, LABELS_4, from_logits=False)
    np.testing.assert_allclose(
        mean, keras.losses.SparseCategoricalCrossentropy()(LABELS_4, p), rtol=1e-6
    )


def test_gradients_through_a_softmax_are_keras_own():
    keras = pytest.importorskip("keras")
    logits = 20 * random(4, 3)

    def theirs(x):
        return keras.losses.SparseCategoricalCrossentropy()(LABELS_4, jax.nn.softmax(x))

    def ours(x):
        loss = supervised_loss(Echo(jax.nn.softmax))
        return loss({}, {}, {"inputs": x, "labels": LABELS_4}, RNG)[0]

    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (jax.nn.softmax, "softmax"),
        (lambda x: nn.softmax(x.astype(jnp.bfloat16)).astype(jnp.float32), "softmax"),
        (jax.jit(lambda x: jax.nn.softmax(x).reshape(2, 2, 3)), "softmax"),
        (jax.checkpoint(jax.nn.softmax), "softmax"),
        (jax.nn.sigmoid, "sigmoid"),
        (lambda x: x, None),
        (jax.nn.log_softmax, None),
        (lambda x: jax.nn.softmax(x) + 0.1, None),
        (lambda x: jnp.exp(x) / jnp.sum(jnp.exp(-x), -1, keepdims=True), None),
        (lambda x: x / jnp.sum(x, -1, keepdims=True), None),
        (lambda x: jnp.ones(3), None),
    ],
)
def test_the_last_operation_tells_probabilities_from_logits(activation, expected):
    assert ends_in(ir.trace(activation, jax.ShapeDtypeStruct((4, 3), jnp.float32))) == expected


def test_the_formula_follows_the_last_operation_unless_told():
    x = random(4, 3)
    p = jax.nn.softmax(x)
    from_logits = optax.losses.softmax_cross_entropy_with_integer_labels(x, LABELS_4).mean()
    on_probabilities = optax.losses.softmax_cross_entropy_with_integer_labels(p, LABELS_4).mean()

    assert echo_loss(x, LABELS_4)[0] == pytest.approx(float(from_logits), rel=1e-6)
    softmax = {"activation": jax.nn.softmax}
    assert echo_loss(x, LABELS_4, **softmax)[0] == pytest.approx(float(from_logits), rel=1e-6)
    told = echo_loss(x, LABELS_4, **softmax, from_logits=True)[0]
    assert told == pytest.approx(float(on_probabilities), rel=1e-6)
    # A softmax hidden behind another function is not seen; then the user says so.
    hidden = echo_loss(p, LABELS_4, from_logits=False)[0]
    assert hidden == pytest.approx(float(from_logits), rel=1e-6)


@pytest.mark.parametrize("name", sorted(LABELS))
def test_every_named_loss_is_optax_own(name):
    outputs = random(4, 3)
    labels = LABELS_4 if LABELS[name] == "index" else ONE_HOT_4
    expected = getattr(optax.losses, name)(outputs, labels)
    assert echo_loss(outputs, labels, loss=name)[0] == pytest.approx(
        float(jnp.mean(expected)), rel=1e-6
    )


def test_every_other_optax_loss_is_refused_with_the_reason():
    others = ("ctc_loss", "triplet_margin_loss", "ntxent", "ranking_softmax_loss")
    for name in others:
        with pytest.raises(LossError, match="pass a callable"):
            supervised_loss(Echo(), loss=name)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("softmax_cross_entropy_with_int_labels", "softmax_cross_entropy_with_integer_labels"),
        ("sparse_categorical_crossentropy", "softmax_cross_entropy_with_integer_labels"),
        ("mse", "squared_error"),
        ("hubber", "huber_loss"),
    ],
)
def test_a_slip_or_a_keras_name_is_answered_with_the_right_one(name, suggestion):
    with pytest.raises(LossError, match=rf"no loss is called '{name}'[^$]*mean [^$]*{suggestion}"):
        supervised_loss(Echo(), loss=name)


def test_binary_loss_and_accuracy_are_elementwise_means_per_example():
    logits = np.array([[2.0, -1.0], [-3.0, -1.0]], np.float32)
    labels = np.array([[1, 0], [1, 0]])
    loss, metrics = echo_loss(logits, labels, loss="sigmoid_binary_cross_entropy")
    p = 1 / (1 + np.exp(-logits))
    assert loss == pytest.approx(-np.mean(np.log(np.where(labels, p, 1 - p))), rel=1e-6)
    assert metrics == {"accuracy": 0.75}
    _, metrics = echo_loss(
        logits, labels, loss="sigmoid_binary_cross_entropy", activation=jax.nn.sigmoid
    )
    assert metrics == {"accuracy": 0.75}


def test_a_column_of_outputs_and_a_row_of_labels_do_not_broadcast():
    outputs, labels = random(4, 1), np.array([0, 1, 1, 0])
    column = echo_loss(outputs, labels[:, None], loss="sigmoid_binary_cross_entropy")
    assert echo_loss(outputs, labels, loss="sigmoid_binary_cross_entropy") == column
    assert echo_loss(outputs[:, 0], labels[:, None], loss="squared_error") == echo_loss(
        outputs[:, 0], labels, loss="squared_error"
    )
    assert echo_loss(random(4, 3), LABELS_4[:, None]) == echo_loss(random(4, 3), LABELS_4)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            ONE_HOT_4,
            {},
            r"integer\[4\] for outputs float32\[4,3\]\n  got: float32\[4,3\]",
        ),
        (LABELS_4.astype(np.float32), {}, r"integer\[4\][^$]*got: float32\[4\]"),
        (LABELS_4, {"loss": "softmax_cross_entropy"}, "_with_integer_labels'"),
        (LABELS_4[:2], {}, r"integer\[4\][^$]*got: int32\[2\]"),
        (LABELS_4, {"loss": "squared_error"}, r"float32\[4,3\][^$]*got: int32\[4\]"),
        ({"a": LABELS_4}, {}, "one output and one array of labels"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, options, message):
    loss = supervised_loss(Echo(), **options)
    with pytest.raises(LossError, match=message):
        loss({}, {}, {"inputs": random(4, 3), "labels": labels}, RNG)


def test_batches_and_options_that_do_not_fit_are_named():
    with pytest.raises(BatchError, match=r"'inputs'[^$]*got: the keys \['x'\]"):
        supervised_loss(Echo())({}, {}, {"x": 1}, RNG)
    with pytest.raises(LossError, match="from_logits=False has no meaning"):
        supervised_loss(Echo(), loss="l2_loss", from_logits=False)
    with pytest.raises(LossError, match="unknown metric 'f1'"):
        supervised_loss(Echo(), metrics=["f1"])
    with pytest.raises(LossError, match=r"weights do not fit[^$]*got: float32\[3\]"):
        echo_loss(random(4, 3), LABELS_4, weights=np.ones(3, np.float32))


def test_weights_average_over_examples():
    outputs, weights = random(4, 3), np.array([1, 0, 2, 0], np.float32)
    losses = np.array(optax.losses.softmax_cross_entropy_with_integer_labels(outputs, LABELS_4))
    hits = outputs.argmax(-1) == LABELS_4
    loss, metrics = echo_loss(outputs, LABELS_4, weights)
    assert loss == pytest.approx((losses[0] + 2 * losses[2]) / 3, rel=1e-6)
    assert metrics["accuracy"] == pytest.approx((hits[0] + 2.0 * hits[2]) / 3)
    assert echo_loss(outputs, LABELS_4, np.zeros(4, np.float32))[0] == 0


def test_weights_per_token():
    outputs, labels = random(2, 5, 3), np.tile([0, 1, 2, 1, 0], (2, 1))
    weights = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], np.float32)
    losses = np.array(optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels))
    expected = losses[weights > 0].mean()
    assert echo_loss(outputs, labels, weights)[0] == pytest.approx(expected, rel=1e-6)
    per_example = echo_loss(outputs, labels, np.array([0, 1], np.float32))[0]
    assert per_example == pytest.approx(losses[1].mean(), rel=1e-6)
    assert weighted_mean(jnp.ones(3), None) == 1


def test_half_precision_outputs_are_averaged_in_float32():
    outputs = jnp.asarray(random(512, 3), jnp.bfloat16)
    labels = np.arange(512) % 3
    loss = supervised_loss(Echo())({}, {}, {"inputs": outputs, "labels": labels}, RNG)[0]
    assert loss.dtype == jnp.float32
    exact = optax.losses.softmax_cross_entropy_with_integer_labels(
        outputs.astype(jnp.float32), labels
    ).mean()
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


def test_accuracies():
    outputs = jnp.asarray(random(6, 8))
    labels = np.array(jnp.argsort(outputs, axis=-1))[np.arange(6), [7, 6, 5, 4, 3, 2]]
    np.testing.assert_array_equal(accuracy(outputs, labels), [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(top_5_accuracy(outputs, labels), [1, 1, 1, 1, 1, 0])
    one_hot = jax.nn.one_hot(labels, 8)
    np.testing.assert_array_equal(top_5_accuracy(outputs, one_hot), [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(accuracy(outputs, labels[:, None]), [1, 0, 0, 0, 0, 0])
    logits = jnp.array([-1.0, 1.0])
    np.testing.assert_array_equal(binary_accuracy(logits, jnp.array([0, 0])), [1, 0])


class Mode(nn.Module):
    """Tells which mode it was called in, by the keyword of its class."""

    @nn.compact
    def __call__(self, x, *, deterministic):
        return jnp.full((x.shape[0],), float(deterministic))


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, a, b, training: bool = False):
        return nn.Dropout(0.5, deterministic=not training)(a + b)


class Dictionary(nn.Module):
    @nn.compact
    def __call__(self, features):
        return features["a"] + features["b"]


def outputs_of(module, inputs, rng=RNG):
    """What a callable loss sees in training, and in inference."""
    loss = supervised_loss(module, loss=lambda outputs, labels: jnp.sum(outputs))
    batch = {"inputs": inputs, "labels": jnp.zeros(2)}
    return float(loss({}, {}, batch, rng)[0]), float(loss.examples({}, batch)["loss"])


def test_the_mode_is_passed_by_the_keyword_that_the_module_has():
    assert outputs_of(Mode(), jnp.ones(2)) == (0, 2)
    train, inference = outputs_of(TwoInputs(), (jnp.ones(64), jnp.ones(64)))
    assert train != inference == 128


def test_inputs_may_be_several_or_a_dict():
    assert outputs_of(TwoInputs(), [jnp.ones(2), jnp.zeros(2)])[1] == 2
    assert outputs_of(Dictionary(), {"a": jnp.ones(2), "b": jnp.ones(2)}) == (4, 4)


def test_a_callable_takes_several_outputs_and_its_own_metrics():
    loss = supervised_loss(
        Echo(lambda x: {"a": x, "b": 2 * x}),
        loss=lambda outputs, labels: jnp.abs(outputs["a"] - labels["a"]),
        metrics={"b": lambda outputs, labels: outputs["b"]},
    )
    batch = {"inputs": jnp.ones(2), "labels": {"a": jnp.zeros(2)}}
    value, (_, metrics) = loss({}, {}, batch, RNG)
    assert float(value) == 1 and float(metrics["b"]) == 2


def test_collections_that_are_not_changed_stay():
    module = nn.BatchNorm(use_running_average=False, momentum=0.5)
    variables = module.init(RNG, jnp.ones((2, 3)))
    state = {"batch_stats": variables["batch_stats"], "non_trainable": {"k": jnp.ones(1)}}
    loss = supervised_loss(module, loss=lambda outputs, labels: outputs.mean())
    batch = {"inputs": 4 * jnp.ones((2, 3)), "labels": jnp.zeros(2)}
    _, (after, _) = loss(variables["params"], state, batch, RNG)
    assert after["non_trainable"]["k"] is state["non_trainable"]["k"]
    np.testing.assert_allclose(after["batch_stats"]["mean"], 2)
