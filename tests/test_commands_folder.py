# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Narrating a folder: the same subtitles as of each file, what is skipped, and what stays after a fault or Ctrl+C."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from tiny import random_frames, tiny_model, write_clip
from typer.testing import CliRunner

from videollm_mod import ReadingReport, cli
from videollm_mod.commands import folder as folder_command
from videollm_mod.commands import ray_folder
from videollm_mod.commands.folder import Narrated, Video, check_places, choose_streams, find_videos


ROOT = Path(__file__).parents[1]
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"
SAMPLE = ROOT / "samples" / "streamworld.mp4"
STORY = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["events"]
SECOND = next(path for path in sorted(SAMPLE.parent.glob("*.mp4")) if path != SAMPLE)


def narrate(*arguments):
    return CliRunner().invoke(cli.app, ["narrate", *map(str, arguments)])


@pytest.fixture
def films(tmp_path):
    """A folder with three videos, two of one name, and files that are none."""
    films = tmp_path / "films"
    for path, source in (("b.mp4", SAMPLE), ("trip/a.mp4", SECOND), ("trip/a.MOV", NASA), (".cache/c.mp4", SAMPLE)):
        (films / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, films / path)
    shutil.copy(ROOT / "docs" / "loss.png", films)
    (films / "notes.txt").write_text("Not a video.\n" * 100)
    (films / ".hidden.mp4").write_bytes(b"")
    return films


def test_each_video_gets_the_subtitles_that_narrate_writes(films, tmp_path):
    (films / "cut.mp4").write_bytes(SAMPLE.read_bytes()[:3000])
    done = narrate(films, "--out", tmp_path / "out", "--streams", 2)
    assert done.exit_code == 1, "one is faulty"
    loading = done.stderr.index("loading")
    fault = "cannot be read as video: its index is missing, as in a recording that was cut off."
    assert done.stderr[:loading] == f"error: '{films}/cut.mp4' {fault}\n"
    assert "3 narrated, 1 failed; 64 frames in" in done.stderr
    written = {"b.mp4": "b.srt", "trip/a.mp4": "trip/a.mp4.srt", "trip/a.MOV": "trip/a.MOV.srt"}
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == set(written.values())
    for video, srt in written.items():
        assert narrate(films / video, "--srt", tmp_path / "one.srt").exit_code == 0
        expected = (tmp_path / "one.srt").read_text()
        assert (tmp_path / "out" / srt).read_text() == expected and "-->" in expected
        captions = expected.count("-->")
        assert f"{video}: {captions} captions in {tmp_path / 'out' / srt}" in done.stdout


