"""A training step: what it has to do for the stages to train, and what it may not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddg.network.find import Network


def describe(target_name: str) -> str:
    """Return how the user's step calls the network of that name."""
    return f"`self.{target_name}`" if target_name else "`self(...)`"


def no_call_of(target_name: str) -> str:
    """Return the message for a training step that does not call the network of that name."""
    return (
        f"`training_step` did not call the network ({describe(target_name)}). Call it exactly once in every training"
        " step, by this name; a step that calls its layers one by one should call the module that holds them."
    )


def check_call(network: Network, calls: int, inputs: Sequence[Tensor]) -> None:
    """Refuse a call of the network, in a training step, that its stages could not answer.

    Args:
        network: The network.
        calls: How many times this step has called it, this call included.
        inputs: The tensors of this call.

    Raises:
        RuntimeError: For a second call, a call without gradients, or an input that requires one.
    """
    name = describe(network.target_name)
    if calls > 1:
        raise RuntimeError(
            f"The network ({name}) was called {calls} times in one training step, but its stages do one"
            " forward a batch. Concatenate the inputs along the batch dimension, call it once and split the output."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"The network ({name}) was called under `torch.no_grad` in a training step. Call it with"
            " gradients, exactly once; a second network without gradients should be another module."
        )
    if any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError(
            f"An input of the network ({name}) requires a gradient: something before it would be trained,"
            " but its gradient ends at the first stage. Make those layers part of the network (`configure_stages`), or"
            " detach the input."
        )


def check_step(network: Network, module: LightningModule, calls: int, output: Any, backward_ran: bool) -> None:
    """Refuse a training step that has ended without what every batch needs.

    Args:
        network: The network.
        module: The LightningModule.
        calls: How many times the step has called the network.
        output: What the step returned.
        backward_ran: Whether ``manual_backward`` was called; of no interest in automatic optimization.

    Raises:
        RuntimeError: Without a call of the network, a loss, or a backward.
    """
    if not calls:
        raise RuntimeError(no_call_of(network.target_name))
    step = f"`{type(module).__name__}.training_step`"
    if module.automatic_optimization and output is None:
        raise RuntimeError(
            f"{step} returned None, but the other stages cannot skip a batch. Return the loss for every batch,"
            " multiplied by 0 where it should not count."
        )
    if not module.automatic_optimization and not backward_ran:
        raise RuntimeError(
            f"{step} ended without `self.manual_backward(loss)`, which every batch needs once. Call it exactly once,"
            " and not `loss.backward()`."
        )


def check_one_step(number: int, before: int | None, optimizers: Sequence[Optimizer]) -> None:
    """Refuse an optimizer whose step runs the training step several times, as sharpness-aware minimisation does.

    Args:
        number: Of the batch whose training step is about to run.
        before: Of that whose training step ran before it.
        optimizers: There is one.

    Raises:
        RuntimeError: Naming the optimizer.
    """
    if number == before:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise RuntimeError(
            f"{names} runs the training step a second time for the same batch (number {number}), but in stages a batch"
            " has one forward and one backward. Use an optimizer that calls its closure once."
        )


def warn_of_kept_tensors(segment: nn.Module, stage: int) -> None:
    """Warn of tensors that a forward has left on layers: the loss, in another process, does not see them.

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
    if kept:
        warnings.warn(
            f"Stage {stage} leaves tensors with gradients in attributes of its layers ({', '.join(kept[:3])}"
            f"{', ...' if len(kept) > 3 else ''}). The loss is computed in another process, which does not see them: if"
            " it uses them, return them from the network's forward, or train in one process (`devices=1`).",
            stacklevel=2,
        )


def _items(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    return value if isinstance(value, list | tuple) else [value]
