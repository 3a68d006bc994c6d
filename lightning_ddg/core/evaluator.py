"""A forward without a backward through K processes, in micro-batches, so that all stages work at the same time.

Samples do not depend on each other in evaluation, but for networks in which they do. With K = 3 and m = 4 parts::

    stage 1   1 2 3 4
    stage 2     1 2 3 4
    stage 3       1 2 3 4   joined, and sent to all

which takes (m + K - 1)/m times as long as one stage needs for a batch, where a whole batch takes K times as long. That
parts give what the whole gives is tried on the first batch, and on the 2nd, 4th, 8th, ... of its form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import ACTIVATION, OUTPUT, Mailbox
from lightning_ddg.core.pytree import flatten, tensors_of
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import rank_of_stage
from lightning_ddg.core.split import even_sizes, join, length_of, split

_MOST_FORMS = 8


class Piece(NamedTuple):
    """A batch, or a part of one, on its way through the stages.

    Attributes:
        value: What a stage has passed on.
        size: How many samples it is of; 0 for a whole batch.
        left: How many pieces of the batch follow.
        tried: Whether the whole batch goes through as well, so that a part must leave nothing behind.
        clean: Whether the network has kept nothing of the whole batch so far, and nobody has looked into it.
    """

    value: Any
    size: int = 0
    left: int = 0
    tried: bool = False
    clean: bool = True


class Verdict(Enum):
    """What the last stage says of a batch, on which the first decides how the next ones go."""

    DONE = "done"
    STAY_WHOLE = "batches are not split from here on"
    AGAIN = "the outputs of the parts cannot be put together: it has to go again, whole"


class Evaluator:
    """Evaluates with stage ``number`` of ``num_stages`` processes.

    Args:
        module: What the stage runs.
        number: The stage's.
        num_stages: K.
        mailbox: Connects the stages.
        parts: Into how many micro-batches a batch is split, if it has that many samples.
        modules: All of the user's modules that the stage may run.
        trial: Inside, nothing that the module does is kept.
        say: Is told why batches stay whole, on the rank of the last stage.
    """

    def __init__(
        self,
        module: nn.Module,
        number: int,
        num_stages: int,
        mailbox: Mailbox,
        parts: int = 1,
        modules: Sequence[nn.Module] = (),
        trial: Callable[[], AbstractContextManager[object]] = nullcontext,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._module, self._number, self._mailbox = module, number, mailbox
        self._parts, self._modules, self._trial, self._say = parts, modules, trial, say
        self._upstream = None if number == 1 else rank_of_stage(number - 1, num_stages)
        self._downstream = None if number == num_stages else rank_of_stage(number + 1, num_stages)
        self._last = rank_of_stage(num_stages, num_stages)
        self._others = [rank for rank in range(num_stages) if rank != self._last]
        # How many batches of each form there have been.
        self._seen: dict[Any, int] = {}
        self._whole, self._tried = parts == 1, 0

    def evaluate(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward; return the network's whole output on every rank.

        Raises:
            RuntimeError: On the last stage, if parts do not give what the whole gives, but did so before.
        """
        verdict = Verdict.AGAIN
        while verdict is Verdict.AGAIN:
            pieces = self._given(args, kwargs) if self._upstream is None else self._taken(self._upstream)
            done = [self._run(batch, piece) for piece in pieces]
            if self._downstream is None:
                output, verdict = self._judged(done)
                # A snapshot: the step may change the output in place while it is still on its way.
                self._mailbox.send(self._others, OUTPUT, (output, verdict), snapshot=True)
            else:
                output, verdict = self._mailbox.take(self._last, OUTPUT)
            self._whole |= verdict is not Verdict.DONE
        return output

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Piece]:
        """On the first stage: the batch, or its parts, or both."""
        call = args, kwargs
        sizes = [] if self._whole else _sizes(call, self._parts)
        if len(sizes) < 2:
            yield Piece(call)
            return
        form = (len(args), tuple(kwargs), *((tensor.dtype, tensor.ndim) for tensor in tensors_of(call)))
        if form not in self._seen and len(self._seen) == _MOST_FORMS:
            yield Piece(call)
            return
        number = self._seen[form] = self._seen.get(form, 0) + 1
        tried = not number & (number - 1)
        if tried:
            yield Piece(call, left=len(sizes), tried=True)
        for at, (part, size) in enumerate(zip(split(call, sizes), sizes, strict=True), 1):
            yield Piece(part, size, len(sizes) - at, tried)

    def _taken(self, upstream: int) -> Iterator[Piece]:
        left = 1
        while left:
            piece: Piece = self._mailbox.take(upstream, ACTIVATION)
            left = piece.left
            yield piece

    def _run(self, batch: Batch, piece: Piece) -> Piece:
        args, kwargs = piece.value if self._upstream is None else ((piece.value,), {})
        decides = piece.tried and not piece.size
        before = _marks(self._modules) if decides else []
        with (
            self._trial() if piece.tried and piece.size else nullcontext(),
            batch.draws(self._number),
            torch.no_grad(),
        ):
            output = self._module(*args, **kwargs)
        if decides:
            kept_nothing = _are_unchanged(before, _marks(self._modules)) and not _is_watched(self._modules)
            piece = piece._replace(clean=piece.clean and kept_nothing)
        done = piece._replace(value=output)
        if self._downstream is not None:
            self._mailbox.send(self._downstream, ACTIVATION, done)
        return done

    def _judged(self, pieces: Sequence[Piece]) -> tuple[Any, Verdict]:
        """On the last stage: the network's output, and what the batch has shown."""
        first, *parts = pieces
        if first.size:
            try:
                return _joined(pieces), Verdict.DONE
            except ValueError as error:
                self._say(str(error))
                return None, Verdict.AGAIN
        if not parts:
            return first.value, Verdict.DONE
        why = _difference(first, parts)
        if why is None:
            self._tried += 1
            return first.value, Verdict.DONE
        if self._tried and first.clean:
            raise RuntimeError(
                f"A batch that is evaluated in {len(parts)} parts gives something else than as a whole ({why}), which"
                " earlier batches of this run did not: the samples of a batch depend on each other. Give DDGStrategy"
                " eval_micro_batches=1, which evaluates whole batches."
            )
        self._say(why)
        return first.value, Verdict.STAY_WHOLE


