"""Attributes that a run sets on the user's and Lightning's objects: taken off again at its end, and kept to itself.

A pickle or a deep copy that is made meanwhile has the object as the user knows it: it needs neither this package nor
this run, and does not act on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Undo = Callable[[], None]


class _Entry(NamedTuple):
    name: str
    had: bool
    old: Any


class _Reduce:
    """The ``__reduce_ex__`` of an instance that has attributes of ours: what it returns has them not."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj
        self.entries: list[_Entry] = []
        self.checks: list[Callable[[], None]] = []

    def __call__(self, protocol: int) -> Any:
        for check in self.checks:
            check()
        attributes = vars(self._obj)
        names = {"__reduce_ex__", *(entry.name for entry in self.entries)}
        ours = {name: attributes.pop(name) for name in names if name in attributes}
        try:
            for name, had, old in reversed(self.entries):
                attributes.pop(name, None)
                if had:
                    attributes[name] = old
            kind: Any = type(self._obj)
            reduced = kind.__reduce_ex__(self._obj, protocol)
            # The state may be the attributes themselves, which get ours back.
            return reduced if isinstance(reduced, str) else tuple(_copied(part, attributes) for part in reduced)
        finally:
            for name in names:
                attributes.pop(name, None)
            attributes.update(ours)


def _copied(part: Any, attributes: dict[str, Any]) -> Any:
    if part is attributes:
        return dict(part)
    if isinstance(part, tuple):
        return tuple(dict(one) if one is attributes else one for one in part)
    return part


def _reduce_of(obj: Any) -> _Reduce:
    reduce = vars(obj).get("__reduce_ex__")
    if not isinstance(reduce, _Reduce):
        reduce = vars(obj)["__reduce_ex__"] = _Reduce(obj)
    return reduce


def _let_go(obj: Any, reduce: _Reduce) -> None:
    if not reduce.entries and not reduce.checks:
        vars(obj).pop("__reduce_ex__", None)


def replaced(obj: Any, name: str, value: Any) -> Undo:
    """Set an instance attribute; undoing removes it again, so that the class's own shows."""
    attributes, reduce = vars(obj), _reduce_of(obj)
    entry = _Entry(name, name in attributes, attributes.get(name))
    reduce.entries.append(entry)
    attributes[name] = value

    def undo() -> None:
        attributes.pop(name, None)
        if entry.had:
            attributes[name] = entry.old
        reduce.entries[:] = [other for other in reduce.entries if other is not entry]
        _let_go(obj, reduce)

    return undo


def checked_when_copied(obj: Any, check: Callable[[], None]) -> Undo:
    """Call a function, which may raise, before an object is pickled or deep-copied."""
    reduce = _reduce_of(obj)
    reduce.checks.append(check)

    def undo() -> None:
        reduce.checks.remove(check)
        _let_go(obj, reduce)

    return undo
