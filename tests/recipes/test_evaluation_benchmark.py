"""Tests of the benchmark of evaluation: all take their turn, and the table says who; never how fast."""

from __future__ import annotations

import pytest

from recipes.benchmarks import evaluation


def test_everybody_takes_a_turn(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--stages", "2", "--works", "--parts", "2", "--forward-ms", "1", "--rounds", "1", "--batches", "2"]
    evaluation.main(words)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "emulated devices" in line]
    assert [row[3:5] for row in rows] == [["1", rows[0][4]], ["2", "whole"], ["2", "2"]]
    assert rows[0][-2] == "1.00"
    assert all(float(row[-3]) >= 1.0 for row in rows), "a stage of 1 ms takes no less"
