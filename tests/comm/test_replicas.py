"""Tests of ``replicas.py`` and ``weights.py``: what replicas add up, and how a pipeline sees the world."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.comm import replicas as module
from lightning_ddg.comm.ranks import name_of_rank
from lightning_ddg.comm.replicas import MEAN, PipelineMailbox, Replicas
from lightning_ddg.comm.weights import given, renew
from lightning_ddg.core.execution import Channel, Observer, Observers

NEWS = Channel("news")


class Post:
    """The mailbox of one of several threads."""

    def __init__(self, rank: int, size: int, letters: defaultdict[Any, Queue[Any]]) -> None:
        self.rank, self.size, self._letters = rank, size, letters
        self.sent: list[tuple[int, Channel]] = []

    def send(self, to: Any, channel: Channel, value: Any, *, snapshot: bool = False, payload: bool = True) -> None:
        for peer in [to] if isinstance(to, int) else to:
            self.sent.append((peer, channel))
            self._letters[self.rank, peer, channel.name].put(value)

    def take(self, source: int, channel: Channel) -> Any:
        return self._letters[source, self.rank, channel.name].get(timeout=10)

    def has(self, source: int, channel: Channel) -> bool:
        return not self._letters[source, self.rank, channel.name].empty()


def together(size: int, function: Callable[[Replicas, Post], Any]) -> list[Any]:
    """What a function returns on each of several replicas of one stage, on the ranks 1, 4, 7, ..."""
    letters: defaultdict[Any, Queue[Any]] = defaultdict(Queue)
    ranks = [1 + 3 * number for number in range(size)]

    def run(number: int) -> Any:
        post = Post(ranks[number], 3 * size, letters)
        return function(Replicas(post, ranks, number), post)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def parameters(number: int) -> list[nn.Parameter]:
    """Of two types; one has a gradient on the replica 1 only, one on none."""
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((5, 7), (3,), (4,), (2, 2))]
    made.insert(2, nn.Parameter(torch.zeros(6, dtype=torch.float64)))
    for at in (0, 1, 2, *([3] if number == 1 else [])):
        made[at].grad = torch.full_like(made[at], 0.1 * (number + 1)) + torch.arange(made[at].numel()).view_as(made[at])
    return made


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("small", [0, 1 << 16])
def test_gradients_become_their_mean(size: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL_BYTES", small)

    def average(replicas: Replicas, post: Post) -> Any:
        made = parameters(replicas.number)
        replicas.mean_gradients(made)
        return [one.grad for one in made], post.sent.count((4 if replicas.number == 0 else 1, MEAN))

    results = together(size, average)
    givens = [[one.grad for one in parameters(number)] for number in range(size)]
    for at in range(5):
        there = [grads[at] for grads in givens if grads[at] is not None]
        for got, messages in results:
            if not there:
                assert got[at] is None
                continue
            assert torch.allclose(got[at], sum(there) / size)  # type: ignore[arg-type,operator]
            assert got[at].dtype == there[0].dtype
            assert torch.equal(got[at], results[0][0][at]), "the same bits everywhere"
            # Three buckets, as the second type lies between two of the first.
            assert messages == (3 if size == 2 or small else 6)


def test_large_gradients_go_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUCKET_BYTES", 100)

    def average(replicas: Replicas, post: Post) -> Any:
        made = parameters(replicas.number)
        replicas.mean_gradients(made)
        return post.sent.count((4 if replicas.number == 0 else 1, MEAN))

    assert together(2, average) == [4, 4]


def test_one_replica_says_nothing() -> None:
    def average(replicas: Replicas, post: Post) -> Any:
        made = parameters(0)
        before = [one.grad for one in made]
        replicas.mean_gradients(made)
        assert [one.grad for one in made] == before
        assert replicas.gather(torch.ones(2))[0].tolist() == [1, 1]
        return post.sent

    assert together(1, average) == [[]]


@pytest.mark.parametrize(
    ("operation", "wanted"), [("sum", [6, 3]), ("mean", [2, 1]), ("min", [1, 1]), ("max", [3, 1]), ("product", [6, 1])]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.long])
def test_values_are_reduced(operation: str, wanted: list[int], dtype: torch.dtype) -> None:
    def take(replicas: Replicas, post: Post) -> Tensor:
        return replicas.reduce(torch.tensor([replicas.number + 1, 1], dtype=dtype), operation)

    for got in together(3, take):
        assert got.tolist() == wanted
        assert got.dtype == dtype


def test_tensors_of_several_shapes_are_gathered_and_copied() -> None:
    def take(replicas: Replicas, post: Post) -> Any:
        own = torch.ones(replicas.number + 1)
        gathered = replicas.gather(own)
        own.zero_()
        return [tensor.tolist() for tensor in gathered]

    assert together(2, take) == [[[1], [1, 1]]] * 2


def test_after_the_conversation_something_else_gathers() -> None:
    post = Post(0, 2, defaultdict(Queue))
    replicas = Replicas(post, [0, 1], 0, lambda value: [value, value + 1])
    assert [one.tolist() for one in replicas.gather(torch.zeros(1))] == [[0], [1]]
    assert post.sent == []


def test_a_pipeline_counts_its_own_ranks() -> None:
    letters: defaultdict[Any, Queue[Any]] = defaultdict(Queue)
    seen: list[tuple[int, str]] = []

    class Notes(Observer):
        def before_take(self, source: int, channel: Channel) -> None:
            seen.append((source, channel.name))

        after_take = before_take

    observers = Observers()
    observers.subscribe(Notes())
    last, first = (PipelineMailbox(Post(rank, 4, letters), 2, 2, observers) for rank in (2, 3))
    assert (last.rank, first.rank, last.size) == (0, 1, 2)
    last.send([1], NEWS, "up")
    first.send(0, NEWS, "down")
    assert last.has(1, NEWS)
    assert (first.take(0, NEWS), last.take(1, NEWS)) == ("up", "down")
    assert not last.has(1, NEWS)
    assert seen == [(0, "news")] * 2 + [(1, "news")] * 2
    assert set(letters) == {(2, 3, "news"), (3, 2, "news")}


def test_ranks_are_named_by_their_replica_where_there_are_several() -> None:
    assert name_of_rank(1, 3, 3) == "Rank 1 (stage 2)"
    assert name_of_rank(5, 2, 6) == "Rank 5 (replica 2, stage 1)"


def test_buffers_are_replaced_and_not_written_into() -> None:
    def network() -> nn.Module:
        net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        net[1].running_var = net[0].running_var
        net[1].register_buffer("hidden", torch.ones(2), persistent=False)
        return net

    own, other = network(), network()
    own[0].running_mean += 1
    own[0].running_var += 1
    del other[1].hidden
    before, same = other[0].running_var, other[1].running_mean
    renew(other, *given(own, [name for name, _ in own.named_buffers()]))
    assert other[0].running_mean.tolist() == [1, 1, 1]
    assert before.tolist() == [1, 1, 1], "what a backward may need stays"
    assert other[0].running_var is other[1].running_var, "one buffer under two names"
    assert other[1].running_mean is same, "what is the same is left alone"
    assert other[1].hidden.tolist() == [1, 1]
    assert "1.hidden" not in other.state_dict()
