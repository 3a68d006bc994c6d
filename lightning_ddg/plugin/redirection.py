"""Forward redirection: while a step runs, the network's own ``forward`` goes to a handler.

It is done on the instance and until :meth:`Redirection.remove`; nothing of the user's class is touched, and the
network's hooks fire around the handler as before. Layers that live in another process refuse any other call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

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
        target: The module whose call is the call of the network.
        foreign: Layers whose weights live on another rank, with the number of their stage.
        outdated: Says whether this process's copies of these weights are not the current ones.
    """

    def __init__(
        self,
        target: nn.Module,
        foreign: Mapping[nn.Module, int] | None = None,
        outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        self._target = target
        self._original = target.__dict__.get("forward")
        self._outdated = outdated
        self._handler: Handler | None = None
        self._running = False
        target.forward = self._forward
        self._guards = [
            layer.register_forward_pre_hook(self._guard(type(layer).__name__, stage))
            for layer, stage in (foreign or {}).items()
        ]

    @property
    def redirected(self) -> dict[nn.Module, Any]:
        """The module whose ``forward`` is another one now, with the user's own attribute of that name, if any."""
        return {self._target: self._original}

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        """Send the network's calls to ``handler(args, kwargs)`` inside."""
        self._handler = handler
        try:
            yield
        finally:
            self._handler = None

    def remove(self) -> None:
        """Give the network its own ``forward`` back."""
        if self._original is None:
            del self._target.forward
        else:
            self._target.forward = self._original
        for guard in self._guards:
            guard.remove()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._handler is None or self._running:
            return self._run_original(*args, **kwargs)
        self._running = True
        try:
            return self._handler(args, kwargs)
        finally:
            self._running = False

    def _run_original(self, *args: Any, **kwargs: Any) -> Any:
        if self._original is not None:
            return self._original(*args, **kwargs)
        return type(self._target).forward(self._target, *args, **kwargs)

    def _guard(self, name: str, stage: int) -> Callable[[nn.Module, Any], None]:
        def refuse(_module: nn.Module, _args: Any) -> None:
            if self._handler is not None:
                raise RuntimeError(
                    f"The step calls a layer ({name}) of stage {stage}, which lives in another process, without"
                    " going through the network as a whole. Call the network by its one entry: the module that holds"
                    " all layers, or `self(...)`, exactly once in a training step."
                )
            if self._outdated():
                raise RuntimeError(
                    f"The network was called outside a step, but the current weights of stage {stage} ({name}) live in"
                    " another process until the fit ends. Call it in `validation_step` or `predict_step`, or after the"
                    " fit."
                )

        return refuse
