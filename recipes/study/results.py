"""What a study leaves on disk lives here: its settings, its cuts, a file for each finished run, and one table of all.

Every file appears whole or not at all, so that a study may be killed at any time.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.study.cuts import Cut, from_json, to_json
from recipes.study.fit import Row
from recipes.study.grid import Recipe, Run, Settings

#: Of the table. Accuracies are in 0..1; ``seconds`` were spent in training until the epoch's end, by one process for
#: all stages; ``device_seconds`` is what it would take on K devices, and empty where that is not known.
COLUMNS = (
    *("recipe", "depth", "optimizer", "method", "stages", "seed", "epoch", "lr"),
    *("train_loss", "train_acc", "test_loss", "test_acc", "seconds", "device_seconds"),
)


class Results:
    """The folder of a study.

    Args:
        folder: Made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    @property
    def table(self) -> Path:
        """The CSV file with all epochs of all finished runs."""
        return self.folder / "results.csv"

    def settle(self, settings: Settings, recipes: Mapping[str, Recipe]) -> None:
        """Writes down what the study is about, or checks that it is still the same, once a run has been finished.

        More runs, and so more recipes, may be added to a study at any time.

        Args:
            settings: What all runs share.
            recipes: What is trained, by names that stay the same.

        Raises:
            ValueError: If the runs that are there were made with something else.
        """
        path = self.folder / "settings.json"
        asked = {"settings": asdict(settings), "recipes": {name: asdict(recipe) for name, recipe in recipes.items()}}
        asked = json.loads(json.dumps(asked))
        kept = json.loads(path.read_text()) if path.exists() else {"settings": asked["settings"], "recipes": {}}
        changed = differences(kept, asked)
        if changed and not any(self.folder.glob("runs/*.json")):
            # Nothing has come of the settings there were, such as a number of images that cannot be chosen.
            kept["recipes"], changed = {}, []
            (self.folder / "cuts.json").unlink(missing_ok=True)
        if changed:
            raise ValueError(
                f"The study in {self.folder} was started with other settings: {'; '.join(changed)}. Its runs cannot be"
                " compared with new ones: give another folder (--out), or the settings it was started with."
            )
        write(path, json.dumps({**asked, "recipes": {**kept["recipes"], **asked["recipes"]}}, indent=1))

    def cuts(self) -> dict[str, dict[int, Cut]]:
        """The cuts that have been measured, by network."""
        path = self.folder / "cuts.json"
        return {name: from_json(cuts) for name, cuts in json.loads(path.read_text()).items()} if path.exists() else {}

    def keep_cuts(self, cuts: Mapping[str, dict[int, Cut]]) -> None:
        """Writes all cuts down."""
        write(self.folder / "cuts.json", json.dumps({name: to_json(some) for name, some in cuts.items()}, indent=1))

    def finished(self, run: Run) -> bool:
        """Whether a run need not be done again."""
        return self._path(run).exists()

    def keep(self, run: Run, rows: Sequence[Row], epoch_seconds: float | None) -> None:
        """Writes a finished run down.

        Args:
            run: Which one.
            rows: What its epochs ended with.
            epoch_seconds: What an epoch would take on K devices; ``None`` if that is not known.
        """
        kept = []
        for row in rows:
            on_devices = None if epoch_seconds is None else epoch_seconds * row["epoch"]
            kept.append({**asdict(run), **row, "device_seconds": on_devices})
        write(self._path(run), json.dumps(kept))

    def collect(self) -> list[Row]:
        """Writes the table of all finished runs, and returns its rows."""
        rows = [row for path in sorted(self.folder.glob("runs/*.json")) for row in json.loads(path.read_text())]
        write_table(self.table, COLUMNS, rows)
        return rows

    def _path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes some columns of rows as a CSV file that appears whole or not at all."""
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *([_cell(row[column]) for column in columns] for row in rows)])
    partial.replace(path)


def _cell(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any], place: str = "") -> list[str]:
    """What differs between two nests of settings, where both have a value; text for people."""
    found = []
    for key in kept.keys() & asked.keys():
        old, new = kept[key], asked[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{place}{key}.")
        elif old != new:
            found.append(f"{place.removeprefix('settings.')}{key} was {old}, now {new}")
    return sorted(found)


def write(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)
