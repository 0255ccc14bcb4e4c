# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod verify`: whether a checkpoint computes here what it computed when it was published."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from videollm_mod.console import quiet

import typer

from videollm_mod.commands.options import AsJson, Revision
from videollm_mod.commands.watching import EMBEDDED
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import check_outputs
from videollm_mod.space.checkpoint_names import check_checkpoint


# The record is about a model, and `--help` does without torch.
if TYPE_CHECKING:
    from videollm_mod.golden import Verdict


def verify(
    checkpoint: Annotated[
        str, typer.Argument(help="A folder or a Hub id.", show_default="the embedded checkpoint")
    ] = str(EMBEDDED),
    revision: Revision = None,
    write: Annotated[
        bool, typer.Option("--write", help="Record in golden.json what the checkpoint in this folder computes now.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Check that a checkpoint computes here what its golden.json says.

    Prints one line. The exit code is 0 if it is equal, and 1 if not, with the first difference. `push` writes
    golden.json into what it publishes.
    """
    with one_line_errors():
        checkpoint = check_checkpoint(checkpoint)
        folder = Path(checkpoint)
        if write and not folder.is_dir():
            raise ValueError(
                f"--write needs a folder, and '{checkpoint}' is a Hub id: `push` records what it publishes."
            )
        quiet()
        from videollm_mod.golden import FILE, make_golden, verify_checkpoint, write_golden

        if write:
            check_outputs({"--write": folder / FILE})
            write_golden(make_golden(folder), folder / FILE)
            typer.echo(f"wrote {folder / FILE}")
            return
        verdict = verify_checkpoint(checkpoint, revision)
    typer.echo(json.dumps(_to_dict(verdict)) if as_json else describe(verdict))
    if verdict.difference is not None:
        raise typer.Exit(1)


def describe(verdict: "Verdict") -> str:
    """Return the result in one line."""
    versions = [
        f"torch {at['torch']}, Transformers {at['transformers']}, {at['dtype']} on {at['device']}"
        for at in (verdict.here, verdict.made_with)
    ]
    where = f"({versions[0]}; recorded with {versions[1]})"
    if verdict.difference is not None:
        return f"not equal: {verdict.difference} {where}"
    allowed = verdict.tolerance
    return (
        f"equal: log-probabilities differ by at most {verdict.logits:.2g} standard deviations of the logits "
        f"({allowed.logits:g} allowed), {verdict.kept:.2%} of routing decisions differ ({allowed.kept:.0%}) {where}"
    )


def _to_dict(verdict: "Verdict") -> dict:
    found = {"equal": verdict.difference is None, "difference": verdict.difference, "logits": verdict.logits}
    found |= {"kept": verdict.kept, "tolerance": verdict.tolerance._asdict()}
    return {**found, "here": verdict.here, "made_with": verdict.made_with}


__all__ = ["describe", "verify"]
