"""What of torch is replaced while a network is followed symbolically, and put back afterwards.

``torch.fx`` sees calls of modules and what is done with proxies. It does not see

- which attributes of modules decide what a forward does (``nn.Module.__getattribute__``), such as ``self.training``,
  and may be others in the next call;
- that a forward assigns to ``self``, or enters ``autocast`` or inference mode, which the recorded graph would not do;
- calls without a proxy among their arguments that must happen anew each time, such as ``torch.rand`` and
  ``torch.arange``: fx would run them once and keep the result.

There is no way to be told of these but to take the place of torch's own functions. Other threads, in which messages
arrive meanwhile, find them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import get_ident
from typing import Any, Protocol
from unittest import mock

import torch
from torch import fx, nn
from torch.amp.autocast_mode import autocast
from torch.autograd.grad_mode import inference_mode
from torch.utils import checkpoint

_CREATORS = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros")
_RANDOM = ("rand", "randn", "randint", "randperm", "normal", "bernoulli")


class Follower(Protocol):
    """Follows a network, in one thread."""

    thread: int

    def follows(self, module: nn.Module) -> bool:
        """Return whether a module belongs to the network."""
        ...

    def read(self, module: nn.Module, name: str) -> Any:
        """Called for an attribute of such a module; return its value."""
        ...

    def record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of a function."""
        ...


@contextmanager
def followed_by(follower: Follower) -> Iterator[None]:
    """Let a follower see what the forward does, and refuse what it may not do."""
    assign = nn.Module.__setattr__

    def is_mine() -> bool:
        return get_ident() == follower.thread

    def read(module: nn.Module, name: str) -> Any:
        if is_mine() and follower.follows(module):
            return follower.read(module, name)
        return object.__getattribute__(module, name)

    def write(module: nn.Module, name: str, value: Any) -> None:
        if is_mine() and follower.follows(module):
            raise fx.proxy.TraceError(f"the forward assigns to `self.{name}`")
        assign(module, name, value)

    def refusing(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(context: Any) -> Any:
            if is_mine():
                raise fx.proxy.TraceError(f"the forward enters `{type(context).__name__}`")
            return enter(context)

        return refuse

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return follower.record(function, args, kwargs) if is_mine() else function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in (*_CREATORS, *_RANDOM):
            stack.enter_context(mock.patch.object(torch, name, recorded(getattr(torch, name))))
        stack.enter_context(mock.patch.object(checkpoint, "checkpoint", recorded(checkpoint.checkpoint)))
        for context in (autocast, inference_mode):
            stack.enter_context(mock.patch.object(context, "__enter__", refusing(context.__enter__)))
        stack.enter_context(mock.patch.object(nn.Module, "__setattr__", write))
        stack.enter_context(_replaced_getattribute(read))
        yield


@contextmanager
def _replaced_getattribute(function: Callable[[nn.Module, str], Any]) -> Iterator[None]:
    # Not `mock.patch`: what it finds is object's own, and putting that back would leave a slower slot behind.
    nn.Module.__getattribute__ = function  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
