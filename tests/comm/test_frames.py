"""Tests of ``frames.py``: the room that both sides count, and messages of all sizes through it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lightning_ddg.comm import frames
from lightning_ddg.comm.frames import AHEAD, LEAST, MOST, MOST_FAR, Arriving, Room, receives_ahead
from lightning_ddg.core.execution import ACTIVATION, GRADIENT
from tests.comm.test_mailbox import connect
from tests.harness import run_ranks


def rooms(sizes: list[int]) -> Iterator[int]:
    room = Room()
    for size in sizes:
        yield room.next
        room.count(size)


def test_room_is_made_for_the_largest_message_that_came_before_the_receive_was_posted() -> None:
    sizes = [10, 100_000, 20, *[30] * AHEAD, 5]
    assert list(rooms(sizes))[: AHEAD + 1] == [LEAST] * (AHEAD + 1)
    assert list(rooms(sizes))[AHEAD + 1 :] == [25 * LEAST] * 3


def test_receives_are_ahead_as_far_as_a_sender_may_be() -> None:
    assert [receives_ahead(slack) for slack in (0, 1, 4)] == [AHEAD, 12, 24]
    room, made = Room(slack=1), []
    for size in [100_000] * 13 + [MOST_FAR] * 13 + [MOST_FAR + 1] * 13:
        made.append(room.next)
        room.count(size)
    assert made == [LEAST] * 12 + [25 * LEAST] * 13 + [MOST_FAR] * 14


def test_room_never_shrinks_and_what_is_too_large_makes_none() -> None:
    assert set(rooms([MOST + 1] * (3 * AHEAD))) == {LEAST}
    assert list(rooms([MOST, *[1] * (3 * AHEAD)]))[-1] == MOST
    assert list(rooms([MOST, MOST + 1, *[1] * (3 * AHEAD)]))[-1] == MOST


@pytest.mark.parametrize("size", [LEAST - 1, LEAST, LEAST + 1, MOST - LEAST, MOST])
def test_a_message_as_large_as_the_last_has_room(size: int) -> None:
    assert list(rooms([size] * (AHEAD + 1)))[-1] >= size


def drawn(rank: int) -> Iterator[torch.Tensor]:
    """Sizes around the limits, small ones and large ones mixed."""
    chance = random.Random(rank)
    limits = [0, 1, LEAST // 4, MOST // 4, MOST // 2]
    for number in range(120):
        size = max(0, chance.choice(limits) + chance.randint(-60, 60))
        yield torch.full((size,), float(number))


def exchange(exact: bool, slack: int) -> None:
    with patch.object(frames, "_EXACT", exact):
        mailbox = connect(slack=slack)
        for other in [rank for rank in range(mailbox.size) if rank != mailbox.rank]:
            for number, value in enumerate(drawn(mailbox.rank)):
                mailbox.send(other, ACTIVATION if number % 3 else GRADIENT, (value, number))
        for other in [rank for rank in range(mailbox.size) if rank != mailbox.rank]:
            for number, value in enumerate(drawn(other)):
                got, which = mailbox.take(other, ACTIVATION if number % 3 else GRADIENT)
                assert which == number
                assert torch.equal(got, value)
        mailbox.close()


@pytest.mark.parametrize(("exact", "slack"), [(True, 0), (False, 0), (True, 2)])
def test_messages_of_all_sizes_arrive_whole(exact: bool, slack: int) -> None:
    if exact and sys.platform != "linux":
        pytest.skip("gloo waits for as many bytes as there is room for here")
    run_ranks(exchange, 3, exact, slack)


def count_sends() -> list[int]:
    mailbox, sends = connect(), []
    isend = dist.isend

    def counting(*args: Any, **kwargs: Any) -> Any:
        sends[-1] += 1
        return isend(*args, **kwargs)

    with patch.object(dist, "isend", counting):
        for number in range(2 * AHEAD):
            sends.append(0)
            if mailbox.rank == 0:
                mailbox.send(1, ACTIVATION, torch.full((30_000,), float(number)))
            else:
                assert mailbox.take(0, ACTIVATION)[0] == number
        mailbox.close()
    return sends


def test_a_message_of_known_size_is_one_frame() -> None:
    assert run_ranks(count_sends, 2)[0][:-1] == [3] + [2] * (AHEAD - 1) + [1] * (AHEAD - 1)


class LaneToNobody:
    """A lane whose peer ends after so many frames, which have arrived by then."""

    def __init__(self, frames: int) -> None:
        self.left = frames

    def post(self, into: torch.Tensor, peer: int, tag: int) -> object:
        if self.left == 0:
            raise RuntimeError("Connection closed by peer")
        self.left -= 1
        return None

    def wait(self, receive: object) -> None:
        pass


def test_what_a_rank_sent_before_it_ended_arrives() -> None:
    frames_of = Arriving(LaneToNobody(AHEAD + 2), 1, 0)  # type: ignore[arg-type]
    for _ in range(AHEAD + 2):
        frames_of.wait()
        frames_of.count(10)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        frames_of.wait()
