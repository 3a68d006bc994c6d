"""Forward redirection: while a step runs, the network's own ``forward`` goes to a handler.

It is done on the instance and until :meth:`Redirection.remove`; nothing of the user's class is touched, and the
network's hooks fire around the handler as before. Layers that live in another process refuse any other call, and to be
read or copied while their weights here are not the current ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType
from typing import Any, NoReturn

from torch import Tensor, nn

from lightning_ddg.plugin.attached import checked_when_copied, replaced

Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class StepDone(BaseException):
    """Ends the user's step at its call of the network, where what follows has no use. No ``except Exception`` stops it.

    Attributes:
        value: What whoever ends the step wants to know of it.
    """

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


class Redirection:
    """Redirects the network's call.

    Args:
        target: The module whose call is the call of the network; ``None`` where the step is more than that.
        foreign: Layers whose weights live on another rank, with the number of their stage.
        outdated: Says whether this process's copies of these weights are not the current ones.
        where: Names what the user's code does at the moment, for messages; empty if that is not known.
    """

    def __init__(
        self,
        target: nn.Module | None,
        foreign: Mapping[nn.Module, int] | None = None,
        outdated: Callable[[], bool] = lambda: False,
        where: Callable[[], str] = lambda: "",
    ) -> None:
        self.target = target
        self._outdated, self._where = outdated, where
        self._handler: Handler | None = None
        self._running = False
        self._undo = ExitStack()
        if target is not None:
            self._original = target.forward
            self._undo.callback(replaced(target, "forward", stand_in(target, "forward", self._forward)))
        for layer, stage in (foreign or {}).items():
            self._guard(layer, stage)

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        """Send the network's calls to ``handler(args, kwargs)`` inside."""
        self._handler = handler
        try:
            yield
        finally:
            self._handler = None

    @property
    def answers(self) -> bool:
        """Whether a call of the network is being answered."""
        return self._running

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let what runs inside copy layers without their values."""
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def remove(self) -> None:
        """Give the network its own ``forward`` back."""
        self._undo.close()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._handler is None or self._running:
            return self._original(*args, **kwargs)
        with self.running():
            return self._handler(args, kwargs)

    def _guard(self, layer: nn.Module, stage: int) -> None:
        name, forward = type(layer).__name__, layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._handler is not None:
                raise RuntimeError(
                    f"The step calls a layer ({name}) of stage {stage}, which lives in another process, without"
                    " going through the network as a whole. Call the network by its one entry: the module that holds"
                    " all layers, or `self(...)`, exactly once in a training step."
                )
            if self._outdated() or _elsewhere(layer, args):
                raise RuntimeError(
                    f"The network was called outside a step, but the current weights of stage {stage} ({name}) live in"
                    " another process until the fit ends. Call it in `validation_step` or `predict_step`, or after the"
                    " fit."
                )
            return forward(*args, **kwargs)

        self._undo.callback(replaced(layer, "forward", stand_in(layer, "forward", call)))
        for part in layer.modules():
            if part._parameters or part._buffers:
                self._guard_state(part, name, stage)

    def _guard_state(self, part: nn.Module, name: str, stage: int) -> None:
        state_dict = part.state_dict

        def refuse(what: str) -> NoReturn:
            where = self._where()
            raise RuntimeError(
                f"{what} while training{f', in `{where}`' if where else ''}, but the current weights of stage {stage}"
                f" ({name}) are in another process then. Every process has all of them in `on_save_checkpoint`, in the"
                " hooks of a validation, in `on_train_epoch_end`, in `on_train_end` and after the fit: do it there, or"
                " let all processes call `trainer.save_checkpoint(path)`."
            )

        def read(*args: Any, **kwargs: Any) -> Any:
            if self._outdated():
                refuse("`state_dict()` was called")
            return state_dict(*args, **kwargs)

        def check() -> None:
            # What answers the network's call may copy layers without their values.
            if self._outdated() and not self._running:
                refuse("A layer was copied or pickled")

        self._undo.callback(replaced(part, "state_dict", stand_in(part, "state_dict", read)))
        self._undo.callback(checked_when_copied(part, check))


def _elsewhere(layer: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a layer is on another device than what it is given: this process keeps those of others on the CPU."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor)}
    return any(parameter.device not in devices for parameter in layer.parameters()) if devices else False


def stand_in(obj: object, name: str, function: Callable[..., Any]) -> Any:
    """Return a function to be set in the place of a method, which for whoever inspects it is the method."""
    method = getattr(obj, name)
    original = getattr(method, "__func__", method)
    bound = isinstance(method, MethodType) and method.__self__ is obj

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args[bound:], **kwargs)

    functools.update_wrapper(call, original)
    # What looks at the arguments of a function without going by what it wraps finds these.
    with suppress(TypeError, ValueError):
        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return MethodType(call, obj) if bound else call
