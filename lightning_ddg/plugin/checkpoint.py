"""Checkpoints of the whole module, assembled of what each stage has, and taken apart again.

They are plain Lightning files, with the formats that Lightning and torch give them; under :data:`CHECKPOINT_KEY` stands
the cut, which nobody else reads. The functions on states are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ddg.plugin import compat
from lightning_ddg.plugin.ownership import OptimizerGroups, Ownership, Weights

CHECKPOINT_KEY = "lightning_ddg"


def record_cut(checkpoint: dict[str, Any], num_stages: int, split_points: Sequence[str]) -> None:
    """Write a cut into a checkpoint."""
    checkpoint[CHECKPOINT_KEY] = {"num_stages": num_stages, "split_points": list(split_points)}


def recorded_cut(checkpoint: Mapping[str, Any], num_stages: int) -> list[str] | None:
    """Return the split points in a checkpoint, if there are any for this many stages."""
    recorded = checkpoint.get(CHECKPOINT_KEY)
    return list(recorded["split_points"]) if recorded and recorded["num_stages"] == num_stages else None


class CheckpointAssembler:
    """Puts the parts of all stages together on rank 0. Every rank has to call each method, in the same order.

    Args:
        ownership: Whose tensor is whose.
        weights: Which weights are up to date here.
        groups: Of each optimizer, the parameter groups over the whole module; none where one process has all.
        gather: Gives rank 0 what the other ranks have of a dictionary, and all others an empty list.
        share: Gives every rank all weights where hooks of the user's are to see them; returns whether it did.
    """

    def __init__(
        self,
        ownership: Ownership,
        weights: Weights,
        groups: Sequence[OptimizerGroups],
        gather: Callable[[dict[Any, Any]], list[dict[Any, Any]]],
        share: Callable[[], bool],
    ) -> None:
        self.ownership, self._weights, self._gather, self._share = ownership, weights, gather, share
        self._groups = {one.optimizer: one for one in groups}
        self._assembled: dict[str, Any] | None = None

    def module_state(self) -> dict[str, Any]:
        """Return the module's state dict, the full one on rank 0; elsewhere this stage's part may alone be current."""
        complete = self._weights.whole or self._share()
        state = self._state()
        if not complete:
            self._complete(state)
        self._assembled = state
        return state

    def complete_copies(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the other stages' parts into what callbacks keep of the module's state, such as an average."""
        for copy in copies_of_state(checkpoint, self._state().keys()):
            if copy is not self._assembled:
                self._complete(copy)
        self._assembled = None

    def _state(self) -> dict[str, Any]:
        with self._weights.read_as_they_are():
            return self.ownership.root.state_dict()

    def _complete(self, state: dict[str, Any]) -> None:
        for values in self._gather({key: state[key] for key in self.ownership.own_keys(state)}):
            state.update(values)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the state of the user's optimizer over the whole module on rank 0, nothing elsewhere.

        ``None`` says that the optimizer itself has the whole module's parameters.
        """
        groups = self._groups.get(optimizer)
        if groups is None:
            return None
        groups.adopt()
        own = stage_optimizer_state(groups.optimizer, groups.whole)
        others = self._gather(own)
        return full_optimizer_state(groups.optimizer, groups.whole, [own, *others]) if others else {}

    def load_optimizer_states(
        self, optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]], device: torch.device
    ) -> None:
        """Load this process's part of the states over the whole module, and move them to a device.

        Raises:
            ValueError: If a state was saved for another number of parameters or groups.
        """
        for optimizer, state in zip(optimizers, states, strict=True):
            self._load_optimizer_state(optimizer, state)
            compat.optimizer_to_device(optimizer, device)

    def _load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        groups = self._groups.get(optimizer)
        if groups is None:
            optimizer.load_state_dict(dict(state))
            return
        groups.adopt()
        optimizer.load_state_dict(local_optimizer_state(state, optimizer, groups.whole))


def copies_of_state(checkpoint: Mapping[str, Any], keys: Collection[str]) -> list[dict[str, Any]]:
    """Return the module's state in a checkpoint, and what callbacks keep that has the same keys, such as an average."""
    callbacks = checkpoint.get("callbacks", {}).values()
    kept = [value for state in callbacks if isinstance(state, Mapping) for value in state.values()]
    values = [checkpoint.get("state_dict"), *kept]
    return [value for value in values if isinstance(value, dict) and value.keys() == set(keys)]


def _full_indices(groups: Sequence[Sequence[nn.Parameter]]) -> dict[int, int]:
    flat = [parameter for group in groups for parameter in group]
    return {id(parameter): index for index, parameter in enumerate(flat)}


def stage_optimizer_state(optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> dict[Any, Any]:
    """Return the state of a stage's optimizer by the indices of the whole module; other keys stay as they are.

    Args:
        optimizer: The optimizer of one stage.
        groups: The parameters of each group over the whole module.
    """
    full = _full_indices(groups)
    local = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict().get("state", {})
    return {full[id(local[key])] if isinstance(key, int) else key: value for key, value in state.items()}


def full_optimizer_state(
    optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]], states: Sequence[Mapping[Any, Any]]
) -> dict[str, Any]:
    """Return the state dict of the user's optimizer over the whole module, from the states of all stages.

    What belongs to no parameter is taken from the first of them.
    """
    whole = optimizer.state_dict()
    if not whole:
        # What stands for an optimizer where `configure_optimizers` has returned none.
        return whole
    merged = {key: value for state in reversed(states) for key, value in state.items()}
    by_index = {key: merged.pop(key) for key in sorted(key for key in merged if isinstance(key, int))}
    param_groups, start = [], 0
    for group, parameters in zip(whole["param_groups"], groups, strict=True):
        param_groups.append({**group, "params": list(range(start, start + len(parameters)))})
        start += len(parameters)
    return {"state": {**by_index, **merged}, "param_groups": param_groups}


def local_optimizer_state(
    state_dict: Mapping[str, Any], optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]]
) -> dict[str, Any]:
    """Return the part of a full optimizer state that a stage's optimizer can load.

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
