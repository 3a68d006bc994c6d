"""One symbolic run of a network: which modules it calls in which order, and what is computed between the calls.

A run must not fix silently what may change later: it refuses to look into a module rather than record it wrongly.
"""

from __future__ import annotations

import inspect
import operator
from collections import UserList
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_ddg.core import rng
from lightning_ddg.core.pytree import unflatten
from lightning_ddg.core.rng import Generators
from lightning_ddg.network.trace.containers import CONTAINERS
from lightning_ddg.network.trace.patches import followed_by
from lightning_ddg.network.trace.recording import Recording, Untraceable
from lightning_ddg.network.trace.source import line_now, line_of

_CPU = torch.device("cpu")
# Values that decide what a forward does: the recording holds only as long as they stay what they were.
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_MACHINERY = (set(vars(nn.Module())) - {"training"}) | {"call_super_init", "dump_patches", "_version"}
# Where a LightningModule keeps what tells it how far the training is.
_RUN = ("trainer", "_trainer")
# Errors that come from running on placeholders; any other is what the forward raises for some input.
_OF_THE_TRACE = (fx.proxy.TraceError, TypeError, NameError, AttributeError, RecursionError, NotImplementedError)


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


def record(target: nn.Module, forward: Callable[..., Any], form: bytes, opaque: Mapping[nn.Module, str]) -> Recording:
    """Run a network's ``forward`` on placeholders, in a call of a form, without looking into ``opaque`` modules.

    Raises:
        Untraceable: A module cannot be looked into, the innermost one; ``target`` itself if it is not inside another.
    """
    container = CONTAINERS.get(type(target))
    run = forward if container is None else partial(container, target)

    def attempt(decisions: list[bool]) -> Recording:
        tracer = _Tracer(target, run, form, opaque, decisions)
        # A run on placeholders is not a run of the network.
        with rng.untouched(_CPU), torch.enable_grad(), followed_by(tracer):
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
    raises = [False, False]
    for answer in (False, True):
        try:
            attempt([*before, answer])
        except _Undecided:
            pass
        except Untraceable as error:
            raises[answer] = not isinstance(error.__cause__, _OF_THE_TRACE)
    if raises[0] == raises[1]:
        raise Untraceable(question.module, f"{question.where} (what it does depends on the input)")
    return raises[0]


def expect(value: Any, answer: bool, where: str) -> None:
    """Raise a ValueError if a condition is not what it was taken to be when the network was traced."""
    if bool(value) is not answer:
        raise ValueError(f"The network's forward ends in an error for this input: {where}. Mend the input.")


class _Placeholders(UserList[Any]):
    """Stands for the list of a call's tensors, each made when it is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make

    def __getitem__(self, index: Any) -> Any:
        while len(self.data) <= index:
            self.data.append(self._make())
        return self.data[index]


class _Tracer(fx.Tracer):
    def __init__(
        self,
        target: nn.Module,
        forward: Callable[..., Any],
        form: bytes,
        opaque: Mapping[nn.Module, str],
        decisions: Sequence[bool],
    ) -> None:
        super().__init__()
        self.inputs: list[fx.Node] = []
        self.constants: dict[fx.Node, Tensor] = {}
        self.reads: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
        self.here: fx.Node
        self._forward = forward
        self._form = form
        self._opaque = opaque
        self._decisions = iter(decisions)
        self._followed = [target]
        self._target = target
        self._names = {module: name for name, module in target.named_modules()}
        self._names_by_id = {id(module): name for module, name in self._names.items()}
        tensors = [*target.named_parameters(remove_duplicate=False), *target.named_buffers(remove_duplicate=False)]
        self._tensor_names = {id(tensor): name for name, tensor in reversed(tensors)}
        self._device = tensors[0][1].device if tensors else torch.device("cpu")
        self._attributes: dict[str, fx.Proxy] = {}
        self.thread = get_ident()

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
        """Replace the function to be run, and its arguments, by the call to be recorded."""
        self.here = self.create_node("placeholder", "here", (), {})

        def placeholder() -> fx.Proxy:
            self.inputs.append(self.create_node("placeholder", f"input_{len(self.inputs)}", (), {}))
            return self.proxy(self.inputs[-1])

        args, kwargs = unflatten(self._form, _Placeholders(placeholder))
        return partial(self._forward, *args, **kwargs), []

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
        if get_ident() != self.thread:
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
        where = line_now()
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

    def follow(self, m: nn.Module, run: Callable[[], Any]) -> Any:
        """Run a forward; say which module it was if it cannot be followed."""
        generators = Generators(_CPU)
        self._followed.append(m)
        try:
            output = run()
        except Exception as error:
            raise Untraceable(m, line_of(error)) from error
        finally:
            self._followed.pop()
        if not generators.unchanged():
            code = inspect.unwrap(type(m).forward).__code__
            reason = f"{code.co_filename}:{code.co_firstlineno}: this forward draws random numbers of its own"
            raise Untraceable(m, reason)
        return output

    # ---- what the patches ask for

    def follows(self, module: nn.Module) -> bool:
        """Return whether a module belongs to the network."""
        return id(module) in self._names_by_id

    def read(self, module: nn.Module, name: str) -> Any:
        """Record that an attribute of a module is read, and return its value."""
        own = object.__getattribute__(module, "__dict__")
        for table in (own["_parameters"], own["_buffers"]):
            # By name: while a stage runs with stashed weights, the tensor itself is another one.
            if table.get(name) is not None:
                return self._attribute(".".join(filter(None, (self._names_by_id[id(module)], name))))
        if name in _RUN:
            raise fx.proxy.TraceError(f"the forward reads `self.{name}`, which changes as the training goes on")
        value = object.__getattribute__(module, name)
        if type(value) in _PLAIN and name not in _MACHINERY and not name.startswith("__"):
            self.reads.setdefault((id(module), name), (module, value))
        return value

    def record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of a function, whatever its arguments are."""
        return self.create_proxy("call_function", function, args, kwargs)

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
