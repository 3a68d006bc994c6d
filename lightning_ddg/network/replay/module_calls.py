"""Whose calls are taken over while a network's forward runs, and what its modules may not do meanwhile.

Each change undoes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def calls_taken(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Send the calls of modules to ``handler(args, kwargs)`` instead; their hooks do not fire.

    ``_compiled_call_impl``, the place of ``nn.Module.compile``, is met by every caller, whichever way it holds the
    module, and leaves the module's class alone.
    """
    for module, handler in handlers.items():
        set_call(module, Taken(handler, module._compiled_call_impl))
    try:
        yield
    finally:
        for module in handlers:
            set_call(module, module._compiled_call_impl.before)  # type: ignore[union-attr]


@contextmanager
def calls_left(module: nn.Module) -> Iterator[None]:
    """Let a module's calls through inside :func:`calls_taken`."""
    taken = module._compiled_call_impl
    assert isinstance(taken, Taken)
    set_call(module, taken.before)
    try:
        yield
    finally:
        set_call(module, taken)


class Taken:
    """What is called in a module's place; ``before`` is what ``nn.Module.compile`` had put there."""

    def __init__(self, handler: Handler, before: Callable[..., Any] | None) -> None:
        self._handler = handler
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(args, kwargs)


def set_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Put something in the place of ``nn.Module.compile``, past the module's ``__setattr__``, which takes its time."""
    if call is None:
        # The class says None too, and so the instance is left as it was found.
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call


def configs_of(network: nn.Module) -> list[Any]:
    """Return the configs in a network, as Hugging Face's have them."""
    configs = {id(config): config for module in network.modules() for config in [getattr(module, "config", None)]}
    return [config for config in configs.values() if config is not None]


@contextmanager
def plain_calls(configs: Iterable[Any]) -> Iterator[None]:
    """Switch off what networks do in a call beside computing their output, on which stages would have to agree.

    That is the filling of caches if ``config.use_cache`` says so, and ``nn.TransformerEncoder``'s packing of padded
    batches in evaluation. Both are asked for by global state, which no argument of the call overrides.
    """
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    fast = torch.backends.mha.get_fastpath_enabled()
    for config in caching:
        config.use_cache = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in caching:
            config.use_cache = True


_WHOLE_ONLY = ("use_cache", "output_hidden_states", "output_attentions")


def check_call(target: nn.Module, configs: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a call, or a config, asks Hugging Face networks for what they collect from all layers."""
    for name in _WHOLE_ONLY:
        asked = kwargs.get(name)
        if asked is None and name != "use_cache":
            asked = any(getattr(config, name, None) is True for config in configs)
        if asked is not None and asked is not False:
            raise ValueError(
                f"{name}={asked!r} asks {type(target).__name__} for values of all its layers, of which each stage has "
                f"only its own: set {name}=False in the call and in the network's config."
            )
