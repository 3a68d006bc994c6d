"""The user's training step, run in stages: the network's call inside it is answered by an execution.

A step goes through these states; what is not drawn is refused::

           the network is called         its output is there       backward (manual optimization)
    IDLE ------------------------> CALLED ---------------> ANSWERED ------------------> BACKWARD
     ^                                                        |                            |
     +--------------------------- end of the step ------------+----------------------------+

In automatic optimization a step that returns ``None``, before or after it has called the network, skips its batch: it
has no backward, on any stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddg.core.execution import Execution, Nothing, Sent
from lightning_ddg.core.pytree import tensors_of
from lightning_ddg.core.rng import Batch
from lightning_ddg.network.find import Network
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.feedback import Feedback
from lightning_ddg.plugin.foreign_hooks import kept_by_hooks
from lightning_ddg.plugin.host import LightningModule
from lightning_ddg.plugin.placeholder import Placeholder, end_step
from lightning_ddg.plugin.redirection import Redirection, StepDone
from lightning_ddg.plugin.site import Site
from lightning_ddg.plugin.verify import Proof
from lightning_ddg.plugin.warn import warn

_log = logging.getLogger(__name__)


class State(Enum):
    """Where a training step stands; see the file's docstring."""

    IDLE = "idle"
    CALLED = "called"
    ANSWERED = "answered"
    BACKWARD = "backward"


class TrainingStep:
    """What one training step has done so far.

    Args:
        module: The LightningModule.
        network: Its network.
    """

    def __init__(self, module: LightningModule, network: Network) -> None:
        self.state = State.IDLE
        self._module = module
        self._name = describe(network.target_name)
        self._target_name = network.target_name
        self._batch: int | None = None
        self._micro = 0
        #: Whether the step has returned no loss, on the process that computes it.
        self.skipped = False

    def forget(self) -> None:
        """Called when training begins: batch numbers may come again."""
        self._batch = None

    def begin(self, batch: int, optimizers: Sequence[Optimizer], micro: int = 0) -> None:
        """Called before the step of a batch, or of one of its micro-batches.

        Raises:
            RuntimeError: If it is the second one for this batch, as in sharpness-aware minimisation.
        """
        if batch == self._batch and micro <= self._micro:
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise RuntimeError(
                f"{names} runs the training step a second time for the same batch (number {batch}), but in stages a"
                " batch has one forward and one backward. Use an optimizer that calls its closure once."
            )
        self._batch, self._micro, self.state, self.skipped = batch, micro, State.IDLE, False

    def called(self, inputs: Iterable[Tensor]) -> None:
        """Called when the step calls the network.

        Args:
            inputs: The tensors that it gives.

        Raises:
            RuntimeError: For a second call, a call without gradients, or an input that requires one.
        """
        if self.state is not State.IDLE:
            raise RuntimeError(
                f"The network ({self._name}) was called 2 times in one training step, but its stages do one"
                " forward a batch. Concatenate the inputs along the batch dimension, call it once and split the output."
            )
        self.state = State.CALLED
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"The network ({self._name}) was called under `torch.no_grad` in a training step. Call it with"
                " gradients, exactly once; a second network without gradients should be another module."
            )
        if any(tensor.requires_grad for tensor in inputs):
            raise RuntimeError(
                f"An input of the network ({self._name}) requires a gradient: something before it would be trained,"
                " but its gradient ends at the first stage. Make those layers part of the network (`configure_stages`),"
                " or detach the input."
            )

    def answered(self) -> None:
        """Called when the step gets the network's output."""
        self.state = State.ANSWERED

    def backward(self) -> None:
        """Called when the step runs its backward; in automatic optimization Lightning does, once and after its end.

        Raises:
            RuntimeError: For a second backward, or one before the call of the network.
        """
        if self._module.automatic_optimization:
            return
        if self.state is State.BACKWARD:
            raise RuntimeError(
                "`manual_backward` was called more than once in a training step. Add the losses up and call it once."
            )
        if self.state is not State.ANSWERED:
            raise RuntimeError(
                f"`manual_backward` was called before the network ({self._name}), whose backward it runs. Call the"
                " network first, exactly once in every training step."
            )
        self.state = State.BACKWARD

    def end(self, output: Any) -> None:
        """Called with what the step has returned.

        Raises:
            RuntimeError: Without a call of the network, or a backward in manual optimization, which every batch needs
                unless the step returns ``None`` in automatic optimization.
        """
        if self._module.automatic_optimization and output is None:
            return
        if self.state is State.IDLE:
            raise RuntimeError(no_call_of(self._target_name))
        if not self._module.automatic_optimization and self.state is not State.BACKWARD:
            raise RuntimeError(
                f"`{type(self._module).__name__}.training_step` ended without `self.manual_backward(loss)`, which every"
                " batch needs once. Call it exactly once, and not `loss.backward()`; only in automatic optimization may"
                " a step return None to skip a batch."
            )


