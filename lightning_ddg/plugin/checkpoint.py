"""Full state and stage state: whose tensor is whose, and optimizer states by the indices of the whole module.

Checkpoints are plain Lightning files, so the formats here are torch's own and must stay so; the functions are pure, and
moving the pieces between ranks is the strategy's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

CHECKPOINT_KEY = "lightning_ddg"


def owner_by_name(root: nn.Module, segments: Sequence[nn.Module]) -> dict[str, int]:
    """Stage (``1..K``) of every parameter and buffer of ``root``, under all its names.

    What belongs to no segment belongs to the last stage, whose rank computes the loss.
    """
    owner: dict[int, int] = {}
    for stage, segment in enumerate(segments, start=1):
        for tensor in (*segment.parameters(), *segment.buffers()):
            owner[id(tensor)] = stage
    named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    return {name: owner.get(id(tensor), len(segments)) for name, tensor in named}


def keys_of_stage(
    state_dict: Mapping[str, Any], root: nn.Module, segments: Sequence[nn.Module], stage: int
) -> list[str]:
    """Keys of a full ``state_dict`` whose values a stage owns.

    Keys are matched by name; where a module renames its keys, by the memory they share with a parameter or a buffer;
    and a module's extra state by the module's name. Everything else belongs to the last stage.
    """
    by_name = owner_by_name(root, segments)
    by_memory: dict[int, int] = {}
    by_module: dict[int, int] = {}
    for number, segment in enumerate(segments, start=1):
        for tensor in (*segment.parameters(), *segment.buffers()):
            if tensor.numel():
                by_memory[tensor.data_ptr()] = number
        for module in segment.modules():
            by_module[id(module)] = number
    modules = {
        name: by_module[id(module)]
        for name, module in root.named_modules(remove_duplicate=False)
        if id(module) in by_module
    }

    def owner(key: str, value: Any) -> int:
        if key in by_name:
            return by_name[key]
        if isinstance(value, Tensor) and value.numel() and value.data_ptr() in by_memory:
            return by_memory[value.data_ptr()]
        return modules.get(key.rpartition(".")[0], len(segments))

    return [key for key, value in state_dict.items() if owner(key, value) == stage]


def copies_of_state(checkpoint: Mapping[str, Any], keys: Collection[str]) -> list[dict[str, Any]]:
    """The module's own state in a checkpoint, and what callbacks keep that has the same keys, such as an average."""
    callbacks = checkpoint.get("callbacks", {}).values()
    kept = [value for state in callbacks if isinstance(state, Mapping) for value in state.values()]
    values = [checkpoint.get("state_dict"), *kept]
    return [value for value in values if isinstance(value, dict) and value.keys() == set(keys)]


def parameter_groups(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of each group of an optimizer over the whole module, in the order of its state's indices."""
    return [list(group["params"]) for group in optimizer.param_groups]


def keep_only(optimizer: Optimizer, own: Iterable[nn.Parameter]) -> None:
    """Takes all other parameters out of an optimizer; its groups stay, so that schedulers align on all ranks."""
    kept = {id(parameter) for parameter in own}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in kept]
    # An optimizer may have a state of its own beside, under another key.
    for key in [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in kept]:
        del optimizer.state[key]


def keep_options(optimizer: Optimizer) -> Callable[[], None]:
    """Remembers the options of an optimizer's groups, such as the learning rate; returns what gives them back."""
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


def adopt_groups(
    optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]], own: Iterable[nn.Parameter]
) -> list[list[nn.Parameter]]:
    """What :func:`parameter_groups` says of an optimizer whose groups were changed after :func:`keep_only`.

    Groups that were added or replaced, over the whole module, are reduced to this stage's own parameters.

    Args:
        optimizer: The optimizer.
        groups: What :func:`parameter_groups` said before.
        own: This stage's parameters.

    Returns:
        The parameters of each group over the whole module.
    """
    own = list(own)
    kept = {id(parameter) for parameter in own}
    adopted = []
    for index, group in enumerate(optimizer.param_groups):
        known = list(groups[index]) if index < len(groups) else []
        reduced = [id(parameter) for parameter in known if id(parameter) in kept]
        unchanged = index < len(groups) and reduced == [id(parameter) for parameter in group["params"]]
        adopted.append(known if unchanged else list(group["params"]))
    keep_only(optimizer, own)
    return adopted


def _full_indices(groups: Sequence[Sequence[nn.Parameter]]) -> dict[int, int]:
    flat = [parameter for group in groups for parameter in group]
    return {id(parameter): index for index, parameter in enumerate(flat)}


def stage_optimizer_state(optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> dict[Any, Any]:
    """State of a stage's optimizer by the indices of the whole module; what belongs to no parameter keeps its key.

    Args:
        optimizer: The optimizer after :func:`keep_only`.
        groups: What :func:`parameter_groups` said before.
    """
    full = _full_indices(groups)
    local = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict()["state"]
    return {full[id(local[key])] if isinstance(key, int) else key: value for key, value in state.items()}


def full_optimizer_state(
    optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]], states: Sequence[Mapping[Any, Any]]
) -> dict[str, Any]:
    """The state dict of the user's optimizer over the whole module, from the states of all stages.

    What belongs to no parameter is taken from the first of them.
    """
    merged = {key: value for state in reversed(states) for key, value in state.items()}
    by_index = {key: merged.pop(key) for key in sorted(key for key in merged if isinstance(key, int))}
    param_groups, start = [], 0
    for group, parameters in zip(optimizer.state_dict()["param_groups"], groups, strict=True):
        param_groups.append({**group, "params": list(range(start, start + len(parameters)))})
        start += len(parameters)
    return {"state": {**by_index, **merged}, "param_groups": param_groups}


def local_optimizer_state(
    state_dict: Mapping[str, Any], optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]]
) -> dict[str, Any]:
    """The part of a full optimizer state that a stage's optimizer can load.

    Raises:
        ValueError: If the state was saved for another number of parameters or groups.
    """
    saved, expected = [len(group["params"]) for group in state_dict["param_groups"]], [len(group) for group in groups]
    if saved != expected:
        raise ValueError(
            f"The checkpoint's optimizer has parameter groups of sizes {saved}, this module's has {expected}. Resume"
            " with the module and the optimizer that the checkpoint was saved with, or load only the weights."
        )
    position = {id(parameter): index for group in groups for index, parameter in enumerate(group)}
    local_groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = {key: value for key, value in state_dict["state"].items() if not isinstance(key, int)}
    start = 0
    for saved_group, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        indices: list[int] = []
        for parameter in group["params"]:
            full = saved_group["params"][position[id(parameter)]]
            index = start + len(indices)
            indices.append(index)
            if full in state_dict["state"]:
                state[index] = state_dict["state"][full]
        start += len(indices)
        local_groups.append({**saved_group, "params": indices})
    return {"state": state, "param_groups": local_groups}
