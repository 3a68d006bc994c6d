"""The training step itself as what is cut: for steps that are more than one call of one network.

A step that calls a network's methods, a network twice, or several modules in turn has no single module whose call could
be run in parts. So every stage runs the step: its own layers are real, and what later ones still need is sent, parts of
the batch too. The last stage runs it to its end, and has the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_ddg.core.execution import Sent
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.rng import untouched as draws_untouched
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.network.replay.code import Code
from lightning_ddg.network.replay.layers import has_forward
from lightning_ddg.network.replay.module_calls import calls_left, calls_taken
from lightning_ddg.network.replay.tracked import Tracked
from lightning_ddg.network.restore import untouched
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.attached import replaced
from lightning_ddg.plugin.feedback import StepFeedback
from lightning_ddg.plugin.host import LightningModule, Precision
from lightning_ddg.plugin.measure import logging_muted, transferred
from lightning_ddg.plugin.redirection import Redirection
from lightning_ddg.plugin.step import StepRunner

_REMEDY = (
    "Cut elsewhere (`split_points`); keep what goes from batch to batch in the layer that makes it and uses it; or"
    " train in one process (`devices=1`)."
)


class Program:
    """A module's training step as a function from a batch to a loss.

    Args:
        module: The LightningModule.

    Attributes:
        returned: What the step has returned when it ran last.
        rehearses: Whether runs leave the module as it was, as when several stages are tried out in one process.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self.returned: Any = None
        self.rehearses = False

    @property
    def code(self) -> Code:
        """What stages run."""
        label = f"The training step of {type(self._module).__name__}"
        runs_on = compat.uses_step_outputs(self._module)
        return Code(label, self._whole, self._part, self._observed, _REMEDY, keeps=True, runs_on=runs_on)

    @staticmethod
    def call(args: Sequence[Any]) -> tuple[Any, Tensor]:
        """Return the arguments with which stages are called, of those with which Lightning calls the step.

        The batch's index is a tensor, as it goes from stage to stage with the batch, and differs from call to call.
        """
        return args[0], torch.tensor(args[1:], dtype=torch.long)

    def first_call(
        self, batch: Any, precision: Precision, device: torch.device, part: Callable[[Any], Any]
    ) -> tuple[Any, Tensor]:
        """Return the arguments with which stages are called for the first batch, or ``part`` of it, on a device."""
        batch = transferred(self._module, batch, precision, device, part)
        return self.call(compat.step_arguments(self._module.training_step, batch))

    def output(self) -> Any:
        """Return what the step has returned in a stage that does not end it, zeros for what that does not know."""
        if not isinstance(self.returned, dict):
            return None
        return tree_map(lambda leaf: _zeros(leaf) if isinstance(leaf, Tracked) else leaf, self.returned)

    def _whole(self, batch: Any, numbers: Tensor) -> Any:
        self.returned = None
        with untouched(self._module.modules()) if self.rehearses else nullcontext():
            self.returned = self._module.training_step(batch, *numbers.tolist())
        return self.returned.get("loss") if isinstance(self.returned, dict) else self.returned

    def _part(self, batch: Any, numbers: Tensor) -> None:
        try:
            with logging_muted(self._module):
                self._whole(batch, numbers)
        finally:
            compat.forget_in_metrics(self._module, lambda value: isinstance(value, Tracked))

    def _observed(self, batch: Any, numbers: Tensor) -> Any:
        logged: list[Tensor] = []

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(value, Tensor):
                logged.append(value)

        undo = replaced(self._module, "log", log)
        try:
            self._whole(batch, numbers)
            return self.returned, logged
        finally:
            undo()
            self.returned = None


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


class ProgramRunner(StepRunner):
    """Runs training steps of which each stage runs a part; see :class:`~lightning_ddg.plugin.step.StepRunner`."""

    def __init__(self, program: Program, feedback: StepFeedback | None, *args: Any) -> None:
        super().__init__(*args)
        self._program, self._watched = program, nullcontext if feedback is None else feedback.watched
        self._runs_step = True
        program.rehearses = False

    @override
    def _run_step(self, batch: Batch, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with batch.draws(0), self._redirection.running(), self._watched():
            loss = self._execution.train(batch, self._program.call(args), {})
        output = self._program.returned
        if isinstance(loss, Sent):
            known = self._program.output()
            return self._no_loss() if known is None else {**known, "loss": self._no_loss()}
        self._program.returned = None
        if output is None:
            self.step.skipped = True
            compat.warn_of_no_loss()
            return self._no_loss()
        return output


class StepCalls(NamedTuple):
    """Which modules a step calls.

    Attributes:
        names: Of those with parameters, trained ones among them, by their names, in order; not what these call.
        keeps: Whether it leaves a tensor in an attribute of the module that had one before, or ``None``.
    """

    names: list[str]
    keeps: bool


def calls_in_step(module: LightningModule, target: nn.Module | None, step: Callable[[], object]) -> StepCalls:
    """Run a step, and note which modules it calls with gradients; leave all as it was.

    Args:
        module: The LightningModule.
        target: What may be the network: it counts as called by its ``forward`` too.
        step: Runs the step.

    Raises:
        Exception: What the step raises.
    """
    names: list[str] = []
    inside = False

    def note(part: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal inside
        outer, inside = inside, True
        if not outer and torch.is_grad_enabled():
            names.append(name)
        try:
            with calls_left(part):
                return part(*args, **kwargs)
        finally:
            inside = outer

    def note_forward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal inside
        if not inside and torch.is_grad_enabled():
            names.append(name_of_target)
        outer, inside = inside, True
        try:
            return redirected.forward(*args, **kwargs)
        finally:
            inside = outer

    redirected = nn.Identity() if target is None else target
    name_of_target = next((name for name, part in module.named_modules() if part is target), "")
    parts = [
        (part, name)
        for name, part in module.named_modules()
        if part not in (target, module) and has_forward(part) and _is_trained(part)
    ]
    before = {**vars(type(module)), **vars(module)}
    unmute = compat.mute_logging(module)
    redirection = Redirection(redirected)
    try:
        with untouched(module.modules()), draws_untouched(torch.device("cpu")), torch.enable_grad():
            handlers = {part: partial(note, part, name) for part, name in parts}
            with calls_taken(handlers), redirection.handled_by(note_forward):
                step()
            keeps = any(
                _holds_tensor(value)
                and value is not before[name]
                and (before[name] is None or _holds_tensor(before[name]))
                for name, value in vars(module).items()
                if name in before
            )
    finally:
        redirection.remove()
        unmute()
    return StepCalls(names, keeps)


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _holds_tensor(value: Any) -> bool:
    items = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in items)


def step_on(module: LightningModule, batch: Any) -> Callable[[], object]:
    """Return what runs the training step on a batch."""
    return partial(module.training_step, *compat.step_arguments(module.training_step, batch))


def layers_of_step(
    module: LightningModule, program: Program, call: tuple[Any, ...] | None, points: Collection[str]
) -> ReplayedChain:
    """Return the layers that a training step calls, in the order of the calls.

    Args:
        module: The LightningModule.
        program: Its step.
        call: See :meth:`Program.call`; ``None`` where nothing is trained.
        points: The user's split points.

    Raises:
        RuntimeError: The step fails.
        ValueError: It calls nothing that could be cut.
    """
    named = [part for path, part in module.named_modules() if path in points]
    chain = ReplayedChain(module, "", None if call is None else (call, {}), named, program.code)
    program.rehearses = chain.keeps
    return chain
