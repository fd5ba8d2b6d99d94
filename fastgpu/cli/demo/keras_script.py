"""A plain Keras script: train a small CNN on handwritten digits for a few epochs and save it.

It stands for the checkpoint that a colleague hands over, and knows nothing of fastgpu. It writes
into the folder given on the command line: `digits.keras`, the data and its split `digits.npz`, and
`keras_predictions.npy`, what the model gives for the test images.

    KERAS_BACKEND=jax python keras_script.py folder
"""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Train, print the test accuracy, save."""
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    keras.config.disable_interactive_logging()

    # 1797 images of 8 x 8 pixels with values 0 ... 16, and their digits.
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, "float32").reshape(-1, 8, 8, 1)
    labels = np.asarray(labels, "int32")
    order = np.random.default_rng(0).permutation(len(images))
    train, validation, test = np.split(order, [1152, 1440])
    np.savez(
        folder / "digits.npz",
        train_images=images[train],
        train_labels=labels[train],
        validation_images=images[validation],
        validation_labels=labels[validation],
        test_images=images[test],
        test_labels=labels[test],
    )

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Rescaling(1 / 16),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(3, padding="same", activation="relu"),
            layers.Conv2D(128, 1, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.2),
            layers.Dense(10, activation="softmax", name="digit"),
        ],
        name="digits",
    )
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(
        images[train],
        labels[train],
        batch_size=64,
        epochs=6,
        validation_data=(images[validation], labels[validation]),
    )
    predictions = model.predict(images[test])
    np.save(folder / "keras_predictions.npy", predictions)
    print(f"test accuracy {np.mean(predictions.argmax(-1) == labels[test]):.4f}")
    model.save(folder / "digits.keras")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
