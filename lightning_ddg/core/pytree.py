"""Pytrees of tensors: taken apart into a form and tensors, and put together again.

A pytree is here whatever pickles, with tensors as its leaves. ``torch.utils._pytree`` knows tuples, lists, dictionaries
and those containers that were registered with it, and takes the rest for a leaf, with its tensors out of sight. Batches
and outputs of networks are data classes and objects of other libraries as often, and no user shall have to register
them. Pickling goes through all of them, and asks of every object whether it is a tensor.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _get_obj_state, _set_obj_state

from lightning_ddg.core.admitted import AdmittedUnpickler


class Form(bytes):
    """A form that holds classes which pickle cannot find by their names, such as those made in a function."""

    classes: tuple[type, ...]

    def __new__(cls, data: bytes, classes: Sequence[type] = ()) -> Form:
        form = super().__new__(cls, data)
        form.classes = tuple(classes)
        return form

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and bytes(self) == bytes(other) and self.classes == other.classes

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return super().__hash__()


class Flattener(pickle.Pickler):
    """Takes a pytree apart.

    Args:
        file: Where the form is written.
        travels: Whether another process shall read it. Here a class can be kept as it is.
    """

    def __init__(self, file: io.BytesIO, travels: bool = False) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.classes: list[type] = []
        self.last: Any = None
        # Whether a tensor that wants a gradient was taken apart, so that no gradient could be handed back.
        self.parted = False
        self._index: dict[int, int] = {}
        self._travels = travels

    def persistent_id(self, obj: Any) -> Any:
        self.last = obj
        if isinstance(obj, Tensor):
            if _is_leaf(obj):
                return self.leaf(obj)
            self.parted |= obj.requires_grad
        if isinstance(obj, type) and not self._travels and not _found_by_name(obj):
            if obj not in self.classes:
                self.classes.append(obj)
            return (self.classes.index(obj),)
        return None

    def leaf(self, tensor: Tensor) -> Any:
        """Return what stands for a tensor: its number; of a subclass, what makes a tensor one, too."""
        if id(tensor) not in self._index:
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        index = self._index[id(tensor)]
        kind = type(tensor)
        # A parameter is that of its module only.
        if kind in (Tensor, nn.Parameter) or getattr(kind, "is_stand_in", False) or _computes_itself(kind):
            return index
        return index, kind, _get_obj_state(tensor)  # type: ignore[no-untyped-call]

    def reducer_override(self, obj: Any) -> Any:
        if self._travels and isinstance(obj, type) and not _found_by_name(obj):
            return _recipe(obj)
        return NotImplemented


class _Unflattening:
    """Puts tensors and classes where a form has their numbers."""

    tensors: list[Any]
    _classes: Sequence[type] = ()

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self.tensors[pid]
        if len(pid) == 1:
            return self._classes[pid[0]]
        index, kind, state = pid
        self.tensors[index] = _as(kind, state, self.tensors[index])
        return self.tensors[index]


class _Unflattener(_Unflattening, pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Any], classes: Sequence[type]) -> None:
        super().__init__(file)
        self.tensors = list(tensors)
        self._classes = classes


class _Receiver(_Unflattening, AdmittedUnpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Any]) -> None:
        super().__init__(file)
        self.tensors = list(tensors)


def flatten(value: Any, *, travels: bool = False) -> tuple[bytes, list[Tensor]]:
    """Split a pytree into its form (bytes) and its tensors; a tensor that occurs twice is listed once.

    Tuples, lists, dicts, dataclasses and any other object that pickles may hold the tensors. Within a process a class
    need not pickle; if the form ``travels`` to another one, it must, or be a named tuple or without methods of its own.

    Raises:
        TypeError: Something does not pickle.
    """
    form, flattener = _flattened(value, travels)
    if travels and flattener.parted:
        raise _lost_gradient()
    return form, flattener.tensors


def _flattened(value: Any, travels: bool = False) -> tuple[bytes, Flattener]:
    buffer = io.BytesIO()
    flattener = Flattener(buffer, travels)
    dump(flattener, value)
    return formed(buffer, flattener), flattener


def dump(flattener: Flattener, value: Any) -> None:
    """Take a value apart; say of what cannot be what it is."""
    try:
        flattener.dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        culprit = flattener.last
        what = f"{culprit.__qualname__!r}" if hasattr(culprit, "__qualname__") else f"a {type(culprit).__qualname__}"
        raise TypeError(
            f"{what} is in a batch, or in what a stage gets or returns, and cannot be pickled: {error} Between stages"
            " travels what pickles: keep functions without a name, locks, open files, generators out of it, and define"
            " classes at the top of a module, or return a tuple or a dict."
        ) from error


def formed(buffer: io.BytesIO, flattener: Flattener) -> bytes:
    """Return the form that a flattener has written."""
    return Form(buffer.getvalue(), flattener.classes) if flattener.classes else buffer.getvalue()


def unflatten(form: bytes, tensors: Sequence[Any]) -> Any:
    """Put a pytree together again; the inverse of :func:`flatten`. Plain tensors become of the classes they were of."""
    return _Unflattener(io.BytesIO(form), tensors, form.classes if isinstance(form, Form) else ()).load()


def received(form: bytes, tensors: Sequence[Tensor], wants_grad: Sequence[bool]) -> Any:
    """Put a pytree together in another process, where its tensors are leaves that want gradients or do not."""
    unflattener = _Receiver(io.BytesIO(form), tensors)
    value = unflattener.load()
    for tensor, wanted in zip(unflattener.tensors, wants_grad, strict=True):
        tensor.requires_grad_(wanted)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a pytree, in a fixed order."""
    return [value] if isinstance(value, Tensor) and _is_leaf(value) else flatten(value)[1]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor of a pytree, and leave everything else as it is."""
    if type(value) is Tensor and _is_leaf(value):
        return function(value)
    form, flattener = _flattened(value)
    if flattener.parted:
        raise _lost_gradient()
    return unflatten(form, [function(tensor) for tensor in flattener.tensors])


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as a tensor of no subclass, to be sent.

    Raises:
        TypeError: It has no memory of its own.
    """
    kind = type(tensor)
    if tensor.is_nested or _computes_itself(kind):
        what = "A nested tensor" if tensor.is_nested else f"A {kind.__qualname__}"
        raise TypeError(
            f"{what} cannot travel to another process. Let it travel as plain tensors and make it where it is needed: a"
            " nested tensor as a list (`nested.unbind()`), or padded."
        )
    return tensor if kind is Tensor else tensor.as_subclass(Tensor)


