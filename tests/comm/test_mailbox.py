"""Tests of ``mailbox.py`` on real processes joined by gloo: order, freedom from waiting, failures and the end.

A function that runs on the ranks asserts there; ``run_ranks`` shows the first rank's failure.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pack_sequence

from lightning_ddg.comm.device_lane import DeviceLane
from lightning_ddg.comm.frames import MOST
from lightning_ddg.comm.mailbox import GroupMailbox, PeerError
from lightning_ddg.comm.ranks import STATE
from lightning_ddg.core.execution import ACTIVATION, GRADIENT, Channel
from tests.harness import run_ranks, run_ranks_raw

FLAG = Channel("flag")
BATCH = Channel("batch")
EPOCH = Channel("epoch", ends=True)
LONG = timedelta(seconds=30)


def connect(
    timeout: timedelta = LONG, group: dist.ProcessGroup | None = None, device: str = "cpu", slack: int = 0
) -> GroupMailbox:
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    chosen = group or cast(dist.ProcessGroup, dist.group.WORLD)
    names = [f"rank {rank} by name" for rank in range(dist.get_world_size())]
    return GroupMailbox(chosen, torch.device(device), timeout, names, slack=slack)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ddg-")]


# ---- order


def interleaved_channels() -> None:
    mailbox = connect()
    channels = [ACTIVATION, GRADIENT, FLAG]
    others = [rank for rank in range(mailbox.size) if rank != mailbox.rank]
    for number in range(20):
        for peer in others:
            for channel in channels:
                mailbox.send(peer, channel, (mailbox.rank, channel.name, torch.tensor(number)))
    for channel in reversed(channels):
        for peer in others:
            for number in range(20):
                source, name, value = mailbox.take(peer, channel)
                assert (source, name, value.item()) == (peer, channel.name, number)
    mailbox.close()
    assert own_threads() == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_channel_keeps_its_order(world_size: int) -> None:
    run_ranks(interleaved_channels, world_size)


def changing_message(number: int) -> Any:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.complex64]
    dtype = dtypes[number % len(dtypes)]
    shape = [(), (number % 7, 3), (2, 0), (1 + number * 9,)][number % 4]
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape).add(number).to(dtype)
    return tensor if number % 3 == 0 else {"x": tensor, "number": number, "rest": [None, torch.full((2,), number)]}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def several_receivers() -> None:
    mailbox = connect()
    if mailbox.rank == 0:
        for length in (3, 4000):
            mailbox.send([1, 2], FLAG, torch.ones(length))
        value = torch.ones(4000)
        mailbox.send([2, 1], BATCH, value, snapshot=True)
        value.zero_()
    else:
        assert [len(mailbox.take(0, FLAG)) for _ in range(2)] == [3, 4000]
        assert torch.equal(mailbox.take(0, BATCH), torch.ones(4000))
    mailbox.close()


def test_one_message_may_go_to_several_ranks() -> None:
    run_ranks(several_receivers, 3)


def changing_messages() -> None:
    mailbox = connect()
    peer = 1 - mailbox.rank
    for number in range(120):
        mailbox.send(peer, ACTIVATION, changing_message(number))
        if number >= 3:
            assert same(mailbox.take(peer, ACTIVATION), changing_message(number - 3)), number
    mailbox.close()


def test_shapes_and_dtypes_may_change_with_every_message() -> None:
    run_ranks(changing_messages, 2)


# ---- not waiting


def large_messages_both_ways() -> None:
    mailbox = connect()
    peer = 1 - mailbox.rank
    for number in range(2):
        mailbox.send(peer, ACTIVATION, torch.full((8_000_000,), float(number + mailbox.rank)))
    for number in range(2):
        got = mailbox.take(peer, ACTIVATION)
        assert got.shape == (8_000_000,)
        assert bool((got == number + peer).all())
    mailbox.close()


def test_large_messages_both_ways_do_not_block_each_other() -> None:
    run_ranks(large_messages_both_ways, 2)


def send_without_a_taker() -> None:
    mailbox = connect()
    if mailbox.rank == 0:
        for number in range(30):
            # The tensor is freed at once, and its memory is very likely used by the next.
            mailbox.send(1, ACTIVATION, torch.full((200_000,), float(number)))
        # Rank 1 takes nothing before this: a send that waited for it would never come here.
        mailbox.send(1, FLAG, None)
    else:
        mailbox.take(0, FLAG)
        for number in range(30):
            got = mailbox.take(0, ACTIVATION)
            assert bool((got == number).all()), number
    mailbox.close()


def test_sends_neither_wait_for_the_receiver_nor_need_the_tensor_kept() -> None:
    run_ranks(send_without_a_taker, 2)


def flush_then_modify() -> None:
    mailbox = connect()
    if mailbox.rank == 0:
        tensor = torch.ones(4_000_000)
        for _ in range(3):
            mailbox.send(1, STATE, tensor)
            mailbox.flush()
            tensor.add_(1)
    else:
        for number in range(3):
            got = mailbox.take(0, STATE)
            assert bool((got == number + 1).all())
    mailbox.close()


def test_a_tensor_may_be_modified_after_a_flush() -> None:
    run_ranks(flush_then_modify, 2)


def without_payload() -> None:
    mailbox = connect()
    if mailbox.rank == 0:
        for size in (3, 3000):
            for payload in (False, True, False):
                mailbox.send(1, BATCH, (torch.ones(2, size), "name"), payload=payload)
    else:
        for size in (3, 3000):
            for expected in (0.0, 1.0, 0.0):
                got, name = mailbox.take(0, BATCH)
                assert torch.equal(got, torch.full((2, size), expected))
                assert name == "name"
    mailbox.close()


def test_shapes_alone_may_be_sent() -> None:
    run_ranks(without_payload, 2)


# ---- descriptions


def count_parts() -> None:
    mailbox = connect()
    if mailbox.rank == 0:
        parts: list[int] = []
        original = dist.isend

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            parts.append(tensor.numel() * tensor.element_size())
            return original(tensor, *args, **kwargs)

        dist.isend = counting

        def sent(value: Any) -> int:
            before = len(parts)
            mailbox.send(1, ACTIVATION, value)
            return len(parts) - before

        large = MOST // 4  # float32: with its header, more than room is made for
        assert sent(torch.ones(large)) == 3  # frame, description, bytes
        assert sent(torch.zeros(large)) == 2
        assert sent(torch.zeros(large + 1)) == 3
        assert sent((torch.ones(large), torch.ones(0))) == 3  # nothing to send for the empty one
        assert sent("x" * 20_000) == 2  # too long to be remembered,
        assert sent("x" * 20_000) == 2  # so it is sent again
        assert sent(torch.ones(5)) == 1
        for number in range(600):
            sent(f"text {number % 300}")
        assert sent(torch.ones(large + 2)) == 3
        assert sent(torch.ones(large + 2)) == 3  # there is no room left to remember it
        assert sent(torch.ones(large)) == 2
        dist.isend = original
    else:
        large = MOST // 4
        assert [len(mailbox.take(0, ACTIVATION)) for _ in range(3)] == [large, large, large + 1]
        assert len(mailbox.take(0, ACTIVATION)) == 2
        assert [len(mailbox.take(0, ACTIVATION)) for _ in range(2)] == [20_000] * 2
        assert torch.equal(mailbox.take(0, ACTIVATION), torch.ones(5))
        for number in range(600):
            assert mailbox.take(0, ACTIVATION) == f"text {number % 300}"
        for length in (large + 2, large + 2, large):
            assert torch.equal(mailbox.take(0, ACTIVATION), torch.ones(length))
    mailbox.close()


def test_a_description_is_sent_once_and_many_different_ones_may_be() -> None:
    run_ranks(count_parts, 2)


# ---- failures


def wait_too_long() -> str | None:
    long = connect()
    short = connect(timedelta(milliseconds=200), cast(dist.ProcessGroup, dist.new_group([0, 1], backend="gloo")))
    message = None
    if long.rank == 0:
        with pytest.raises(TimeoutError) as caught:
            short.take(1, GRADIENT)
        message = str(caught.value)
        long.send(1, FLAG, None)
    else:
        long.take(0, FLAG)
    long.close()
    return message


def test_waiting_has_a_limit() -> None:
    message, _ = run_ranks(wait_too_long, 2)
    assert "rank 0 by name waited 0:00:00.200000 for a message (gradient) from rank 1 by name" in message
    assert "raise `timeout` of DDGStrategy" in message


def die_or_wait() -> str:
    mailbox = connect()
    others = [peer for peer in range(3) if peer != mailbox.rank]
    mailbox.send(others, FLAG, None)
    for peer in others:
        mailbox.take(peer, FLAG)
    # Rank 1 dies when the others have all that they take: what is on its way by then, its own or theirs, may be lost.
    if mailbox.rank == 1:
        for peer in others:
            mailbox.take(peer, ACTIVATION)
        os._exit(3)
    mailbox.send(1, ACTIVATION, None)
    with pytest.raises(PeerError) as caught:
        # Rank 2 waits for a rank that lives.
        mailbox.take({0: 1, 2: 0}[mailbox.rank], ACTIVATION)
    return str(caught.value)


def test_a_rank_that_dies_is_named_to_all_others() -> None:
    results = run_ranks_raw(die_or_wait, 3, timeout=60)
    assert results[1].exitcode == 3
    for rank in (0, 2):
        assert results[rank].error is None, results[rank].error
        assert results[rank].value.endswith("Its own output, above or in its log, says why.")
    assert any(results[rank].value.startswith("rank 1 by name is gone") for rank in (0, 2)), results


def abort_or_wait() -> list[str]:
    mailbox = connect()
    if mailbox.rank == 1:
        mailbox.abort("rank 1 ran out of luck")
        with pytest.raises(PeerError, match="This rank has failed: rank 1 ran out of luck"):
            mailbox.raise_failure()
        return []
    heard = []
    with pytest.raises(PeerError) as caught:
        mailbox.take(2 - mailbox.rank, GRADIENT)
    heard.append(str(caught.value))
    with pytest.raises(PeerError) as caught:
        mailbox.send(2 - mailbox.rank, FLAG, None)
    heard.append(str(caught.value))
    # Passes on what it knows; does not replace the first reason by its own.
    mailbox.abort("a consequence")
    with pytest.raises(PeerError) as caught:
        mailbox.flush()
    heard.append(str(caught.value))
    return heard


def test_the_reason_of_an_abort_reaches_ranks_that_wait_for_others() -> None:
    results = run_ranks(abort_or_wait, 3)
    for rank in (0, 2):
        assert results[rank] == ["rank 1 ran out of luck"] * 3


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def send_a_command() -> str:
    mailbox = connect()
    if mailbox.rank == 0:
        mailbox.send(1, FLAG, Command())
    with pytest.raises(PeerError) as caught:
        mailbox.take(1 - mailbox.rank, FLAG)
    mailbox.abort(str(caught.value))
    return str(caught.value)


def test_a_message_that_could_become_a_command_ends_all_ranks() -> None:
    for said in run_ranks(send_a_command, 2, timeout=60):
        assert re.match(
            r"A message \(flag\) from rank 0 by name cannot be read: it names \w+\.system, which is not", said
        )


def end_the_epoch_early() -> str | None:
    mailbox = connect()
    message = None
    if mailbox.rank == 0:
        mailbox.send(1, ACTIVATION, 5)
        mailbox.send(1, EPOCH, None)
        mailbox.take(1, FLAG)
    else:
        # What was sent before the end of the epoch still counts.
        assert mailbox.take(0, ACTIVATION) == 5
        with pytest.raises(PeerError) as caught:
            mailbox.take(0, ACTIVATION)
        message = str(caught.value)
        assert mailbox.take(0, EPOCH) is None
        mailbox.send(0, FLAG, None)
    mailbox.close()
    return message


def test_a_rank_that_has_ended_the_epoch_is_not_waited_for() -> None:
    _, message = run_ranks(end_the_epoch_early, 2)
    assert "rank 1 by name waits for a message (activation) from rank 0 by name, which has already ended" in message
    assert "`limit_*_batches`" in message


def take_after_goodbye() -> str | None:
    long = connect()
    short = connect(timedelta(seconds=2), cast(dist.ProcessGroup, dist.new_group([0, 1], backend="gloo")))
    name = None
    if long.rank == 1:
        try:
            short.take(0, BATCH)
        except (PeerError, TimeoutError) as error:
            name = type(error).__name__
    short.close()
    long.close()
    return name


def test_a_rank_that_has_said_goodbye_is_not_waited_for() -> None:
    assert run_ranks(take_after_goodbye, 2)[1] == "UnmatchedError"


# ---- devices, as far as they can be told without one


def keep_places() -> None:
    """The device "meta" stands for a GPU: all that matters here is that it is not the CPU."""
    mailbox = connect(device="cpu" if os.environ["LOCAL_RANK"] == "0" else "meta")
    sequence = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    large = torch.ones(3000)
    if mailbox.rank == 0:
        mailbox.send(1, BATCH, {"sequence": sequence, "lengths": torch.tensor([3, 2]), "large": large})
        mailbox.send(1, BATCH, [torch.empty(2, device="meta"), torch.ones(2)], payload=False)
    else:
        batch = mailbox.take(0, BATCH)
        places = {batch[key].device.type for key in ("lengths", "large")} | {batch["sequence"].batch_sizes.device.type}
        assert places == {"cpu"}
        assert torch.equal(batch["large"], large)
        shapes = mailbox.take(0, BATCH)
        assert [tensor.device.type for tensor in shapes] == ["meta", "cpu"]
        assert shapes[1].tolist() == [0.0, 0.0]
    mailbox.close()


def test_what_is_on_the_cpu_stays_there() -> None:
    run_ranks(keep_places, 2)


class BrokenEvent:
    """An event of a GPU on which a kernel has failed: whatever one asks of it raises that error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record()

    def record(self, *args: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    synchronize = record


def abort_with_a_broken_device(how: str) -> str | None:
    with (
        patch("torch.cuda.Event", BrokenEvent),
        patch("torch.cuda.Stream", lambda device: None),
        patch("torch.cuda.stream", lambda stream: nullcontext()),
        patch("torch.cuda.set_device", lambda device: None),
    ):
        mailbox = connect(device="cuda" if os.environ["LOCAL_RANK"] == "1" else "cpu")
        message = None
        if mailbox.rank == 1 and how == "abort":
            mailbox.abort("a kernel failed")
        elif mailbox.rank == 1:
            event = BrokenEvent.__new__(BrokenEvent)
            assert isinstance(mailbox._lane, DeviceLane)
            mailbox._lane._staged.put((event, 0, [torch.ones(1)]))
            with pytest.raises(PeerError) as caught:
                mailbox.take(0, FLAG)
            message = str(caught.value)
            mailbox.abort(message)
        else:
            with pytest.raises(PeerError) as caught:
                mailbox.take(1, FLAG)
            message = str(caught.value)
        mailbox.close()
    return message


def test_a_rank_whose_device_is_broken_can_still_tell() -> None:
    assert run_ranks(abort_with_a_broken_device, 2, "abort")[0] == "a kernel failed"


def test_a_copy_that_fails_on_its_way_is_the_failure_of_its_rank() -> None:
    expected = "rank 1 by name could not copy what it sends from its device: RuntimeError: CUDA error: device-side"
    assert all(expected in message for message in run_ranks(abort_with_a_broken_device, 2, "copy"))


# ---- the end


def close_at_different_times() -> None:
    mailbox = connect()
    # Not how many: the one that hears a rank ends at that rank's goodbye, which may have come already.
    assert own_threads()
    if mailbox.rank == 0:
        # Rank 0 hears from both before it closes: the others are already in `close` then.
        mailbox.send(1, STATE, torch.ones(3_000_000))
        assert mailbox.take(1, FLAG) == 1
        assert mailbox.take(2, FLAG) == 2
    else:
        mailbox.send(0, FLAG, mailbox.rank)
    mailbox.close()
    if mailbox.rank == 1:
        # It came before the goodbye, so it is still there.
        assert mailbox.take(0, STATE).sum() == 3_000_000
    assert own_threads() == []
    assert mailbox.failure is None


def test_closing_loses_nothing_and_leaves_no_thread() -> None:
    run_ranks(close_at_different_times, 3)


def connect_twice() -> int:
    for number in range(2):
        group = cast(dist.ProcessGroup, dist.new_group([0, 1], backend="gloo")) if number else None
        mailbox = connect(group=group)
        mailbox.send(1 - mailbox.rank, FLAG, number)
        assert mailbox.take(1 - mailbox.rank, FLAG) == number
        mailbox.close()
    return len(own_threads())


def test_ranks_may_connect_again() -> None:
    assert run_ranks(connect_twice, 2) == [0, 0]


def wait_for_each_other() -> str:
    mailbox = connect(timedelta(days=1))
    peer = 1 - mailbox.rank
    mailbox.send(peer, FLAG, mailbox.rank)
    if mailbox.rank == 0:
        # One message of the other's is left untaken, and one of this rank's arrives while the other waits.
        mailbox.take(peer, ACTIVATION)
        mailbox.send(peer, BATCH, None)
    else:
        mailbox.send(peer, ACTIVATION, 1)
    with pytest.raises(PeerError) as caught:
        mailbox.take(peer, GRADIENT if mailbox.rank else STATE)
    mailbox.abort(str(caught.value))
    return str(caught.value)


def test_ranks_that_wait_for_each_other_know_it() -> None:
    for said in run_ranks(wait_for_each_other, 2, timeout=60):
        assert re.match(
            r"rank . by name waits for a message \((state|gradient)\) from rank . by name, which has sent none and"
            r" waits for one \((state|gradient)\) from rank . by name: each waits for the other. Do on all ranks what",
            said,
        )
        assert "`trainer.save_checkpoint`" in said


def wait_in_a_row() -> str:
    mailbox = connect(timedelta(seconds=5 if os.environ["LOCAL_RANK"] == "2" else 60))
    if mailbox.rank == 0:
        # Rank 0 waits for nobody, but to be told.
        deadline = time.monotonic() + 50
        while mailbox.failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return str(mailbox.failure)
    with pytest.raises((TimeoutError, PeerError)) as caught:
        mailbox.take(mailbox.rank - 1, GRADIENT)
    mailbox.abort(str(caught.value))
    return str(caught.value)


def test_who_gives_up_names_who_waits_for_nobody() -> None:
    for said in run_ranks(wait_in_a_row, 3, timeout=60):
        assert said.startswith(
            "rank 2 by name waited 0:00:05 for a message (gradient) from rank 1 by name, which itself waits for one"
            " (gradient) from rank 0 by name. If a batch can really take that long, raise `timeout`"
        )


def take_twice_slowly() -> dict[int, Any]:
    mailbox = connect(timedelta(seconds=60))
    if mailbox.rank == 0:
        ended = time.monotonic() + 2.5
        while time.monotonic() < ended:
            torch.randn(100).sum()
        mailbox.send(1, GRADIENT, 1)
    elif mailbox.rank == 1:
        mailbox.take(0, GRADIENT)
        mailbox.send(2, GRADIENT, 1)
    else:
        # What it hears of rank 1's wait and of its end comes before this message.
        mailbox.take(1, GRADIENT)
    mailbox.close()
    return mailbox._waits


def test_a_wait_that_has_ended_is_forgotten() -> None:
    assert run_ranks(take_twice_slowly, 3, timeout=60) == [{}, {}, {}]


def close_alone() -> str | None:
    mailbox = connect(timedelta(seconds=1))
    said = None
    if mailbox.rank == 1:
        with pytest.raises(TimeoutError) as caught:
            mailbox.close()
        said = str(caught.value)
    dist.barrier()
    return said


def test_a_rank_that_never_ends_is_named() -> None:
    assert (run_ranks(close_alone, 2, timeout=60)[1] or "").startswith(
        "rank 1 by name waited 0:00:01 for rank 0 by name to end the run too. If what is done after training can really"
    )


class HeldUp:
    """A lane whose messages to a rank do not leave."""

    held_up_by = 0

    def __init__(self, lane: Any) -> None:
        self.lane = lane

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lane, name)

    def mark(self) -> threading.Event:
        return threading.Event()