def _sizes(call: Any, parts: int) -> list[int]:
    try:
        return even_sizes(length_of(call), parts)
    except ValueError:
        return []


def _joined(pieces: Sequence[Piece]) -> Any:
    return join([piece.value for piece in pieces], [piece.size for piece in pieces], "the network's output")


def _difference(whole: Piece, parts: Sequence[Piece]) -> str | None:
    """Say why parts cannot stand for the whole, if they cannot."""
    if not whole.clean:
        return "the network keeps something of the batch, or a hook looks into it"
    try:
        joined = _joined(parts)
    except ValueError as error:
        return str(error)
    (form, own), (other, others) = flatten(whole.value), flatten(joined)
    if form != other or not all(map(_same, own, others)):
        return "the output of a sample goes by the other samples of its batch"
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    # A kernel may add up otherwise for another number of samples: far less than what a neighbour would change.
    largest = float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()) if one.numel() else 0.0
    bound = 0.1 * torch.finfo(one.dtype).eps ** 0.5 * largest
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)


def _marks(modules: Sequence[nn.Module]) -> list[tuple[Any, int]]:
    """The modules' attributes and buffers, and how often each has been written or how much it holds."""
    held = (value for part in modules for kept in (vars(part), part._buffers) for value in kept.values())
    return [(value, _state_of(value)) for value in held]


def _state_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return 0 if value.is_inference() else value._version
    return len(value) if isinstance(value, list | dict | set) else 0


def _are_unchanged(before: Sequence[tuple[Any, int]], after: Sequence[tuple[Any, int]]) -> bool:
    return len(before) == len(after) and all(
        one is other and written == later for (one, written), (other, later) in zip(before, after, strict=True)
    )


def _is_watched(modules: Sequence[nn.Module]) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in modules)
