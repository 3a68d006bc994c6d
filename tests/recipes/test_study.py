"""Tests of the study live here: the runs it lists, what a run records, that it can be killed, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import psutil
import pytest
import torch

from recipes.cifar_tensors import Batch, Batches
from recipes.study.__main__ import main, parse
from recipes.study.cuts import Cut
from recipes.study.fit import Job, fit
from recipes.study.grid import Run, Settings, find_recipe, read_recipe, runs
from recipes.study.methods import METHODS
from recipes.study.processes import RunError, share_out
from recipes.study.results import COLUMNS, Results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-8 with four batches of six images an epoch."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    text = (ROOT / "recipes/resnet_cifar.yaml").read_text()
    path.write_text(text.replace("depth: 56", "depth: 8").replace("batch_size: 128", "batch_size: 6"))
    return path


@pytest.fixture
def arguments(recipe: Path, image_folder: Path, tmp_path: Path) -> list[str]:
    """A study of seven runs."""
    grid = ["--method", "backprop", "ddg", "dni", "--stages", "1", "2", "3", "--seeds", "1", "--epochs", "2"]
    places = ["--data", str(image_folder), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    return ["--recipe", str(recipe), *grid, *places]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_with_table_and_figures(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "recipes.study", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stderr is not None
    for line in started.stderr:
        if "1/5  small_sgd_backprop_K1_seed1: test accuracy" in line:
            break
    workers = psutil.Process(started.pid).children(recursive=True)
    assert workers
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "a study that is gone leaves nobody behind"

    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*.json")}
    assert tmp_path / "out/runs/small_sgd_backprop_K1_seed1.json" in files
    cuts = (tmp_path / "out/cuts.json").read_text()
    main(arguments)
    printed = capsys.readouterr()
    assert f"5 runs, {len(files)} of them done before." in printed.err
    for path, written in files.items():
        assert path.stat().st_mtime_ns == written, "a finished run is not repeated"
    assert (tmp_path / "out/cuts.json").read_text() == cuts

    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["method"], int(row["stages"]), int(row["epoch"])) for row in rows]
    contenders = [("backprop", 1), ("ddg", 2), ("ddg", 3), ("dni", 2), ("dni", 3)]
    assert found == [(*contender, epoch) for contender in contenders for epoch in (1, 2)]
    measured = json.loads(cuts)["small"]
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["recipe"], row["depth"], row["optimizer"], row["seed"]) == ("small", "0", "sgd", "1")
        assert float(row["lr"]) == pytest.approx(0.01 if row["epoch"] == "1" else 0.001)
        assert 0 <= float(row["train_acc"]) <= 1
        assert 0 <= float(row["test_acc"]) <= 1
        assert min(float(row[column]) for column in ("train_loss", "test_loss", "seconds")) > 0
        if row["method"] == "dni":
            assert row["device_seconds"] == ""
        else:
            expected = Cut(**measured[row["stages"]]).epoch_seconds(4) * int(row["epoch"])
            assert float(row["device_seconds"]) == pytest.approx(expected, rel=1e-5)

    assert "DDG" in printed.out
    assert "## small, SGD" in (tmp_path / "out/results.md").read_text()
    assert matplotlib.image.imread(tmp_path / "out/curves-small-sgd.png").shape[:2] == (936, 1430)
    assert (tmp_path / "out/best.png").is_file()

    # Another process has done it after other runs; here it is done alone.
    run = Run("small", 0, "sgd", "ddg", 3, seed=1)
    settings = Settings(2, None, None, arguments[arguments.index("--data") + 1], None, "32-true", "cpu")
    trained = read_recipe(Path(arguments[1]), 0, "sgd")
    again = fit(Job(run, trained, settings, measured["3"]["split_points"], tmp_path / "cache"))
    for row, kept in zip(again, rows[4:6], strict=True):
        for column in ("train_loss", "train_acc", "test_loss", "test_acc"):
            assert float(kept[column]) == pytest.approx(row[column], rel=1e-6), "a run depends on its seed alone"

    with pytest.raises(SystemExit, match=r"started with other settings: lr was None, now 0.1. .*\(--out\)"):
        main([*arguments, "--lr", "0.1"])


@pytest.fixture
def job(recipe: Path, image_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes a small run; the number of threads is as it was afterwards."""
    settings = Settings(2, None, None, str(image_folder), None, "32-true", "cpu")
    threads = torch.get_num_threads()

    def make(method: str, stages: int, *split_points: str, optimizer: str = "sgd", seed: int = 1) -> Job:
        run = Run("small", 0, optimizer, method, stages, seed)
        return Job(run, read_recipe(recipe, 0, optimizer), settings, list(split_points), tmp_path / "cache")

    yield make
    torch.set_num_threads(threads)


