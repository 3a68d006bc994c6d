"""Hooks of the user's on layers: they fire where the layer runs, and what they keep for the step is in that process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_ddg.network.restore import hooks_of, reached
from lightning_ddg.plugin.warn import is_users, raised_by_user


@contextmanager
def misses_explained(root: nn.Module, elsewhere: Mapping[nn.Module, int]) -> Iterator[None]:
    """Let a step that fails inside say that what it looks for may be where a hook has kept it.

    Args:
        root: The module whose names count.
        elsewhere: The modules that run in other processes, with their stages.

    Raises:
        RuntimeError: In place of an exception of the user's code, where there are such hooks.
    """
    try:
        yield
    except Exception as error:
        hooked = [(name, part, elsewhere[part]) for name, part in root.named_modules() if part in elsewhere]
        hooked = [entry for entry in hooked if any(_users_hooks_of(entry[1]))]
        # What a module, a dictionary or a list does not have, or what the user's own line does not bear.
        if not hooked or not (isinstance(error, LookupError | AttributeError) or raised_by_user(error)):
            raise
        layers = ", ".join(f"{name!r} ({type(part).__name__}, stage {stage})" for name, part, stage in hooked[:3])
        raise RuntimeError(
            f"The step failed with {type(error).__name__}: {error}. Hooks of yours on {layers} fire in another"
            " process, where that layer runs, and what they keep is not there in this one. If the step looks for it,"
            " return the value from the network's `forward` and use that, or train in one process (`devices=1`)."
        ) from error


def kept_by_hooks(segment: nn.Module) -> list[str]:
    """Return the names of the modules of a stage whose hooks have kept tensors with gradients."""
    return [
        name
        for name, part in segment.named_modules()
        if any(
            isinstance(item, Tensor) and item.grad_fn is not None
            for hook in _users_hooks_of(part)
            for thing in reached(hook)
            for item in _items(thing)
        )
    ]


def _users_hooks_of(part: nn.Module) -> Iterator[Callable[..., Any]]:
    """Not those that torch sets, as for a norm of weights: they work on the layer alone."""
    for hook in hooks_of(part):
        plain: Any = hook
        while isinstance(plain, partial):
            plain = plain.func
        if is_users(getattr(plain, "__module__", None) or type(plain).__module__):
            yield hook


def _items(thing: Any, depth: int = 2) -> Iterator[Any]:
    """A thing, and what is in it: an entry of a container, or an attribute, or an entry of a container in that."""
    yield thing
    if isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values()) if depth == 2 else []
    for item in inside if depth else ():
        yield from _items(item, depth - 1)
