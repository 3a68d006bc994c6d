"""``torch.compile`` for stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_ddg.network.replay.module_calls import set_call


def compile_stage(segment: nn.Module, number: int, options: Mapping[str, Any]) -> Callable[[], None]:
    """Compile a stage's forward, and with it its backward; return what undoes it.

    A stage that runs the network's own code has each module compiled that this code calls, as one compiles the blocks
    of a large network; any other is compiled as a whole.

    Args:
        segment: The layers of the stage, as a module that nobody else uses.
        number: Its number.
        options: Arguments of ``torch.compile``.
    """
    modules: list[nn.Module] = getattr(segment, "called", [segment])
    for index, module in enumerate(modules):
        set_call(module, _compiled(module, f"stage_{number}_{index}", options))

    def undo() -> None:
        for module in modules:
            set_call(module, None)

    return undo


def _compiled(module: nn.Module, name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a module's call.

    torch keeps what it has compiled with the code that was compiled, and gives up after some versions of it. Modules of
    one process run the same code, and so each gets a copy of its own.
    """
    call: Callable[..., Any] = module._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    code = run.__code__.replace(co_name=name)
    own = FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    return torch.compile(own, **options)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
