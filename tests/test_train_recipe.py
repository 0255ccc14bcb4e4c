# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's labels, and the recipe from nothing to a table, in miniature."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, GenerationConfig

from videollm_mod import VideoLLMMoDConfig
from videollm_mod.remembering_videollm_mod import checkpoint_limits
from videollm_mod.train import pretrain_vision, recipe, recipe_measures, recipe_sizes
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.data.world.clip import WORLDS, Clip
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.sprites import COLORS
from videollm_mod.train.evaluation import measure_checkpoint
from videollm_mod.train.loading import load_checkpoint
from videollm_mod.train.new_model import new_model, take_language_model
from videollm_mod.train.objectness import load_patch_labels
from videollm_mod.train.pretrain_vision import (
    LABELS,
    JointLabels,
    KeptClips,
    LabelledPatches,
    LabelSource,
    PatchReader,
    VisionArguments,
    VisionTrainingArguments,
    make_scenes,
)
from videollm_mod.train.recipe_sizes import CONFIGS, SIZES


ROOT = Path(__file__).parents[1]
WORLD = WORLDS["small"]


def test_patch_labels_match_the_pictures():
    """A patch inside a thing mostly has its color, and a patch without a thing shows the background."""
    patches = LabelledPatches(WORLD, grid=8, size=96, seeds=range(20))
    close, far = [], []
    for seed in patches.seeds:
        clip = make_scenes(seed, WORLD)
        things, colors, places = patches.labels(clip, 0.0)
        picture = clip.draw(0.0, 96).astype(float).reshape(8, 12, 8, 12, 3)[:, 3:9, :, 3:9].mean((1, 3)).reshape(-1, 3)
        covered = colors >= 0
        assert np.array_equal(covered, things < len(WORLD.things)) and not places[~covered].any()
        row, column = np.indices((8, 8)).reshape(2, -1) + 0.5
        middle = covered & (np.hypot(places[:, 0] - column, places[:, 1] - row) < 0.6)
        palette = np.array(list(COLORS.values()), dtype=float)
        close += list(np.abs(picture[middle] - palette[colors[middle]]).mean(-1))
        far += list(np.abs(picture[middle] - palette[(colors[middle] + 3) % len(palette)]).mean(-1))
    assert len(close) > 60 and np.mean(close) < 0.6 * np.mean(far)


def test_scenes_show_many_things_and_the_wall_hides_some():
    scenes = [make_scenes(seed, WORLD) for seed in range(40)]
    assert scenes[0] == make_scenes(0, WORLD) and all(isinstance(clip, Clip) and not clip.events for clip in scenes)
    story = np.mean([len(make_clip(seed, WORLD).visible(5.0)) for seed in range(40)])
    assert np.mean([len(clip.visible(3.0)) for clip in scenes]) > 2 * story
    seen = {actor.name(actor.begin) for clip in scenes for actor in clip.actors}
    assert seen == {f"{color} {thing}" for color, thing in WORLD.pairs()}
    walled = next(clip for clip in scenes if clip.wall is not None)
    things, _, _ = LabelledPatches(WORLD, 8, 96, range(1)).labels(walled, 0.0)
    behind = things == len(WORLD.things) + 1
    assert 4 < behind.sum() < 16 and not behind.reshape(8, 8)[:4].any()


