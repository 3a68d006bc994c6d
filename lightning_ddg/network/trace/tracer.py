"""One symbolic run of a network: which modules it calls in which order, and what is computed between the calls.

How much of a network can be followed changes here; where the recorded nodes may be cut is the business of
:mod:`~lightning_ddg.network.trace.graph`. What a run must not do is to fix silently what may change later: it refuses
to
look into a module rather than to record it wrongly.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from threading import get_ident
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import autocast
from torch.autograd.grad_mode import inference_mode
from torch.utils import checkpoint

from lightning_ddg.network.trace.containers import CONTAINERS

# Functions of torch that make a tensor of nothing: fx would run them once and keep the result.
_CREATORS = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "tensor", "zeros")
_RANDOM = ("rand", "randn", "randint", "randperm", "normal", "bernoulli")
# Values that decide what a forward does: the recording holds only as long as they stay what they were.
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_MACHINERY = (set(vars(nn.Module())) - {"training"}) | {"call_super_init", "dump_patches", "_version"}
# Where a LightningModule keeps what tells it how far the training is.
_RUN = ("trainer", "_trainer")
# Errors that come from running on placeholders; any other is what the forward raises for some input.
_OF_THE_TRACE = (fx.proxy.TraceError, TypeError, NameError, AttributeError, RecursionError, NotImplementedError)
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True)
class Recording:
    """What one symbolic run recorded.

    Attributes:
        nodes: The computation in its order, without inputs and output. The target of a ``call_module`` or a
            ``get_attr`` node is a name relative to the network. ``meta["no_grad"]`` says that gradients were off.
        inputs: Placeholders of the network's inputs.
        output: The output node; its first argument is the nest of nodes that the network returns.
        here: Stands for the device that the network runs on.
        constants: Tensors that are neither parameters nor buffers, by the placeholder that stands for them.
        reads: The modules' plain attributes that were read, with their values then.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    output: fx.Node
    here: fx.Node
    constants: dict[fx.Node, Tensor]
    reads: list[tuple[nn.Module, str, Any]]

    def holds(self) -> bool:
        """Whether a run today would record the same."""
        return all(_same(getattr(module, name, None), value) for module, name, value in self.reads)