def _is_leaf(tensor: Tensor) -> bool:
    """Return whether a tensor is taken as it is; others, such as sparse ones, pickle as parts that are tensors."""
    return tensor.is_nested or (tensor.layout is torch.strided and not tensor.is_quantized)


def _lost_gradient() -> TypeError:
    return TypeError(
        "A sparse tensor that wants a gradient is what a stage gets or returns: no gradient could be handed back. Make"
        " it dense (`to_dense()`) before it leaves the layer."
    )


def _computes_itself(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


def _as(kind: Any, state: Any, tensor: Any) -> Any:
    """Return a plain tensor as one of a subclass, a leaf as a leaf; what is another's already stays as it is."""
    # The class's own code must not see one without its attributes.
    with torch._C.DisableTorchFunctionSubclass():
        if type(tensor) is Tensor:
            leaf = tensor.is_leaf and tensor.requires_grad
            tensor = (tensor.detach() if leaf else tensor).as_subclass(kind).requires_grad_(tensor.requires_grad)
        if type(tensor) is kind and not vars(tensor):
            _set_obj_state(tensor, state)  # type: ignore[no-untyped-call]
    return tensor


def _found_by_name(kind: type) -> bool:
    if kind.__module__ == "builtins" or type(kind) in copyreg.dispatch_table:
        return True
    try:
        found: bool = attrgetter(kind.__qualname__)(sys.modules.get(kind.__module__)) is kind
    except AttributeError:
        return False
    return found


def _recipe(kind: Any) -> tuple[Any, ...]:
    """Return how another process can make a class that it does not know."""
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    behaviour = {name for name, value in own.items() if callable(value) or hasattr(type(value), "__get__")}
    if kind.__bases__ == (tuple,) and "_fields" in own:
        defaults = tuple(kind._field_defaults.values())
        if behaviour <= vars(_named_tuple("_", kind._fields, defaults, "")).keys():
            return _named_tuple, (kind.__name__, kind._fields, defaults, kind.__module__)
    elif "__dataclass_fields__" in own and all(map(_DUNDER.match, behaviour)):
        return _data_class, (kind.__name__, list(own.get("__annotations__", ())), kind.__bases__, kind.__module__)
    elif type(kind) is type and not behaviour:
        return type, (kind.__name__, kind.__bases__, own)
    raise pickle.PicklingError(f"the class {kind.__module__}.{kind.__qualname__} is not known to other processes.")


_DUNDER = re.compile(r"__\w+__$")


def _named_tuple(name: str, fields: Sequence[str], defaults: Sequence[Any], module: str) -> type:
    return namedtuple(name, fields, defaults=defaults, module=module)


def _data_class(name: str, fields: Sequence[str], bases: tuple[type, ...], module: str) -> type:
    own = [(field_name, object, field(default=None)) for field_name in fields]
    return make_dataclass(name, own, bases=bases, namespace={"__module__": module})
