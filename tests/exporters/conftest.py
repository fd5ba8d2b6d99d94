"""What a user of an exported file does, without a line of fastgpu: the oracle of these tests."""

import os
import pickle
import subprocess
import sys

import pytest

_PROGRAM = """
import pickle, sys
sys.modules["jax"] = sys.modules["jaxlib"] = sys.modules["fastgpu"] = None  # importing them fails
import tensorflow as tf

answers = []
for folder, calls in pickle.load(open(sys.argv[1], "rb")):
    loaded = tf.saved_model.load(folder)
    outputs = [
        {key: (value.dtype.name, tf.cast(value, tf.float64).numpy())
         for key, value in loaded.signatures[name](**inputs).items()}
        for name, inputs in calls
    ]
    trainable = {variable.name for variable in loaded.model_variables if variable.trainable}
    names = {variable.name for variable in loaded.model_variables}
    answers.append((outputs, names, trainable))
pickle.dump(answers, open(sys.argv[2], "wb"))
"""


@pytest.fixture(scope="session")
def run_in_tensorflow(tmp_path_factory):
    """For each `(folder, [(signature, inputs)])`: outputs, variable names, trainable names."""

    def run(exports):
        work = tmp_path_factory.mktemp("tensorflow")
        (work / "questions").write_bytes(pickle.dumps(exports))
        command = [sys.executable, "-I", "-c", _PROGRAM, work / "questions", work / "answers"]
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return pickle.loads((work / "answers").read_bytes())

    return run
