"""A plain TensorFlow script: the test accuracy of an exported SavedModel, without JAX or Keras.

It reads the SavedModel and `digits.npz`, given on the command line, and prints the accuracy.

    python tensorflow_script.py saved_model digits.npz
"""

import sys


def main(saved_model: str, digits: str) -> None:
    """Load, predict, print."""
    sys.modules["jax"] = None  # pyright: ignore[reportArgumentType]  # importing it now fails
    import numpy as np
    import tensorflow as tf

    predict = tf.saved_model.load(saved_model).signatures["serving_default"]
    with np.load(digits) as data:
        images, labels = data["test_images"], data["test_labels"]
    probabilities = predict(image=tf.constant(images))["output_0"].numpy()
    print(np.mean(probabilities.argmax(-1) == labels))


if __name__ == "__main__":
    main(*sys.argv[1:])
