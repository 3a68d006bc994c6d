"""What travels from one stage of a replayed network to the next, and how its values are named.

A value is named by where it is seen: as a tensor among the arguments, or in the output, of a call of a module, or as
the result of one of the torch functions that the code of a module calls. A call is named by the calls that it is made
in, and so has the same name in every stage that runs the code around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_ddg.core.pytree import flatten, tensors_of
from lightning_ddg.core.tensors import TensorSpec

#: The numbers of the modules called, outermost first, each with how often it was called there before.
Path = tuple[tuple[int, int], ...]

ARGUMENT, OUTPUT, RESULT = 0, 1, 2

#: A call, where the tensor is seen there, and its place among such tensors. ``RESULT + i`` is the i-th tensor that a
#: torch function returns; its place is how many were called before in the code of that call.
Sight = tuple[Path, int, int]


def around(sight: Sight) -> Path:
    """Return the calls whose code has to be run to see a value there."""
    path, where, _ = sight
    return path if where >= RESULT else path[:-1]


class Done(NamedTuple):
    """A call that is over: its name, the form of its output (``None`` for a tensor), and the tensors' descriptions."""

    path: Path
    form: bytes | None
    tensors: tuple[TensorSpec, ...]


class Crossing(NamedTuple):
    """All that a stage needs to run the network's forward from where the one before it has stopped.

    Attributes:
        form: The form of the network's call.
        inputs: Its tensors; of those that nothing uses from here on, the description.
        done: The calls that are over.
        values: Tensors that are used later, by where they are seen.
    """

    form: bytes
    inputs: list[Tensor | TensorSpec]
    done: tuple[Done, ...]
    values: dict[Sight, Tensor]


def arguments_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a call's arguments, in tuples, lists and dictionaries; one in two places twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from arguments_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from arguments_of(item)


def form_of(output: Any) -> tuple[bytes | None, list[Tensor]]:
    """Split a call's output into its form and its tensors."""
    return (None, [output]) if isinstance(output, Tensor) else flatten(output)


def tensors_in(output: Any) -> Iterable[Tensor]:
    """Return the tensors in what a network returns."""
    try:
        return tensors_of(output)
    except Exception:  # noqa: BLE001 - whatever pickling says of an object made for the loss alone
        return arguments_of(output)