class OneThing(torch.utils.data.Dataset):
    """Noise with a bright thing on one patch, of a source without colors."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        frames, things = rng.integers(0, 100, (4, 64, 16, 16, 3), dtype=np.uint8), np.full((4, 64), 1)
        places = np.zeros((4, 64, 3), np.float32)
        for frame, patch in enumerate(rng.integers(0, 64, 4)):
            frames[frame, patch], things[frame, patch] = 250, 0
            places[frame, patch] = patch % 8 + 0.5, patch // 8 + 0.5, 0.125
        frames = frames.reshape(4, 8, 8, 16, 16, 3).swapaxes(2, 3).reshape(4, 128, 128, 3)
        return {"frames": frames, "things": things, "colors": np.full((4, 64), -100), "places": places}


def test_sources_share_one_table_of_labels():
    """The second source calls its only thing 0. Together with StreamWorld's things it has the index of its name."""
    small, other = LABELS["small"](), LabelSource(("imp",), (), lambda *_: OneThing(3))
    things = (*small.things, *other.things)
    joint = JointLabels(other.make("train", 8, 128, 0, 3), other, things, small.colors)[2]
    assert len(joint["things"]) == 4 and (joint["colors"] == -100).all()
    assert set(joint["things"].ravel().tolist()) == {things.index("imp"), len(things)}
    patches = small.make("validation", 8, 96, 0, 2)
    same = JointLabels(patches, small, things, small.colors)[0]
    assert np.array_equal(same["colors"], patches[0]["colors"]) and (same["colors"] >= 0).any()
    covered = patches[0]["things"] < len(small.things)
    assert np.array_equal(same["things"], patches[0]["things"] + ~covered)


def test_the_labels_head_finds_covered_patches(tmp_path, monkeypatch, capsys):
    fields = json.loads((CONFIGS / "local_model.json").read_text())
    fields["model"]["vision_config"]["embed_dim"] = 16
    (tmp_path / "model.json").write_text(json.dumps(fields))
    monkeypatch.setattr(pretrain_vision, "NUM_EVAL_CLIPS", 2)
    source = LabelSource(("imp",), (), lambda _split, _grid, _size, _first, count: OneThing(count))
    for name in ("squares", "blocks"):
        monkeypatch.setitem(LABELS, name, lambda: source)
    options = {"max_steps": 16, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "report_to": "none"}
    training = VisionTrainingArguments(
        str(tmp_path / "vision"), remove_unused_columns=False, save_strategy="no", **options
    )
    pretrain_vision.main(VisionArguments(str(tmp_path / "model.json"), world="squares", num_clips=32), training)
    head = load_patch_labels(tmp_path / "vision")
    assert head.things == ("imp",) and head.colors == ()
    model, processor = load_checkpoint(str(tmp_path / "vision"))
    example = OneThing(100)[99]
    with torch.no_grad():
        features = model.encode_frames(processor.process_frames(example["frames"]))
    scores, covered = head.objectness(features).numpy(), example["things"] == 0
    assert scores.shape == (4, 64) and scores.min() >= 0 and scores.max() <= 1
    assert (scores[covered][:, None] > scores[~covered]).mean() > 0.9
    with pytest.raises(ValueError, match="have width 96, but the patch labels read 32"):
        head.objectness(torch.zeros(1, 64, 96))
    with pytest.raises(FileNotFoundError, match="has no patch_labels.safetensors"):
        load_patch_labels(tmp_path)

    # A run that begins with this encoder, and learns nothing, has its weights. It prints what is right in each world.
    arguments = VisionArguments(str(tmp_path / "model.json"), "squares,blocks", 8, encoder=str(tmp_path / "vision"))
    capsys.readouterr()
    still = replace(training, output_dir=str(tmp_path / "still"), max_steps=1, learning_rate=0.0)
    pretrain_vision.main(arguments, still)
    printed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "_right" in line]
    assert [world for world, _ in printed] == ["squares", "blocks"]
    assert printed[0][1] == printed[1][1] and "things_right" in printed[0][1]
    for name, weight in load_checkpoint(str(tmp_path / "still"))[0].model.vision_encoder.state_dict().items():
        assert torch.equal(weight, model.model.vision_encoder.state_dict()[name]), name
    assert torch.equal(load_patch_labels(tmp_path / "still").weight, head.weight)
    # A deeper encoder takes these layers over, and only its own change.
    fields["model"]["vision_config"]["depths"] = [2, 2]
    (tmp_path / "deeper.json").write_text(json.dumps(fields))
    deeper = replace(arguments, model_config=str(tmp_path / "deeper.json"))
    pretrain_vision.main(deeper, replace(still, output_dir=str(tmp_path / "deeper")))
    weights = load_checkpoint(str(tmp_path / "deeper"))[0].model.vision_encoder.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.model.vision_encoder.state_dict().items())
    assert len(weights) > len(model.model.vision_encoder.state_dict())

    # Without a head beside it, the head is new.
    (tmp_path / "still" / "patch_labels.safetensors").unlink()
    headless = replace(arguments, encoder=str(tmp_path / "still"))
    pretrain_vision.main(headless, replace(still, output_dir=str(tmp_path / "headless")))
    assert not torch.equal(load_patch_labels(tmp_path / "headless").weight, head.weight)

    refused = replace(arguments, model_config=str(CONFIGS / "local_model.json"))
    shallower = replace(arguments, encoder=str(tmp_path / "deeper"))
    for other in (refused, shallower):
        with pytest.raises(SystemExit, match="is not the one of --model_config, or a part of it"):
            pretrain_vision.main(other, still)


