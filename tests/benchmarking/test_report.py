"""The arithmetic of a report, on figures that can be checked by hand."""

import json

import pytest

from fastgpu.benchmarking import BenchmarkReport, Row


@pytest.fixture
def report() -> BenchmarkReport:
    rows = [
        Row("fastgpu", [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]], 8, 0.5, 2**20, 3 * 2**30),
        Row("keras-jax", [[3.0, 3.0], [6.0, 6.0], [30.0, 30.0]], 8, 0.7, None, None),
    ]
    return BenchmarkReport("m", rows, {"fastgpu": [2.0, 1.0], "keras-jax": [2.0, 1.1]})


def test_the_ratio_is_the_median_of_the_ratios_of_rounds(report: BenchmarkReport) -> None:
    # rounds: 3, 3 and 30; the machine was disturbed in the last one
    assert report.ratios == {"fastgpu": 1.0, "keras-jax": 3.0}


def test_a_row_gives_median_spread_and_throughput(report: BenchmarkReport) -> None:
    row = report.row("keras-jax")
    assert (row.median_seconds, row.spread_seconds, row.throughput) == (6.0, (3.0, 30.0), 8 / 6)


def test_loss_curves_are_compared_with_that_of_fastgpu(report: BenchmarkReport) -> None:
    assert report.loss_deviations == {"fastgpu": 0.0, "keras-jax": pytest.approx(0.1)}


def test_the_keras_backends_show_what_rounding_makes_of_the_losses() -> None:
    curves = {"fastgpu": [2.0], "keras-jax": [2.2], "keras-tensorflow": [2.0]}
    report = BenchmarkReport("m", [Row("fastgpu", [[1.0]], 1, 0.1, None, None)], curves)
    assert report.peer_deviation == pytest.approx(0.1)
    assert "from each other: 1.0e-01" in str(report)


def test_it_prints_a_table_and_writes_json(report: BenchmarkReport) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "m"
    assert lines[2].split() == ["fastgpu", "1000", "(1000-2000)", "8", "1.00x", "0.50", "1", "3072"]
    assert lines[3].split()[-2:] == ["-", "-"]
    assert "1.0e-01 (keras-jax)" in lines[4]
    figures = json.loads(json.dumps(report.to_json()))
    assert [row["ratio"] for row in figures["rows"]] == [1.0, 3.0]
    assert figures["loss_deviations"]["keras-jax"] == pytest.approx(0.1)


def test_without_losses_there_is_nothing_to_compare() -> None:
    report = BenchmarkReport("m", [Row("fastgpu", [[1.0]], 1, 0.1, None, None)])
    assert report.loss_deviations == {}
    assert len(str(report).splitlines()) == 3
