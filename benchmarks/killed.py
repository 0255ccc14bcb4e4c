# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Kill each writing command at random times, run it again, and compare the files with those of an undisturbed run.

```bash
python benchmarks/killed.py                            # 10 times each
python benchmarks/killed.py --only train encode --times 50 --seed 7
python benchmarks/killed.py --full                # on disks that are too small; needs root
python benchmarks/killed.py --workers --times 3   # one of two processes of training
```

After each kill, every file that has its name must be complete. After the next run, all files must be those of the run
that was not killed, except for numbers in texts, such as durations, and the rounding of tensors. A line is printed for
each command, and one for each fault with its seed.
"""

# ruff: noqa: E402 (the helpers of the tests are found by the path)
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time as clock
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import ablation
import psutil
import torch
from hub import Hub
from published import save_source
from safetensors import safe_open
from safetensors.torch import load, save_file
from tiny import copy_embedded
from transformers import AutoModel, AutoProcessor

from videollm_mod import cli, read_video
from videollm_mod.convert.command import main as convert
from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import StreamingEngine
from videollm_mod.serving.state_folder import StateFolder
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train import encoding, pretrain_vision, push, recipe, sft  # noqa: F401
from videollm_mod.train.data import prepare, shards, streamworld
from videollm_mod.train.new_model import new_model
from videollm_mod.train.recipe_sizes import CONFIGS


SAMPLES = sorted((ROOT / "samples").glob("*.mp4"))
# Files that grow by lines, and folders that are complete when this file is there.
GROWING, LAST = re.compile(r"(predictions.*|results)\.jsonl"), "trainer_state.json"
TEXTS = {".json", ".jsonl", ".md", ".html", ".srt", ".txt"}
WORLD = ["--dataset", "streamworld", "--world", "tiny", "--checkpoint", ROOT]


def script(main: Callable[[], None] | str, *arguments: Any) -> None:
    """Run a command in this process."""
    sys.argv = [str(main), *map(str, arguments)]
    if callable(main):
        main()
    else:
        runpy.run_path(str(ROOT / main), run_name="__main__")


# ------------------------------------------------------------------------------------------------------------ commands


def train(_: Path, out: Path) -> None:
    options = ["--num_clips", 8, "--max_steps", 4, "--save_steps", 1, "--lora_r", 8, "--report_to", "none"]
    options += ["--bf16", "false", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1]
    script("train/sft.py", *WORLD, *options, "--output_dir", out, "--resume_from_checkpoint", "true")


def encode_rows(_: Path, out: Path) -> None:
    script("train/encode.py", *WORLD, "--num_clips", 16, "--output_dir", out)


def train_vision(_: Path, out: Path) -> None:
    options = ["--world", "tiny", "--num_clips", 8, "--per_device_train_batch_size", 2, "--save_steps", 1]
    options += ["--save_strategy", "steps", "--output_dir", out, "--resume_from_checkpoint", "true"]
    script("train/pretrain_vision.py", "--config", CONFIGS / "local_vision.yaml", *options)


def run_recipe(_: Path, out: Path) -> None:
    small = {"vision_clips": 16, "slides": 8, "clips": 8, "questions": 8, "test_clips": 2}
    recipe.SIZES["quick"] = replace(recipe.SIZES["quick"], **small)
    script(recipe.main, "--size", "quick", "--folder", out)


def prepare_annotations(base: Path) -> None:
    (base / "annotations").mkdir()
    (base / "videos").mkdir()
    entry = {"duration": 10, "timestamps": [[1, 2], [3, 5]], "sentences": ["A ball.", "It leaves."]}
    for split in ("train", "val_1"):
        names = {f"v_{split[0] * 11}": entry}
        (base / "annotations" / f"{split}.json").write_text(json.dumps(names))
        for name in names:
            shutil.copy(SAMPLES[0], base / "videos" / f"{name}.mp4")


def prepare_data(base: Path, out: Path) -> None:
    given = ["--annotations", base / "annotations", "--videos", base / "videos", "--out", out]
    script(prepare.main, "activitynet", *given)


def write_world(_: Path, out: Path) -> None:
    script(streamworld.main, out, "--num_clips", 6, "--world", "tiny", "--frame_size", 64)


def write_rows(base: Path) -> None:
    message = {"role": "user", "content": "?" * 500, "time": 0.0}
    rows = [{"id": str(index), "video": "v.mp4", "messages": [message]} for index in range(2000)]
    (base / "rows").mkdir()
    (base / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_shards(base: Path, out: Path) -> None:
    script(shards.main, base / "rows", out, "--max_shard_size", "100KB")


def prepare_source(base: Path) -> None:
    save_source("llava", base / "theirs")


def convert_model(base: Path, out: Path) -> None:
    # A run that was killed after its last file has nothing left to do.
    if not (out / "ours").exists():
        script(convert, base / "theirs", out / "ours")


def prepare_ablation(base: Path) -> None:
    settings = json.loads((CONFIGS / "local_model.json").read_text())
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    settings["model"]["text_config"] |= text | {"num_key_value_heads": 2}
    (base / "model.json").write_text(json.dumps(settings))
    model, processor = new_model(base / "model.json", mod_keep_ratio=1.0)
    for part in (model, processor):
        part.save_pretrained(base / "initial")
    said = {"role": "assistant", "content": "A red ball enters.", "time": 0.5}
    for name, count in (("clips", 8), ("test", 2)):
        (base / name).mkdir()
        rows = []
        for index in range(count):
            features = torch.randn(2, 64, model.config.vision_config.hidden_size).bfloat16()
            save_file({"frame_features": features}, base / name / f"{index}.safetensors", metadata={"fps": "2.0"})
            asked = {"role": "user", "content": "Please narrate the video in real time.", "time": 0.0}
            row = {"frame_features": f"{index}.safetensors", "messages": [asked, said]}
            rows.append(row | {"covered": [[0, 1, 63]] * 2})
        (base / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "about.json").write_text(json.dumps({"world": "tiny", "fps": 2.0}))


def run_ablation(base: Path, out: Path) -> None:
    for name in ("initial", "clips", "test", "about.json"):
        if not (out / name).exists():
            (out / name).symlink_to(base / name)
    options = ["--steps", 2, "--batch-size", 2, "--test-clips", 2, "--arms", "full", "learned", "--seeds", 0, 1, 2]
    script(ablation.main, "run", "--folder", out, *options)


def report(_: Path, out: Path) -> None:
    paths = [part for kind in ("html", "md", "json") for part in ("--out", out / f"report.{kind}")]
    script(cli.main, "report", SAMPLES[0], *paths, "--summary", "")


def prepare_films(base: Path) -> None:
    (base / "films").mkdir()
    for name in "abc":
        shutil.copy(SAMPLES[0], base / "films" / f"{name}.mp4")


def narrate(base: Path, out: Path) -> None:
    script(cli.main, "narrate", base / "films", "--out", out)


def prepare_checkpoint(base: Path) -> None:
    copy_embedded(base / "model")


def verify(base: Path, out: Path) -> None:
    for path in (base / "model").rglob("*"):
        link = out / "model" / path.relative_to(base / "model")
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.name != "golden.json" and not link.is_symlink():
            link.symlink_to(path)
    script(cli.main, "verify", out / "model", "--write")


def save_sessions(_: Path, out: Path) -> None:
    """Save a stream every second of a video, in a folder and in that of a server."""
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True)
    state = StateFolder(out / "state", 10**9)
    with one_line_errors(), StreamingEngine(model, processor, max_streams=1, max_frames=40) as engine:
        stream = engine.open(fps=2)
        for time, frame in read_video(SAMPLES[0], fps=2):
            stream.push(frame, time=time)
            stream.save(out / "session")
            place = state.begin()
            stream.save(place / "stream")
            state.commit(place, "secret", 4e9)
        stream.close()


def push_checkpoint(base: Path, _: Path) -> None:
    script(push.main, base / "model", "somebody/narrator", "--no_verify")


COMMANDS: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path, Path], None]]] = {
    "train": (None, train),
    "vision": (None, train_vision),
    "recipe": (None, run_recipe),
    "encode": (None, encode_rows),
    "prepare": (prepare_annotations, prepare_data),
    "world": (None, write_world),
    "shards": (write_rows, write_shards),
    "convert": (prepare_source, convert_model),
    "push": (prepare_checkpoint, push_checkpoint),
    "ablation": (prepare_ablation, run_ablation),
    "report": (None, report),
    "narrate": (prepare_films, narrate),
    "verify": (prepare_checkpoint, verify),
    "sessions": (None, save_sessions),
}


# ------------------------------------------------------------------------------------------------------------- killing


class Trial:
    """
    A command, its folder, and what an undisturbed run of it writes.

    Args:
        name (`str`): A name in [`COMMANDS`].
        folder (`Path`): Folder for its input and output.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.prepare, self.action = COMMANDS[name]
        self.name, self.base, self.out, self.log = name, folder / "base", folder / "out", folder / "log.txt"
        self.base.mkdir(parents=True)
        self.hub = Hub()

    def __enter__(self) -> "Trial":
        if self.prepare is not None:
            self._in_child(lambda: self.prepare(self.base))
        self.hub.__enter__()
        self.whole, self.seconds = self._run_whole()
        again, _ = self._run_whole()
        self.changing = {name for name in self.whole if self.whole[name] != again.get(name)}
        return self

    def __exit__(self, *_: Any) -> None:
        self.hub.__exit__()

    def _run_whole(self) -> tuple[dict[str, bytes], float]:
        self.clear()
        begin = clock.monotonic()
        code = self._in_child(self._act)
        if code:
            raise SystemExit(f"{self.name} ends with {code}:\n{self.log.read_text()[-3000:]}")
        seconds, written = clock.monotonic() - begin, self.written()
        self.needed = self._bytes_on_disk(written)
        return written, seconds

    def _bytes_on_disk(self, written: dict[str, bytes]) -> int:
        """Return how many bytes the command has written, without what only links to its input."""
        if self.name != "push":
            return sum(
                path.lstat().st_size for path in self.out.rglob("*") if path.is_file() and not path.is_symlink()
            )
        given = {path.read_bytes() for path in (self.base / "model").rglob("*") if path.is_file()}
        return sum(len(content) for content in written.values() if content not in given)

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        for kept in (self.hub.repos, self.hub.stored) if self.name == "push" else ():
            kept.clear()

    def _act(self) -> None:
        if self.name == "push":
            # What is published is made in a temporary folder.
            tempfile.tempdir = str(self.out)
            with self.hub.used_here(self.base / "home"):
                self.action(self.base, self.out)
        else:
            self.action(self.base, self.out)

    def _in_child(self, action: Callable[[], None], kill_after: float | None = None) -> int:
        """Run an action in a copy of this process, in a new process group, and return its exit code."""
        child = os.fork()
        if child == 0:
            self._be_child(action)
        if kill_after is not None:
            clock.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _be_child(self, action: Callable[[], None]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            log = os.open(self.log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(ROOT)
            torch.set_num_threads(1)
            action()
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                sys.stderr.write(end.code)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def written(self) -> dict[str, bytes]:
        """Return the files that have their names: not hidden, and not of an unfinished checkpoint of training."""
        if self.name == "push":
            return {
                f"{repo}/{name}": content for repo in self.hub.repos for name, content in self.hub.files(repo).items()
            }
        found = {}
        for path in self.out.rglob("*"):
            name = path.relative_to(self.out)
            of = next((each for each in path.parents if each.name.startswith("checkpoint-")), None)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if path.is_file() and not is_hidden and (of is None or (of / LAST).exists()):
                # The name of a saved session has its time.
                found[re.sub(r"(state/\w{64})\.\d+", r"\1", name.as_posix())] = path.read_bytes()
        return found

    def differs(self, name: str, content: bytes | None) -> bool:
        """Return whether a file is not that of the run that was not killed."""
        expected = self.whole.get(name)
        if self.name == "sessions" and None not in (content, expected):
            return False  # What a stream has seen when it is saved depends on time.
        if content == expected or expected is None or content is None:
            return content != expected
        if name.endswith(".safetensors"):
            return not _is_nearly(content, expected)
        if GROWING.fullmatch(Path(name).name):
            content, expected = _complete(content), _complete(expected)
        if Path(name).suffix not in TEXTS and name not in self.changing:
            return True
        if Path(name).suffix not in TEXTS:
            return abs(len(content) - len(expected)) > 0.02 * len(expected)
        return _without_numbers(content) != _without_numbers(expected)

    def is_half(self, name: str, content: bytes) -> bool:
        """Return whether a file that a killed run left is half-written."""
        if GROWING.fullmatch(Path(name).name):
            return False
        if self.name in ("train", "recipe") and Path(name).name in ("README.md", "loss.png"):
            return False  # Each checkpoint updates the card.
        return self.differs(name, content)

    def try_once(self, seed: int) -> tuple[Counter[str], list[str]]:
        """Kill a run, look at what it left, and run it again. Return counts and faults."""
        at = random.Random(f"{self.name} {seed}").uniform(0, self.seconds)
        self.clear()
        killed = self._in_child(self._act, at)
        where = f"{self.name} seed {seed}, killed after {at:.2f} of {self.seconds:.2f} s"
        faults = [f"{where}: {name} is half-written" for name, x in self.written().items() if self.is_half(name, x)]
        if self.name == "sessions" and (fault := self._find_lost()):
            faults.append(f"{where}: {fault}")
        code = self._in_child(self._act)
        if code:
            faults.append(f"{where}: the next run ends with {code}: {self.log.read_text()[-500:]}")
        found = self.written()
        faults += [
            f"{where}: {name} differs" for name in {**self.whole, **found} if self.differs(name, found.get(name))
        ]
        hidden = sum(path.is_file() for path in self.out.rglob("*") if path.name.endswith(".part"))
        return Counter(killed=killed == -9, ended=killed == 0, parts_left=hidden), faults

    def _run_again(self, where: str) -> Iterator[str]:
        if code := self._in_child(self._act):
            yield f"{where}: the next run ends with {code}: {self.log.read_text()[-500:]}"
        found = self.written()
        for name in {**self.whole, **found}:
            if self.differs(name, found.get(name)):
                yield f"{where}: {name} differs"

    def try_full(self, seed: int) -> tuple[Counter[str], list[str]]:
        """Run on a disk that is too small, look at what is there, and run again with room. See [`Trial.try_once`]."""
        needed = self.needed
        size = max(int(random.Random(f"{self.name} {seed}").uniform(0.05, 0.95) * needed) // 4096, 1) * 4096
        self.clear()
        where = f"{self.name} seed {seed}, on a disk of {size:,} of {needed:,} bytes"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.out], check=True)
        try:
            code, told = self._in_child(self._act), self.log.read_text().strip()
            faults = [
                f"{where}: {name} is half-written" for name, x in self.written().items() if self.is_half(name, x)
            ]
            if code != 0:
                faults += [f"{where}: {fault}" for fault in self._find_bad_words(code, told)]
            subprocess.run(["mount", "-o", f"remount,size={20 * needed + 10**7}", self.out], check=True)
            faults += self._run_again(where)
        finally:
            subprocess.run(["umount", self.out], check=True)
        return Counter(killed=code != 0, ended=code == 0), faults

    def _find_bad_words(self, code: int, told: str) -> Iterator[str]:
        line = (told.splitlines() or [""])[-1]
        if code != 1 or "Traceback" in told:
            yield f"it ends with {code} and a traceback: {line[:300]}"
        elif not re.search(rf"error: .*{re.escape(str(self.out))}.* (No space left|the disk may be full)", told):
            yield f"it does not name the file and the reason: {line[:300]}"

    def _find_lost(self) -> str | None:
        """Return whether a session that was saved before is gone or damaged."""
        folder = self.out / "state"
        kept = list(folder.glob("[0-9a-f]*")) if folder.exists() else []
        if kept and StateFolder(folder, 10**9).take("secret") is None:
            return "the saved session is gone"
        session = self.out / "session"
        if session.exists():
            state = json.loads((session / "session.json").read_text(encoding="utf-8"))
            with safe_open(session / "session.safetensors", "pt") as file:
                if file.metadata()["id"] != state["id"]:
                    return "the files of a saved session are of two saves"
        return None


def kill_worker(seed: int) -> list[str]:
    """Train in two processes, kill one of them, and print how long the others live. Return faults."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "train/configs/ddp.yaml"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", "--num_processes", "2", "train/sft.py", *WORLD]
    command += ["--num_clips", 64, "--max_steps", 10_000, "--logging_steps", 1, "--lora_r", 8, "--report_to", "none"]
    command += ["--bf16", "false", "--save_strategy", "no", "--per_device_train_batch_size", 1, "--dtype", "float32"]
    chance = random.Random(f"worker {seed}")
    with tempfile.TemporaryDirectory(prefix="killed-worker-") as folder:
        log = Path(folder, "log.txt")
        command += ["--output_dir", folder]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        with log.open("wb") as out:
            running = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=out, stderr=out)
        launcher = psutil.Process(running.pid)
        while b"'loss'" not in log.read_bytes():
            if running.poll() is not None:
                return [f"worker seed {seed}: it ended before it trained: {log.read_text(encoding='utf-8')[-500:]}"]
            clock.sleep(0.1)
        clock.sleep(chance.uniform(0, 10))
        workers = [each for each in launcher.children() if "train/sft.py" in each.cmdline()]
        rank = chance.randrange(len(workers))
        begin = clock.monotonic()
        workers[rank].kill()
        gone, alive = psutil.wait_procs([*workers, launcher], timeout=120)
        seconds, told = clock.monotonic() - begin, log.read_text(encoding="utf-8")
        for each in alive:
            each.kill()
        cause = next((line for line in told.splitlines() if "SIGKILL" in line), "no cause")
    print(f"worker seed {seed}: of {len(workers)} processes one was killed, all ended after {seconds:.1f} s: {cause}")
    faults = [f"worker seed {seed}: {len(alive)} processes live on"] if alive or seconds > 60 else []
    return faults + ([f"worker seed {seed}: the cause is not printed"] if cause == "no cause" else [])


def _is_nearly(content: bytes, expected: bytes) -> bool:
    """Compare tensors. The sum of an encoder depends on where in memory its numbers lie."""
    one, other = load(content), load(expected)
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], 1e-4, 1e-5) for name in one)


def _complete(content: bytes) -> bytes:
    """Return the lines that are complete JSON. Readers skip the others."""
    lines = []
    for line in content.splitlines(keepends=True):
        with suppress(ValueError):
            json.loads(line)
            lines.append(line)
    return b"".join(lines)


def _without_numbers(content: bytes) -> bytes:
    """Return text without numbers, and without digests and names by chance."""
    return re.sub(rb"\b[0-9a-f]{8,}\b|-?\d+(\.\d+)?(e[+-]?\d+)?", b"#", content)


def main() -> None:
    """Try each command."""
    parser = CommandLineParser(description="Kill commands at random times, and compare what they write.")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="commands to try")
    parser.add_argument("--times", type=int, default=10, help="how often to kill each")
    parser.add_argument("--full", action="store_true", help="run on full disks instead (needs root)")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--workers", action="store_true", help="kill one of two training processes instead")
    options = parser.parse_args()
    if options.workers:
        for seed in range(options.seed, options.seed + options.times):
            print("\n".join(kill_worker(seed)), flush=True)
        return
    for name in options.only:
        counts: Counter[str] = Counter()
        all_faults: list[str] = []
        with tempfile.TemporaryDirectory(prefix=f"killed-{name}-") as folder, Trial(name, Path(folder)) as trial:
            for seed in range(options.seed, options.seed + options.times):
                found, faults = (trial.try_full if options.full else trial.try_once)(seed)
                counts += found
                all_faults += faults
                for fault in faults:
                    print(fault, flush=True)
        print(
            f"{name}: {counts['killed']} {'full' if options.full else 'killed'}, {counts['ended']} ended before, "
            f"{len(all_faults)} faults, "
            f"{counts['parts_left']} parts of files left; {len(trial.whole)} files in {trial.seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
