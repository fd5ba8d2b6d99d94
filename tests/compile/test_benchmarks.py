"""The programs that measure budgets, on networks that compile in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def figures(path: Path, network: str, *options: str) -> dict:
    """What `benchmarks/remat.py` writes about a network; it must end well."""
    command = [sys.executable, ROOT / "benchmarks/remat.py", "--networks", network, "--json", path]
    subprocess.run([*command, *options], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(path.read_text())[network]


@pytest.mark.slow
def test_budgets_fall_until_one_is_infeasible(tmp_path):
    # The exit status says whether a smaller budget had a larger peak.
    sweep = figures(tmp_path / "figures.json", "mlp", "--budgets=", "--sweep")["sweep"]
    assert len(sweep) >= 20 and not sweep[-1]["feasible"]
    assert all(row["met"] for row in sweep[:-1])


@pytest.mark.slow
def test_a_budget_costs_no_more_than_the_cheapest_way_by_hand(tmp_path):
    result = figures(tmp_path / "figures.json", "gpt-tiny", "--budgets", "0.6", "--by-hand")
    peaks = {row["policy"]: row["peak_bytes"] for row in result["by_hand"]}
    assert len(peaks) >= 8
    assert peaks["blocks: nothing_saveable"] < 0.6 * result["unconstrained_peak_bytes"]
    assert peaks["blocks: everything_saveable"] >= result["unconstrained_peak_bytes"]
    (beside,) = result["beside"]
    assert beside["extra_step_cost"] <= beside["by_hand_extra_step_cost"]
