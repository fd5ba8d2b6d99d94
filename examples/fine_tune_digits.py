"""Fine-tune a Keras checkpoint and deploy it: the calls of `fastgpu demo`, to copy and change.

    python fastgpu/cli/demo/keras_script.py runs/digits    # a plain Keras script saves a checkpoint
    python examples/fine_tune_digits.py runs/digits

The two take a minute of CPU time. Test accuracy is 0.966 before, and should reach 0.99.
"""

import sys
from pathlib import Path

import numpy as np
import optax

import fastgpu as fgpu

folder = Path(sys.argv[1])
epochs, batch_size, learning_rate, weight_decay = 20, 64, 3e-3, 1e-3

fgpu.configure()
arrays = np.load(folder / "digits.npz")
train, validation, test = (
    {"inputs": arrays[f"{split}_images"], "labels": arrays[f"{split}_labels"]}
    for split in ("train", "validation", "test")
)

m = fgpu.from_keras(folder / "digits.keras")
steps = epochs * (len(train["labels"]) // batch_size)
tx = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)
loss = fgpu.supervised_loss(m.module, loss="softmax_cross_entropy_with_integer_labels")
step = fgpu.train_step(loss, tx)
state = fgpu.TrainState.create(m.variables, tx, rng=0)

before = fgpu.evaluate(step, state, test, batch_size=batch_size)
state, _ = fgpu.fit(
    step, state, train, epochs=epochs, batch_size=batch_size, eval_data=validation, log_every=steps
)
after = fgpu.evaluate(step, state, test, batch_size=batch_size)
print(f"test accuracy {before['accuracy']:.4f} before, {after['accuracy']:.4f} after")

report = fgpu.export_saved_model(
    m.module, state.variables, folder / "saved_model", sample=test["inputs"], overwrite=True
)
print(report)