def _ordinary(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # For an operator as it is fx writes `x += y`, which would change what else has the name of an integer.
    def run(value: Any, other: Any) -> Any:
        return operation(value, other)

    run.__name__ = run.__qualname__ = f"in_place_{operation.__name__}"
    return run


class _Proxy(fx.Proxy):
    """A proxy that records `x += y` as what it is: fx's own has no such methods, and Python would take `x = x + y`."""

    @classmethod
    def learn(cls, operation: Callable[[Any, Any], Any]) -> None:
        """Add the method of an operator, such as ``operator.iadd``."""
        function = _ordinary(operation)

        def method(self: _Proxy, other: Any) -> Any:
            return self.tracer.create_proxy("call_function", function, (self, other), {})

        setattr(cls, f"__{operation.__name__}__", method)


for _operation in (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
):
    _Proxy.learn(_operation)


class Untraceable(BaseException):
    """A module cannot be looked into. Not an Exception: the user's own ``except`` must not catch it."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module
        self.reason = reason


def record(
    target: nn.Module,
    forward: Callable[..., Any],
    call: Callable[[Callable[[], Any]], tuple[tuple[Any, ...], dict[str, Any]]],
    opaque: Mapping[nn.Module, str],
) -> Recording:
    """Run ``forward`` on placeholders.

    Args:
        target: The network.
        forward: Its forward, bound.
        call: Given a function that makes a placeholder, returns the arguments of the call.
        opaque: Modules not to look into.

    Raises:
        Untraceable: A module cannot be looked into, the innermost one; ``target`` itself if it is not inside another.
    """
    container = CONTAINERS.get(type(target))
    run = forward if container is None else partial(container, target)

    def attempt(decisions: list[bool]) -> Recording:
        tracer = _Tracer(target, run, call, opaque, decisions)
        with _isolated_draws(), torch.enable_grad(), tracer.watching():
            graph = tracer.follow(target, lambda: tracer.trace(target))
        return tracer.recording(graph)

    decisions: list[bool] = []
    while True:
        try:
            return attempt(decisions)
        except _Undecided as question:
            decisions.append(_only_way(attempt, decisions, question))


class _Undecided(BaseException):
    """The forward asks for the truth of a value that only a real call has."""

    def __init__(self, module: nn.Module, where: str) -> None:
        super().__init__(where)
        self.module = module
        self.where = where


def _only_way(attempt: Callable[[list[bool]], Recording], before: list[bool], question: _Undecided) -> bool:
    """Return the answer that does not end in an error of the user's own, as in ``assert`` or ``if ...: raise``."""
    raises = []
    for answer in (False, True):
        try:
            attempt([*before, answer])
        except _Undecided:
            raises.append(False)
        except Untraceable as error:
            raises.append(not isinstance(error.__cause__, _OF_THE_TRACE))
        else:
            raises.append(False)
    if raises[0] == raises[1]:
        raise Untraceable(question.module, f"{question.where} (what it does depends on the input)")
    return raises[0]


def expect(value: Any, answer: bool, where: str) -> None:
    """Check that a condition is what it was taken to be when the network was traced.

    Raises:
        ValueError: It is not: the forward would have raised an error here.
    """
    if bool(value) is not answer:
        raise ValueError(f"The network's forward ends in an error for this input: {where}. Mend the input.")


class _Tracer(fx.Tracer):
    def __init__(
        self,
        target: nn.Module,
        forward: Callable[..., Any],
        call: Callable[[Callable[[], Any]], tuple[tuple[Any, ...], dict[str, Any]]],
        opaque: Mapping[nn.Module, str],
        decisions: Sequence[bool],
    ) -> None:
        super().__init__()
        self.inputs: list[fx.Node] = []
        self.constants: dict[fx.Node, Tensor] = {}
        self.reads: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        self.here: fx.Node
        self._forward = forward
        self._call = call
        self._opaque = opaque
        self._decisions = iter(decisions)
        self._followed = [target]
        self._target = target
        self._names = {module: name for name, module in target.named_modules()}
        tensors = [*target.named_parameters(remove_duplicate=False), *target.named_buffers(remove_duplicate=False)]
        self._tensor_names = {id(tensor): name for name, tensor in reversed(tensors)}
        self._device = tensors[0][1].device if tensors else torch.device("cpu")
        self._attributes: dict[str, fx.Proxy] = {}
        self._thread = get_ident()

    def recording(self, graph: fx.Graph) -> Recording:
        """What has been recorded."""
        *nodes, output = graph.nodes
        placeholders = {self.here, *self.constants, *self.inputs}
        return Recording(
            [node for node in nodes if node not in placeholders],
            self.inputs,
            output,
            self.here,
            self.constants,
            [(module, name, value) for (_, name), (module, value) in self.reads.items()],
        )

    # ---- what fx asks for

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Replace the function to be run, and its arguments, by the call that is to be recorded."""
        self.here = self.create_node("placeholder", "here", (), {})

        def placeholder() -> fx.Proxy:
            self.inputs.append(self.create_node("placeholder", f"input_{len(self.inputs)}", (), {}))
            return self.proxy(self.inputs[-1])

        args, kwargs = self._call(placeholder)

        def run() -> Any:
            return self._forward(*args, **kwargs)

        return run, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make what stands for a node while the forward runs."""
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record also whether gradients are switched off there."""
        node = super().create_node(*args, **kwargs)
        node.meta["no_grad"] = not torch.is_grad_enabled()
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn a value into an argument of a node."""
        if isinstance(a, torch.device) and a.type == self._device.type and a.index in (None, self._device.index):
            # Where the network is today, which is not where it will be.
            return self.here
        if isinstance(a, Tensor):
            name = self._tensor_names.get(id(a))
            return self._attribute(name).node if name is not None else self._constant(a)
        if isinstance(a, nn.Module):
            # A module given to a function, such as torch.utils.checkpoint.
            if a not in self._names:
                raise NameError(f"a {type(a).__name__} is passed on that is not a submodule of the network")
            return self._attribute(self._names[a]).node
        return super().create_arg(a)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a module, or what happens inside it."""
        if self._elsewhere:
            return forward(*args, **kwargs)
        if m not in self._names:
            # Made in the forward, as `nn.Softmax(dim=-1)(x)`, or kept out of the network's sight.
            if next(m.parameters(), None) is not None:
                raise NameError(
                    f"a {type(m).__name__} with parameters is called that is not a submodule of the network"
                )
            return forward(*args, **kwargs)
        if m is self._target:
            raise RecursionError("the forward calls the network itself")
        if self._is_unit(m):
            return self.create_proxy("call_module", self._names[m], args, kwargs)
        inside = CONTAINERS.get(type(m))
        if inside is not None:
            return self.follow(m, lambda: inside(m, *args, **kwargs))
        return self.follow(m, lambda: forward(*args, **kwargs))

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer as decided, and record the question, so that a real call is held to the answer."""
        where = _users_line((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))
        answer = next(self._decisions, None)
        if answer is None:
            raise _Undecided(self._followed[-1], where)
        self.create_proxy("call_function", expect, (obj, answer, where), {})
        return answer

    # ---- what is looked into, and what may not happen there

    def _is_unit(self, m: nn.Module) -> bool:
        if m in self._opaque or next(m.children(), None) is None:
            return True
        # These act on real calls, not on a recording.
        if any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)):
            return True
        if m._compiled_call_impl is not None or isinstance(m, torch.jit.ScriptModule):
            return True
        own = type(m).__module__.startswith(("torch.nn.", "torch.ao."))
        return own and not isinstance(m, nn.Sequential) and type(m) not in CONTAINERS

    @property
    def _elsewhere(self) -> bool:
        """Whether another thread asks: messages arrive in one, and it must find torch as it is."""
        return get_ident() != self._thread

    def follow(self, m: nn.Module, run: Callable[[], Any]) -> Any:
        """Run a forward; say which module it was if it cannot be followed."""
        before = _draw_states()
        self._followed.append(m)
        try:
            output = run()
        except Exception as error:
            raise Untraceable(m, _where(error)) from error
        finally:
            self._followed.pop()
        if not _same_states(before, _draw_states()):
            code = inspect.unwrap(type(m).forward).__code__
            reason = f"{code.co_filename}:{code.co_firstlineno}: this forward draws random numbers of its own"
            raise Untraceable(m, reason)
        return output

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what the run reads, and refuse what it may not do, while it runs."""
        module_names = {id(module): name for module, name in self._names.items()}
        assign = nn.Module.__setattr__

        def read(module: nn.Module, name: str) -> Any:
            if id(module) not in module_names or self._elsewhere:
                return object.__getattribute__(module, name)
            own = object.__getattribute__(module, "__dict__")
            for table in (own["_parameters"], own["_buffers"]):
                # By name: while a stage runs with stashed weights, the tensor itself is another one.
                if table.get(name) is not None:
                    return self._attribute(".".join(filter(None, (module_names[id(module)], name))))
            if name in _RUN:
                raise fx.proxy.TraceError(f"the forward reads `self.{name}`, which changes as the training goes on")
            value = object.__getattribute__(module, name)
            if type(value) in _PLAIN and name not in _MACHINERY and not name.startswith("__"):
                self.reads.setdefault((id(module), name), (module, value))
            return value

        def write(module: nn.Module, name: str, value: Any) -> None:
            if id(module) in module_names and not self._elsewhere:
                raise fx.proxy.TraceError(f"the forward assigns to `self.{name}`")
            assign(module, name, value)

        def refusing(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def refuse(context: Any) -> Any:
                if self._elsewhere:
                    return enter(context)
                raise fx.proxy.TraceError(f"the forward enters `{type(context).__name__}`")

            return refuse

        with ExitStack() as stack:
            for name in (*_CREATORS, *_RANDOM):
                stack.enter_context(mock.patch.object(torch, name, self._recorded(getattr(torch, name))))
            stack.enter_context(mock.patch.object(checkpoint, "checkpoint", self._recorded(checkpoint.checkpoint)))
            for context in (autocast, inference_mode):
                stack.enter_context(mock.patch.object(context, "__enter__", refusing(context.__enter__)))
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", write))
            stack.enter_context(_replaced_getattribute(read))
            yield

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, recorded whatever its arguments are."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._elsewhere:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return call

    # ---- tensors

    def _attribute(self, name: str) -> fx.Proxy:
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def _constant(self, tensor: Tensor) -> fx.Node:
        known = next((node for node, constant in self.constants.items() if constant is tensor), None)
        if known is None:
            if tensor.requires_grad:
                raise fx.proxy.TraceError("a tensor that requires a gradient is not a parameter of the network")
            known = self.create_node("placeholder", f"constant_{len(self.constants)}", (), {})
            self.constants[known] = tensor
        return known


@contextmanager
def _replaced_getattribute(function: Callable[[nn.Module, str], Any]) -> Iterator[None]:
    # Not `mock.patch`: what it finds is object's own, and putting that back would leave a slower slot behind.
    nn.Module.__getattribute__ = function  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _same(now: object, then: object) -> bool:
    return now is then or (type(now) is type(then) and now == then)


def _draw_states() -> list[Any]:
    states: list[Any] = [random.getstate(), torch.get_rng_state()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append(numpy.random.get_state())
    return states


def _same_states(before: Sequence[Any], after: Sequence[Any]) -> bool:
    same = before[0] == after[0] and torch.equal(before[1], after[1])
    if len(before) == len(after) == 3:
        pairs = zip(before[2], after[2], strict=True)
        same = same and all(bool((a == b).all() if hasattr(a, "all") else a == b) for a, b in pairs)
    return same


@contextmanager
def _isolated_draws() -> Iterator[None]:
    """Put the generators back: a run on placeholders is not a run of the network."""
    python, own, *numpy = _draw_states()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(own)
        for state in numpy:
            sys.modules["numpy"].random.set_state(state)


def _where(error: BaseException) -> str:
    """``file:line: `code` (what is wrong)`` of the user's line where an error came from."""
    problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    line = _users_line(reversed([(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]))
    return f"{line} ({problem})" if line else problem


def _users_line(frames: Iterable[tuple[str, int]]) -> str:
    """``file:line: `code``` of the innermost line that is the user's; frames come innermost first."""
    for file, line in frames:
        if not file.startswith(_NOT_THE_USERS) and Path(file).is_file():
            return f"{file}:{line}: `{linecache.getline(file, line).strip()}`"
    return ""
