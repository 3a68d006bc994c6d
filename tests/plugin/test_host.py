"""Tests of the choice between Lightning's two packages live here; a process that has made it cannot make another."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_ddg.plugin import host
from tests.harness import environment

HOST_FILE = host.__file__
PACKAGES = ("lightning", "pytorch_lightning")

SCRIPT = """
import sys
{imports}
import torch
from torch import nn
from lightning_ddg.plugin import host

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch), torch.zeros(4, dtype=torch.long))
        self.log("loss", loss, on_epoch=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def data():
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=4)

def fit(devices, **kwargs):
    torch.manual_seed(0)
    trainer = pl.Trainer(devices=devices, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, **kwargs)
    trainer.fit(Net(), data(), data())
    return {{name: float(value) for name, value in trainer.callback_metrics.items()}}

def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
    return "no error"
"""


def run(folder: Path, imports: str, body: str, **variables: str) -> str:
    """Run a script that begins with these imports, and return what it prints."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(imports=imports) + textwrap.dedent(body))
    clean = {name: value for name, value in os.environ.items() if name != host.VARIABLE}
    clean["PYTHONPATH"] = environment()["PYTHONPATH"]
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=clean | variables, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def lines(out: str) -> list[str]:
    """What the script itself printed, without the cut's table."""
    return [line.removeprefix("> ") for line in out.splitlines() if line.startswith("> ")]


def test_strategies_work_in_a_program_of_the_other_package(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        "import pytorch_lightning as pl\nimport lightning_ddg\nfrom pytorch_lightning.cli import LightningCLI",
        """
        alone, together = fit(1, strategy="ddg"), fit(2, strategy=lightning_ddg.DDGStrategy())
        cli = LightningCLI(Net, run=False, args=[
            "--trainer.strategy=lightning_ddg.DDGStrategy", "--trainer.strategy.num_stages=3", "--trainer.devices=1",
            "--trainer.accelerator=cpu", "--trainer.logger=false"])
        if host.part("fabric.utilities.rank_zero").rank_zero_only.rank == 0:
            print(">", host.HOST, "lightning.pytorch" in sys.modules, alone == together, sorted(alone))
            print(">", type(cli.trainer.strategy).__name__, cli.trainer.strategy.num_stages, repr(cli.trainer.strategy))
            import lightning.pytorch as other
            print(">", error_of(other.Trainer, strategy=lightning_ddg.DDGStrategy()))
        """,
    )
    facts, cli, mixed = lines(out)
    assert facts == "pytorch_lightning False True ['loss', 'loss_epoch', 'loss_step', 'val']"
    assert cli.startswith("DDGStrategy 3 <lightning_ddg.plugin.strategy.DDGStrategy object")
    assert "DDGStrategy: lightning_ddg works with `pytorch_lightning` in this process" in mixed
    assert "set the environment variable LIGHTNING_DDG_HOST=lightning" in mixed


@pytest.mark.slow
def test_where_both_are_imported_the_other_one_says_why_it_fails(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        "import pytorch_lightning\nimport lightning.pytorch as pl\nimport lightning_ddg",
        """
        print(">", host.HOST, sorted(fit(1, strategy="ddg")))
        for strategy in ("ddg", "ddg_spawn", "ddg_notebook", lightning_ddg.DDGStrategy()):
            print(">", error_of(pytorch_lightning.Trainer, strategy=strategy))
        pl, right = pytorch_lightning, pl
        class Other(pl.LightningModule): pass
        trainer = right.Trainer(strategy="ddg", logger=False, accelerator="cpu", devices=1)
        print(">", error_of(trainer.fit, Other(), data()))
        """,
    )
    facts, *mixed, module = lines(out)
    assert facts == "lightning ['loss', 'loss_epoch', 'loss_step', 'val']"
    assert len(mixed) == 4
    for line in mixed:
        assert "lightning_ddg works with `lightning` in this process" in line
        assert "Import `pytorch_lightning`, and not `lightning`, before lightning_ddg" in line
        assert "set the environment variable LIGHTNING_DDG_HOST=pytorch_lightning" in line
    # Lightning's own words, said before any strategy is asked.
    assert module.startswith("TypeError: `model` must be a `LightningModule`")


