"""A tensor that is followed through the code of a network, with or without its values.

What is computed from such a tensor is another one. What follows from it is decided by its :class:`Ledger`:
:mod:`~lightning_ddg.network.replay.dataflow` (with values) and :mod:`~lightning_ddg.network.replay.absent` (without).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle


class Ledger(Protocol):
    """Says what follows from what happens to the tensors that are followed, and computes with their contents."""

    def read(self, tensor: Tracked, operation: str) -> None:
        """Called when an operation needs the tensor's values at once, to branch on them or to write them elsewhere."""

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tracked]) -> Any:
        """Return what an operation returns that writes into none of its arguments, the contents of the operands."""

    def made(self, func: Any, operands: Sequence[Tracked]) -> Any:
        """Return the origin of a tensor that an operation makes of others."""

    def written(self, func: Any, operands: Sequence[Tracked], into: Sequence[Tracked]) -> None:
        """Called when an operation has written into some of its operands."""

    def plain(self, tensor: Tracked) -> bool:
        """Return whether each stage makes the tensor for itself, as one that is not followed there."""


class Tracked(Tensor):
    """Looks like a tensor with ``content``'s shape and dtype, on ``device``; so does what is computed from it.

    Operations are done on the content: a tensor with values, or one on the meta device.
    """

    #: Pytrees take it as it is: it is no tensor of the user's.
    is_stand_in = True

    content: Tensor
    ledger: Ledger
    #: Where it comes from, in the ledger's own terms.
    origin: Any
    #: The tensor it stands for, once that is known.
    value: Tensor | None

    @staticmethod
    def __new__(cls, content: Tensor, device: torch.device, ledger: Ledger, origin: Any) -> Tracked:
        made: Tracked = Tensor._make_wrapper_subclass(
            cls, content.shape, content.stride(), content.storage_offset(), dtype=content.dtype, device=device
        )
        made.content, made.ledger, made.origin = content, ledger, origin
        made.value = None
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"Tracked({self.origin}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.value is not None:
            return copy.deepcopy(self.value, memo)
        memo[id(self)] = copied = self.clone()
        return copied

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.register_hook and isinstance(args[0], Tracked):
            if args[0].value is not None:
                # Perhaps in its own way, as :mod:`~lightning_ddg.network.replay.part` has it.
                return args[0].value.register_hook(*args[1:], **kwargs)  # type: ignore[no-untyped-call]
            if not args[0].requires_grad:
                return RemovableHandle(OrderedDict())
        # Above autograd, so that gradients flow into the tensor it stands for.
        if any(tensor.value is not None for tensor in followed((args, kwargs))):
            return func(*known(args), **known(kwargs))
        if func in _VALUES and isinstance(args[0], Tracked):
            args[0].ledger.read(args[0], func.__name__)
            return func(args[0].content, *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if "data is not allocated" not in str(error):
                    raise
        # It looks into memory past the dispatcher.
        operands = followed((args, kwargs))
        for tensor in operands:
            tensor.ledger.read(tensor, func.__name__)
        first = operands[0]
        with _disable_current_modes():
            result = func(*replaced(content_of, args), **replaced(content_of, kwargs))
        return _followed_too(func, result, first, operands)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _operate(func, args, kwargs or {})


def followed(tree: Any) -> list[Tracked]:
    """Return the followed tensors in a pytree of tuples, lists and dicts."""
    if isinstance(tree, Tracked):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for value in values for tensor in followed(value)]


def replaced(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to each value in a pytree of tuples, lists and dicts.

    Runs several times for every operation between layers, where ``torch.utils._pytree.tree_map``, which knows more
    kinds, takes ten times as long (and pickling, as ``map_tensors`` does, longer still).
    """
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([replaced(function, value) for value in tree])
    if kind is dict:
        return {key: replaced(function, value) for key, value in tree.items()}
    return tree_map(function, tree) if isinstance(tree, tuple | list | dict) else function(tree)


def known(tree: Any) -> Any:
    """Replace each followed tensor in a pytree by the one it stands for, if that is known."""
    return replaced(lambda leaf: leaf.value if isinstance(leaf, Tracked) and leaf.value is not None else leaf, tree)


def content_of(leaf: Any) -> Any:
    """Return what operations are done on in a value's place: itself, if it is not followed."""
    return leaf.content if isinstance(leaf, Tracked) else leaf


def address_of(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def draws(func: Any) -> bool:
    """Return whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


#: Methods that go past the dispatcher, straight to the memory.
_VALUES = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_DATA_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Only shape, dtype and device of their first argument matter, and the result is known without its values.
_TEMPLATES = {
    getattr(torch.ops.aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
}


def _operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _TEMPLATES and isinstance(args[0], Tracked):
        like = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
        return func(like, *args[1:], **kwargs)
    tracked = followed((args, kwargs))
    first = tracked[0]
    written = _written(func, args, kwargs)
    outside = not draws(func) and any(not isinstance(t, Tracked) or t.ledger.plain(t) for t in written)
    if _needs_values(func, args) or outside:
        for tensor in tracked:
            tensor.ledger.read(tensor, str(func).removeprefix("aten."))
    if torch.Tag.inplace_view in func.tags:
        return _reshaped(func, first, args, kwargs)
    device = first.device
    if first.content.is_meta:
        if kwargs.get("device") is not None:
            device, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": "meta"}
        args, kwargs = replaced(on_meta, (args, kwargs))
    else:
        args, kwargs = replaced(content_of, (args, kwargs))
    if written:
        if not first.content.is_meta:
            func(*args, **kwargs)
        first.ledger.written(func, tracked, written)
        return written[0] if len(written) == 1 else tuple(written)
    result = first.ledger.compute(func, args, kwargs, tracked)

    return _followed_too(func, result, first, tracked, device)


def _followed_too(
    func: Any, result: Any, first: Tracked, operands: Sequence[Tracked], device: torch.device | None = None
) -> Any:
    """Follow what an operation has made of operands."""

    def follow(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return Tracked(leaf, device or leaf.device, first.ledger, first.ledger.made(func, operands))

    return replaced(follow, result)


def _reshaped(func: Any, tensor: Tracked, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tracked:
    # Not on the content itself: others may know it by its old strides.
    content = tensor.content.detach()
    func(content, *args[1:], **kwargs)
    if content.shape != tensor.shape:
        raise RuntimeError(
            f"{str(func).removeprefix('aten.')} changes the shape of {tensor.origin} in place, outside of the "
            "network's layers, where the tensor may be absent. Use the operation that returns a new tensor."
        )
    tensor.content = content
    return tensor


def _needs_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result cannot be had, not even its shape, without the values."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(_DATA_TAGS & set(func.tags))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the tensors that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [tensor for tensor in (value if isinstance(value, list) else [value]) if tensor is not None]
    return found


def on_meta(leaf: Any) -> Any:
    """Return a tensor on the meta device in a tensor's place."""
    if isinstance(leaf, Tracked):
        return leaf.content
    if isinstance(leaf, Tensor):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return leaf
