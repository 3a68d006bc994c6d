"""Tests of how a checkpoint is written: a kill at any moment or a full disk leaves the old one or the new one."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_ddg import DDGStrategy
from lightning_ddg.plugin.checkpoint_file import WholeFileCheckpointIO
from tests.networks import Classifier, loader, quiet_trainer

SIZE = 100_000


def checkpoint(number: int) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((SIZE,), float(number))}


def write_for_ever(path: Path, ready: int) -> None:
    os.environ["TMPDIR"] = "/dev/shm"
    number = 1
    while True:
        WholeFileCheckpointIO().save_checkpoint(checkpoint(number), path)
        if number == 1:
            os.write(ready, b"x")
        number += 1


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path, draw = tmp_path / "deep" / "last.ckpt", random.Random(7)
    seen = set()
    for _ in range(50):
        heard, ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            write_for_ever(path, ready)
        os.close(ready)
        assert os.read(heard, 1) == b"x"
        os.close(heard)
        # Not to wait for anything: to be killed somewhere within the next two files.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.02))
        signal.sigwait({signal.SIGALRM})
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = torch.load(path)
        assert found["number"] >= 1
        assert torch.equal(found["weights"], checkpoint(found["number"])["weights"])
        seen.add(found["number"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    assert len(seen) > 1


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeFileCheckpointIO().save_checkpoint(checkpoint(1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"last.ckpt' could not be written .*; what was there before is unchanged. Free"
        ):
            WholeFileCheckpointIO().save_checkpoint(checkpoint(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert torch.load(path)["number"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeFileCheckpointIO().save_checkpoint(checkpoint(1), path)
    with pytest.raises(Exception, match="pickle"):
        WholeFileCheckpointIO().save_checkpoint({**checkpoint(2), "function": lambda: 0}, path)
    assert torch.load(path)["number"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    path, link = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    WholeFileCheckpointIO().save_checkpoint(checkpoint(1), path)
    link.symlink_to(path)
    WholeFileCheckpointIO().save_checkpoint(checkpoint(2), link)
    assert [torch.load(file)["number"] for file in (path, link)] == [1, 2]


def test_what_is_no_local_file_is_lightning_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *args: asked.append(args))
    WholeFileCheckpointIO().save_checkpoint({}, "memory://last.ckpt")
    WholeFileCheckpointIO().save_checkpoint({}, "last.ckpt", {"a": 1})
    assert asked == [({}, "memory://last.ckpt", None), ({}, "last.ckpt", {"a": 1})]


class Other(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        written.append(type(self).__name__)
        super().save_checkpoint(*args, **kwargs)


written: list[str] = []


@pytest.mark.parametrize("kind", ["ours", "asynchronous", "the user's", "the strategy's"])
def test_a_fit_writes_by_it_unless_the_user_has_another(kind: str, tmp_path: Path) -> None:
    written.clear()
    plugins: list[Any] = {"asynchronous": [AsyncCheckpointIO()], "the user's": [Other()]}.get(kind, [])
    strategy = DDGStrategy(2, ["net.5"], checkpoint_io=Other() if kind == "the strategy's" else None)
    saving = ModelCheckpoint(tmp_path, filename="model")
    trainer = quiet_trainer(
        devices=1, strategy=strategy, max_epochs=1, plugins=plugins, callbacks=[saving], enable_checkpointing=True
    )
    trainer.fit(Classifier("mlp"), loader("mlp"))
    inner = getattr(trainer.strategy.checkpoint_io, "checkpoint_io", trainer.strategy.checkpoint_io)
    user_s = kind in ("the user's", "the strategy's")
    assert type(inner) is (Other if user_s else WholeFileCheckpointIO)
    assert written == (["Other"] if user_s else [])
    assert torch.load(tmp_path / "model.ckpt", weights_only=False)["epoch"] == 0