def test_clips_are_drawn_once(tmp_path):
    """Epochs and runs read the same arrays. A file that was begun by a program that was killed is not read."""

    class Counted(OneThing):
        drawn = 0

        def __getitem__(self, index):
            Counted.drawn += 1
            return super().__getitem__(index)

    expected = OneThing(3)[1]
    for first in (4, 3):
        kept = KeptClips(Counted(3), tmp_path / "clips", "one-train-8-96", first)
        for example in (kept[1], kept[1], KeptClips(Counted(3), tmp_path / "clips", "one-train-8-96", first)[1]):
            assert example.keys() == expected.keys()
            assert all(np.array_equal(example[name], expected[name]) for name in expected)
    assert Counted.drawn == 2 and len(kept) == 3
    names = sorted(path.name for path in (tmp_path / "clips").iterdir())
    assert names == ["one-train-8-96-4.npz", "one-train-8-96-5.npz"]


def test_a_second_run_reads_the_clips_of_its_folder(tmp_path, monkeypatch):
    class Unread(OneThing):
        def __getitem__(self, index):
            raise AssertionError(index)

    fields = json.loads((CONFIGS / "local_model.json").read_text())
    fields["model"]["vision_config"]["embed_dim"] = 16
    (tmp_path / "model.json").write_text(json.dumps(fields))
    monkeypatch.setattr(pretrain_vision, "NUM_EVAL_CLIPS", 1)
    monkeypatch.setitem(LABELS, "squares", lambda: LabelSource(("imp",), (), lambda *given: OneThing(given[-1])))
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "report_to": "none"}
    training = VisionTrainingArguments(
        str(tmp_path / "vision"), remove_unused_columns=False, save_strategy="no", **options
    )
    arguments = VisionArguments(str(tmp_path / "model.json"), "squares", 4, clips_folder=str(tmp_path / "clips"))
    pretrain_vision.main(arguments, training)
    names = {path.name for path in (tmp_path / "clips").iterdir()}
    assert names == {f"squares-train-8-128-{index}.npz" for index in range(4)} | {"squares-validation-8-128-0.npz"}
    monkeypatch.setitem(LABELS, "squares", lambda: LabelSource(("imp",), (), lambda *given: Unread(given[-1])))
    pretrain_vision.main(arguments, training)


def test_an_unknown_world_is_refused():
    with pytest.raises(ValueError, match="There is no world vast. Worlds are full, small, tiny, hard, doom"):
        VisionArguments("model.json", world="hard,vast")


def test_shares_of_correct_patches():
    torch.manual_seed(0)

    class Known(torch.nn.Module):
        config = type("Config", (), {"hidden_size": 4})

        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": pixel_values})

    reader = PatchReader(Known(), num_things=2, num_colors=len(COLORS))
    things, colors = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[5, 6, -100, -100]])
    with torch.no_grad():
        reader.reading.weight.zero_()
        reader.reading.bias.zero_()
        reader.reading.bias[0] = 9.0  # Predicts thing 0 everywhere,
        reader.reading.bias[4 + 6] = 9.0  # and color 6.
    output = reader(torch.randn(1, 4, 4), things, colors, torch.zeros(1, 4, 3))
    # All scores are equal, so no covered patch ranks higher than another.
    assert output["right"].tolist() == [[0.5, 0.5, 0.0]] and output["loss"] > 0


