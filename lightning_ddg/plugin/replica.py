"""A copy of the user's module whose training step can be run aside: what it does reaches nothing outside of it.

The module's own things are copied: weights, buffers, metrics, attributes, generators, hooks, and what functions among
them close over. What belongs to the fit is not (the Trainer, loggers, callbacks, optimizers): the copy has stand-ins,
which can be read and do nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import DummyLogger, LightningDataModule, LightningModule, Trainer
from lightning_ddg.plugin.redirection import StepDone
from lightning_ddg.plugin.stale_copies import NotesGradient

_SHARED = (ModuleType, Dataset, DataLoader, LightningDataModule, Trainer)
_PACKAGE = "lightning_ddg"


def replica_of(module: LightningModule) -> tuple[LightningModule, dict[int, Any]]:
    """Return a copy of a module, and by the ``id`` of each thing its copy.

    Args:
        module: The module, attached to a Trainer.

    Raises:
        Exception: Whatever an attribute raises that cannot be copied.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in _of_the_fit(module.trainer)}
    functions = _Functions(memo)
    for child in module.modules():
        for value in vars(child).values():
            for item in _items(value, depth=3):
                _prepare(item, memo, functions)
    replica = copy.deepcopy(module, memo)
    functions.fill()
    for parameter in module.parameters():
        _copy_hooks(parameter, memo[id(parameter)], functions)
    functions.fill()
    _set_aside(replica, module)
    return replica, memo


def _of_the_fit(trainer: Trainer) -> Iterator[Any]:
    yield from (trainer, trainer.strategy, *trainer.callbacks, *trainer.loggers)  # type: ignore[attr-defined]
    yield from (*trainer.optimizers, *compat.lightning_optimizers(trainer))
    yield from (config.scheduler for config in trainer.lr_scheduler_configs)


def _items(value: Any, depth: int) -> Iterator[Any]:
    """A value and what the containers in it hold."""
    yield value
    if depth and isinstance(value, dict):
        for item in list(value.values()):
            yield from _items(item, depth - 1)
    elif depth and type(value) in (list, tuple, set):
        for item in value:
            yield from _items(item, depth - 1)


def _prepare(value: Any, memo: dict[int, Any], functions: _Functions) -> None:
    """Say what becomes of a value that `deepcopy` would take too far, or not at all."""
    if id(value) in memo:
        return
    if isinstance(value, _SHARED):
        memo[id(value)] = value
    elif isinstance(value, Tensor) and value.grad_fn is not None:
        memo[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, MethodType):
        owner = value.__self__
        # A hook of a callback, or of this package, looks on; here it would look on twice.
        if id(owner) in memo and memo[id(owner)] is owner or _is_ours(type(owner).__module__):
            memo[id(value)] = _nothing
    elif isinstance(value, FunctionType):
        functions.copied(value)


def _is_ours(name: str | None) -> bool:
    return (name or "").partition(".")[0] == _PACKAGE


class _Functions:
    """Copies functions with what they close over, which `deepcopy` leaves as it is."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._cells: dict[int, CellType] = {}
        self._empty: list[tuple[CellType, CellType]] = []

    def copied(self, function: FunctionType) -> Any:
        """Return the copy of a function; it can be called after :meth:`fill`."""
        if id(function) not in self._memo:
            self._memo[id(function)] = self._copy(function)
        return self._memo[id(function)]

    def fill(self) -> None:
        """Give the copies what they close over."""
        while self._empty:
            cell, original = self._empty.pop()
            try:
                content = original.cell_contents
            except ValueError:
                continue
            cell.cell_contents = (
                self.copied(content) if isinstance(content, FunctionType) else copy.deepcopy(content, self._memo)
            )

    def _copy(self, function: FunctionType) -> Any:
        if function.__closure__ is None:
            return function
        if _is_ours(function.__globals__.get("__name__")):
            return _nothing
        cells = tuple(map(self._cell, function.__closure__))
        new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        new.__kwdefaults__ = function.__kwdefaults__
        vars(new).update(vars(function))
        return new

    def _cell(self, original: CellType) -> CellType:
        if id(original) not in self._cells:
            self._cells[id(original)] = CellType()
            self._empty.append((self._cells[id(original)], original))
        return self._cells[id(original)]


def _copy_hooks(parameter: nn.Parameter, new: nn.Parameter, functions: _Functions) -> None:
    """Let hooks change a gradient of the copy as they change the original's."""
    after = (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    if not all(isinstance(hook, NotesGradient) for hook in after):
        raise TypeError("a parameter has a `register_post_accumulate_grad_hook`, which may do anything")
    for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
        new.register_hook(functions.copied(hook) if isinstance(hook, FunctionType) else hook)  # type: ignore[no-untyped-call]


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand for what shall not be done."""


# ---- stand-ins


class StandIn:
    """Reads like something else, keeps what is set, and has some attributes of its own."""

    def __init__(self, real: Any, **own: Any) -> None:
        vars(self).update(own, _real=real)

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        # The class too, for `isinstance`.
        return own[name] if name in own else own if name == "__dict__" else getattr(own["_real"], name)


def _set_aside(replica: LightningModule, module: LightningModule) -> None:
    """Attach a copy to stand-ins."""
    trainer = module.trainer
    loggers = [DummyLogger() for _ in trainer.loggers]
    logger = loggers[0] if loggers else None
    quiet = {"save_checkpoint": _nothing, "print": _nothing}
    stand_in: Any = StandIn(trainer, lightning_module=replica, model=replica, loggers=loggers, logger=logger, **quiet)
    replica.trainer = stand_in
    optimizers = _single([_optimizer(optimizer) for optimizer in compat.lightning_optimizers(trainer)])
    schedulers = [StandIn(config.scheduler, step=_nothing) for config in trainer.lr_scheduler_configs]
    for part in replica.modules():
        if isinstance(part, LightningModule):
            vars(part)["log"] = vars(part)["print"] = _nothing
            vars(part)["toggle_optimizer"] = vars(part)["untoggle_optimizer"] = _nothing
            vars(part)["optimizers"] = lambda use_pl_optimizer=True: optimizers
            vars(part)["lr_schedulers"] = lambda: _single(schedulers) if schedulers else None
            vars(part)["manual_backward"] = _backward_and_end(part)


def _single(things: list[Any]) -> Any:
    return things[0] if len(things) == 1 else things


def _optimizer(real: Any) -> StandIn:
    def step(closure: Callable[[], Any] | None = None, **_kwargs: Any) -> Any:
        return None if closure is None else closure()

    groups = [dict(group) for group in real.param_groups]
    toggle = {"toggle_model": lambda *_args, **_kwargs: nullcontext()} if hasattr(real, "toggle_model") else {}
    return StandIn(real, zero_grad=_nothing, step=step, param_groups=groups, **toggle)


def _backward_and_end(part: LightningModule) -> Callable[..., None]:
    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        part.backward(loss, *args, **kwargs)
        raise StepDone(loss)

    return manual_backward
