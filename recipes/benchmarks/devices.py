"""Emulated devices live here: a network whose layers sleep as long as a device would be busy, and what it should take.

Sleeping needs no core, so K processes behave like K equal devices even on two cores, and what is left is what a
schedule makes them wait, what its messages and its Python take. Change here what a device does, not who drives it.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_ddg.planning.simulate import Work as Seconds
from lightning_ddg.planning.simulate import steady_state
from recipes.benchmarks.works import Batch, Work

#: Samples of a batch: as many as the most micro-batches that are tried.
SAMPLES = 32

_WIDTH = 8
# The first columns of a message say when it was sent and by which process, so that every library can be delayed alike.
_SENT, _SENDER, _STAMPS = 0, 1, 2
# The most that is made up for: of a timer's lateness, and of the Python that emulates a piece of work.
_MOST_LATE_S, _MOST_PYTHON_S = 0.0005, 0.0015


class Times(NamedTuple):
    """What a device takes for a whole batch.

    Attributes:
        forward_ms: Milliseconds of a stage's forward, F.
        backward_ms: Milliseconds of its backward, B: half of it for the gradient by the input, half by the weights.
        message_ms: Milliseconds between the end of a stage's work and its message's arrival.
    """

    forward_ms: float
    backward_ms: float
    message_ms: float


class _Clock:
    """Ends each piece of a device's work when it is due, the Python of the emulation included."""

    def __init__(self) -> None:
        self._free = self._late = 0.0

    def begin(self) -> None:
        """Says that the device has been given work; how late its last piece ended is made up for."""
        self._free, self._late = time.perf_counter() - self._late, 0.0

    def work(self, seconds: float) -> None:
        """Sleeps until the device has worked that long, since it began or since its last piece of work was due."""
        if not seconds:
            return
        now = time.perf_counter()
        due = seconds + (self._free if now - self._free < _MOST_PYTHON_S else now)
        time.sleep(max(0.0, due - now))
        self._free, self._late = due, min(time.perf_counter() - due, _MOST_LATE_S)


_clock = _Clock()


def _await(message: Tensor, delay_s: float) -> None:
    if not delay_s:
        return
    sent, sender = message[0, _SENT].item(), message[0, _SENDER].item()
    left = sent + delay_s - time.perf_counter()
    # To learn shapes, torch's pipelines pass memory that nobody has written through the layers: no stamp then.
    if 0 < left < delay_s + 0.001 and sender != os.getpid():
        time.sleep(left)


def _stamped(message: Tensor, delay_s: float) -> Tensor:
    if not delay_s:
        return message.view_as(message)
    message = message.clone()
    message[:, _SENT], message[:, _SENDER] = time.perf_counter(), os.getpid()
    return message


class _Arrive(torch.autograd.Function):
    """The end of a link: waits for the message, and stamps the gradient that goes back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, delay_s: float) -> Tensor:
        ctx.delay_s = delay_s
        _await(value, delay_s)
        _clock.begin()
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _stamped(gradient, ctx.delay_s), None


class _Leave(torch.autograd.Function):
    """The beginning of a link: stamps the message, and waits for the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, delay_s: float) -> Tensor:
        ctx.delay_s = delay_s
        return _stamped(value, delay_s)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _await(gradient, ctx.delay_s)
        _clock.begin()
        return gradient, None