def test_a_trained_encoder_is_taken_instead_of_training_one(tmp_path):
    encoder, folder, size = tmp_path / "encoder", tmp_path / "run", recipe.SIZES["quick"]
    with pytest.raises(SystemExit, match="no finished folder of train/pretrain_vision.py"):
        recipe.take_vision(str(encoder), folder)
    model, processor = new_model(CONFIGS / "local_model.json", seed=1)
    model.save_pretrained(encoder)
    processor.save_pretrained(encoder)
    (encoder / "checkpoint-1").mkdir()
    recipe.begin_folder(folder, size, vision=str(encoder))
    recipe.take_vision(str(encoder), folder)
    files = {path.name: path.read_bytes() for path in encoder.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (folder / "vision").iterdir()} == files
    recipe.begin_folder(folder, size, vision=str(encoder))  # it goes on
    with pytest.raises(SystemExit, match="stages of a run with other options"):
        recipe.begin_folder(folder, size)


def test_a_model_takes_the_words_and_layers_of_another_language_model(tmp_path):
    """Words of both vocabularies keep their embeddings, routers stay new, and other sizes are refused."""
    model, processor = new_model(CONFIGS / "local_model.json", seed=1)
    model.save_pretrained(tmp_path / "vision")
    processor.save_pretrained(tmp_path / "vision")
    begun, words = load_checkpoint(recipe.begin_with(str(ROOT), tmp_path))
    given, known = load_checkpoint(ROOT)
    new, old, start = begun.state_dict(), given.state_dict(), model.state_dict()
    for name, weight in new.items():
        if "lm_head" in name:
            assert torch.equal(weight, begun.get_input_embeddings().weight)
        elif "language_model" not in name or ".router." in name:
            assert torch.equal(weight, start[name]), name
        elif "embed_tokens" not in name:
            assert torch.equal(weight, old[name]), name
    vocabulary, known = words.tokenizer.get_vocab(), known.tokenizer.get_vocab()
    for word, place in known.items():
        if word in vocabulary and place < len(given.get_input_embeddings().weight):
            row = begun.get_input_embeddings().weight[vocabulary[word]]
            assert torch.equal(row, given.get_input_embeddings().weight[place]), word
    # A stream remembers as much as one of the given checkpoint.
    assert checkpoint_limits(begun.generation_config) == checkpoint_limits(given.generation_config) != {}
    told = known.keys() & {f"Ġ{word}" for word in ("red", "enters", "tree", "left")}
    assert told and told <= vocabulary.keys()

    fields = json.loads((CONFIGS / "local_model.json").read_text())
    fields["model"]["text_config"]["intermediate_size"] = 64
    (tmp_path / "narrow.json").write_text(json.dumps(fields))
    narrow = new_model(tmp_path / "narrow.json")
    with pytest.raises(ValueError, match=r"The language models differ: layers.0.mlp.* is \(64, 128\) here and \(352"):
        take_language_model(*narrow, given, processor)


