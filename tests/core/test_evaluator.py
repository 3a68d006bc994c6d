"""Tests of ``evaluator.py``: K stages in K threads, whose parts give what the whole gives, or which stay whole."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.core.evaluator import Evaluator, Piece
from lightning_ddg.core.execution import ACTIVATION, Channel, Mailbox
from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.rng import Batch
from lightning_ddg.network.restore import untouched

Queues = dict[tuple[int, int, str], "queue.Queue[Any]"]


class Threads(Mailbox):
    """One rank's end of queues between threads; counts what goes from stage to stage."""

    def __init__(self, rank: int, size: int, queues: Queues) -> None:
        self.rank, self.size, self.queues = rank, size, queues
        self.pieces: list[Piece] = []

    def queue(self, source: int, to: int, channel: Channel) -> queue.Queue[Any]:
        return self.queues.setdefault((source, to, channel.name), queue.Queue())

    def send(self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False) -> None:
        if channel is ACTIVATION:
            self.pieces.append(value)
        for rank in (to,) if isinstance(to, int) else to:
            self.queue(self.rank, rank, channel).put(map_tensors(torch.clone, value))

    def take(self, source: int, channel: Channel) -> Any:
        return self.queue(source, self.rank, channel).get(timeout=20)

    def has(self, source: int, channel: Channel) -> bool:
        return not self.queue(source, self.rank, channel).empty()


class Line:
    """All stages of a network: what each rank's evaluation returns, and what went between them."""

    def __init__(self, *stages: nn.Module, parts: int = 4) -> None:
        count, queues = len(stages), Queues()
        self.said: list[str] = []
        self.mailboxes = [Threads(count - number, count, queues) for number in range(1, count + 1)]
        self.evaluators = []
        for number, (stage, mailbox) in enumerate(zip(stages, self.mailboxes, strict=True), 1):
            modules = list(stage.modules())
            trial = partial(untouched, modules)
            self.evaluators.append(Evaluator(stage, number, count, mailbox, parts, modules, trial, self.said.append))

    def __call__(self, *args: Any, batch: int = 0, **kwargs: Any) -> Any:
        def on_stage(evaluator: Evaluator) -> Any:
            with torch.no_grad():
                return evaluator.evaluate(Batch(batch), args, kwargs)

        # As their calls pass through the ranks, each would wait for ever without the others.
        with ThreadPoolExecutor(len(self.evaluators)) as pool:
            outputs = list(pool.map(on_stage, self.evaluators))
        assert all(_equal(output, outputs[-1]) for output in outputs)
        return outputs[-1]

    def sizes(self) -> list[int]:
        """Of the pieces that have left the first stage since the last call."""
        pieces, self.mailboxes[0].pieces = self.mailboxes[0].pieces, []
        return [piece.size for piece in pieces]


def _equal(one: Any, other: Any) -> bool:
    found = [torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(other), strict=True)]
    return all(found)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("grad_mode", [nullcontext, torch.inference_mode])
def test_parts_follow_each_other_and_are_joined(stages: int, grad_mode: Any) -> None:
    network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(stages)])
    line = Line(*network)
    for length, sizes in [(8, [0, 2, 2, 2, 2]), (7, [0, 2, 2, 2, 1]), (6, [2, 2, 1, 1]), (3, [0, 1, 1, 1]), (1, [0])]:
        x = torch.randn(length, 3)
        with grad_mode():
            assert torch.allclose(line(x), network(x), atol=1e-6)
        assert line.sizes() == sizes
    assert not line.said


def test_whole_batches_go_where_that_is_asked_for() -> None:
    line = Line(nn.Linear(3, 3), nn.Linear(3, 3), parts=1)
    line(torch.ones(8, 3))
    assert line.sizes() == [0]


class Answer(nn.Module):
    def forward(self, h: Tensor) -> dict[str, Any]:
        return {"logits": h, "loss": h.square().mean(), "pair": (h[:, 0], "a name")}


