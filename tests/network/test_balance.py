"""How even the automatic cut is on the recipes' networks: against every other cut, with the same measured costs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.network.balance import forbidden_cuts
from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.find import find_network
from lightning_ddg.network.profile import measure_profile
from recipes.gpt import GPT
from recipes.resnet_cifar import CifarResNet


class Root(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32)


def tokens() -> Tensor:
    return torch.randint(0, 65, (1, 32))


NETWORKS = {
    "ResNet-56": (lambda: CifarResNet(depth=56), images),
    "ResNet-110": (lambda: CifarResNet(depth=110), images),
    "GPT of 12 layers": (lambda: GPT(n_layers=12, width=48, heads=2, context=32), tokens),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_cut_has_a_faster_slowest_stage(name: str) -> None:
    make, batch = NETWORKS[name]
    chain = find_network(Root(make()), example=lambda *_: ((batch(),), {})).chain
    assert forbidden_cuts(chain) == {}
    profile = measure_profile(chain, (batch(),), {}, repeats=1)
    for num_stages in (2, 3):
        for seconds_per_byte in (0.0, 1e-9):
            model = CostModel(profile, seconds_per_byte=seconds_per_byte)
            slowest = max(model.stage_seconds(model.best_stages(num_stages)))
            least = min(
                max(model.stage_seconds(starts)) for starts in combinations(range(1, len(chain)), num_stages - 1)
            )
            # The same sums in another order.
            assert slowest == pytest.approx(least, rel=1e-9)
