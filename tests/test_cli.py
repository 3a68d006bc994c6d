"""Tests of ``cli.py``: the command ``plan``; the commands that train are run in ``test_package.py``.

``plan`` is given the YAML file of the recipe ``digits``, as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ddg.cli import main
from lightning_ddg.plugin import planned
from recipes.digits import DigitsData, DigitsModule
from tests.planning.test_plan import Winding

CONFIG = str(Path(__file__).parents[1] / "recipes" / "digits.yaml")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-ddg"])
    return tmp_path


def test_plan_takes_the_config_of_a_fit_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", CONFIG, "--num_stages", "[2,4,99]"])
    printed = capsys.readouterr().out
    assert "Plain backpropagation on one device" in printed
    points = [json.loads(line) for line in re.findall(r"^split_points: (.*)$", printed, re.MULTILINE)]
    assert [len(names) for names in points] == [1, 3]
    assert all(name.startswith("net.") for names in points for name in names)
    assert printed.count("in flight") == 2, "a table for each number of stages that was asked for"
    assert "99 stages: num_stages=99, but the network has" in printed
    assert not list(tmp_path.iterdir())


def test_plan_draws_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", CONFIG, "--num_stages", "2", "--picture", "pictures/plan.svg"])
    assert "timelines drawn in pictures/plan.svg" in capsys.readouterr().out
    text = (tmp_path / "pictures" / "plan.svg").read_text()
    assert "2 stages: " in text
    assert "3 stages" not in text


class LoudModule(DigitsModule):
    """Looks at everything that a trainer offers, and says when it is trained."""

    seen: dict[str, Any] = {}  # noqa: RUF012

    def setup(self, stage: str) -> None:
        self.seen["classes"] = self.trainer.datamodule.classes  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        assert self.logger is not None
        self.logger.log_hyperparams({"any": "thing"})
        self.seen["trainer"] = self.trainer
        self.seen["weights"] = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.seen["module"] = self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["marked"] = bool((batch[0] == 7.0).any())
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        raise AssertionError("plan trains nothing")


class LoudData(DigitsData):
    classes = 10

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0][0, 0, 0, 0] = 7.0
        return batch


def words(module: str, data: str = "LoudData") -> list[str]:
    here = __name__ if "." in __name__ else f"tests.{__name__}"
    optimizer = ["--optimizer=torch.optim.SGD", "--optimizer.lr=0.1"]
    return ["plan", f"--model={here}.{module}", f"--data={here}.{data}", "--trainer.accelerator=cpu", *optimizer]


def test_plan_goes_the_way_of_a_fit_up_to_the_first_step_and_keeps_nothing_else_of_its_trainer(tmp_path: Path) -> None:
    import tests.test_cli as loud

    logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    options = ["--trainer.strategy=ddg", "--trainer.devices=3", "--trainer.precision=64-true", "--num_stages=2"]
    main([*words("LoudModule"), *options, logger, "--trainer.logger.save_dir=logs", "--ckpt_path=null"])
    seen = loud.LoudModule.seen
    trainer: Trainer = seen["trainer"]
    assert (trainer.world_size, trainer.precision) == (1, "64-true")
    assert not isinstance(trainer.strategy, DDPStrategy)
    assert seen["classes"] == 10
    assert seen["marked"], "the batch has gone through the data module's hooks, once"
    module = seen["module"]
    assert module.net[0].weight.dtype == torch.float64
    assert all(torch.equal(tensor, seen["weights"][name]) for name, tensor in module.state_dict().items())
    assert not list(tmp_path.iterdir())


class NoData(LightningDataModule):
    classes = 10

    def train_dataloader(self) -> Any:
        return DataLoader([], batch_size=2)  # type: ignore[arg-type, var-annotated]


class NotCut(DigitsModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Winding()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (words("NotCut"), "The network 'net' .Winding. cannot be run in parts: The forward of Winding failed"),
        (words("LoudModule", "NoData"), "The training data has no batch, and a batch is what is measured"),
        (words("LoudModule")[:-2], r"No `configure_optimizers\(\)` method defined"),
        ([*words("LoudModule"), "--picture=plan.jpg"], "'plan.jpg' is of no known kind"),
        ([*words("LoudModule"), "--num_stages=[]"], r"num_stages=\[\] names no number of stages"),
    ],
    ids=["network", "data", "optimizer", "picture", "number"],
)
def test_what_cannot_be_planned_ends_with_a_plain_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"lightning-ddg plan: .*{message}"):
        main(arguments)
    assert not list(tmp_path.iterdir())


def test_plan_counts_forwards_done_again_and_weights_not_stashed_if_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []

    def plan_module(*args: Any, recompute: bool, stash: bool, **options: Any) -> Any:
        asked.append((recompute, stash))
        return planned.plan_module(*args, recompute=recompute, stash=stash, **options)

    monkeypatch.setattr("lightning_ddg.cli.plan_module", plan_module)
    main(["plan", "--config", CONFIG, "--num_stages", "2"])
    main(["plan", "--config", CONFIG, "--num_stages", "2", "--recompute", "true"])
    main(["plan", "--config", CONFIG, "--num_stages", "2", "--stash", "false"])
    assert asked == [(False, True), (True, True), (False, False)]


def test_plan_without_a_number_of_stages_is_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", CONFIG])
    printed = capsys.readouterr().out
    assert "in flight" not in printed
    assert re.findall(r"^split_points: .*# (\d) stages$", printed, re.MULTILINE) == list("2345678")


def test_plan_compares_numbers_of_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", CONFIG, "--num_stages", "[4]", "--micro_batches", "[1,3]", "--finish", "0.1"])
    printed = capsys.readouterr().out
    assert "A batch in micro-batches, one update for all" in printed
    printed, finish = printed.split("The last 0.1 of a fit synchronous")
    assert re.findall(r"│ +4 │ +(\d) │ .* ms │ .* ms │ .* ms │", finish) == ["1", "3"]
    rows = re.findall(r"│ +4 │ +(\d) │ .* (\d) │ [^│]*│\n", printed)
    assert rows == [("1", "3"), ("3", "1")]
