"""Tests of what a study says live here: means over seeds, differences, tables, sentences, figures; nothing trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recipes.study.figures import curves, draw
from recipes.study.report import best_rows, course_rows, early_epochs, findings, markdown, percent, tables
from recipes.study.summary import Contender, Setup, best, by_setup, curve, difference, mean_sd

SETUP = Setup("resnet_cifar", 8, "sgd")
# The best test accuracies of seeds 1, 2 and 3.
BEST = {
    Contender("backprop", 1): (0.60, 0.62, 0.64),
    Contender("ddg", 2): (0.59, 0.63, 0.64),
    Contender("ddg", 4): (0.50, 0.52, 0.55),
}


def make_rows(best: Mapping[Contender, tuple[float, ...]] = BEST, optimizer: str = "sgd") -> list[dict[str, Any]]:
    """Four epochs of each run, the third of which is the best; K stages are K times as fast."""
    rows = []
    for (method, stages), accuracies in best.items():
        for seed, accuracy in enumerate(accuracies, start=1):
            for epoch in range(1, 5):
                acc = accuracy - 0.1 * abs(3 - epoch)
                losses = {"train_loss": 2 - acc, "train_acc": acc + 0.05, "test_loss": 2.1 - acc, "test_acc": acc}
                names = {"recipe": "resnet_cifar", "depth": 8, "optimizer": optimizer, "method": method}
                times = {"lr": 0.01, "seconds": 3.0 * epoch, "device_seconds": 12.0 * epoch / stages}
                rows.append({**names, "stages": stages, "seed": seed, "epoch": epoch, **losses, **times})
    return rows


def test_the_best_epoch_of_each_seed_counts() -> None:
    runs = by_setup(make_rows())[SETUP][Contender("ddg", 2)]
    assert best(runs) == pytest.approx({1: 0.59, 2: 0.63, 3: 0.64})


def test_a_curve_is_the_mean_over_seeds() -> None:
    runs = by_setup(make_rows())[SETUP][Contender("backprop", 1)]
    epochs, means, deviations = zip(*curve(runs, "test_acc"), strict=True)
    assert epochs == (1, 2, 3, 4)
    assert means == pytest.approx([0.42, 0.52, 0.62, 0.52])
    assert deviations == pytest.approx([0.02] * 4)
    assert mean_sd([0.5]) == (0.5, None)


def test_differences_are_of_the_same_seeds() -> None:
    found = difference({1: 0.5, 2: 0.6, 3: 0.9}, {1: 0.4, 2: 0.4, 4: 0.0})
    assert found is not None
    assert found.mean == pytest.approx(0.15)
    # The deviation of 0.1 and 0.2 is 0.0707, the mean's is 0.05; t has one degree of freedom.
    assert found.half == pytest.approx(12.706 * 0.05)
    assert found.within_noise is True
    apart = difference({1: 0.5, 2: 0.51, 3: 0.52}, {1: 0.4, 2: 0.41, 3: 0.42})
    assert apart is not None
    assert apart.within_noise is False
    single = difference({1: 0.5}, {1: 0.6})
    assert single is not None
    assert (single.half, single.within_noise) == (None, None)
    assert difference({1: 0.5}, {2: 0.5}) is None


def test_the_table_has_means_differences_and_times() -> None:
    assert best_rows(by_setup(make_rows())[SETUP]) == [
        ("backprop", "1", "3", "62.00 ± 2.00 %", "-", "48.0 s", "1.00"),
        ("DDG", "2", "3", "62.00 ± 2.65 %", "+0.00 ± 2.48", "24.0 s", "2.00"),
        ("DDG", "4", "3", "52.33 ± 2.52 %", "-9.67 ± 1.43", "12.0 s", "4.00"),
    ]
    assert percent([0.125]) == "12.50 %"


def test_the_course_shows_early_epochs_the_middle_and_the_last() -> None:
    assert early_epochs(12) == [1, 2, 3, 6, 12]
    assert early_epochs(2) == [1, 2]
    header, rows = course_rows(by_setup(make_rows())[SETUP])
    assert header == ["method", "K", "epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    assert rows[0][:3] == ("backprop", "1", "47.00 ± 2.00 %")


def test_sentences_say_which_way_it_falls() -> None:
    two, four = findings(by_setup(make_rows()))
    assert two.startswith("resnet_cifar, depth 8, SGD: DDG, K = 2, differs from backpropagation by +0.00 ± 2.48 points")
    assert "within what seeds explain" in two
    assert "by -9.67 ± 1.43 points of best test accuracy: beyond what seeds explain" in four


def test_a_sentence_over_all_setups_counts_each_seed_once() -> None:
    other = {**BEST, Contender("ddg", 2): (0.61, 0.63, 0.68)}
    *_, two, four = findings(by_setup([*make_rows(), *make_rows(other, optimizer="adam")]))
    # By setup -1, 1, 0 and 1, 1, 4 points, by seed 0, 1 and 2: a deviation of 1, and t has two degrees of freedom.
    assert two.startswith("All together: DDG, K = 2, differs from backpropagation by +1.00 ± 2.48 points")
    assert "All together: DDG, K = 4" in four
    missing = {contender: accuracies[:2] for contender, accuracies in other.items()}
    *_, two, _ = findings(by_setup([*make_rows(), *make_rows(missing, optimizer="adam")]))
    # The third seed is there in one setup only: 0 and 1 remain.
    assert two.startswith("All together: DDG, K = 2, differs from backpropagation by +0.50 ± 6.35 points")


def test_too_few_runs_are_no_verdict() -> None:
    alone = {contender: accuracies for contender, accuracies in BEST.items() if contender.method == "ddg"}
    assert "cannot be compared: backpropagation has not been run" in findings(by_setup(make_rows(alone)))[0]
    single = {contender: accuracies[:1] for contender, accuracies in BEST.items()}
    assert "in one seed, which says nothing about noise" in findings(by_setup(make_rows(single)))[0]


def test_the_terminal_and_the_file_say_the_same() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(make_rows()))
    shown, text = console.export_text(), markdown(make_rows())
    for cell in ("62.00 ± 2.65 %", "-9.67 ± 1.43", "47.00 ± 2.00 %"):
        assert cell in shown
        assert cell in text
    assert "| method | K | seeds | best test accuracy |" in text


def test_curves_have_a_line_for_each_contender_over_epochs_and_seconds() -> None:
    contenders = by_setup(make_rows())[SETUP]
    figure = curves(SETUP, contenders, dict.fromkeys(contenders, "black"))
    by_epoch, by_seconds, *_ = figure.axes
    assert len(by_epoch.lines) == 2 * len(BEST), "test and training"
    assert by_epoch.lines[0].get_xydata().flatten().tolist() == pytest.approx([1, 42, 2, 52, 3, 62, 4, 52])
    assert by_seconds.lines[2].get_xdata().tolist() == [6, 12, 18, 24]
    assert len(by_epoch.collections) == len(BEST), "a band for each"


def test_figures_are_drawn_for_each_setup(tmp_path: Path) -> None:
    drawn = draw([*make_rows(), *make_rows(optimizer="adam")], tmp_path)
    assert [path.name for path in drawn] == [
        "curves-resnet_cifar-8-sgd.png",
        "curves-resnet_cifar-8-adam.png",
        "best.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_what_takes_an_unknown_time_is_drawn_over_epochs_alone() -> None:
    rows = [{**row, "device_seconds": None} for row in make_rows()]
    contenders = by_setup(rows)[SETUP]
    figure = curves(SETUP, contenders, dict.fromkeys(contenders, "black"))
    assert not figure.axes[1].lines
    assert best_rows(contenders)[0][-2:] == ("-", "-")
