"""The K-process execution as one rank sees it: a stage, its neighbours, and what passes between them.

Nothing here waits for anything but the activation a forward needs and the gradient a backward needs; keep it so. The
other execution with the same methods is :mod:`~lightning_ddg.core.delay_line`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import ACTIVATION, GRADIENT, OUTPUT, Channel, Mailbox
from lightning_ddg.core.schedule import rank_of_stage
from lightning_ddg.core.stage import Stage
from lightning_ddg.core.staleness import shrunk
from lightning_ddg.core.tensors import flatten, map_tensors, spec_of
from lightning_ddg.plugin.redirection import StepDone

NOTICE = Channel("notice")

Seeded = Callable[[int], AbstractContextManager[None]]


class Pipeline:
    """One stage among ``num_stages`` processes.

    Args:
        stage: This rank's stage.
        number: Its number ``k``, input side first.
        num_stages: ``K``.
        transport: Connects the ranks.
        seeded: ``seeded(k)`` seeds the random draws of stage ``k`` for the current batch.
        shape_of_output: For steps that are to go on after the network's call, as in manual optimization: maps this
            stage's output to a placeholder of the network's output. ``None`` ends the step there instead.
        shrink: Factor of the gradients sent upstream.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        num_stages: int,
        transport: Mailbox,
        seeded: Seeded,
        shape_of_output: Callable[[Any], Any] | None = None,
        shrink: float = 1.0,
    ) -> None:
        self.stage = stage
        self.number = number
        self.num_stages = num_stages
        self.transport = transport
        self._seeded = seeded
        self._shape_of_output = shape_of_output
        self._shrink = shrink
        self._drained = False
        self.notices: list[Any] = []
        self._pending = False
        self._upstream = None if number == 1 else rank_of_stage(number - 1, num_stages)
        self._downstream = None if number == num_stages else rank_of_stage(number + 1, num_stages)

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of the next training batch.

        Returns:
            The network's output on the last stage; on others a placeholder for it, if the step is to go on.

        Raises:
            StepDone: On a stage before the last, if the step has nothing more to do there.
        """
        if self._upstream is not None:
            args, kwargs = (self.transport.take(self._upstream, ACTIVATION),), {}
        with self._seeded(self.number):
            output = self.stage.forward(*args, received=self._upstream is not None, **kwargs)
        if self._downstream is None:
            return output
        self.transport.send(self._downstream, ACTIVATION, output)
        if self._shape_of_output is None:
            raise StepDone
        return self._shape_of_output(output)

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward with today's weights; returns the network's output, on every rank."""
        if self._upstream is not None:
            args, kwargs = (self.transport.take(self._upstream, ACTIVATION),), {}
        with self._seeded(self.number), torch.no_grad():
            output = self.stage.module(*args, **kwargs)
        if self._downstream is not None:
            self.transport.send(self._downstream, ACTIVATION, output)
            return self.transport.take(rank_of_stage(self.num_stages, self.num_stages), OUTPUT)
        # A snapshot: the step may change the output in place while it is still on its way.
        others = [rank_of_stage(number, self.num_stages) for number in range(1, self.num_stages)]
        self.transport.send(others, OUTPUT, output, snapshot=True)
        return output

    def backward(self, run: Callable[[], object]) -> None:
        """Backward of the batch that is due, if any, and its gradient sent upstream.

        Args:
            run: The loss's backward; run on the last stage only.
        """
        if self._downstream is None:
            run()
            self._send_gradients(self.stage.backward_done())
        elif len(self.stage) > self.stage.delay:
            self._backward_of_oldest()
        elif not self._pending:
            # Zeroed gradients are not missing ones: an optimizer would decay weights and count a step.
            for parameter in self.stage.module.parameters():
                parameter.grad = None

    def drain(self) -> bool:
        """Backward of the oldest batch in flight, without a new forward; whether there was one."""
        if self._downstream is None or not len(self.stage):
            return False
        self._drained = True
        self._backward_of_oldest()
        return True

    @property
    def waiting(self) -> bool:
        """Whether any batch's gradient has not been applied yet."""
        return len(self.stage) > 0

    def before_step(self) -> None:
        """Lets the weights be changed; batches in flight keep those of their forward."""
        self.stage.stash()

    def stepped(self) -> None:
        """Says that the optimizer has changed the weights."""
        self._pending = False
        self.stage.stepped(self._drained)
        self._drained = False

    def begin(self, step: int) -> None:
        """Says that a run begins, with the optimizer step of that number."""
        self._drained = False
        self.stage.begin(step)

    def skip(self) -> None:
        """Forgets the batch just trained, of which no stage will run a backward."""
        self.stage.skip()

    def clear(self) -> None:
        """Forgets the batches in flight; every rank must call it, so that none finds their gradients later."""
        self._pending = False
        for _ in range(len(self.stage)):
            if self._downstream is not None:
                self.transport.take(self._downstream, GRADIENT)
            self._send_gradients([])
        self.stage.clear()

    def announce(self, notice: Any) -> None:
        """On the last stage: tells the others something; stage ``k`` knows it after ``K - k`` more batches.

        It travels from stage to stage with the gradients, so that nobody waits for it.
        """
        if self._upstream is not None:
            self.transport.send(self._upstream, NOTICE, notice)

    def ask(self, names: list[str]) -> None:
        """On another stage than the last: asks rank 0 for a decision."""
        self.transport.send(rank_of_stage(self.num_stages, self.num_stages), NOTICE, names)

    def asked(self) -> list[str]:
        """On the last stage: what others have asked for since it was last called."""
        others = [rank_of_stage(number, self.num_stages) for number in range(1, self.num_stages)]
        return [
            name for peer in others if self.transport.has(peer, NOTICE) for name in self.transport.take(peer, NOTICE)
        ]

    def _backward_of_oldest(self) -> None:
        assert self._downstream is not None
        self._pending = True
        grads = self.transport.take(self._downstream, GRADIENT)
        while self.transport.has(self._downstream, NOTICE):
            notice = self.transport.take(self._downstream, NOTICE)
            self.notices.append(notice)
            self.announce(notice)
        self._send_gradients(self.stage.backward(grads))

    def _send_gradients(self, grads: list[Tensor | None]) -> None:
        if self._upstream is not None:
            self.transport.send(self._upstream, GRADIENT, shrunk(grads, self._shrink))