def test_outputs_of_any_form_are_joined() -> None:
    line = Line(nn.Linear(3, 3), Answer())
    for _ in range(3):
        x = torch.randn(7, 3)
        with torch.no_grad():
            expected = nn.Sequential(*[evaluator._module for evaluator in line.evaluators])(x)
        found = line(x)
        assert found.keys() == expected.keys()
        assert torch.allclose(found["logits"], expected["logits"], atol=1e-6)
        assert torch.allclose(found["loss"], expected["loss"], atol=1e-6)
        assert found["pair"][1] == "a name"
    assert not line.said


class Centred(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class Counts(nn.Module):
    calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, h: Tensor) -> Tensor:
        self.total += h.sum()
        self.seen.append(len(h))
        return h


class Transposed(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.t()


def hooked() -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Centred, "the output of a sample goes by the other samples of its batch"),
        (lambda: nn.BatchNorm1d(3), "the network keeps something of the batch"),
        (lambda: nn.Dropout(), "goes by the other samples"),
        (Counts, "the network keeps something of the batch"),
        (Writes, "the network keeps something of the batch"),
        (hooked, "or a hook looks into it"),
        (Transposed, "cannot be put together"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_networks_whose_samples_are_not_alone_stay_whole(make: Callable[[], nn.Module], says: str, place: int) -> None:
    stages: list[nn.Module] = [nn.Linear(3, 3) for _ in range(3)]
    stages[place] = make()
    if make is Transposed:
        stages[place + 1 :] = [nn.Identity() for _ in stages[place + 1 :]]
    line = Line(*stages)
    line(torch.randn(8, 3))
    assert len(line.sizes()) == 5
    assert says in line.said[0]
    if isinstance(stages[place], Writes):
        assert stages[place].seen == [8], "what is tried leaves nothing behind"
    if isinstance(stages[place], Counts):
        assert stages[place].calls == 1
    line(torch.randn(8, 3))
    assert line.sizes() == [0]
    assert len(line.said) == 1


class Padded(nn.Module):
    """Its output is as long as the longest sample."""

    def forward(self, h: Tensor) -> Tensor:
        longest = int((h != 0).sum(1).max())
        return h[:, :longest]


def test_outputs_that_cannot_be_joined_go_again_whole() -> None:
    line = Line(nn.Identity(), Padded())
    same, other = torch.ones(4, 3), torch.tensor([[1.0, 0, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]])
    for x in (same, same):
        assert line(x).shape == (4, 3)
    line.sizes()
    # The third of its form, which is not tried.
    assert torch.equal(line(other), other)
    assert line.sizes() == [1, 1, 1, 1, 0]
    assert "cannot be put together from micro-batches" in line.said[0]
    assert torch.equal(line(other), other)
    assert line.sizes() == [0]


class Late(nn.Module):
    """Mixes samples only where one is negative."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if bool((h < 0).any()) else h


def test_what_was_alike_and_is_no_more_is_an_error() -> None:
    line = Line(nn.Identity(), Late())
    line(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match=r"evaluated in 4 parts gives something else than as a whole .* eval_micro"):
        _both(line)


def _both(line: Line) -> None:
    first, last = line.evaluators
    for piece in first._given((-torch.arange(12.0).reshape(4, 3),), {}):
        first._run(Batch(0), piece)
    last.evaluate(Batch(0), (), {})


def test_a_form_is_tried_by_itself_and_few_are() -> None:
    line = Line(nn.Identity(), nn.Identity())
    line(torch.ones(4, 3))
    line(torch.ones(4, 3, 2))
    assert line.sizes() == [0, 1, 1, 1, 1] * 2
    for ndim in range(3, 12):
        line(torch.ones(4, *[1] * ndim))
    line.sizes()
    line(torch.ones(4, 3, dtype=torch.float64))
    assert line.sizes() == [0], "no more forms than are worth remembering"
    line(torch.ones(4, 3))
    line(torch.ones(4, 3))
    assert line.sizes() == [0, 1, 1, 1, 1] + [1, 1, 1, 1], "the second is tried, the third is not"


def test_what_has_no_samples_stays_whole() -> None:
    line = Line(nn.Identity(), nn.Identity())
    line(torch.ones(()))
    line([torch.ones(4, 3), torch.ones(5, 3)])
    assert line.sizes() == [0, 0]
