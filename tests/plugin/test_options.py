"""Tests of ``options.py``: what is wrong with an option is said with the value and the remedy."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_ddg import DDGStrategy, Staleness
from lightning_ddg.plugin.options import Options, check_backend, check_trainer
from tests.networks import BEFORE_2_6, quiet_trainer

ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_stages": 0}, ValueError, "num_stages=0 is not a number of stages. Use a positive integer or 'auto'"),
    ({"num_stages": 2.0}, ValueError, "num_stages=2.0 is not"),
    ({"num_stages": True}, ValueError, "num_stages=True is not"),
    ({"num_stages": "two"}, ValueError, "num_stages='two' is not"),
    ({"balance": "memory"}, ValueError, "balance='memory' is not known. Use one of 'time', 'parameters', 'flops'"),
    ({"max_memory": "lots"}, ValueError, "'lots' is not a number of bytes: give .* such as '12GB'"),
    (
        {"max_memory": "1kB", "num_stages": 2, "split_points": ["net.3"]},
        ValueError,
        r"max_memory=1000 bytes has no part in a cut by split_points=\['net.3'\].*Leave out one",
    ),
    ({"max_memory": 1000, "balance": "flops"}, ValueError, "max_memory=1000 bytes .* balance='flops'.*Leave out one"),
    ({"drain": "step"}, ValueError, "drain='step' is not known. Use one of 'epoch', 'fit', 'never'"),
    ({"start_method": "thread"}, ValueError, "start_method='thread' is not known. Use one of 'popen'"),
    ({"split_points": "net.3"}, TypeError, r"split_points='net.3' is a string.*split_points=\['net.3'\]"),
    (
        {"num_stages": 3, "split_points": ["net.3"]},
        ValueError,
        "begin 1 stages after the first, but num_stages=3 needs 2",
    ),
    ({"timeout": timedelta(0)}, ValueError, "timeout=datetime.timedelta.0. is not a limit. Use a positive"),
    ({"timeout": 30}, ValueError, "timeout=30 is not a limit"),
    ({"compile": "inductor"}, TypeError, "compile='inductor' is neither a bool nor a dictionary.*Use True"),
    ({"compile": True, "num_stages": 1}, ValueError, r"num_stages=1 cuts nothing.*self.net.compile\(\)"),
    (
        {"compile": {"mode": "max-autotune"}},
        ValueError,
        "'max-autotune'.* records CUDA graphs.*Use mode='max-autotune-no-",
    ),
    ({"compile": {"options": {"triton.cudagraphs": True}}}, ValueError, "triton.cudagraphs.* records CUDA graphs"),
    ({"staleness": {"shrink": 0.5}}, TypeError, "staleness=.*'shrink': 0.5.* is no Staleness. Use lightning_ddg.Stal"),
    ({"staleness": "none"}, ValueError, "staleness='none' is not known. Use 'corrected', or Staleness"),
    *(
        ({"slack": slack}, ValueError, f"slack={slack!r} is not a number of batches. Use 0 .none., or the positive int")
        for slack in (-1, 1.0, True, "1", None)
    ),
    ({"recompute": 1}, TypeError, "recompute=1 is not a bool. Use True or False"),
    (
        {"staleness": Staleness(stash=False), "compile": True},
        ValueError,
        "stash=False uses today's weights.*compiled.*Use recompute=True with it, or leave `compile` out",
    ),
    (
        {"precision_plugin": MixedPrecision("16-mixed", "cpu")},
        ValueError,
        "precision='16-mixed'.*Use precision='bf16-mixed'",
    ),
]


NAMES = [re.sub(r" at 0x\w+", "", str(case[0])) for case in ARGUMENTS]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS, ids=NAMES)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDGStrategy(**arguments)


@pytest.mark.parametrize(("given", "parts"), [({}, "auto"), ({"micro_batches": 4}, 4)])
def test_a_word_stands_for_the_correction(given: dict[str, Any], parts: Any) -> None:
    options = DDGStrategy(staleness="corrected", **given)._options
    assert (options.staleness, options.micro_batches) == (Staleness(extrapolate=True), parts)


def test_nccl_between_processes_that_share_a_device() -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(
        ValueError, match="process_group_backend='nccl' cannot .* share a device.*cuda:0, cuda:0.*'gloo'"
    ):
        check_backend("nccl", [device, device])
    check_backend("nccl", [device, torch.device("cuda", 1)])
    check_backend("gloo", [device, device])
    shared = DDGStrategy(parallel_devices=[device, device])
    assert shared.process_group_backend == "gloo"
    shared.parallel_devices = [device]
    shared.cluster_environment = LightningEnvironment()
    assert shared.process_group_backend == "nccl"


def test_todays_weights_in_recurrent_layers_on_a_gpu() -> None:
    rule, device = Staleness(stash=False), torch.device("cuda", 0)
    segments = [nn.Linear(2, 2), nn.Sequential(nn.LSTM(2, 2))]
    with pytest.raises(
        ValueError, match=r"stash=False .* on cuda:0 LSTM keeps them .*Leave stash=False out, or train on"
    ):
        Options(staleness=rule).check_recurrent(segments, device)
    Options(staleness=rule).check_recurrent(segments, torch.device("cpu"))
    Options(staleness=rule).check_recurrent(segments[:1], device)
    Options().check_recurrent(segments, device)


@pytest.mark.skipif(BEFORE_2_6, reason="Lightning 2.6 brought an interval in seconds")
def test_a_time_based_validation_interval_is_refused() -> None:
    check_trainer(quiet_trainer(devices=1, val_check_interval=2), None, True)
    with pytest.raises(ValueError, match=r"time-based `val_check_interval` \(90.0 seconds\).*number of batches"):
        check_trainer(quiet_trainer(devices=1, val_check_interval="00:00:01:30"), None, False)
    check_trainer(quiet_trainer(devices=1, val_check_interval="00:00:01:30"), None, True)
