"""The programs that measure budgets, on a network that compiles in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_falling_budgets_and_ways_by_hand(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks/remat.py", "--networks", "mlp", "--json", path]
    command += ["--budgets", "0.5", "--sweep", "--by-hand"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The exit status says whether any smaller budget had a larger peak.
    subprocess.run(command, check=True, env=environment)
    result = json.loads(path.read_text())["mlp"]
    assert len(result["sweep"]) >= 20 and not result["sweep"][-1]["feasible"]
    by_hand = {row["policy"]: row for row in result["by_hand"]}
    assert by_hand["blocks: nothing_saveable"]["peak_bytes"] < result["unconstrained_peak_bytes"]
    (beside,) = result["beside"]
    assert beside["extra_step_cost"] <= beside["by_hand_extra_step_cost"]
