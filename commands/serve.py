# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod serve`: a server for cameras, agents and scripts."""

import os
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer

from videollm_mod.commands.options import CacheDtype, FrameSize, MaxFrames, Model, Revision, Weights
from videollm_mod.commands.watching import EMBEDDED, describe_checkpoint, load
from videollm_mod.mistakes import one_line_errors


KEYS = "VIDEOLLM_MOD_API_KEYS"
# Only variables, since everyone on a machine can see the options of a command.
TRANSCRIBER_KEY, SPEECH_KEY = "VIDEOLLM_MOD_TRANSCRIBER_KEY", "VIDEOLLM_MOD_SPEECH_KEY"


def serve(
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="the checkpoint's")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=KEYS,
            help="A key that clients must have. Repeat it for more; in the variable, separate them by spaces.",
            show_default="none: everyone is served",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may use the server, or *. Can be repeated.", show_default="none"),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of this server that clients without a key may use, or *. Can be repeated.",
            show_default="the host, localhost and IP addresses",
        ),
    ] = None,
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Fetch videos from private networks and this machine too.")
    ] = False,
    transcriber: Annotated[
        str | None,
        typer.Option(
            help="Address of an API with /audio/transcriptions, such as http://localhost:9000/v1, so that clients can "
            f"speak. Its key is in the environment variable {TRANSCRIBER_KEY}.",
            show_default="none: audio is refused",
        ),
    ] = None,
    transcriber_model: Annotated[
        str | None, typer.Option(help="Name of the transcriber's model.", show_default="whisper-1")
    ] = None,
    speech: Annotated[
        str | None,
        typer.Option(
            help="Address of an API with /audio/speech, so that replies can be spoken. Its key is in the environment "
            f"variable {SPEECH_KEY}.",
            show_default="none: replies are text",
        ),
    ] = None,
    speech_model: Annotated[
        str | None, typer.Option(help="Name of the model that speaks.", show_default="none")
    ] = None,
    speech_voice: Annotated[str | None, typer.Option(help="Name of its voice.", show_default="none")] = None,
    max_streams: Annotated[int, typer.Option(min=1, help="Most streams at once. Their memory is reserved.")] = 8,
    max_frames: MaxFrames = None,
    max_text_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Text tokens that a stream remembers.",
            show_default="the checkpoint's, or what fits the context",
        ),
    ] = None,
    max_fps: Annotated[float, typer.Option(help="Most frames per second that a stream may ask for.")] = 30.0,
    max_event_bytes: Annotated[int, typer.Option(min=1, help="Largest event of a WebSocket.")] = 15_000_000,
    max_frame_bytes: Annotated[int, typer.Option(min=1, help="Largest picture file.")] = 4_000_000,
    max_frame_pixels: Annotated[int, typer.Option(min=1, help="Largest picture, width times height.")] = 9_437_184,
    idle_seconds: Annotated[
        float, typer.Option(help="A session without events from its client ends after this.")
    ] = 300,
    resume_seconds: Annotated[float, typer.Option(help="A session waits so long for a client that lost it.")] = 60.0,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which sessions are saved when the server stops, so that clients resume them on the next.",
            show_default="a private one among temporary files",
        ),
    ] = None,
    no_state_dir: Annotated[
        bool, typer.Option("--no-state-dir", help="Save nothing when the server stops: sessions end with it.")
    ] = False,
    max_state_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of saved sessions.")] = 10_000_000_000,
    save_seconds: Annotated[
        float | None,
        typer.Option(
            help="Save each session that has news in --state-dir after this, so that kill -9 loses no more.",
            show_default="none: only when the server stops",
        ),
    ] = None,
    frame_size: FrameSize = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
) -> None:
    """
    Serve a model: OpenAI's realtime and chat protocols, and plain HTTP.

    Ctrl+C or SIGTERM stops the server. It speaks plain HTTP; put a proxy with TLS before it on a network.
    """
    with one_line_errors():
        check_installed()
        from videollm_mod.serving.access import check_keys
        from videollm_mod.serving.limits import Limits
        from videollm_mod.serving.state_folder import check_saving, own_folder

        limits = {"max_fps": max_fps, "max_event_bytes": max_event_bytes, "max_frame_bytes": max_frame_bytes}
        limits |= {"max_frame_pixels": max_frame_pixels, "idle_seconds": idle_seconds}
        limits |= {"resume_seconds": resume_seconds}
        # Wrong options are reported before the model is loaded.
        Limits(**limits)
        if save_seconds is not None and no_state_dir:
            raise ValueError(
                "--save-seconds and --no-state-dir contradict each other: sessions are saved in a folder."
            )
        check_saving(save_seconds, state_dir or "the server's own")
        if no_state_dir and state_dir is not None:
            raise ValueError("--state-dir and --no-state-dir contradict each other: give one of them.")
        memory = {"max_streams": max_streams, "max_frames": max_frames, "max_text_tokens": max_text_tokens}
        stored = {"weights": weights, "cache_dtype": cache_dtype, "frame_size": frame_size}
        keys = split_keys(api_key or ())
        check_keys(keys)
        given = {"api_keys": keys, "cors": cors or (), "allowed_hosts": allowed_host or (), **limits}
        given |= {"allow_private_urls": allow_private_urls}
        if state_dir is None and not no_state_dir:
            state_dir = own_folder(f"{model_key(model, revision)} at port {port}", max_state_bytes)
            if state_dir is not None:
                typer.echo(f"Sessions are saved in {state_dir.folder} when the server stops.", err=True)
        given |= {"state_dir": state_dir, "max_state_bytes": max_state_bytes, "save_seconds": save_seconds}
        given |= {"transcriber": transcriber, "transcriber_model": transcriber_model}
        given |= {"speech": speech, "speech_model": speech_model, "speech_voice": speech_voice}
        _warn(host, keys)
        _run(new_app(model, revision, name=name, **memory, **stored, **given), host, port)