def test_the_recipe_writes_what_streams_of_the_embedded_checkpoint_remember():
    config = new_model(CONFIGS / SIZES["cpu"].model_config)[0].generation_config
    assert checkpoint_limits(config) == checkpoint_limits(GenerationConfig.from_pretrained(ROOT)) != {}


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """The embedded checkpoint's recipe with a tiny model, few short rows, and DoomWorld only if it is installed."""
    fields = json.loads((CONFIGS / "local_model.json").read_text())
    fields["model"]["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    fields["model"]["vision_config"]["embed_dim"] = 16
    fields["generation"] = {"max_frames": 40, "sink_frames": 2}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    monkeypatch.setattr(recipe_sizes, "LONG", "5,6")
    monkeypatch.setattr(recipe_sizes, "LONGEST", "5,5")
    for name in ("tiny", "doom"):
        world = recipe_sizes.WORLDS[name]
        monkeypatch.setitem(recipe_sizes.WORLDS, name, replace(world, source=world.source | {"seconds": "4,4"}))
    # A model that hardly trained never ends its replies.
    short = {"max_new_tokens": 3}
    monkeypatch.setattr(recipe_measures, "measure_checkpoint", lambda *a, **k: measure_checkpoint(*a, **k | short))
    counts = {"vision_clips": 4, "slides": 4, "clips": 4, "questions": 2, "long_clips": 2, "test_clips": 1}
    counts |= {"test_long": 1, "word_steps": 1, "epochs": 1, "batch": 2, "model_config": str(tmp_path / "model.json")}
    size = replace(SIZES["cpu"], worlds=("tiny", "doom") if find_spec("vizdoom") else ("tiny",), **counts)
    monkeypatch.setitem(recipe.SIZES, "quick", size)
    # To start two processes for each stage would take most of the time.
    monkeypatch.setattr(recipe, "share_step", lambda _rows: 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return size


@pytest.mark.xdist_group("recipe")  # one process imports for all stages
@pytest.mark.timeout(1200)
def test_the_recipe_trains_on_all_worlds_and_prints_a_table(miniature, tmp_path, monkeypatch, capfd):
    """All stages run, a second run skips them, and the trained model has the pretrained encoder."""
    command = ["recipe.py", "--size", "quick", "--twin", "--minutes", "60", "--folder", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    recipe.main()
    printed, folder = capfd.readouterr().out, tmp_path / "out"
    num_stages = 1 + 4 * len(miniature.worlds) + 8
    assert "is there" not in printed and printed.count("--max_minutes") == num_stages - 4
    written = json.loads((folder / "measures.json").read_text())
    assert written["command"].startswith("python train/recipe.py --size quick --twin")
    assert len(written["worlds"]) == 2 * len(miniature.worlds)
    for world, columns in written["worlds"].items():
        table = printed.split(f"Held-out clips of {world}\n")[1].splitlines()
        before = [] if "5 to 5 s" in world else ["before"]
        assert table[0].split() == [*before, "after", "full", "compute"]
        layers = columns["after"]["routers"]["layers"]
        assert (
            list(layers) == ["2"] and 0 <= layers["2"]["background"] <= 1 and "routers" not in columns["full compute"]
        )
        labels = [*recipe_measures.TABLE.values(), *(f"layer 2: {label}" for label in recipe_measures.FOCUS.values())]
        assert [line[:36].strip() for line in table[1 : 1 + len(labels)]] == labels
        assert table[len(labels)].split()[-1] == "-", "the twin has no routers"
    before, after = (
        AutoModel.from_pretrained(folder / name, trust_remote_code=True).state_dict() for name in ("vision", "trained")
    )
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("vision_encoder" in name), name
    for name in ("trained", "trained_1"):
        assert checkpoint_limits(GenerationConfig.from_pretrained(folder / name)) == {
            "max_frames": 40,
            "sink_frames": 2,
        }
    models = [VideoLLMMoDConfig.from_pretrained(folder / name) for name in ("trained", "trained_1")]
    assert [(config.mod_keep_ratio, config.mod_router_loss) for config in models] == [(0.2, "gradient"), (1, None)]

    # Rows of all worlds are in one file, and long rows in both stages that narrate.
    for name, count in (("slides", 4), ("clips", 4), ("questions", 4)):
        rows = load_timed_messages(folder / name, video_root=[folder / "encoded"])
        sources = [Path(row["frame_features"]).parent.name for row in rows]
        assert len(rows) == count * len(miniature.worlds) and not list(find_faults(rows))
        kinds = {name, "long"} if name == "questions" else {name}
        assert set(sources) == {f"{kind}_{world}" for kind in kinds for world in miniature.worlds}

    # Two rows are a step.
    steps = -(-4 * len(miniature.worlds) // 2)
    assert printed.count("--max_steps") == 6 and recipe.last_step(folder / "narration_1") == steps
    # A second run finds all stages, and one with other options is refused.
    scores = dict.fromkeys(recipe_measures.TABLE, 0.0)
    monkeypatch.setattr(recipe, "measure", lambda *_: {"StreamWorld": {"after": scores}})
    recipe.main()
    assert capfd.readouterr().out.count("is there") == num_stages
    monkeypatch.setattr(sys, "argv", [*command, "--worlds", "hard"])
    with pytest.raises(SystemExit, match="has stages of a run with other options: give another --folder"):
        recipe.main()


def test_the_tables_of_usual_and_of_long_clips_share_no_clip(monkeypatch):
    """A clip of a minute would begin with the events of the usual clip of its index."""
    monkeypatch.setattr(recipe_measures, "_measure", lambda _name, _checkpoint, rows: {row["seed"] for row in rows})
    size = replace(SIZES["cpu"], worlds=("tiny",), test_clips=2, test_long=1)
    usual, long = (found["after"] for found in recipe_measures.measure(size, {"after": Path()}).values())
    assert (len(usual), len(long)) == (2, 1) and not usual & long


def test_clips_without_a_question_have_no_share_of_right_answers():
    scores = dict.fromkeys(set(recipe_measures.TABLE) - {"answer_accuracy"}, 0.5)
    lines = list(recipe_measures.show({"StreamWorld": {"after": scores}}))
    assert [line.split()[-1] for line in lines if line.startswith(("correct answers", "precision"))] == ["0.5", "-"]


def test_worlds_are_chosen_and_doomworld_needs_its_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert recipe.choose_worlds(None, SIZES["cpu"]) == ("tiny", "hard")
    assert "without DoomWorld: " in capsys.readouterr().out
    assert recipe.choose_worlds("hard, tiny", SIZES["cpu"]) == ("tiny", "hard")
    with pytest.raises(SystemExit, match="--worlds doom: "):
        recipe.choose_worlds("doom", SIZES["cpu"])
    with pytest.raises(SystemExit, match="--worlds has no vast; it has full, tiny, hard, doom"):
        recipe.choose_worlds("hard,vast", SIZES["cpu"])


def test_a_world_leaves_its_time_to_the_next(tmp_path, monkeypatch):
    """Each world has half of the stage's time, and the second also has what the first did not need."""
    given, now = [], iter((0.0, 0.0, 60.0))
    monkeypatch.setattr(recipe, "run_stage", lambda _done, _script, *options, **_how: given.append(options[-1]))
    monkeypatch.setattr(recipe.clock, "monotonic", lambda: next(now))
    size = replace(SIZES["cpu"], worlds=("tiny", "hard"))
    recipe.encode("clips", range(4), size, tmp_path, 10 / recipe.SHARES["clips"], is_little=True)
    assert given == ["5", "9"]


@pytest.mark.parametrize(("cores", "shares"), [(None, 1), (1, 1), (3, 2), (12, 8)])
def test_processes_share_a_step_evenly(cores, shares, monkeypatch):
    monkeypatch.setattr(recipe.os, "cpu_count", lambda: cores)
    assert recipe.share_step(8) == (1 if torch.cuda.is_available() else shares)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_files(size):
    known = recipe_sizes.WORLDS
    assert set(SIZES[size].worlds) <= set(known) and {known[name].scenes for name in SIZES[size].worlds} <= set(LABELS)
    assert SIZES[size].frame_size in (96, 128, 192) and (CONFIGS / SIZES[size].vision_config).exists()


@pytest.mark.xdist_group("recipe")
def test_a_stage_that_fails_stops_the_recipe(tmp_path):
    with pytest.raises(SystemExit, match="error: train/sft.py failed"):
        recipe.run_stage(Path(tmp_path / "one" / "config.json"), "sft.py", "--dataset", "nothing_here")


@pytest.mark.xdist_group("recipe")
def test_a_stage_that_writes_nothing_stops_the_recipe(tmp_path):
    with pytest.raises(SystemExit, match="error: train/sft.py failed"):
        recipe.run_stage(tmp_path / "one" / "config.json", "sft.py", "--help")
