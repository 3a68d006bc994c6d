"""Tests of the language study live here: its rows, its seeds in pairs, that it goes on, and when it says "equal"."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from recipes.study.equivalence import Pairs, compare
from recipes.study.language import RULES, Job, Run, Settings, best_rates, by_contender, even_cut, fit, main, read_rows

ROOT = Path(__file__).parents[2]
SETTINGS = {
    **{"steps": 12, "layers": 2, "width": 16, "heads": 2, "context": 8, "batch_size": 4, "warmup_steps": 2},
    **{"clip": 1.0, "precision": "32-true", "accelerator": "cpu"},
}


def test_equal_means_that_the_interval_lies_within_the_margin() -> None:
    # Differences of 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, and Student's 95 % quantile of 2 degrees is 2.920.
    found = compare({1: 1.01, 2: 2.02, 3: 3.03, 4: 9.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert found is not None
    assert (found.mean, found.half, found.count) == (pytest.approx(0.02), pytest.approx(0.016859, rel=1e-4), 3)
    assert [found.verdict(margin) for margin in (0.04, 0.03, 0.003)] == ["equal", "undecided", "different"]
    assert Pairs(-0.02, 0.01, 3).verdict(0.005) == "different"
    assert compare({1: 1.0}, {2: 1.0}) is None
    alone = compare({1: 1.0}, {1: 3.0})
    assert alone == Pairs(-2.0, None, 1)
    assert alone.verdict(1.0) == ""


def test_rows_are_read() -> None:
    rows = read_rows(["adamw: m12, extrapolated: 4 8", "soap: backprop: 1"])
    assert list(rows) == [("adamw", "m12, extrapolated", 4), ("adamw", "m12, extrapolated", 8), ("soap", "backprop", 1)]


@pytest.mark.parametrize("row", ["adamw: plain", "adamw: m13: 4", "adamw: plain: four"])
def test_a_row_that_says_nothing_is_refused(row: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"The row '{row}' is not `optimizer: rule: stages`, with a rule of: backprop"
    ):
        list(read_rows([row]))


@pytest.mark.parametrize("name", ["language", "language_five", "language_gpu"])
def test_the_protocol_can_be_read(name: str) -> None:
    protocol = yaml.safe_load((ROOT / f"recipes/study/{name}.yaml").read_text())
    Settings(**protocol["settings"])
    rows = list(read_rows(protocol["rows"]))
    assert {name for name, _, _ in rows} == protocol["sweep"].keys()
    assert all((rule == "backprop") == (stages == 1) for _, rule, stages in rows)


def test_the_sweep_chooses_and_is_not_compared() -> None:
    def row(rule: str, lr: float, seed: int, loss: float) -> dict[str, object]:
        return {"optimizer": "adamw", "rule": rule, "stages": 1, "lr": lr, "seed": seed, "val_loss": loss}

    rows = [row("backprop", 0.1, 0, 3.0), row("backprop", 0.2, 0, 2.0), row("backprop", 0.2, 1, 2.5)]
    rates = best_rates(rows, {"adamw": [0.1, 0.2], "soap": [0.1]})
    assert rates == {"adamw": 0.2}
    assert by_contender([*rows, row("plain", 0.1, 1, 9.0)], rates) == {("adamw", "backprop", 1): {1: 2.5}}


def test_runs_of_a_seed_begin_alike_and_rules_differ(text_file: Path) -> None:
    settings = Settings(**SETTINGS)  # type: ignore[arg-type]
    curves = {}
    for rule, stages in (("backprop", 1), ("plain", 2), ("m2", 2), ("m4, extrapolated, finish 0.1", 2)):
        found = fit(Job(Run("adamw", rule, stages, 0.01, 1), settings, str(text_file)))
        curves[rule] = found["curve"]
        assert found["val_loss"] < 5.6
    assert all(curve[0] == pytest.approx(curves["backprop"][0], rel=1e-5) for curve in curves.values())
    assert len({curve[-1] for curve in curves.values()}) == len(curves)
    assert fit(Job(Run("adamw", "plain", 2, 0.01, 1), settings, str(text_file)))["curve"] == curves["plain"]


def test_a_study_goes_on_where_it_stopped(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    asked = {"settings": SETTINGS, "sweep": {"adamw": [0.01]}, "rows": ["adamw: backprop: 1", "adamw: plain: 2"]}
    config.write_text(yaml.safe_dump(asked))
    command = ["--config", str(config), "--path", str(text_file), "--out", str(out), "--seeds", "1"]
    main([*command, "--minutes", "0"])
    assert list(out.glob("runs/*.json")) == []
    main(command)
    assert len(list(out.glob("runs/*.json"))) == 3
    capsys.readouterr()
    main(command)
    printed = capsys.readouterr()
    assert "1/" not in printed.err
    assert "minus its K = 1" in printed.out
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["rule"], row["seed"]) for row in rows) == [("backprop", "0"), ("backprop", "1"), ("plain", "1")]
    kept = json.loads(next(out.glob("runs/*plain*.json")).read_text())
    assert kept["val_loss"] == pytest.approx(
        float(next(row for row in rows if row["rule"] == "plain")["val_loss"]), 1e-5
    )
    config.write_text(yaml.safe_dump({**asked, "settings": {**SETTINGS, "steps": 13}}))
    with pytest.raises(SystemExit, match="has other settings: steps was 12, now 13. Give another --out"):
        main(command)


def test_the_cut_is_even() -> None:
    assert even_cut(8, 1) == []
    assert even_cut(8, 3) == ["network.blocks.2", "network.blocks.5"]
    assert even_cut(8, 8) == [f"network.blocks.{block}" for block in range(1, 8)]


def test_rules_are_told_apart_by_their_files() -> None:
    names = {Run("adamw", rule, 8, 0.001, 1).name for rule in RULES}
    assert len(names) == len(RULES)
    assert all(" " not in name and "," not in name for name in names)