def new_app(
    model: str,
    revision: str | None,
    *,
    name: str | None,
    max_streams: int,
    max_frames: int | None,
    max_text_tokens: int | None,
    weights: str | None,
    cache_dtype: str | None,
    frame_size: int | None,
    transcriber: str | None = None,
    transcriber_model: str | None = None,
    speech: str | None = None,
    speech_model: str | None = None,
    speech_voice: str | None = None,
    **options: Any,
) -> Any:
    """Load a checkpoint. Return the application that serves it; see [`create_app`] for `options`."""
    from videollm_mod.serving.server import create_app

    # Wrong options are reported before the model is loaded.
    options["transcriber"] = _new_transcriber(transcriber, transcriber_model)
    options["speaker"] = _new_speaker(speech, speech_model, speech_voice)
    stored = {"weights": weights, "cache_dtype": cache_dtype, "frame_size": frame_size}
    processor, loaded, given = load(model, revision, max_frames=max_frames, **stored)
    engine = {"max_streams": max_streams, "max_frames": max_frames, "max_text_tokens": max_text_tokens}
    engine |= {"cache_dtype": given["cache_dtype"]}
    return create_app(loaded, processor, name=name or name_of(model), engine_options=engine, **options)


def _new_transcriber(url: str | None, model: str | None) -> Any:
    from videollm_mod.serving.speech_endpoints import Transcriber

    if url is None and model is not None:
        raise ValueError("--transcriber-model needs --transcriber.")
    key = os.environ.get(TRANSCRIBER_KEY)
    return None if url is None else Transcriber(url, model or "whisper-1", key=key)


def _new_speaker(url: str | None, model: str | None, voice: str | None) -> Any:
    from videollm_mod.serving.speech_endpoints import Speaker

    if len({url is None, model is None, voice is None}) > 1:
        raise ValueError("--speech, --speech-model and --speech-voice belong together: give all three, or none.")
    return None if url is None else Speaker(url, model, voice, key=os.environ.get(SPEECH_KEY))


def check_installed() -> None:
    """Raise `ImportError` with advice if a package of the extra `serve` is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ImportError(f'`serve` needs {error.name}: run `pip install -e ".[serve]"` in the checkout.') from None


def name_of(model: str) -> str:
    """Return the name of a checkpoint for clients: the Hub id, or the name of the folder."""
    if describe_checkpoint(model) != model:
        return "videollm-mod"
    return Path(model).resolve().name if Path(model).exists() else model


def model_key(model: str, revision: str | None) -> str:
    """Return what tells checkpoints apart: the path of a folder, or the Hub id, and the revision."""
    place = str(Path(model).resolve()) if Path(model).exists() else model
    return place if revision is None else f"{place}@{revision}"


def split_keys(given: Sequence[str]) -> list[str]:
    """
    Return the keys of clients, given by options or by the environment variable.

    Raises:
        `ValueError`: If an option or the variable is there but has no key. The server would then be open.
    """
    keys = [part for key in given for part in key.split()]
    if not keys and (given or KEYS in os.environ):
        raise ValueError(f"--api-key or {KEYS} is empty, so everyone would be served: give a key, or remove it.")
    return keys


def _warn(host: str, api_keys: list[str]) -> None:
    if not api_keys and not _is_loopback(host):
        warning = f"everyone who reaches {host} can use this server: set --api-key, and a proxy with TLS before it"
        typer.secho(f"Note: {warning}", err=True, fg="yellow")


def _run(app: Any, host: str, port: int) -> None:
    from videollm_mod.serving.server import run

    run(app, host=host, port=port, say=lambda line: typer.echo(line, err=True))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


__all__ = ["KEYS", "check_installed", "model_key", "name_of", "new_app", "serve", "split_keys"]
