"""Checkpoints are plain Lightning files: they move between K, one process and plain backprop, with the optimizer."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_ddg import DDGStrategy
from tests.harness import environment, run_ranks
from tests.networks import SAFELY, Classifier, largest_difference, loader, quiet_trainer, seeded_network, state_of

STARTS = {2: [3], 3: [2, 5]}


def strategy_for(num_stages: int) -> Any:
    if num_stages == 1:
        return "auto"
    return DDGStrategy(num_stages=num_stages, split_points=[f"net.{start}" for start in STARTS[num_stages]])


def fit(
    num_stages: int, devices: int, epochs: int, load: str | None, save: str | None, network: str = "convnet"
) -> dict[str, torch.Tensor]:
    warnings.simplefilter("ignore")
    pl.seed_everything(11)
    module = Classifier(network, "nesterov")
    trainer = quiet_trainer(devices=devices, strategy=strategy_for(num_stages), max_epochs=epochs)
    trainer.fit(module, loader(network), ckpt_path=load, **SAFELY)
    if save is not None:
        trainer.save_checkpoint(save)
    return state_of(module)


def same_state(a: Any, b: Any) -> bool:
    """Whether two optimizer states are equal to 1e-12, with the same structure."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool((a.double() - b.double()).abs().max() <= 1e-12)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def test_processes_write_the_file_that_one_process_writes(tmp_path: Path) -> None:
    run_ranks(fit, 3, 3, 3, 2, None, str(tmp_path / "three.ckpt"))
    fit(3, 1, 2, None, str(tmp_path / "one.ckpt"))
    fit(1, 1, 2, None, str(tmp_path / "plain.ckpt"))
    three, one, plain = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("three", "one", "plain"))
    assert list(three["state_dict"]) == list(plain["state_dict"])
    assert largest_difference(three["state_dict"], one["state_dict"]) <= 1e-12
    assert same_state(three["optimizer_states"], one["optimizer_states"])
    assert three["optimizer_states"][0].keys() == plain["optimizer_states"][0].keys()
    assert three["optimizer_states"][0]["state"].keys() == plain["optimizer_states"][0]["state"].keys()
    assert three["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]
    assert three["lr_schedulers"] == plain["lr_schedulers"]
    assert three["global_step"] == plain["global_step"] == 10
    assert three["lightning_ddg"] == {"num_stages": 3, "split_points": ["net.2", "net.5"]}
    assert three.keys() - plain.keys() == {"lightning_ddg"}


def plain_epoch_from(path: Path) -> dict[str, torch.Tensor]:
    """One more epoch by plain torch, from a checkpoint's weights, momentum and learning rate."""
    saved = torch.load(path, weights_only=True)
    net = seeded_network("convnet")
    net.load_state_dict({name.removeprefix("net."): value for name, value in saved["state_dict"].items()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.8)
    scheduler.load_state_dict(saved["lr_schedulers"][0])
    for x, y in loader("convnet"):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        scheduler.step()
    return {f"net.{name}": value for name, value in state_of(net).items()}


def test_resuming_under_another_number_of_stages(tmp_path: Path) -> None:
    three, plain = str(tmp_path / "three.ckpt"), str(tmp_path / "plain.ckpt")
    run_ranks(fit, 3, 3, 3, 2, None, three)
    fit(1, 1, 2, None, plain)
    assert largest_difference(fit(1, 1, 3, three, None), plain_epoch_from(tmp_path / "three.ckpt")) == 0.0
    for path in (three, plain):
        for num_stages in (2, 3):
            alone = fit(num_stages, 1, 3, path, None)
            for got in run_ranks(fit, num_stages, num_stages, num_stages, 3, path, None):
                assert largest_difference(got, alone) <= 1e-12, (path, num_stages)
    momentum_lost = torch.load(three, weights_only=True)
    momentum_lost["optimizer_states"][0]["state"] = {}
    torch.save(momentum_lost, tmp_path / "lost.ckpt")
    lost = fit(2, 1, 3, str(tmp_path / "lost.ckpt"), None)
    assert largest_difference(lost, fit(2, 1, 3, three, None)) > 1e-6


@pytest.mark.parametrize("num_stages", [1, 2])
def test_resuming_at_the_end_of_an_epoch_equals_the_uninterrupted_run(num_stages: int, tmp_path: Path) -> None:
    path, network = str(tmp_path / "half.ckpt"), "dropout_mlp"
    devices = num_stages
    if num_stages == 1:  # all stages in one process
        num_stages = 3
    run_ranks(fit, devices, num_stages, devices, 2, None, path, network)
    resumed = run_ranks(fit, devices, num_stages, devices, 4, path, None, network)
    whole = run_ranks(fit, devices, num_stages, devices, 4, None, None, network)
    for a, b in zip(resumed, whole, strict=True):
        assert largest_difference(a, b) == 0.0


def test_a_program_without_the_package_loads_a_checkpoint(tmp_path: Path) -> None:
    (expected, _) = run_ranks(fit, 2, 2, 2, 1, None, str(tmp_path / "two.ckpt"))
    torch.save(expected, tmp_path / "expected.pt")
    program = f"""
import sys
import torch
from tests.networks import SAFELY, Classifier

module = Classifier.load_from_checkpoint({str(tmp_path / "two.ckpt")!r}, network="convnet", **SAFELY)
for name, value in torch.load({str(tmp_path / "expected.pt")!r}).items():
    assert torch.equal(module.state_dict()[name], value), name
assert not any(name.startswith("lightning_ddg") for name in sys.modules)
print("loaded")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().endswith("loaded"), done.stderr


def remembered_cut(path: str, devices: int, load: bool) -> list[list[str]]:
    warnings.simplefilter("ignore")
    module = Classifier("mlp")
    strategy = DDGStrategy(num_stages=2, split_points=None if load else ["net.1"], balance="parameters")
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2 if load else 1)
    trainer.fit(module, loader("mlp"), ckpt_path=path if load else None, **SAFELY)
    if not load:
        trainer.save_checkpoint(path)
    return strategy.stage_parameter_names


def test_the_cut_is_remembered(tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")
    chosen = remembered_cut(path, 1, load=False)
    assert chosen[0] == ["net.0.weight", "net.0.bias"]
    assert remembered_cut(path, 1, load=True) == chosen
    assert run_ranks(remembered_cut, 2, path, 2, True) == [chosen, chosen]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    fit(1, 1, 1, None, str(path))
    saved = torch.load(path, weights_only=True)
    saved["optimizer_states"][0]["param_groups"][0]["params"].pop()
    torch.save(saved, path)
    with pytest.raises(AssertionError, match=r"parameter groups of sizes \[12\], this module's has \[13\]. Resume"):
        run_ranks(fit, 2, 2, 2, 2, str(path), None)


def held_after_fits(path: str) -> list[tuple[int, int]]:
    held = []
    for _ in range(3):
        fit(2, 2, 1, None, path, "mlp")
        gc.collect()
        held.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="open files and threads are counted in Linux's /proc")
def test_fits_and_saves_leave_no_sockets_and_no_threads_behind(tmp_path: Path) -> None:
    """What leaks grows with each fit; it may fall, as gloo notices a little late what the other process gives back."""
    for first, second, third in run_ranks(held_after_fits, 2, str(tmp_path / "a.ckpt")):
        for now, *before in zip(third, first, second, strict=True):
            assert now <= max(before)