class StepRunner:
    """Runs training steps.

    Args:
        site: What the run is built of.
        network: The network.
        execution: Answers the network's call.
        redirection: Sends the network's call here.
        placeholder: What the step gets for the network's output where that is elsewhere.
        first_forward: Checks what the first batch's forward has left behind.
        first_backward: Checks what the first batch's backward of the loss has left behind.
        proof: Compares the first batch's gradients with those of plain backpropagation, if that is wanted.
        alone: Surrounds a step.
    """

    def __init__(
        self,
        site: Site,
        network: Network,
        execution: Execution,
        redirection: Redirection,
        placeholder: Placeholder,
        first_forward: Callable[[], None],
        first_backward: Callable[[], None],
        proof: Proof | None,
        alone: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.step = TrainingStep(site.module, network)
        self._network_name, self._feedback = network.target_name, Feedback(site)
        self._site, self._execution, self._redirection = site, execution, redirection
        self._placeholder, self._proof, self._alone = placeholder, proof, alone
        self._after_forward, self._after_backward = _Once(first_forward), _Once(first_backward)
        # Elsewhere the stage alone has something to do.
        self._runs_step = site.has_loss or site.ranks.reads or placeholder is not end_step

    def train(
        self, optimizers: Sequence[Optimizer], args: Sequence[Any], kwargs: dict[str, Any], micro: int = 0
    ) -> Any:
        """Run a training step; return what the user's returned, or a loss of 0 that stands for it, or for ``None``.

        ``micro`` is the number of the micro-batch, if the batch is split.
        """
        trainer = self._site.trainer
        skips = compat.skips_backward(trainer)
        if skips and self._execution.waiting:
            # The weights are an average by now; gradients that were not drained before have come too late.
            self._execution.clear()
        batch = self._site.training_batch(compat.batch_number(trainer), micro)
        self.step.begin(batch.number, optimizers, micro)
        if self._proof is not None and not skips:
            self._proof.begin(batch, args, kwargs)
        with self._alone(), self._site.precision.train_step_context():
            output = self._run_step(batch, args, kwargs) if self._runs_step else self._train_stage(batch)
        self._after_forward()
        if skips:
            self._execution.skip()
            for parameter in self._site.module.parameters():
                parameter.grad = None
        return output

    def passes_over(self) -> bool:
        """Return whether the step has returned no loss; if so, run the other backwards that are due."""
        if self.step.skipped:
            self._execution.backward(None)
        return self.step.skipped

    def backward(self, loss: Tensor, run_backward: Callable[[], object]) -> None:
        """Run the backwards that are due; ``run_backward`` runs that of the loss."""

        def run() -> None:
            run_backward()
            self._after_backward()

        if self._proof is not None:
            self._proof.loss(loss)
        self._execution.backward(run)
        if self._proof is not None:
            self._proof.after_backward()

    def flush(self) -> None:
        """Called when all of a batch has gone: in the synchronous finish no gradient is left in flight."""
        if self._execution.synchronous:
            self._execution.flush()

    def _train_stage(self, batch: Batch) -> Tensor:
        self._execution.train(batch, (), {})
        return self._no_loss()

    def _run_step(self, batch: Batch, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        answer = partial(self._answer, batch)
        try:
            with batch.draws(0), self._redirection.handled_by(answer):
                output = self._site.module.training_step(*args, **kwargs)
        except StepDone:
            return self._no_loss()
        except Exception:
            # What follows the network is run here for the sake of hooks only, and may not bear a placeholder.
            if (
                self.step.state is State.ANSWERED
                and not self._site.has_loss
                and self._site.module.automatic_optimization
            ):
                _log.debug("the step failed after the network's call, where its output is a placeholder", exc_info=True)
                return self._no_loss()
            raise
        self.step.end(output)
        if output is not None or not self._site.module.automatic_optimization:
            return output
        if self.step.state is State.IDLE:
            self._execution.pass_over(batch)
        # Elsewhere the loss is a placeholder, as is what the step made of it.
        if self._site.has_loss:
            self.step.skipped = True
            compat.warn_of_no_loss()
        return self._no_loss()

    def _answer(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.step.called(tensors_of((args, kwargs)) if self._site.ranks.reads else ())
        output = self._execution.train(batch, args, kwargs)
        if isinstance(output, Sent) and output.activation is Nothing.NOTHING:
            if self._site.has_loss:
                raise RuntimeError(
                    f"`training_step` returned None for batch {batch.number} without a call of the network"
                    f" ({describe(self._network_name)}) on the process of stage 1, but called it on that of the last"
                    " stage. Whether a batch is skipped must follow from the batch, or from what all processes draw"
                    " or know alike."
                )
            raise StepDone
        self._feedback.check(describe(self._network_name), args, kwargs)
        if isinstance(output, Sent):
            output = self._placeholder(output.activation)
        self.step.answered()
        return output

    def _no_loss(self) -> Tensor:
        return torch.zeros((), device=self._site.device, requires_grad=True)


class _Once:
    """Calls a function the first time only: what it checks is in the nature of the layers, or of the loss."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._rest = [function]

    def __call__(self) -> None:
        if self._rest:
            self._rest.pop()()


def describe(target_name: str) -> str:
    """Return how the user's step calls the network of that name."""
    return f"`self.{target_name}`" if target_name else "`self(...)`"


def no_call_of(target_name: str) -> str:
    """Return the message for a training step that does not call the network of that name."""
    return (
        f"`training_step` did not call the network ({describe(target_name)}). Call it exactly once in every training"
        " step, by this name; a step that calls its layers one by one should call the module that holds them."
    )


def warn_of_kept_tensors(segment: nn.Module, stage: int) -> None:
    """Warn of tensors that a forward, or a hook, has left: the loss, in another process, does not see them.

    Args:
        segment: The layers of a stage before the last, after a training forward.
        stage: Its number.
    """
    kept = [
        f"{name}.{attribute}".lstrip(".")
        for name, module in segment.named_modules()
        for attribute, value in vars(module).items()
        # What a hook makes of other parameters before each forward is no result of it, nor is an RNN's list of them.
        if attribute != "_flat_weights" and not {f"{attribute}_g", f"{attribute}_orig"} & module._parameters.keys()
        if any(isinstance(item, Tensor) and item.grad_fn is not None for item in _items(value))
    ]
    kept += [f"what a hook of {name} keeps" for name in kept_by_hooks(segment)]
    if kept:
        warn(
            f"Stage {stage} leaves tensors with gradients in attributes of its layers, or their hooks do"
            f" ({', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}). The loss is computed in another process,"
            " which does not see them: if it uses them, return them from the network's forward, or train in one"
            " process (`devices=1`)."
        )


def _items(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    return value if isinstance(value, list | tuple) else [value]
