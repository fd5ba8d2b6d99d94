"""Hyperparameter search: a plain dict for a space, TPE with median pruning, resumed from SQLite."""

from fastgpu.tuning.result import TrialRow, TuneResult
from fastgpu.tuning.search import Trial, tune

__all__ = ["Trial", "TrialRow", "TuneResult", "tune"]
