"""What stands in for the network's output where that is in another process, and the step goes on all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import flatten, map_tensors
from lightning_ddg.core.tensors import spec_of
from lightning_ddg.network.replay.shapes import copy_on_meta
from lightning_ddg.plugin.redirection import StepDone

#: From what a stage has sent on to what the user's step gets as the network's output.
Placeholder = Callable[[Any], Any]


def end_step(activation: Any) -> NoReturn:
    """End the user's step at the network's call, as nothing that follows is wanted.

    Raises:
        StepDone: Always.
    """
    raise StepDone


def zeros_like_output(rest: nn.Module) -> Placeholder:
    """Return a function from a stage's output to zeros shaped as the network's output.

    The layers after this stage run on the meta device, which computes shapes only, once per shape of the input.

    Args:
        rest: The layers after this stage. They are copied without their values.
    """
    copies: list[nn.Module] = []
    known: dict[Any, Any] = {}

    def make(activation: Any) -> Any:
        structure, tensors = flatten(activation)
        key = structure, tuple(map(spec_of, tensors))
        if key not in known:
            device = next((tensor.device for tensor in tensors), torch.device("cpu"))
            try:
                if not copies:
                    copies.append(copy_on_meta(rest))
                with torch.no_grad():
                    shapes = copies[0](map_tensors(lambda tensor: tensor.detach().to("meta"), activation))
            except Exception as error:
                raise RuntimeError(
                    "In manual optimization a rank without the loss needs the shape of the network's output, and the"
                    f" layers after its stage do not run on the meta device ({type(error).__name__}: {error}). Use"
                    " automatic optimization, one process (devices=1), or layers whose output shape does not depend on"
                    " the data."
                ) from error
            known[key] = (shapes, device)
        shapes, device = known[key]
        return map_tensors(lambda tensor: _zeros(tensor, device), shapes)

    return make


def or_end_step(placeholder: Placeholder) -> Placeholder:
    """Return a placeholder where one can be made, else end the step: for steps that may end at the network's call."""

    def make_or_end(activation: Any) -> Any:
        try:
            return placeholder(activation)
        except RuntimeError:
            raise StepDone from None

    return make_or_end


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    floating = like.is_floating_point() or like.is_complex()
    return torch.zeros(like.shape, dtype=like.dtype, device=device, requires_grad=floating)
