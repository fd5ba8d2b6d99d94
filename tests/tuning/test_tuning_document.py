"""The programs in docs/tuning.md run as they stand, and do what the text around them says."""

import re
from pathlib import Path

import numpy as np

import fastgpu as fgpu

ROOT = Path(__file__).parents[2]
PROGRAMS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/tuning.md").read_text(), re.M | re.S)


def test_the_first_program_finds_the_minimum():
    namespace: dict = {}
    exec(PROGRAMS[0], namespace)
    result = namespace["result"]
    assert abs(result.best_config["x"] - 1) < 0.5 and result.best_config["offset"] == 2


def test_learning_rate_and_decay_of_a_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(PROGRAMS[1], namespace)
    result, step, state = (namespace[name] for name in ("result", "step", "variables"))
    assert set(result.best_config) == {"learning_rate", "weight_decay"}
    untrained = fgpu.evaluate(namespace["loss"], state, namespace["valid"], batch_size=64)["loss"]
    assert result.best_value < 0.5 * untrained
    values = np.array([row.value for row in result.trials])
    assert len(set(values)) == 8, "every trial trains with rates of its own"
    assert step._cache_size() == 1, "one compilation serves every trial"
    assert {path.name for path in Path("runs").iterdir()} == {"tune.db", "tune.db.lock", "tune.png"}
