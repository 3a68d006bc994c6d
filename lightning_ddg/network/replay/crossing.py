"""What travels from one stage of a replayed network to the next."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from torch import Tensor

from lightning_ddg.core.pytree import Flattener, dump, formed
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


class _Places(Flattener):
    def leaf(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return 0


def places(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return the form of a pytree and the tensor at each place, a tensor in two places twice.

    Unlike with :func:`~lightning_ddg.core.pytree.flatten`, the form does not depend on which tensors are the same.
    """
    buffer = io.BytesIO()
    flattener = _Places(buffer)
    dump(flattener, value)
    return formed(buffer, flattener), flattener.tensors