def test_the_other_one_is_not_imported_and_says_why_it_fails_where_that_comes_later(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        "import lightning_ddg\nimport lightning.pytorch as pl",
        """
        print(">", host.HOST, "pytorch_lightning" in sys.modules, type(pl.Trainer(strategy="ddg").strategy).__name__)
        finders = len(sys.meta_path)
        import pytorch_lightning
        print(">", finders - len(sys.meta_path))
        for strategy in ("ddg", "ddg_spawn", "ddg_notebook", lightning_ddg.DDGStrategy()):
            print(">", error_of(pytorch_lightning.Trainer, strategy=strategy))
        """,
    )
    facts, finders, *mixed = lines(out)
    assert facts == "lightning False DDGStrategy"
    assert finders == "1"
    assert len(mixed) == 4
    for line in mixed:
        assert "lightning_ddg works with `lightning` in this process" in line
        assert "Import `pytorch_lightning`, and not `lightning`, before lightning_ddg" in line


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES:
        monkeypatch.setenv(host.VARIABLE, package)
        assert host._chosen() == package


@pytest.mark.parametrize(
    ("imported", "chosen"),
    [
        ((), "lightning"),
        (("lightning",), "lightning"),
        (("pytorch_lightning",), "pytorch_lightning"),
        (PACKAGES, "lightning"),
    ],
)
def test_the_package_that_is_imported_is_chosen(
    monkeypatch: pytest.MonkeyPatch, imported: tuple[str, ...], chosen: str
) -> None:
    monkeypatch.delenv(host.VARIABLE, raising=False)
    for package, module in (("lightning", "lightning.pytorch"), ("pytorch_lightning", "pytorch_lightning")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        if package in imported:
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert host._chosen() == chosen


def test_an_alias_of_one_package_for_the_other_is_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(host.VARIABLE, raising=False)
    twin = ModuleType("pytorch_lightning")
    for module in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, twin)
    assert host._chosen() == "pytorch_lightning"


def test_an_alias_that_is_heard_of_later_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType(f"{host._PACKAGES[host.HOST]['pytorch']}.strategies")
    own.StrategyRegistry = registry = Registry()  # type: ignore[attr-defined]
    monkeypatch.setattr(host, "part", lambda path, package=host.HOST: own)
    for imported in (True, False):
        monkeypatch.setattr(host, "_imported", lambda package, imported=imported: imported)
        finders = list(sys.meta_path)
        host.register(Registry)
        if not imported:
            (heard,) = set(sys.meta_path) - set(finders)
            heard._then()
            sys.meta_path.remove(heard)
        assert registry == {"ddg": {"strategy": Registry}}


class Registry(dict[str, dict[str, Any]]):
    """Lightning's registry of strategies, and a strategy that registers itself."""

    def register(self, name: str, strategy: Any, **_: Any) -> None:
        self[name] = {"strategy": strategy}

    @classmethod
    def register_strategies(cls, registry: Registry) -> None:
        registry.register("ddg", cls)


@pytest.mark.parametrize("asked", ["pytorch-lightning", "", "Lightning"])
def test_a_value_that_names_no_package_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(host.VARIABLE, asked)
    with pytest.raises(ValueError, match=f"LIGHTNING_DDG_HOST='{asked}' names no package of Lightning: lightning or"):
        host._chosen()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host.VARIABLE, "pytorch_lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match="`pytorch_lightning`, which cannot be imported.*_HOST=lightning"):
        runpy.run_path(HOST_FILE)


def test_a_name_that_lightning_lacks_is_an_attribute_error() -> None:
    with pytest.raises(ImportError, match="Nothing"):
        exec("from lightning_ddg.plugin.host import Nothing")
