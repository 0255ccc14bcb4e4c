# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The table of an evaluation: scores, with published figures beside them."""

from typing import Any

from videollm_mod.train.data.faults import counted
from videollm_mod.train.tasks import find_task


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """
    Return the scores of tasks as a Markdown table, and how they were counted.

    Args:
        results (`dict`): What [`evaluate_tasks`] returns.
    """
    models = list(dict.fromkeys(model for result in results.values() for model in result["papers"]))
    lines = [["task", "measure", "this model", *(f"{model} (published)" for model in models)]]
    for name, result in results.items():
        published = {measure for figures in result["papers"].values() for measure in figures}
        for measure in dict.fromkeys([*result["scores"], *sorted(published)]):
            figures = [result["papers"].get(model, {}).get(measure) for model in models]
            lines.append([name, measure, *map(_number, [result["scores"].get(measure), *figures])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in padded), "", *_notes(results, bool(models))])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _unread(result: dict[str, Any]) -> str:
    if not result["unread"]:
        return ""
    meaning = "that count as rows without a reply" if result["count"] else "that the scores do not cover"
    return f", and {result['unread']} more {meaning} because they cannot be read"


def _notes(results: dict[str, dict[str, Any]], has_papers: bool) -> list[str]:
    lines, names_by_note = [], {}
    for name, result in results.items():
        scorer = "the published scorer" if result["official"] else "the default scorer"
        lines.append(f"{name}: {counted(result['rows'], 'row')}{_unread(result)}, {scorer}.")
        lines += [f"{name}: wrote {path}" for path in result.get("files", [])]
        if note := find_task(name).official_note:
            names_by_note.setdefault(note, []).append(name)
    lines += [f"{', '.join(names)}: {note}" for note, names in names_by_note.items()]
    if has_papers:
        lines.append(
            "Published figures are the papers' own, by the published scorers (--official), on the papers' videos."
        )
    return lines
