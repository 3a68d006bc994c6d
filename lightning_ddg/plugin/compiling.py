"""``torch.compile`` for stages."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_ddg.network.find import Network
from lightning_ddg.plugin.step import describe


def check_compilable(network: Network) -> None:
    """Refuse to compile a network that runs its own code in every stage.

    Raises:
        ValueError: Naming it.
    """
    if not network.chain.compilable:
        raise ValueError(
            f"The network ({describe(network.target_name)}) cannot be traced and runs its own code in every stage,"
            " which torch.compile cannot follow. Leave `compile` out and compile its layers in your module"
            " (`layer.compile()`), or return its layers from `configure_stages()`."
        )


def compile_stage(segment: nn.Module, number: int, options: Mapping[str, Any]) -> None:
    """Compile a stage's forward, and with it its backward.

    torch keeps what it has compiled with the code that was compiled, and gives up after some versions of it. Stages of
    one process run the same code, and so each gets a copy of its own.

    Args:
        segment: The layers of the stage, as a module that nobody else uses.
        number: Its number.
        options: Arguments of ``torch.compile``.
    """
    forward = segment.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    code = run.__code__.replace(co_name=f"stage_{number}")
    own = FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    segment.forward = torch.compile(own, **options)