def test_all_methods_see_the_same_images_of_a_seed(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = Batches.__iter__

    def watched(batches: Batches) -> Iterator[Batch]:
        for images, labels in original(batches):
            seen.append(images.sum().item())
            yield images, labels

    monkeypatch.setattr(Batches, "__iter__", watched)
    orders = []
    for method, stages, cut in (("backprop", 1, []), ("ddg", 2, ["network.layer2"]), ("cdni", 2, [])):
        rows = fit(job(method, stages, *cut))
        assert [row["epoch"] for row in rows] == [1, 2]
        orders.append(seen[:])
        seen.clear()
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 2 * (4 + 1)
    assert len(set(orders[0])) == 2 * 4 + 1, "training batches differ, test batches do not"


def test_a_method_gives_its_arguments_to_the_strategy(job: Callable[..., Job]) -> None:
    drained, carried = (fit(job(name, 3, "network.layer2", "network.layer3")) for name in ("ddg", "ddg-undrained"))
    assert METHODS["ddg-undrained"].arguments == {"drain": "never"}
    assert drained[0]["train_loss"] == carried[0]["train_loss"], "nothing is drained before the first epoch ends"
    assert drained[0]["test_loss"] != carried[0]["test_loss"]


@pytest.mark.parametrize("name", ["ddg-unstashed", "features-replay", "ddg-shrink", "ddg-predict"])
def test_a_rule_trains_otherwise_than_the_paper(name: str, job: Callable[..., Job]) -> None:
    exact, other = (fit(job(method, 3, "network.layer2", "network.layer3")) for method in ("ddg", name))
    assert exact[0]["train_loss"] != other[0]["train_loss"]
    assert METHODS[name].recompute == (name == "features-replay")


def test_adam_is_its_recipes(job: Callable[..., Job]) -> None:
    recipe = job("backprop", 1, optimizer="adam").recipe
    assert recipe.optimizer == {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3, "weight_decay": 5e-4}}
    assert fit(job("backprop", 1, optimizer="adam"))[0]["lr"] == 1e-3


# ---- the grid


def test_runs_are_listed_seed_by_seed() -> None:
    found = list(runs(["a"], [8, 20], ["sgd"], ["backprop", "ddg"], [1, 2, 4], [1, 2]))
    assert [run.name for run in found[:4]] == [
        "a-8_sgd_backprop_K1_seed1",
        "a-8_sgd_ddg_K2_seed1",
        "a-8_sgd_ddg_K4_seed1",
        "a-20_sgd_backprop_K1_seed1",
    ]
    assert len(found) == 12
    assert [run.seed for run in found] == [1] * 6 + [2] * 6


def test_the_learning_rate_drops_at_the_papers_parts_of_the_epochs() -> None:
    settings = Settings(300, None, None, "data", None, "32-true", "cpu")
    assert settings.milestones == [150, 225]
    assert replace(settings, epochs=12).milestones == [6, 9]
    assert replace(settings, epochs=1).milestones == [1]


def test_a_depth_takes_the_place_of_the_recipes() -> None:
    recipe = read_recipe(find_recipe("resnet_cifar"), 20, "sgd")
    assert recipe.network["init_args"] == {"depth": 20, "classes": 10}
    assert (recipe.dataset, recipe.batch_size) == ("cifar10", 128)
    assert recipe.optimizer["init_args"]["nesterov"] is True