def flush_what_does_not_leave() -> str:
    mailbox = connect(timedelta(seconds=4 if os.environ["LOCAL_RANK"] == "1" else 60))
    if mailbox.rank == 0:
        with pytest.raises(PeerError) as caught:
            mailbox.take(1, FLAG)
        return str(caught.value)
    lane = mailbox._lane
    mailbox._lane = HeldUp(lane)  # type: ignore[assignment]
    with pytest.raises(TimeoutError) as late:
        mailbox.flush()
    mailbox._lane = lane
    mailbox.abort(str(late.value))
    return str(late.value)


def test_who_cannot_send_names_who_does_not_receive() -> None:
    for said in run_ranks(flush_what_does_not_leave, 2, timeout=60):
        assert said.startswith(
            "rank 1 by name waited 0:00:04 for its messages to be received by rank 0 by name, which itself waits for"
            " one (flag) from rank 1 by name. If sending can really take that long, raise `timeout`"
        )


def fail_while_the_other_closes(how: str) -> str:
    mailbox = connect(timedelta(seconds=60))
    if mailbox.rank == 0:
        mailbox.take(1, FLAG)
        if how == "dies":
            os._exit(3)
        mailbox.abort("rank 0 fails late")
        mailbox.close()
        return ""
    mailbox.send(0, FLAG, 1)
    with pytest.raises(PeerError) as caught:
        mailbox.close()
    return str(caught.value)


@pytest.mark.parametrize(("how", "says"), [("aborts", "rank 0 fails late"), ("dies", "rank 0 by name is gone")])
def test_who_ends_the_run_is_told_of_a_failure_meanwhile(how: str, says: str) -> None:
    results = run_ranks_raw(fail_while_the_other_closes, 2, how, timeout=60)
    assert results[1].error is None, results[1].error
    assert results[1].value.startswith(says)


def work_while_the_other_waits() -> int:
    mailbox = connect(timedelta(days=1))
    if mailbox.rank == 0:
        # Longer than the patience of the other, which must not take it for a wait.
        ended = time.monotonic() + 2.5
        while time.monotonic() < ended:
            torch.randn(100).sum()
        mailbox.send(1, ACTIVATION, 7)
        return int(mailbox.take(1, GRADIENT))
    value = mailbox.take(0, ACTIVATION)
    mailbox.send(0, GRADIENT, value)
    mailbox.flush()
    return int(value)


def test_a_rank_that_works_is_not_taken_for_one_that_waits() -> None:
    assert run_ranks(work_while_the_other_waits, 2, timeout=60) == [7, 7]