class _Busy(torch.autograd.Function):
    """The identity, which takes its time forward and backward, in seconds."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        _clock.work(forward_s)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _clock.work(ctx.backward_s)
        return gradient, None, None


class SleepingLayer(nn.Module):
    """A layer that keeps an emulated device busy in proportion to the samples it is given.

    The gradient by its input and the gradient by its weights are two pieces of work, as zero-bubble schedules need.

    Args:
        times: Of a stage.
        share: What part of a stage's work the layer is.

    Shape: (samples, 10) to (samples, 10), the first two columns stamps.
    """

    def __init__(self, times: Times, share: float) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH, dtype=torch.float64)
        # Adds nothing, but makes the first layer's input want a gradient: its backward would be half as long otherwise.
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.forward_s = share * times.forward_ms / 1000 / SAMPLES
        self.half_backward_s = share * times.backward_ms / 2 / 1000 / SAMPLES
        self.delay_s = times.message_ms / 1000

    def forward(self, x: Tensor) -> Tensor:
        half_backward_s = len(x) * self.half_backward_s
        weight, bias = self.linear.weight, self.linear.bias
        # Autograd runs the youngest first: the weights' part, then the input's, and the stamp of what is sent last.
        arrived = _Busy.apply(_Arrive.apply(x + 0 * self.shift, self.delay_s), 0.0, half_backward_s)
        body = nn.functional.linear(arrived[:, _STAMPS:], _Busy.apply(weight, 0.0, half_backward_s), bias)
        done = _Busy.apply(torch.cat([arrived[:, :_STAMPS], body], 1), len(x) * self.forward_s, 0.0)
        sent: Tensor = _Leave.apply(done, self.delay_s)
        return sent


def sleeping_network(layers: int, times: Times, share: float) -> nn.Module:
    """A network of sleeping layers, each with this share of a stage's work."""
    return nn.Sequential(*(SleepingLayer(times, share) for _ in range(layers)))


def sleeping_batch() -> Batch:
    """A batch whose stamps say that it has been there for long."""
    inputs = torch.randn(SAMPLES, _STAMPS + _WIDTH, dtype=torch.float64)
    inputs[:, :_STAMPS] = 0
    return inputs, torch.randn(SAMPLES, _WIDTH, dtype=torch.float64)


def sleeping_loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of all but the stamps."""
    return mse_loss(output[:, _STAMPS:], targets)


def emulated(stages: int, times: Times, chunks: int) -> Work:
    """The work of K emulated devices.

    Args:
        stages: K.
        times: What each takes for a batch.
        chunks: Layers of a device, which share its work.
    """
    name = f"{stages} emulated devices"
    network = partial(sleeping_network, chunks * stages, times, 1 / chunks)
    return Work(name, network, sleeping_batch, sleeping_loss)


def theory_ms(name: str, microbatches: int, stages: int, times: Times) -> float | None:
    """What a schedule takes for a batch, in milliseconds, if only devices and messages take time; ``None`` if unknown.

    One device alone takes F + B. DDG takes F + B where messages take no time: no stage ever waits. With messages, the
    package simulates it. GPipe and 1F1B flush after every batch, which costs the time of K - 1 of m micro-batches,
    (F + B)(m + K - 1)/m; two stages a device, interleaved, halve that cost (Narayanan et al., *Efficient Large-Scale
    Language Model Training on GPU Clusters Using Megatron-LM*, SC 2021, section 2.2).
    """
    both = times.forward_ms + times.backward_ms
    if name in ("backprop", "trainer"):
        return both
    if name in ("ddg", "ddg-bare"):
        links = [times.message_ms] * (stages - 1)
        return steady_state(Seconds([times.forward_ms] * stages, [times.backward_ms] * stages, links, links)).period
    if times.message_ms:
        return None
    if name in ("gpipe", "1f1b"):
        return both * (microbatches + stages - 1) / microbatches
    if name == "interleaved":
        return both * (microbatches + (stages - 1) / 2) / microbatches
    return None


def references_ms(stages: int, times: Times) -> dict[str, float]:
    """The periods a batch, in milliseconds, that need no measurement.

    Returns:
        ``"ideal"``: no stage ever waits; ``"backprop"``: one stage works at a time; ``"paper"``: every forward waits
        for the one before it, the backwards run side by side.
    """
    forward, backward, message = times
    return {
        "ideal": forward + backward,
        "backprop": (forward + backward) * stages + 2 * message * (stages - 1),
        "paper": forward * stages + backward + message * (stages - 1),
    }