def placeholder_maker(rest: nn.Module) -> Callable[[Any], Any]:
    """A function from a stage's output to zeros shaped as the network's output.

    The layers after this stage are run on the meta device, which computes shapes only, once per shape of the input.

    Args:
        rest: The layers after this stage. They are copied without their values.
    """
    copies: list[nn.Module] = []
    known: dict[Any, Any] = {}

    def make(output: Any) -> Any:
        structure, tensors = flatten(output)
        key = (structure, tuple(map(spec_of, tensors)))
        if key not in known:
            device = next((tensor.device for tensor in tensors), torch.device("cpu"))
            try:
                if not copies:
                    copies.append(_copy_on_meta(rest))
                with torch.no_grad():
                    shapes = copies[0](map_tensors(lambda tensor: tensor.detach().to("meta"), output))
            except Exception as error:
                raise RuntimeError(
                    "In manual optimization a rank without the loss needs the shape of the network's output, and the"
                    f" layers after its stage do not run on the meta device ({type(error).__name__}: {error}). Use"
                    " automatic optimization, or layers whose output shape does not depend on the data."
                ) from error
            known[key] = (shapes, device)
        shapes, device = known[key]
        return map_tensors(lambda tensor: _zeros(tensor, device), shapes)

    return make


def or_end_step(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A placeholder where one can be made, else the end of the step: for steps that may end at the network's call."""

    def make_or_end(output: Any) -> Any:
        try:
            return make(output)
        except RuntimeError:
            raise StepDone from None

    return make_or_end


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    floating = like.is_floating_point() or like.is_complex()
    return torch.zeros(like.shape, dtype=like.dtype, device=device, requires_grad=floating)


def _copy_on_meta(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for child in module.modules():
        # A hook may be a method of anything, the Trainer included, which must not be copied with it.
        for name, value in vars(child).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                memo[id(value)] = OrderedDict()
    return copy.deepcopy(module, memo)
