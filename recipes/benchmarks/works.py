"""What the contenders train lives here: networks, batches of random data, losses; a new work goes into ``WORKS``.

A work is the same for all contenders: the same first weights, the same batch again and again, SGD with momentum. Where
it is cut is measured by the package itself (:func:`measure_cuts`), once, and all contenders get the same cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ddg.core.pytree import flatten, tensors_of, unflatten
from lightning_ddg.core.rng import untouched
from lightning_ddg.network.balance import cut_at, forbidden_cuts
from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.find import Network, find_network
from lightning_ddg.network.profile import measure_profile
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE
from lightning_ddg.planning.stages import work_of
from recipes.gpt import GPT
from recipes.resnet_cifar import CifarResNet

Batch = tuple[Tensor, Tensor]
Cuts = Mapping[int, Sequence[str]]  # by the number of stages: the names of the layers that begin stages 2, 3, ...


@dataclass(frozen=True)
class Work:
    """A network and what it is trained on; everything in it must pickle, as it travels to the processes.

    Attributes:
        name: For people.
        network: Makes the network.
        batch: Makes one batch: inputs and targets, both with the samples in the first dimension.
        loss: From the network's output and the targets to the mean over the samples.
    """

    name: str
    network: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]


class Training(LightningModule):
    """An ordinary LightningModule that trains a work's network."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.network = work.network()
        self.work_loss = work.loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.work_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Every contender's optimizer."""
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def make(work: Work) -> tuple[Training, Batch]:
    """Makes a work's module and its batch, the same in every process."""
    torch.manual_seed(0)
    return Training(work), work.batch()


class Positional(nn.Module):
    """A segment called as torch's pipelines call it: each tensor that crosses a cut is an argument of its own.

    Args:
        segment: Takes the nest of values that the segment before it returns; the first, the network's input.
        structure: That nest without its tensors, from :func:`~lightning_ddg.core.tensors.flatten`; ``None`` for the
        first.
        copies: Whether to return copies: torch's zero-bubble schedules detach in place what a stage returns, which may
            be what its last layer needs again in the second half of its backward.
    """

    def __init__(self, segment: nn.Module, structure: bytes | None, copies: bool) -> None:
        super().__init__()
        self.segment = segment
        self.structure = structure
        self.copies = copies

    def forward(self, *tensors: Tensor) -> Any:
        # Torch's pipelines send over gloo what they are given, which takes contiguous tensors only.
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(Tensor.contiguous)
        value = self.segment(tensors[0] if self.structure is None else unflatten(self.structure, tensors))
        sent = tuple(
            tensor.clone(memory_format=torch.contiguous_format) if self.copies else tensor.contiguous()
            for tensor in tensors_of(value)
        )
        return tuple(sent) if len(sent) > 1 else sent[0]


def segments(network: Network, points: Sequence[str]) -> list[nn.Module]:
    """Cuts a network at the layers of these names."""
    chain = network.chain
    bounds = [0, *cut_at(chain, points, len(points) + 1), len(chain)]
    return [chain.segment(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def positional_segments(network: Network, points: Sequence[str], piece: Tensor, copies: bool) -> list[nn.Module]:
    """The same for torch's pipelines.

    Args:
        network: What is cut.
        points: Names of the layers that begin stages 2, 3, ...
        piece: A micro-batch, which is passed through to learn what crosses the cuts: sizes may be among it.
        copies: Whether stages return copies, see :class:`Positional`.
    """
    parts: list[nn.Module] = []
    structure, value = None, piece
    for segment in segments(network, points):
        parts.append(Positional(segment, structure, copies))
        with torch.no_grad():
            value = segment(value)
        structure, _ = flatten(value)
    return parts


def network_of(training: LightningModule, work: Work) -> Network:
    """Find the network of a work, by a call with a batch of it."""
    with untouched(torch.device("cpu")):
        inputs, _ = work.batch()
    return find_network(training, example=lambda target, name: ((inputs,), {}))


def measure_cuts(work: Work, counts: Sequence[int], repeats: int) -> dict[str, Any]:
    """Cuts a work as the package does: into the stages whose slowest, its messages included, is fastest.

    Args:
        work: What is trained.
        counts: The numbers of stages.
        repeats: How often each layer is measured.

    Returns:
        By the number of stages: the ``"cuts"``; in ``"shares"``, what part of the time of all stages each takes; in
        ``"crossing"``, the bytes that cross each cut. The number of ``"parameters"`` and the shape of the ``"batch"``.
    """
    torch.set_num_threads(1)
    training, (inputs, _) = make(work)
    network = network_of(training, work)
    chain = network.chain
    profile = measure_profile(chain, (inputs,), {}, repeats=repeats)
    model = CostModel(profile, seconds_per_byte=SECONDS_PER_BYTE)
    forbidden = forbidden_cuts(chain)
    found: dict[str, Any] = {"cuts": {}, "shares": {}, "crossing": {}}
    for count in counts:
        starts = model.best_stages(count, forbidden)
        seconds = work_of(model, starts).busy
        found["shares"][count] = [part / sum(seconds) for part in seconds]
        found["crossing"][count] = [profile.crossing[start] for start in starts]
        found["cuts"][count] = [chain.names[start] for start in starts]
    found["parameters"] = sum(parameter.numel() for parameter in training.parameters())
    return {**found, "batch": list(inputs.shape)}


# The works


class LSTMLayer(nn.Module):
    """An LSTM without its final state: (samples, steps, width) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def lstm_stack(layers: int, width: int) -> nn.Module:
    """LSTM layers and a linear head on every step: (samples, steps, width) to (samples, steps, 10)."""
    return nn.Sequential(*(LSTMLayer(width) for _ in range(layers)), nn.Linear(width, 10))


def wide_mlp(layers: int, width: int) -> nn.Module:
    """Linear layers of equal width with ReLU between them.

    Shape: (samples, width) to (samples, width).
    """
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


def random_values(*shape: int) -> Batch:
    """Random inputs of a shape, and one of ten classes for each sample."""
    return torch.rand(shape), torch.randint(10, shape[:1])


def random_steps(samples: int, steps: int, width: int) -> Batch:
    """Random sequences (samples, steps, width), and one of ten classes for each step."""
    return torch.rand(samples, steps, width), torch.randint(10, (samples, steps))


def random_text(samples: int, context: int) -> Batch:
    """Random bytes, and the random bytes that follow them; both (samples, context)."""
    return torch.randint(256, (samples, context)), torch.randint(256, (samples, context))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of all tokens, or steps."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


#: Sizes are chosen so that a batch takes between a tenth of a second and a few seconds on one core.
WORKS = {
    "resnet56": Work("ResNet-56", partial(CifarResNet, 56), partial(random_values, 128, 3, 32, 32), cross_entropy),
    "resnet110": Work("ResNet-110", partial(CifarResNet, 110), partial(random_values, 128, 3, 32, 32), cross_entropy),
    "gpt": Work(
        "GPT, 10 M parameters",
        partial(GPT, n_layers=8, width=320, heads=5, context=64, dropout=0.0),
        partial(random_text, 16, 64),
        token_loss,
    ),
    "lstm": Work("8 LSTM layers", partial(lstm_stack, 8, 128), partial(random_steps, 8, 256, 128), token_loss),
    "mlp": Work("Wide MLP", partial(wide_mlp, 8, 2048), partial(random_values, 128, 2048), cross_entropy),
}
