# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Evaluate a streaming model: LIVE's measures under teacher forcing and free streaming, or the tasks of a benchmark.

```bash
python train/evaluation.py --checkpoint . --world tiny --kinds narrate=2,ask=1,wait=1
python train/evaluation.py --checkpoint my-model --dataset prepared/coin --task coin_step,coin_next
accelerate launch train/evaluation.py --checkpoint my-model --dataset prepared/coin --task coin
```

With `--task`, predictions are saved in the folder `--out`, a line a row, and an interrupted run goes on where it
stopped. docs/evaluation.md describes tasks and measures.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from videollm_mod.checks_videollm_mod import check_count, check_number, check_seconds
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.train.arguments import naming_options, run
from videollm_mod.train.card import add_results, published_command
from videollm_mod.train.data.about import read_about
from videollm_mod.train.data.faults import row_record
from videollm_mod.train.data.sources import DataSource, load_split
from videollm_mod.train.judging import SIMILARITIES, check_judge
from videollm_mod.train.loading import load_checkpoint


def measure_checkpoint(
    checkpoint: str | Path,
    rows: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    tolerance: float = 0.5,
    batch_size: int = 8,
    interval_threshold: float | None = None,
    weights: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """
    Load a checkpoint by its name, and compute all measures.

    Args:
        checkpoint (`str` or `Path`): A folder or a Hub id.
        rows (`Sequence[dict]`): Rows with `messages` and `video`.
        fps, tolerance, batch_size, interval_threshold, options: See [`teacher_forced`] and [`free_streaming`].
        weights (`str`, *optional*): `"int8"` or `"fp8"`: linear layers in eight bits, by torchao.

    Returns:
        `dict[str, float]`: The measures of [`teacher_forced`] and [`free_streaming`] by name.
    """
    # Imported here, because `--help` does without torch.
    from videollm_mod.space.loading import quantization
    from videollm_mod.train.streaming_evaluation import free_streaming
    from videollm_mod.train.teacher_forcing import teacher_forced

    model, processor = load_checkpoint(checkpoint, dtype="auto", device_map="auto", **quantization(weights))
    options |= {"fps": fps, "interval_threshold": interval_threshold}
    scores = teacher_forced(model, processor, rows, fps=fps, interval_threshold=interval_threshold)
    return scores | free_streaming(model, processor, rows, tolerance=tolerance, batch_size=batch_size, **options)


@dataclass
class EvaluationArguments:
    """
    What to measure, and how.

    Args:
        checkpoint (`str`): The model: a folder or a Hub id.
        split (`str`, *optional*, defaults to `"test"`): Split to evaluate on.
        num_clips (`int`, *optional*, defaults to 200): Number of clips, if they are generated.
        fps (`float`, *optional*): Frames per second that the model sees. Generated clips have one rate, which is the
            default and the only value. Otherwise defaults to 2.0.
        tolerance (`float`, *optional*, defaults to 0.5): Seconds by which a narrated event may be early or late.
        delay_window (`float`, *optional*, defaults to 5.0): Seconds by which it may be off and still count for the
            mean delay.
        batch_size (`int`, *optional*, defaults to 8): Number of clips to stream at the same time.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the checkpoint's.
        max_new_tokens (`int`, *optional*, defaults to 100): Longest reply in tokens.
        weights (`str`, *optional*): `"int8"` or `"fp8"`: linear layers in eight bits, by torchao.
        cache_dtype (`str`, *optional*): Data type of keys and values while streaming. Teacher-forced measures use no
            cache.
        skip_faulty (`bool`, *optional*, defaults to `False`): Leave out faulty rows, and list them at the end. All
            frames are decoded before, so that all measures are of the same rows.
        card (`bool`, *optional*, defaults to `False`): Also write the results into the checkpoint's model card.
        task (`str`, *optional*): Tasks to evaluate, separated by commas, or the name of the data's source for all its
            tasks. Without it, LIVE's measures and free streaming are evaluated.
        out (`str`, *optional*): Folder for the predictions and results of tasks. Defaults to a folder in `results`
            that is named after the checkpoint, the data and the split.
        official (`bool`, *optional*, defaults to `False`): Score tasks as the published scorers do, with their
            weaknesses.
        judge (`str`, *optional*, defaults to `"token_f1"`): Judge of free text, for measures that need one: `"exact"`,
            `"token_f1"`, `"sentence"` (an encoder), or, for tasks, `"endpoint"`: the language model `judge_model`
            behind the OpenAI-compatible address `judge_url`. Its replies are kept in the folder of results.
        judge_url, judge_model (`str`, *optional*): Address and name of the judge.
    """

    checkpoint: str = field(metadata={"help": "The model: a folder or a Hub id."})
    split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    num_clips: int = field(default=200, metadata={"help": "Number of clips, if they are generated."})
    fps: float = field(
        default=2.0, metadata={"help": "Frames per second that the model sees. Generated clips have one rate."}
    )
    tolerance: float = field(default=0.5, metadata={"help": "Seconds by which an event may be early or late."})
    delay_window: float = field(default=5.0, metadata={"help": "The same, to count for the mean delay."})
    batch_size: int = field(default=8, metadata={"help": "Number of clips to stream at the same time."})
    interval_threshold: float | None = field(default=None, metadata={"help": "Default: the checkpoint's."})
    max_new_tokens: int = field(default=100, metadata={"help": "Longest reply in tokens."})
    weights: str | None = field(
        default=None, metadata={"help": "Linear layers in eight bits, by torchao.", "choices": ["int8", "fp8"]}
    )
    cache_dtype: str | None = field(
        default=None, metadata={"help": "Keys and values while streaming.", "choices": ["fp8"]}
    )
    skip_faulty: bool = field(default=False, metadata={"help": "Leave out faulty rows, and list them at the end."})
    card: bool = field(default=False, metadata={"help": "Also write the results into the model card."})
    task: str | None = field(default=None, metadata={"help": "Tasks, separated by commas, or the data's source."})
    out: str | None = field(default=None, metadata={"help": "Folder for the predictions and results of tasks."})
    official: bool = field(default=False, metadata={"help": "Score tasks as the published scorers do."})
    judge: str = field(
        default="token_f1",
        metadata={"help": "Judge of free text, for measures that need one.", "choices": [*SIMILARITIES, "endpoint"]},
    )
    judge_url: str | None = field(default=None, metadata={"help": "Address of --judge endpoint, OpenAI-compatible."})
    judge_model: str | None = field(default=None, metadata={"help": "Model of --judge endpoint."})

    def __post_init__(self) -> None:
        self.checkpoint = check_checkpoint(self.checkpoint)
        with naming_options():
            for name in ("num_clips", "batch_size", "max_new_tokens"):
                check_count(name, getattr(self, name))
            for name in ("tolerance", "delay_window"):
                check_seconds(name, getattr(self, name), least=0)
            if self.interval_threshold is not None:
                check_number("interval_threshold", self.interval_threshold, least=0, most=1)
        if self.task is None and (self.official or self.out is not None):
            raise ValueError(f"--{'official' if self.official else 'out'} is for tasks: give --task too.")
        if self.task is None and self.judge == "endpoint":
            raise ValueError("--judge endpoint is for tasks: give --task too.")
        if self.task is not None and (given := self.changed("tolerance", "delay_window")):
            raise ValueError(f"--{given[0]} is not for tasks: leave out --task or --{given[0]}.")
        named = (self.judge_url is not None, self.judge_model is not None)
        if named != ((self.judge == "endpoint"),) * 2:
            raise ValueError("--judge endpoint, --judge_url and --judge_model go together.")

    def changed(self, *names: str) -> list[str]:
        """Return those of some arguments that do not have their default."""
        return [each.name for each in fields(self) if each.name in names and getattr(self, each.name) != each.default]

    def options(self) -> dict[str, Any]:
        """Return the options of [`measure_checkpoint`]."""
        from videollm_mod.space.loading import CACHE_DTYPES

        names = ("fps", "tolerance", "delay_window", "batch_size", "interval_threshold", "max_new_tokens", "weights")
        given = {name: getattr(self, name) for name in names}
        return given | {"cache_dtype": CACHE_DTYPES.get(self.cache_dtype), "similarity": self.judge}


def main(source: DataSource, arguments: EvaluationArguments) -> None:
    """Print the measures as JSON, or the scores of tasks as a table."""
    if arguments.task is None:
        try:
            check_judge(arguments.judge)
        except (ImportError, OSError) as error:
            raise SystemExit(f"error: --judge {arguments.judge}: {error}") from None
    with row_record() as record:
        checks = {"fps": arguments.fps, "full": arguments.skip_faulty and arguments.task is None}
        checks["left_out"] = record if arguments.skip_faulty else None
        _choose_split(source, arguments)
        rows = load_split(source, arguments.split, arguments.num_clips, **checks)
        if arguments.task is None:
            scores = measure_checkpoint(arguments.checkpoint, rows, **arguments.options())
            print(json.dumps({name: round(float(value), 4) for name, value in scores.items()}, indent=1))
        else:
            from videollm_mod.train.tasks.command import run_tasks

            scores = run_tasks(source, rows, arguments, checks["left_out"])
    from accelerate import Accelerator

    if arguments.card and Accelerator().is_main_process:
        _write_card(source, arguments, scores)


def _choose_split(source: DataSource, arguments: EvaluationArguments) -> None:
    """
    Take the one evaluation split of prepared data if it has none of the name of the default, and say so.

    COIN's publisher calls the second split validation, and others call it testing.
    """
    if arguments.changed("split") or not Path(source.dataset).is_dir():
        return
    try:
        splits = read_about(source.dataset).get("splits", {})
    except ValueError:  # an evaluation of tasks says what is wrong with it
        return
    there = [split for split in ("validation", "test") if isinstance(splits.get(split), dict)]
    there = [split for split in there if splits[split].get("rows")]
    if there == ["validation"]:
        (arguments.split,) = there
        # A state of accelerate, made here, would keep other processes from waiting for days later.
        if os.environ.get("RANK", "0") == "0":
            print("There is no split test: this evaluates on validation.", file=sys.stderr)


def _write_card(source: DataSource, arguments: EvaluationArguments, scores: dict[str, float]) -> None:
    add_results(
        arguments.checkpoint,
        {name: value for name, value in scores.items() if name != "first_word_latency"},
        dataset=source.title(arguments.split),
        split=arguments.split,
        command=published_command(
            ["python", "train/evaluation.py", *(arg for arg in sys.argv[1:] if arg != "--card")]
        ),
    )
    print(f"wrote {Path(arguments.checkpoint) / 'README.md'}", file=sys.stderr)


if __name__ == "__main__":
    quiet()
    run(main, DataSource, EvaluationArguments, dataset="streamworld")
