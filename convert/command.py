# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The command `videollm-mod convert`: a vision-language model, or a checkpoint of VideoLLM-online."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from videollm_mod.convert import with_name
from videollm_mod.convert.videollm_online import LIVE_VERSIONS
from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.command_line import CommandLineParser


# Types that weights can be saved in.
DTYPES = ("float32", "bfloat16", "float16")
_USAGE = "%(prog)s MODEL OUT [options]\n       %(prog)s BASE ADAPTER OUT [options]"
_DESCRIPTION = """Convert a published model to a streaming model.

MODEL is a vision-language model of Transformers: SmolVLM, Idefics3, InternVL (-hf), LLaVA, LLaVA-NeXT,
LLaVA-NeXT-Video or LLaVA-OneVision. BASE and ADAPTER are the language model and the checkpoint of VideoLLM-online.
Each is a folder or a Hub id."""
# Options of MODEL OUT only, and of BASE ADAPTER OUT only.
_MODEL_OPTIONS = ("frame_token_pooled", "frame_size")
_LIVE_OPTIONS = ("vision_model", "live_version", "keep_adapter")


def main() -> None:
    """Convert, then print which folder was written, what it lacks, and how to use it."""
    parser = _new_parser()
    options = vars(parser.parse_args())
    *names, out = options.pop("names")
    if len(names) not in (1, 2):
        parser.error("give MODEL and OUT, or BASE, ADAPTER and OUT")
    is_model = len(names) == 1
    wrong = [name for name in (_LIVE_OPTIONS if is_model else _MODEL_OPTIONS) if name in options]
    if wrong:
        parser.error(f"--{wrong[0].replace('_', '-')} is for {'BASE ADAPTER OUT' if is_model else 'MODEL OUT'}")
    as_json = options.pop("json")
    with one_line_errors():
        print(f"loading {' and '.join(names)} ...", file=sys.stderr)
        quiet()
        told = (_convert_model if is_model else _convert_live)(*names, with_name(Path(out)), options)
    if as_json:
        print(json.dumps(told["json"]))
    else:
        print("\n".join(told["lines"]))


def _convert_model(source: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    from videollm_mod.convert.vision_language import convert

    left_out = convert(source, out, **options)
    lines = [
        f"not converted: {', '.join(left_out) or 'nothing'}",
        f"wrote {out}. The model has not learned when to speak, so a policy asks it every few seconds:",
        shlex.join(["videollm-mod", "narrate", "video.mp4", "--model", str(out), "--every", "2"]),
    ]
    return {"json": {"folder": str(out), "not_converted": left_out}, "lines": lines}


def _convert_live(base: str, adapter: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    from videollm_mod.convert.videollm_online import convert

    convert(base, adapter, out, **options)
    has_adapter = options.get("keep_adapter", False)
    lines = [f"wrote {out}. Load it: AutoModel.from_pretrained('{out}', trust_remote_code=True)"]
    if has_adapter:
        lines.append(f"Then add the adapter: PeftModel.from_pretrained(model, '{out}', subfolder='adapter')")
    return {"json": {"folder": str(out), "adapter": has_adapter}, "lines": lines}


def _new_parser() -> CommandLineParser:
    parser = CommandLineParser(
        usage=_USAGE, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="MODEL OUT, or BASE ADAPTER OUT")
    parser.add_argument("--dtype", choices=DTYPES, help="type of all weights; default: the type they have")
    parser.add_argument(
        "--mod-layers",
        metavar="LAYERS",
        help="which layers to route: the name of a scheme, such as interleaved, or indices, such as 1,3,5",
    )
    parser.add_argument(
        "--mod-keep-ratio",
        type=float,
        metavar="RATIO",
        help="share of a frame's tokens that routed layers keep; default: 1, with other routing options 0.2",
    )
    parser.add_argument(
        "--mod-router",
        metavar="NAME",
        help="how routed layers choose tokens: learned (the default) has to be fine-tuned, change does not",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    # A missing option leaves no trace, so that options of the other form are noticed.
    model = parser.add_argument_group("options of MODEL OUT", argument_default=argparse.SUPPRESS)
    model.add_argument(
        "--frame-token-pooled",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="grid of tokens per frame; default: the model's own for a frame of a video",
    )
    model.add_argument(
        "--frame-size", type=int, metavar="PIXELS", help="side at which frames are encoded; default: the encoder's own"
    )
    live = parser.add_argument_group("options of BASE ADAPTER OUT", argument_default=argparse.SUPPRESS)
    live.add_argument(
        "--vision-model", metavar="MODEL", help="vision encoder; default: google/siglip-large-patch16-384"
    )
    live.add_argument(
        "--live-version",
        choices=LIVE_VERSIONS,
        help="frame layout: live1 has 1 token per frame, live1+ has 10; default: live1+",
    )
    live.add_argument("--keep-adapter", action="store_true", help="save the adapter unmerged, in OUT/adapter")
    return parser


if __name__ == "__main__":
    main()
