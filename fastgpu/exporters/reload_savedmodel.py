"""Call an exported SavedModel in a process where neither JAX nor fastgpu can be imported.

Run as a script with three paths: the SavedModel, a pickled list of `(signature, inputs by name)`,
and the file to write the pickled list of outputs by name to. It needs TensorFlow and NumPy alone.
"""

import pickle
import sys
from importlib.abc import MetaPathFinder

FORBIDDEN = ("jax", "jaxlib", "flax", "fastgpu")


class Forbid(MetaPathFinder):
    """Makes importing any of the `FORBIDDEN` packages fail, installed or not."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Raise for a forbidden package; leave every other import alone."""
        if fullname.split(".")[0] in FORBIDDEN:
            raise ImportError(f"an exported model must run without {fullname!r}")


def main(folder: str, calls_file: str, results_file: str) -> None:
    """Load the SavedModel at `folder` and make the calls."""
    sys.meta_path.insert(0, Forbid())
    import tensorflow as tf

    with open(calls_file, "rb") as file:
        calls = pickle.load(file)
    signatures = tf.saved_model.load(folder).signatures
    results = []
    for name, inputs in calls:
        tensors = {key: tf.constant(value) for key, value in inputs.items()}
        results.append({key: out.numpy() for key, out in signatures[name](**tensors).items()})
    with open(results_file, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
