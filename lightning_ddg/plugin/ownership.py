"""Whose tensor is this? Which stage each parameter, buffer and layer belongs to, and what follows for the optimizer.

What belongs to no stage's layers belongs to the last stage, whose process computes the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_ddg.core.ties import Tie


@dataclass
class Weights:
    """Which weights of the module are up to date in this process.

    Attributes:
        whole: Whether all are, for good. From the first step of a fit in several processes until its end, a process has
            those of its own stage only.
        shared: Whether all are until the next step.
    """

    whole: bool = True
    shared: bool = False
    _open: bool = field(default=False, repr=False)

    @property
    def readable(self) -> bool:
        """Whether anybody may look at all of them."""
        return self.whole or self.shared or self._open

    def stepped(self) -> None:
        """Called after a step of an optimizer in one of several processes."""
        self.whole = self.shared = False

    @contextmanager
    def read_as_they_are(self) -> Iterator[None]:
        """Let them be looked at inside by somebody who knows which are up to date."""
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before


class Ownership:
    """The stages of a module's tensors and layers.

    Names are those at the time of making; tensors may move to another device, and buffers be replaced, afterwards.
    A buffer that is made later, as in a layer's first forward, belongs where its module does.

    Args:
        root: The LightningModule, or any module whose names count.
        segments: The stages ``1..K`` as modules, which share their layers with ``root``.
        stage: This process's stage; ``None`` if it runs all of them.
        layers: The layers of each stage, as ``root`` calls them; only for :attr:`foreign_layers`.

    Attributes:
        root: As given.
        stage: As given.
        segments: As given.
        by_name: Stage of every parameter and buffer of ``root``, under all its names.
    """

    def __init__(
        self,
        root: nn.Module,
        segments: Sequence[nn.Module],
        stage: int | None = None,
        layers: Sequence[Sequence[nn.Module]] = (),
    ) -> None:
        self.root, self.stage = root, stage
        self.segments, self._layers = segments, layers
        self._stages: dict[int, int] = {}
        for number, segment in self._numbered:
            for tensor in _tensors(segment):
                # What several stages use is the first one's.
                self._stages.setdefault(id(tensor), number)
        named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        self.by_name = {name: self.stage_of(tensor) for name, tensor in named}
        self._inside = {name for name, tensor in named if id(tensor) in self._stages}
        self._modules = {module: number for number, segment in self._numbered for module in segment.modules()}

    @property
    def _numbered(self) -> Iterable[tuple[int, nn.Module]]:
        return enumerate(self.segments, start=1)

    @property
    def last(self) -> int:
        return len(self.segments)

    def stage_of(self, tensor: Tensor) -> int:
        """Return the stage of a parameter, or of a buffer that has not been replaced since."""
        return self._stages.get(id(tensor), self.last)

    # ---- names and parameters

    @property
    def parameter_names(self) -> list[list[str]]:
        """The names of the parameters of each of the ``K`` stages."""
        names = [name for name, _ in self.root.named_parameters()]
        return [[name for name in names if self.by_name.get(name, self.last) == stage] for stage, _ in self._numbered]

    @property
    def own_names(self) -> list[str]:
        """The names of this process's parameters and buffers."""
        later = {name: self._stage_of_module(name) or self.last for name in self._later_buffers}
        return [name for name, stage in {**self.by_name, **later}.items() if stage == self.stage]

    @property
    def _later_buffers(self) -> list[str]:
        return [name for name, _ in self.root.named_buffers() if name not in self.by_name]

    def _stage_of_module(self, name: str) -> int | None:
        """The stage of the module that has a tensor of that name, if it is a layer's."""
        return self._modules.get(self.root.get_submodule(name.rpartition(".")[0]))

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters of this process's stage."""
        return [parameter for name, parameter in self.root.named_parameters() if self._is_own(name)]

    def _is_own(self, name: str) -> bool:
        return self.stage is None or self.by_name.get(name, self.last) == self.stage

    @property
    def parameters_outside(self) -> list[nn.Parameter]:
        """The parameters that lie outside the network."""
        return [parameter for name, parameter in self.root.named_parameters() if name not in self._inside]

    def names_outside(self, wanted: Callable[[Tensor], bool]) -> list[str]:
        """Return the names of those parameters and buffers outside the network that are wanted."""
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        inside = self._inside.union(name for name in self._later_buffers if self._stage_of_module(name) is not None)
        return [name for name, tensor in named if name not in inside and wanted(tensor)]

    @property
    def names_between(self) -> list[str]:
        """The names of the stages' parameters and buffers that other stages' processes use in an evaluation.

        They are no layer's, but used between the layers, or tied.
        """
        held = {tensor for layers in self._layers for layer in layers for tensor in _tensors(layer)}
        held -= {tie.parameter for tie in self.ties}
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        return [name for name, tensor in named if name in self._inside and tensor not in held]

    @property
    def foreign_layers(self) -> dict[nn.Module, int]:
        """The layers whose parameters or buffers live in another process, with their stage."""
        if self.stage is None:
            return {}
        own = set(self.segments[self.stage - 1].modules())
        numbered = list(enumerate(self._layers, start=1))
        return {layer: stage for stage, of in numbered for layer in of if layer not in own and _tensors(layer)}

    # ---- the state dict

    def own_keys(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Return the keys of a full state dict whose values this process's stage owns.

        Keys are matched by name; where a module renames its keys, by the memory they share with a parameter or a
        buffer; and a module's extra state by the module's name. Everything else belongs to the last stage.
        """
        memory = {
            tensor.data_ptr(): number
            for number, segment in self._numbered
            for tensor in _tensors(segment)
            if tensor.numel()
        }
        modules = {name: self._modules.get(module) for name, module in self.root.named_modules(remove_duplicate=False)}

        def owner(key: str, value: Any) -> int | None:
            if key in self.by_name:
                return self.by_name[key]
            if isinstance(value, Tensor) and value.numel() and value.data_ptr() in memory:
                return memory[value.data_ptr()]
            return modules.get(key.rpartition(".")[0])

        return [key for key, value in state_dict.items() if (owner(key, value) or self.last) == self.stage]

    # ---- what is shared

    @property
    def ties(self) -> list[Tie]:
        """The parameters that several stages use."""
        users: dict[nn.Parameter, list[int]] = {}
        for number, segment in self._numbered:
            for parameter in segment.parameters():
                users.setdefault(parameter, []).append(number)
        return [Tie(parameter, tuple(stages)) for parameter, stages in users.items() if len(stages) > 1]

    def check_ties(self) -> None:
        """Refuse a parameter that a module outside the network shares with a stage before the last.

        Raises:
            ValueError: Naming the parameter and the stage.
        """
        inside = {module for segment in self.segments for module in segment.modules()}
        known = {name for segment in self.segments for name, _ in segment.named_parameters()}
        for module_name, module in self.root.named_modules():
            if module in inside:
                continue
            for name, parameter in module.named_parameters(module_name, recurse=False):
                stage = self.stage_of(parameter)
                if stage < self.last and name not in known:
                    raise ValueError(
                        f"The parameter {name!r} is tied to one of stage {stage}, but lies outside the network and so"
                        f" on stage {self.last}. Untie it, or make its module part of the network"
                        " (`configure_stages`) and keep both in one stage (`split_points`)."
                    )

    def check_foreign_grads(self) -> None:
        """Refuse a loss, on the last stage, that uses the weights of other stages directly: it would use stale ones.

        Raises:
            RuntimeError: Naming the parameter and its stage.
        """
        tied = {tie.parameter for tie in self.ties if self.last in tie.stages}
        for name, parameter in self.root.named_parameters():
            if self.by_name[name] != self.last and parameter.grad is not None and parameter not in tied:
                raise RuntimeError(
                    f"The loss uses the parameter {name!r} directly, but its weights live on stage"
                    f" {self.by_name[name]}, in another process. For an L2 penalty use the optimizer's `weight_decay`."
                )


def _tensors(segment: nn.Module) -> tuple[Tensor, ...]:
    return (*segment.parameters(), *segment.buffers())


class OptimizerGroups:
    """The parameter groups of an optimizer over the whole module; the optimizer itself has its own stage's parameters.

    The groups themselves stay, so that schedulers align on all ranks.

    Args:
        optimizer: The user's optimizer; the parameters of other stages are taken out of it.
        ownership: Whose parameter is whose.

    Attributes:
        optimizer: As given.
        whole: The parameters of each group over the whole module, in the order of the indices of its state.
    """

    def __init__(self, optimizer: Optimizer, ownership: Ownership) -> None:
        check_state_form(optimizer)
        self.optimizer = optimizer
        self.whole: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self._ownership = ownership
        self._keep(set(ownership.own_parameters))

    def _keep(self, own: Collection[nn.Parameter]) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter in own]
        # An optimizer may have a state of its own beside, under another key.
        for key in [key for key in self.optimizer.state if isinstance(key, Tensor) and key not in own]:
            del self.optimizer.state[key]

    def show_all(self) -> None:
        """Put the parameters of all stages into the optimizer's groups, until :meth:`adopt`."""
        self.adopt()
        for group, parameters in zip(self.optimizer.param_groups, self.whole, strict=True):
            group["params"] = list(parameters)

    def adopt(self) -> None:
        """Take the parameters of other stages out again, also of groups that were added or replaced meanwhile.

        Such groups are over the whole module, and become part of :attr:`whole`.
        """
        own = set(self._ownership.own_parameters)
        adopted = []
        for index, group in enumerate(self.optimizer.param_groups):
            known = self.whole[index] if index < len(self.whole) else []
            reduced = [id(parameter) for parameter in known if parameter in own]
            unchanged = index < len(self.whole) and reduced == [id(parameter) for parameter in group["params"]]
            adopted.append(known if unchanged else list(group["params"]))
        self.whole = adopted
        self._keep(own)


def keep_options(optimizer: Optimizer) -> Callable[[], None]:
    """Remember the options of an optimizer's groups, such as the learning rate; return what gives them back."""
    before = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items()}
        for group in optimizer.param_groups
    ]

    def restore() -> None:
        for group, options in zip(optimizer.param_groups, before, strict=False):
            for name, value in options.items():
                if isinstance(value, Tensor) and isinstance(group[name], Tensor):
                    group[name].copy_(value)
                elif name != "params":
                    group[name] = value

    return restore


def check_state_form(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state cannot be put together of the stages', before any checkpoint needs it.

    Raises:
        ValueError: Naming its type and the keys of its state.
    """
    # What stands for an optimizer where `configure_optimizers` has returned none has no state.
    keys = list(optimizer.state_dict())
    if keys and not {"state", "param_groups"} <= set(keys):
        raise ValueError(
            f"{type(optimizer).__name__}.state_dict() has the keys {keys}, but in several processes a checkpoint is put"
            " together of each stage's 'state' and 'param_groups', the form of torch's optimizers. Return that form, or"
            " train in one process (devices=1)."
        )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse several optimizers, and those that need the loss more than once a step.

    Raises:
        ValueError: Naming their types.
    """
    if len(optimizers) > 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"`configure_optimizers` returned {len(optimizers)} optimizers ({names}), but delayed gradients are applied"
            " with one. Use one optimizer with parameter groups."
        )
    lbfgs = [optimizer for optimizer in optimizers if isinstance(optimizer, LBFGS)]
    if lbfgs:
        raise ValueError(
            f"{type(lbfgs[0]).__name__} evaluates the loss several times in a step, which delayed gradients cannot do."
            " Use an optimizer that needs one gradient a step, such as SGD or AdamW."
        )
