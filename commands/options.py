# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands have, with their help."""

from typing import Annotated

import typer


Video = Annotated[
    str, typer.Argument(help="A file, a URL (also rtsp://), camera:0, or - for standard input.", show_default=False)
]
Model = Annotated[
    str, typer.Option(help="The checkpoint: a folder or a Hub id.", show_default="the embedded checkpoint")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub checkpoint.", show_default="the main branch")
]
Weights = Annotated[
    str | None,
    typer.Option(help="int8 or fp8: load linear layers in eight bits (needs torchao).", show_default="as saved"),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="fp8: store keys and values in eight bits.", show_default="the type of the weights"),
]
Fps = Annotated[float, typer.Option(help="Frames per second to watch.")]
LiveFps = Annotated[
    float | None,
    typer.Option(
        help="Frames per second to watch.",
        show_default="2; for a camera or broadcast the largest of 2, 1, 0.5, ... that the model keeps up with",
    ),
]
MaxFrames = Annotated[
    int | None,
    typer.Option(
        help="Number of frames to remember. Older ones are forgotten.",
        show_default="the checkpoint's, or what fits the context",
    ),
]
FrameSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Side in pixels at which frames are encoded. Smaller is faster.", show_default="the checkpoint's"
    ),
]
ReuseStatic = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Do not encode a frame that hardly differs from the last encoded one: no part of it by more than so many "
        "grey levels of 255. 0 encodes all frames.",
        show_default="3; for a model that learned when to speak 0",
    ),
]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="Least probability of yes.")]
Timeout = Annotated[float, typer.Option(help="Seconds that a camera or URL may take to open, and may be silent.")]
Reconnect = Annotated[
    bool | None,
    typer.Option(
        "--reconnect/--no-reconnect",
        help="Open a live source again when it ends, breaks off or falls silent.",
        show_default="for a camera or broadcast",
    ),
]
Query = Annotated[
    str | None,
    typer.Option(
        help='What the user says before the first frame. Use "" for no query.',
        show_default="Please narrate the video in real time., if the model has learned when to speak",
    ),
]
IntervalThreshold = Annotated[
    float | None,
    typer.Option(
        help="Speak when the probability of silence falls below this. Higher values speak more often.",
        show_default="the checkpoint's",
    ),
]
Speak = Annotated[
    str | None,
    typer.Option(
        help="When to speak. learned: when silence is unlikely. every: each --every seconds. change: at a frame that "
        "differs from the one last spoken about. probe: if the model finds that there is something new.",
        show_default="the checkpoint's, or every if --every is given",
    ),
]
Every = Annotated[
    float | None,
    typer.Option(
        help="Seconds from one reply to the next. For change and probe the least.", show_default="2, unless learned"
    ),
]
SpeakThreshold = Annotated[
    float | None,
    typer.Option(
        help="For change the cosine distance of frames that differ, for probe the probability of yes.",
        show_default="0.05 for change, 0.5 for probe",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help='Message of the user that is added before each unprompted reply. Use "" for none.',
        show_default="What is happening now? Answer in one short sentence.; for learned nothing",
    ),
]
NoRepeat = Annotated[
    int | None,
    typer.Option(
        min=0, help="Do not show a reply that repeats one of the last so many.", show_default="1, for learned 0"
    ),
]
MaxWords = Annotated[
    int | None,
    typer.Option(min=0, help="Most words of a reply; 0 for no limit.", show_default="40, for learned 0"),
]
MinSilence = Annotated[
    float | None,
    typer.Option(
        min=0, help="Seconds of silence after a reply.", show_default="1, or --every if that is less; for learned 0"
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the steps with torch.compile. Starting takes minutes, and each frame is faster.",
        show_default="compile on a GPU",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


__all__ = [
    "AsJson",
    "CacheDtype",
    "Compile",
    "Every",
    "Fps",
    "FrameSize",
    "IntervalThreshold",
    "LiveFps",
    "MaxFrames",
    "MaxWords",
    "MinSilence",
    "Model",
    "NoRepeat",
    "Prompt",
    "Query",
    "Reconnect",
    "ReuseStatic",
    "Revision",
    "Speak",
    "SpeakThreshold",
    "Threshold",
    "Timeout",
    "Video",
    "Weights",
]