def test_names_that_are_not_unicode_are_printed(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(SAMPLE.read_bytes()[:3000])
    done = narrate(tmp_path, "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["video"] == os.fsdecode(b"caf\xe9.mp4"), done.stderr


def test_an_empty_name_is_no_folder():
    done = narrate("")
    assert done.exit_code == 1 and done.stderr == "error: The name of the video is empty.\n"


def test_a_policy_speaks_as_in_narrate(films, tmp_path):
    policy = ("--every", 3, "--max-words", 4, "--no-repeat", 0)
    assert narrate(films / "trip", *policy).exit_code == 0
    assert narrate(SECOND, *policy, "--srt", tmp_path / "one.srt").exit_code == 0
    expected = (tmp_path / "one.srt").read_text()
    assert (films / "trip" / "a.mp4.srt").read_text() == expected and expected.count("-->") == 4


def test_finished_videos_are_skipped(films):
    (films / "trip" / "a.mp4.srt").write_text("mine")
    first = narrate(films, "--json", "--streams", 1)
    assert first.exit_code == 0 and "1 of 3 videos have subtitles already" in first.stderr, first.stderr
    told = {line["video"]: line for line in map(json.loads, first.stdout.splitlines())}
    assert set(told) == {"b.mp4", "trip/a.MOV"} and (films / "trip" / "a.mp4.srt").read_text() == "mine"
    assert told["b.mp4"]["srt"] == str(films / "b.srt")
    assert [[event["time"], event["text"]] for event in told["b.mp4"]["events"]] == STORY
    assert told["trip/a.MOV"]["reading"]["ignored_streams"] == 1 and told["trip/a.MOV"]["frames"] == 27
    again = narrate(films)
    assert again.exit_code == 0 and again.stdout == ""
    assert again.stderr == "3 of 3 videos have subtitles already\n", "the model is not loaded"


def test_a_fault_of_one_video_is_said_and_the_others_are_narrated(films, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trip").write_text("a file in the place of the folder")
    done = narrate(films, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 1 and (tmp_path / "out" / "b.srt").exists()
    told = {line["video"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert "events" in told["b.mp4"] and "File exists" in told["trip/a.mp4"]["error"]
    assert "1 narrated, 2 failed" in done.stderr


def test_subtitles_that_cannot_be_saved_end_the_run(films, monkeypatch):
    """No file gets more than ten bytes. A disk without space fails in the same calls."""
    tried = []

    def write_to_a_full_disk(path, text, write=folder_command.write_text):
        tried.append(path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            write(path, text)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(folder_command, "write_text", write_to_a_full_disk)
    done = narrate(films, "--streams", 1)
    assert done.exit_code == 1 and tried == [films / "b.srt"] and done.stdout == ""
    error = f"error: '{tried[0]}' cannot be written: File too large. Free some space or choose another folder, then"
    assert f"{error} run the same command again.\n" in done.stderr, done.stderr
    assert not list(films.rglob("*.srt")) and not list(films.rglob("*.part"))


@pytest.mark.parametrize("options", [[], ["--split", "train"]])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(films, options):
    (films / "b.mp4").unlink()
    done = narrate(films, "--out", "/proc", *options)
    assert done.exit_code == 1 and done.stderr.startswith("error: Nothing can be written to '/proc': ")
    assert done.stderr.endswith(". Choose another folder with --out.\n") and done.stderr.count("\n") == 1


def test_the_nearest_folder_above_subtitles_must_be_writable():
    with pytest.raises(ValueError, match="Nothing can be written to '/proc': .*--out"):
        check_places([Path("/proc/trip/day")])


def test_ctrl_c_keeps_finished_videos_and_says_how_to_go_on(films, monkeypatch):
    def write_and_stop(path, text, write=folder_command.write_text):
        write(path, text)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(folder_command, "write_text", write_and_stop)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = narrate(films, "--streams", 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130 and "videos left: the same command goes on" in done.stderr, done.stderr
    assert [path.name for path in sorted(films.rglob("*.srt"))] == ["b.srt"]
    monkeypatch.undo()
    assert narrate(films).exit_code == 0 and len(list(films.rglob("*.srt"))) == 3
    assert not list(films.rglob("*.part"))


def test_what_is_a_video(films, tmp_path):
    write_clip(films / "no_suffix.mp4", random_frames(4)).rename(films / "no_suffix")
    (films / "empty.mkv").touch()
    (films / "gone.webm").symlink_to("nowhere")
    (films / "list.m3u8").write_text("#EXTM3U\n#EXTINF:8.5,\nb.mp4\n#EXT-X-ENDLIST\n")
    found = {video.name: video for video in find_videos(films, None)}
    assert list(found) == ["b.mp4", "empty.mkv", "no_suffix", "trip/a.MOV", "trip/a.mp4"]
    assert found["b.mp4"].srt == films / "b.srt" and found["no_suffix"].srt == films / "no_suffix.srt"
    assert [name for name, video in found.items() if video.fault] == ["empty.mkv"]
    assert [video.srt.parent for video in find_videos(films / "trip", tmp_path / "out")] == [tmp_path / "out"] * 2


def test_what_is_no_video(films):
    """Photos, icons, texts that are named like MPEG-TS, and a GIF with one picture; but a moving one is a video."""
    before = {video.name for video in find_videos(films, None)}
    photo = Image.new("RGB", (64, 64), "red")
    for name in ("favicon.ico", "still.gif", "photo.tiff"):
        photo.save(films / name)
    photo.save(films / "moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])
    clip = write_clip(films / "clip.mp4", random_frames(2)).read_bytes()
    for brand in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        (films / f"{brand.decode()}.heic").write_bytes(clip.replace(b"ftypisom", b"ftyp" + brand, 1))
    # A camera's JPEG pictures are a film, and a photo with a second picture in it is none.
    jpeg = films / "photo.jpg"
    photo.save(jpeg)
    (films / "camera.mjpeg").write_bytes(jpeg.read_bytes() * 5)
    (films / "gain_map.jpg").write_bytes(jpeg.read_bytes() * 2)
    (films / "page.ts").write_text("export const page = 1;\n" * 100)
    (films / "page.mts").write_text("export const page = 1;\n" * 100)
    (films / "cut.ts").write_bytes(b"G" + bytes(100))
    (films / "palette.adf").write_bytes(b"\1" + bytes(range(256)) * 40)
    found = {video.name: video.fault for video in find_videos(films, None)}
    assert set(found) - before == {"camera.mjpeg", "moving.gif", "clip.mp4", "cut.ts"}
    assert [name for name, fault in found.items() if fault] == ["cut.ts"]


def test_links_to_folders_are_followed_once(films, tmp_path):
    (tmp_path / "disk" / "more").mkdir(parents=True)
    (films / "b.mp4").rename(tmp_path / "disk" / "more" / "b.mp4")
    for link, place in (("above", ".."), ("again", "trip"), ("disk", tmp_path / "disk"), ("loop", "loop")):
        (films / link).symlink_to(place)
    (tmp_path / "disk" / "back").symlink_to(films)
    found = [video.name for video in find_videos(films, None)]
    assert found == ["trip/a.MOV", "trip/a.mp4", "above/disk/more/b.mp4"]
    (films / "above").unlink()
    assert [video.name for video in find_videos(films, None)][2:] == ["disk/more/b.mp4"]


def test_a_folder_that_cannot_be_read_is_named(films, monkeypatch, capsys):
    """Its path is too long, which holds for all users."""
    monkeypatch.chdir(films)
    for _ in range(20):
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    assert len(list(find_videos(films, None))) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"error: the folder '{films}/xxx") and said.endswith(
        "' cannot be read: File name too long\n"
    )
    for name in ("b.srt", "trip/a.mp4.srt", "trip/a.MOV.srt"):
        (films / name).touch()
    done = narrate(films)
    assert done.exit_code == 1 and "3 of 3 videos have subtitles already" in done.stderr, "the rest may be there"
    os.chdir(films)
    shutil.rmtree(films / ("x" * 250))


def ended(name):
    """What became of a video in which nothing was said."""
    video = Video(Path(name), name, Path(f"{name}.srt"), seconds=1.0)
    return Narrated(video, num_frames=2, reading=ReadingReport())


def test_with_ray_a_result_names_the_folder_of_its_row(tmp_path):
    [done] = ray_folder._saved((batch for batch in [[ended("a.mp4")]]), tmp_path)
    assert str(done) == f"a.mp4: 0 captions in {tmp_path}" and "srt" not in json.loads(done.to_json())
    assert ray_folder.read_names(tmp_path) == {"a.mp4"}


@pytest.mark.parametrize("columns", [{"video": [{"path": "a.mp4"}]}, {"clip": ["a.mp4"]}])
def test_with_ray_other_parquet_files_are_refused_in_one_line(films, tmp_path, monkeypatch, columns):
    monkeypatch.setattr(cli, "check_ray", lambda _: None)
    (tmp_path / "out").mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / "out" / "other.parquet")
    done = narrate(films, "--ray", 1, "--out", tmp_path / "out")
    error = f"error: '{tmp_path}/out/other.parquet' has no names of videos: choose a folder for --out without other"
    assert done.exit_code == 1 and done.stderr == f"{error} Parquet files.\n", done.output


def test_with_ray_names_that_are_not_unicode_have_rows(tmp_path, monkeypatch):
    films, rows = tmp_path / "films", tmp_path / "rows"
    films.mkdir()
    for byte in (b"\xe8", b"\xe9"):
        shutil.copy(SAMPLE, films / os.fsdecode(b"caf" + byte + b".mp4"))
    monkeypatch.setattr(ray_folder, "_run", lambda videos, *_, **__: ([ended(video.name)] for video in videos))
    options = {"workers": 1, "out": rows, "as_json": False}
    assert ray_folder.narrate_with_ray(str(films), "model", None, **options) == 0
    assert ray_folder.read_names(rows) == {r"caf\udce8.mp4", r"caf\udce9.mp4"}
    monkeypatch.setattr(ray_folder, "_run", lambda videos, *_, **__: (pytest.fail(str(video)) for video in videos))
    assert ray_folder.narrate_with_ray(str(films), "model", None, **options) == 0, "all have rows"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.mp4", "b.mov"], ["a.srt", "b.srt"]),
        (["a.mov", "a.mov.mp4"], ["a.srt", "a.mov.srt"]),
        (["a.mov", "a.mov.mp4", "a.mp4"], ["a.mov.srt", "a.mov.mp4.srt", "a.mp4.srt"]),
        (["a", "a.mov", "a.mov.mp4", "a.mov.mp4.mkv"], ["a.srt", "a.mov.srt", "a.mov.mp4.srt", "a.mov.mp4.mkv.srt"]),
        (["1. Introduction", "2. A talk.mp4"], ["1. Introduction.srt", "2. A talk.srt"]),
        (["A.mp4", "a.MOV", "a.mov.mp4"], ["A.mp4.srt", "a.MOV.srt", "a.mov.mp4.srt"]),
    ],
)
@pytest.mark.parametrize("has_out", [False, True])
def test_each_video_has_its_own_subtitles(tmp_path, names, expected, has_out):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(2))
    folder, out = tmp_path / "films", tmp_path / "out" if has_out else None
    folder.mkdir()
    for name in names:
        (folder / name).hardlink_to(clip)
    assert [video.srt for video in find_videos(folder, out)] == [(out or folder) / name for name in expected]


def test_the_number_of_streams_follows_cores_and_memory(monkeypatch):
    model, room = tiny_model(), (100, 100)
    each = model.estimate_cost(*room).cache_bytes
    for cores, memory, videos, expected in (
        (16, 100 * each, 9, 4),
        (2, 100 * each, 9, 2),
        (16, 100 * each, 3, 3),
        (16, 6 * each, 9, 3),
        (16, each, 9, 1),
    ):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(os, "sysconf", lambda name, memory=memory: memory if "PAGES" in name else 1)
        assert choose_streams(model, room, videos) == expected