@pytest.mark.parametrize(("name", "count"), [("cpu", 48), ("gpu", 18)])
def test_a_preset_describes_its_runs(name: str, count: int) -> None:
    options = parse(["--config", str(ROOT / f"recipes/study/{name}.yaml"), "--out", "elsewhere"])
    names = [Path(recipe).stem for recipe in options.recipe]
    found = runs(names, options.depth, options.optimizer, options.method, options.stages, options.seeds)
    assert len(set(found)) == count
    assert options.out == Path("elsewhere")


def test_an_epoch_on_devices_fills_and_drains_the_pipeline() -> None:
    # The first batch finds nobody busy and takes as long as backpropagation, every other one a period.
    two = Cut(["b"], [1.0, 1.0], [2.0, 2.0], [0.0], [0.0])
    assert two.epoch_seconds(1) == 6
    assert two.epoch_seconds(10) == 6 + 9 * 3
    # With forwards done twice the first stage takes 4, the last one 3.
    assert two.epoch_seconds(10, recompute=True) - two.epoch_seconds(9, recompute=True) == 4
    assert Cut([], [2.0], [4.0], [], []).epoch_seconds(10) == 60


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "magic"], "magic"),
        (["--optimizer", "lion"], "lion"),
        (["--epochs", "0"], "--epochs 0: nothing would be trained; give 1 or more"),
        (["--jobs", "0"], "--jobs 0: nothing would be trained"),
        (["--stages", "0", "2"], "--stages 0: nothing would be trained"),
        (["--recipe", "a/x.yaml", "b/x.yaml"], "two have the same name, by which runs are told apart; rename one"),
        (["--method", "ddg", "--stages", "1"], "--method ddg --stages 1: there is no such run; backprop has 1 stage"),
    ],
)
def test_what_cannot_be_studied_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(options)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "magic"], r"There is no recipe 'magic': give a YAML file, or one of .*resnet_cifar"),
        (["--recipe", "gpt"], r"gpt.yaml does not train recipes.classifier.ImageClassifier .* give resnet_cifar"),
        (["--recipe", "vit_cifar", "--depth", "8"], r"--depth 8: the network of vit_cifar.yaml has no depth"),
        (["--data", "nowhere"], r"root='nowhere' does not hold cifar10. Give a folder"),
        (["--train-images", "7"], r"7 images cannot be chosen with as many of each class: give a multiple of 3"),
    ],
)
def test_what_cannot_be_found_is_said(
    options: list[str], said: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said):
        main([*arguments, *options])


def test_a_study_takes_more_runs_but_no_other_settings(recipe: Path, tmp_path: Path) -> None:
    settings = Settings(2, 300, None, "data", None, "32-true", "cpu")
    results = Results(tmp_path)
    results.settle(settings, {"small sgd": read_recipe(recipe, 0, "sgd")})
    Results(tmp_path).settle(settings, {"small adam": read_recipe(recipe, 0, "adam")})
    changed = replace(read_recipe(recipe, 0, "sgd"), batch_size=7)
    results.settle(settings, {"small sgd": changed})  # no run has been finished yet
    results.settle(settings, {"small sgd": read_recipe(recipe, 0, "sgd")})
    results.keep(Run("small", 0, "sgd", "backprop", 1, seed=1), [], None)
    with pytest.raises(ValueError, match="recipes.small sgd.batch_size was 6, now 7"):
        results.settle(settings, {"small sgd": changed})
    with pytest.raises(ValueError, match="epochs was 2, now 3; train_images was 300, now None.*another folder"):
        results.settle(replace(settings, epochs=3, train_images=None), {})


# ---- processes


def test_jobs_are_shared_out(tmp_path: Path) -> None:
    texts = [f"[{number}]" for number in range(5)]
    found = dict(share_out(json.loads, texts, 2, tmp_path / "log"))
    assert found == {text: json.loads(text) for text in texts}


def test_a_failed_run_is_told_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="JSONDecodeError"):
        list(share_out(json.loads, ["[1]", "["], 1, tmp_path / "log"))


def test_a_process_that_ends_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Its process has ended; .*log may say why"):
        list(share_out(os._exit, [3], 1, tmp_path / "log"))


def test_no_jobs_need_no_process(tmp_path: Path) -> None:
    assert not list(share_out(json.loads, [], 2, tmp_path / "log"))
