# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: predictions, a line a row, the settings they were made with, and results."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from videollm_mod.outputs import append_line, complete_lines, write_text
from videollm_mod.train.data.faults import WHERE


Key: TypeAlias = tuple[str, str, str]
SETTINGS, RESULTS = "settings.json", "results.json"


class Predictions:
    """
    Predictions in a folder. Each process appends to a file of its own, and reads the files of all.

    Args:
        folder (`Path`): The folder. It is made if it does not exist.
        process (`int`, *optional*, defaults to 0): Number of this process.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.path = folder, folder / f"predictions-{process}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """
        Compare settings with those of an earlier run in this folder, if there was one.

        Raises:
            `ValueError`: If they differ. Predictions of several settings must not be mixed.
        """
        path, settings = self.folder / SETTINGS, json.loads(json.dumps(settings, default=str))
        before = _read_json(path) if path.exists() else settings
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            differ = ", ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in names)
            raise ValueError(
                f"'{self.folder}' has predictions of another run ({differ}). Give another --out, or delete it."
            )

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings of this run, which [`Predictions.check_settings`] reads in the next."""
        write_text(self.folder / SETTINGS, json.dumps(settings, indent=1, default=str) + "\n")

    def keys(self) -> set[Key]:
        """Return task, id and [`fingerprint`] of the rows that have a saved prediction of any process."""
        return {key for key, _ in self._lines()}

    def read(self, task: str) -> dict[Key, dict[str, Any]]:
        """Return the saved predictions of all processes for a task, by the keys of [`Predictions.keys`]."""
        return {key: prediction for key, prediction in self._lines() if key[0] == task}

    def _lines(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        for path in sorted(self.folder.glob("predictions-*.jsonl")):
            # A run that was killed leaves part of a line. Its row is predicted again.
            for saved in complete_lines(path):
                if saved.keys() >= {"task", "id", "row", "prediction"}:
                    yield (saved["task"], saved["id"], saved["row"]), saved["prediction"]

    def add(self, key: Key, prediction: dict[str, Any]) -> None:
        """Append the prediction of a row."""
        line = dict(zip(("task", "id", "row"), key, strict=True)) | {"prediction": prediction}
        append_line(self.path, json.dumps(line))


def fingerprint(row: Mapping[str, Any], truth_keys: Sequence[str] = (), official: bool = False) -> str:
    """
    Return a hash of what a prediction depends on, so that a row prepared anew is predicted anew.

    Args:
        row (mapping): A row.
        truth_keys (sequence of `str`, *optional*): The keys of its `truth` that count. Of the truth, a score depends
            on the others.
        official (`bool`, *optional*, defaults to `False`): Whether the prediction follows the published code.
    """
    kept = {name: value for name, value in row.items() if name not in (WHERE, "truth", "id", "task")}
    for name in ("video", "frame_features"):
        # The folder may move.
        kept[name] = Path(kept[name]).name if isinstance(kept.get(name), str) else None
    if truth := limit_truth(row, truth_keys):
        kept["truth"] = truth
    if official:
        kept["official"] = True
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def limit_truth(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return what a row's `truth` has under some keys."""
    truth = row.get("truth") or {}
    return {key: truth[key] for key in keys if key in truth}


def save_results(folder: Path, settings: dict[str, Any], tasks: dict[str, Any]) -> Path:
    """Write `results.json`. Results of other tasks in it are kept. Return its path."""
    path = folder / RESULTS
    before = _read_json(path).get("tasks", {}) if path.exists() else {}
    results = {"settings": settings, "tasks": {**before, **tasks}}
    write_text(path, json.dumps(results, indent=1, default=str) + "\n")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}. Delete it.") from None
