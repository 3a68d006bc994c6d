"""What travels from one stage of a replayed network to the next."""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

from torch import Tensor

from lightning_ddg.core.tensors import TensorSpec

#: A layer's position, and which of the tensors in its output.
Output = tuple[int, int]


class Done(NamedTuple):
    """A call of a layer that is over: the layer's position, the form of its output, and its tensors' descriptions."""

    position: int
    form: bytes
    tensors: tuple[TensorSpec, ...]


class Crossing(NamedTuple):
    """All that a stage needs to run the network's forward from where the one before it has stopped.

    Attributes:
        form: The form of the network's call.
        inputs: Its tensors; of those that nothing uses from here on, the description.
        done: The calls of layers so far.
        position: The layer that is called next.
        arguments: The tensors in its arguments; ``None`` for those that every stage has by itself.
        outputs: Tensors that layers have returned and that are needed later.
    """

    form: bytes
    inputs: list[Tensor | TensorSpec]
    done: tuple[Done, ...]
    position: int
    arguments: list[Tensor | None]
    outputs: dict[Output, Tensor]


class _Places(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return 0


def places(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return the form of a pytree and the tensor at each place, a tensor in two places twice.

    Unlike with :func:`~lightning_ddg.core.tensors.flatten`, the form does not depend on which tensors are the same.
    """
    buffer = io.BytesIO()
    pickler = _Places(buffer)
    pickler.dump(value)
    return buffer.getvalue(), pickler.tensors
