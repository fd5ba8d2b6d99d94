"""A Keras program as users write them; prints its numbers as JSON. Run by test_trainer.py.

python keras_program.py accelerated|plain CASE...
"""

import json
import logging
import sys

import fastgpu as fgpu

ACCELERATED = sys.argv[1] == "accelerated"
fgpu.configure(quiet=True, cache=False, keras=ACCELERATED)

import keras  # noqa: E402
import numpy as np  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(48, 12, 12, 3)).astype("float32")
LABELS = RNG.integers(0, 4, 48)


def convnet(**settings):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(3, use_bias=False),
            layers.BatchNormalization(),
            layers.Conv2D(16, 1, activation="relu"),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(4, activation="softmax"),
        ]
    )
    settings = {"metrics": ["accuracy"], **settings}
    model.compile("adam", "sparse_categorical_crossentropy", **settings)
    return model


def fit():
    model = convnet()
    seen = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(b))
    history = model.fit(
        IMAGES,
        LABELS,
        batch_size=8,
        epochs=2,
        validation_split=0.25,
        callbacks=[callback, keras.callbacks.EarlyStopping(patience=5)],
        class_weight={0: 1.0, 1: 2.0, 2: 1.0, 3: 0.5},
        verbose=0,
    ).history
    return {**history, "batches": seen, "after": summary(model)}


def on_batch():
    model = convnet()
    weights = np.linspace(0.1, 2, 8).astype("float32")
    return {
        "train": [float(v) for v in model.train_on_batch(IMAGES[:8], LABELS[:8], weights)],
        "test": [float(v) for v in model.test_on_batch(IMAGES[8:16], LABELS[8:16])],
        "predict": model.predict_on_batch(IMAGES[:2]).tolist(),
        "evaluate": model.evaluate(IMAGES, LABELS, batch_size=20, verbose=0),
    }


def several_steps():
    model = convnet(steps_per_execution=3)
    history = model.fit(IMAGES, LABELS, batch_size=8, epochs=2, verbose=0).history
    return {**history, "predict": model.predict(IMAGES[:9], batch_size=4, verbose=0).tolist()}


def not_compiled():
    one = convnet(run_eagerly=True).fit(IMAGES[:8], LABELS[:8], verbose=0).history
    two = convnet(jit_compile=False).fit(IMAGES[:8], LABELS[:8], verbose=0).history
    return {"eager": one, "not compiled": two}


def own_train_step():
    import jax

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8, activation="relu")
            self.out = keras.layers.Dense(1)

        def call(self, x, training=False):
            return self.out(self.hidden(x))

        def train_step(self, state, data):
            trainable, fixed, optimizer, metrics = state
            x, y = data

            def loss_of(trainable):
                predicted, after = self.stateless_call(trainable, fixed, x, training=True)
                return self.compute_loss(x, y, predicted), after

            (loss, after), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
            return {"own_loss": loss}, (trainable, after, optimizer, metrics)

    keras.utils.set_random_seed(2)
    model = Own()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = IMAGES.reshape(48, -1)[:, :10]
    return model.fit(x, x.sum(1, keepdims=True), batch_size=12, epochs=3, verbose=0).history


def several_inputs():
    keras.utils.set_random_seed(3)
    a, b = keras.Input((6,), name="a"), keras.Input((3,), name="b")
    joined = keras.layers.Concatenate()([keras.layers.Dense(4)(a), b])
    outputs = {
        "y": keras.layers.Dense(2, name="y")(joined),
        "z": keras.layers.Dense(1, name="z", kernel_regularizer="l2")(joined),
    }
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile("rmsprop", {"y": "mse", "z": "mae"}, loss_weights={"y": 0.5, "z": 2.0})
    x = {"a": RNG.normal(size=(16, 6)), "b": RNG.normal(size=(16, 3))}
    y = {"y": RNG.normal(size=(16, 2)), "z": RNG.normal(size=(16, 1))}
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    return {**history, "predict": np.asarray(model.predict(x, verbose=0)["z"]).tolist()}


def datasets():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(16)
    history = convnet().fit(data, epochs=2, validation_data=data, verbose=0).history

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(16 * index, 16 * index + 16)
            return IMAGES[part], LABELS[part]

    model = convnet()
    again = model.fit(Sequence(), epochs=1, shuffle=False, verbose=0).history
    return {"tf.data": history, "PyDataset": again, "backend": tf.keras.backend.backend()}


def mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_float16")
    history = convnet().fit(IMAGES, LABELS, batch_size=16, epochs=2, verbose=0).history
    keras.mixed_precision.set_global_policy("float32")
    return history


def large_weights():
    keras.utils.set_random_seed(4)
    draws = [
        keras.initializers.GlorotUniform(seed=1)((1100, 1000)),
        keras.initializers.TruncatedNormal(seed=2)((1100, 1000)),
        keras.initializers.RandomNormal(stddev=0.1, seed=3)((1100, 1000)),
    ]
    layer = keras.layers.Dense(1000)
    layer.build((None, 1200))
    return [
        [float(np.sum(np.asarray(d, "float64"))), float(d[7, 7])] for d in (*draws, layer.kernel)
    ]


def failing_pass():
    """The passes fail for every step: it runs as Keras runs it, and one line a step says so."""
    from fastgpu.keras_integration import trainer

    def broken(fn):
        def run(*args):
            raise ValueError("no pass for this")

        return run

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("fastgpu").addHandler(handler)
    optimize, trainer.optimize = trainer.optimize, broken
    try:
        history = convnet().fit(IMAGES, LABELS, batch_size=16, epochs=2, verbose=0).history
    finally:
        trainer.optimize = optimize
        logging.getLogger("fastgpu").removeHandler(handler)
    return {**history, "warnings": len(records) if ACCELERATED else 1}


def summary(model):
    return [float(np.sum(np.abs(w.astype("float64")))) for w in model.get_weights()]


if __name__ == "__main__":
    found = {}
    for case in sys.argv[2:]:
        found[case] = globals()[case]()
    trainer = sys.modules["keras.src.backend.jax.trainer"]
    wrapped = hasattr(trainer.JAXTrainer.make_train_function, "__wrapped__")
    print(json.dumps({"wrapped": wrapped, **found}))
