"""Which networks can be cut: each cut in 2, 3 and 4, against the uncut network, in float64; add a row for a new family.

The table in docs/networks.md lists what is tried here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from lightning_ddg.core.pytree import tensors_of
from lightning_ddg.network.balance import best_cut, forbidden_cuts
from lightning_ddg.network.profile import parameter_costs
from lightning_ddg.network.replay.chain import ReplayedChain
from tests.networks import GPT, UNet


class Checkpointed(GPT):
    """Its blocks are computed again in the backward."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x).mean(dim=1))


class Rotary(nn.Module):
    """One buffer that all layers read, and the loss computed inside when there are targets."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.register_buffer("angles", torch.rand(16, 8), persistent=False)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = x + layer(x * self.angles[: x.size(1)].cos())
        logits = self.head(x)
        if targets is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}


class Classifier(nn.Module):
    """torch's own encoder inside a network, with a padding mask made of the input."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.tokens = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(tokens), src_key_padding_mask=tokens == 0).mean(dim=1))


class Translator(nn.Module):
    """torch's own encoder and decoder: what the encoder says goes to every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.ModuleList([nn.Embedding(11, 8), nn.Embedding(11, 8)])
        self.both = nn.Transformer(8, 2, 2, 3, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.ones(target.shape[1], target.shape[1], device=target.device).triu(1).bool()
        return self.head(self.both(self.tokens[0](source), self.tokens[1](target), tgt_mask=mask))


class Recurrent(nn.Module):
    """Layers that return a tensor and a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(6, 6, batch_first=True) for _ in range(4)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, (last, _) = layer(x)
        return self.head(last[-1])


class Frozen(nn.Module):
    """A part without gradients, and sizes and a constant that are needed again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.body = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        batch, pixels = x.shape[0], x[0].numel()
        with torch.no_grad():
            x = self.features(x)
        x = self.body(x.flatten(2).mean(dim=2)) + torch.arange(4, device=x.device)
        return self.head(x).view(batch, -1) / pixels, batch


def images(size: int, channels: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.rand(batch, channels, size, size, dtype=torch.float64),)


def tokens(count: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: tuple(torch.randint(0, 11, (batch, 7)) for _ in range(count))


def maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 4, stochastic_depth_prob=0.1)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 4, 2, 16, 32, dropout=0.1)


def swin(block: Any) -> nn.Module:
    kwargs = {} if block is None else {"block": block, "downsample_layer": models.swin_transformer.PatchMergingV2}
    return models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.1, **kwargs)


def with_head(network: nn.Module, inputs: int) -> nn.Module:
    """The same with a small head: a hundred million weights of torchvision's own show nothing more."""
    network.classifier = nn.Sequential(nn.Dropout(), nn.Linear(inputs, 16), nn.ReLU(inplace=True), nn.Linear(16, 10))
    return network


def resnet(block: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: models.ResNet(block, [1, 2, 1, 1], num_classes=10, **kwargs)


def efficientnet() -> nn.Module:
    config = models.efficientnet.MBConvConfig
    blocks = [config(1, 3, 1, 32, 16, 1, 0.5), config(6, 3, 2, 16, 24, 2, 0.5), config(6, 5, 2, 24, 40, 2, 0.5)]
    return models.EfficientNet(blocks, dropout=0.1, stochastic_depth_prob=0.2, num_classes=10)


def regnet() -> nn.Module:
    params = models.regnet.BlockParams.from_init_params(6, 16, 20.0, 2.0, 8, se_ratio=0.25)
    return models.RegNet(params, num_classes=10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "AlexNet": (lambda: with_head(models.alexnet(), 9216), images(64)),
    "ConvNeXt": (lambda: models.ConvNeXt([models.convnext.CNBlockConfig(8, 16, 2),
                                          models.convnext.CNBlockConfig(16, None, 2)]), images(32)),
    "DenseNet": (lambda: models.DenseNet(8, (3, 3, 2), 16, drop_rate=0.1), images(64)),
    "EfficientNet": (efficientnet, images(32)),
    "GoogLeNet": (lambda: models.googlenet(init_weights=False), images(64)),
    "Inception v3": (lambda: models.inception_v3(aux_logits=False, init_weights=False), images(107)),
    "MaxVit": (maxvit, images(64)),
    "MNASNet": (models.mnasnet0_5, images(64)),
    "MobileNet v2": (lambda: models.mobilenet_v2(width_mult=0.35), images(64)),
    "MobileNet v3": (models.mobilenet_v3_small, images(64)),
    "RegNet": (regnet, images(32)),
    "ResNet": (resnet(models.resnet.BasicBlock), images(32)),
    "ResNeXt": (resnet(models.resnet.Bottleneck, groups=4, width_per_group=8), images(32)),
    "ShuffleNet v2": (models.shufflenet_v2_x0_5, images(64)),
    "SqueezeNet": (models.squeezenet1_1, images(64)),
    "Swin": (lambda: swin(None), images(32)),
    "Swin v2": (lambda: swin(models.swin_transformer.SwinTransformerBlockV2), images(32)),
    "VGG": (lambda: with_head(models.vgg11_bn(init_weights=False), 25088), images(32)),
    "Vision Transformer": (vit, images(32)),
    "Wide ResNet": (resnet(models.resnet.Bottleneck, width_per_group=128), images(32)),
    "U-Net": (UNet, images(8, 1)),
    "GPT by hand": (lambda: GPT(dropout=0.1, layers=3), tokens(1)),
    "GPT by hand, checkpointed": (lambda: Checkpointed(layers=3), tokens(1)),
    "GPT by hand, loss inside": (Rotary, tokens(2)),
    "nn.TransformerEncoder": (Classifier, tokens(1)),
    "nn.Transformer": (Translator, tokens(2)),
    "LSTM stack": (Recurrent, lambda batch: (torch.rand(batch, 5, 6, dtype=torch.float64),)),
    "part without gradients": (Frozen, images(8, 1)),
}  # fmt: skip


SLOW = ("GoogLeNet", "Inception v3", "Wide ResNet")


def run(
    network: nn.Module, call: Callable[[], Any]
) -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
    """Outputs, gradients by the sum of their squares, and the state that is left; the state before is put back."""
    before = copy.deepcopy(network.state_dict())
    network.zero_grad()
    torch.manual_seed(0)
    outputs = tensors_of(call())
    sum(output.square().sum() for output in outputs).backward()
    state = copy.deepcopy(network.state_dict())
    network.load_state_dict(before)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return [output.detach() for output in outputs], gradients, state


def chained(segments: list[nn.Module], args: tuple[Any, ...]) -> Any:
    for segment in segments:
        args = (segment(*args),)
    return args[0]


def assert_equal(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)
def test_cut_in_2_3_and_4_it_computes_what_it_computes_uncut(family: str) -> None:
    torch.manual_seed(1)
    make, arguments = NETWORKS[family]
    network = make().double()
    names = list(network.state_dict())
    chain = ReplayedChain(network, "net", (arguments(2), {}))
    costs, forbidden = parameter_costs(chain), forbidden_cuts(chain)
    cuts = [[0, *best_cut(costs, stages, forbidden), len(chain)] for stages in (2, 3, 4)]
    stages = [[chain.segment(start, stop) for start, stop in pairwise(bounds)] for bounds in cuts]

    for training, batch in ((True, 4), (True, 3), (False, 2)):
        network.train(training)
        args = arguments(batch)
        wanted = run(network, lambda args=args: network(*args))
        for segments in stages:
            assert_equal(run(network, lambda segments=segments, args=args: chained(segments, args)), wanted)

    assert list(network.state_dict()) == names
    for segments in stages:
        own = [f"net.{name}" for name, _ in network.named_parameters()]
        assert sorted(name for segment in segments for name, _ in segment.named_parameters()) == sorted(own)
