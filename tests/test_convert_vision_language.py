# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compare vision-language models of Transformers before and after conversion: pixels, embeddings and logits."""

import json
from datetime import timedelta

import pytest
import torch
from num2words import num2words
from published import SOURCES, save_source
from tiny import random_frames
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_VIDEO_INTRO as SMOLVLM_INTRO
from transformers.video_utils import VideoMetadata
from turns import recording

from videollm_mod.convert.vision_language import NEWLINE_TOKEN, convert
from videollm_mod.remembering_videollm_mod import within_context
from videollm_mod.serving import StreamingEngine


# The connector, its feature layer, the tokens per frame and the features per frame of each tiny model.
LAYOUTS = {
    "smolvlm": ("pixel_shuffle", None, [2, 2], (4, 16 * 16)),
    "idefics3": ("pixel_shuffle", None, [2, 2], (4, 16 * 16)),
    "internvl": ("pixel_shuffle", None, [2, 2], (4, 16 * 4)),
    "llava_onevision": ("mlp_pool_after", -1, [3, 3], (25, 16)),
    "llava_next_video": ("mlp", -2, [2, 2], (4, 16)),
    "llava_next": ("mlp", -2, [4, 4], (16, 16)),
    "llava": ("mlp", -2, [4, 4], (16, 16)),
}

# How a stream begins.
BEGINNINGS = {
    "smolvlm": "<|im_start|>User: You are provided",
    "idefics3": "<|begin_of_text|>User:<fake_token_around_image><global-img><image>",
    "internvl": "<|im_start|>user\nFrame1: <img><IMG_CONTEXT>",
    "internvl on llama": "<s><|im_start|>user\nFrame1: <img><IMG_CONTEXT>",
    "llava_onevision": "<|im_start|>user <video>",
    "llava_next_video": "<s>USER: <video>",
    "llava_next_video on mistral": "<s>[INST] <video>",
    "llava_next": "<s>USER: <image>",
    "llava": "<s>USER: <image>",
}


def run_source(kind, theirs, processor, frames):
    """Return the source's inputs for a video and a question, its embeddings of the frames, and its logits."""
    is_video = kind in ("smolvlm", "internvl", "llava_onevision", "llava_next_video")
    shown = [{"type": "video"}] if is_video else [{"type": "image"}] * len(frames)
    turn = {"role": "user", "content": [*shown, {"type": "text", "text": "What is this?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    options = {"videos": [[frames]] if kind == "smolvlm" else [frames]} if is_video else {"images": [*frames]}
    if kind == "smolvlm":
        times = {"total_num_frames": len(frames), "duration": float(len(frames))}
        options["video_metadata"] = [VideoMetadata(fps=1.0, frames_indices=[*range(len(frames))], **times)]
    elif kind == "idefics3":
        options["do_image_splitting"] = False
    inputs = processor(text=text, return_tensors="pt", **options)
    found = []
    projector = theirs.model.connector if hasattr(theirs.model, "connector") else theirs.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda *arguments: found.append(arguments[-1]))
    with torch.no_grad():
        logits = theirs(**inputs).logits
    handle.remove()
    embeddings = theirs.model.apply_pooling(found[0]) if kind == "llava_onevision" else found[0]
    return inputs, embeddings, logits


# One process converts a source for all its tests.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(f"converted {name}")) for name in SOURCES]
)
def converted(request, tmp_path_factory):
    """Return the model type, the source and its processor, and ours and its processor."""
    folder = tmp_path_factory.mktemp("converted")
    kind = request.param.partition(" on ")[0]
    theirs, processor = save_source(request.param, folder / "theirs")
    left_out = convert(str(folder / "theirs"), folder / "ours")
    ours = AutoModel.from_pretrained(folder / "ours", trust_remote_code=True).eval()
    processors = processor, AutoProcessor.from_pretrained(folder / "ours", trust_remote_code=True)
    return kind, theirs, ours, *processors, left_out, folder


@pytest.mark.parametrize("size", [(36, 60), (50, 31)])
def test_pixels_embeddings_and_logits_stay_the_same(converted, size):
    kind, theirs, ours, their_processor, processor, _, _ = converted
    frames = random_frames(1 if kind == "llava_next" else 3, size=size)
    inputs, embeddings, logits = run_source(kind, theirs, their_processor, frames)
    pixels = processor.process_frames(frames)
    expected = next(inputs[name] for name in ("pixel_values", "pixel_values_videos") if name in inputs)
    expected = expected.flatten(0, -4)
    # LLaVA-NeXT shows each picture as one of the encoder's size, and then its tiles.
    assert_close(pixels, expected[:1] if kind == "llava_next" else expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        found = ours.get_video_features(pixels).pooler_output
        assert_close(found, embeddings[: len(found)], rtol=1e-5, atol=1e-5)
        ids = inputs["input_ids"]
        if kind == "llava_onevision":
            ids = ids.clone()
            ids[0, (ids[0] == theirs.config.video_token_id).nonzero()[-1]] = newline_of(processor)
        if kind == "llava_next":
            ids, logits = without_tiles(theirs, ids, found)
        assert ours.config.frame_token_id in ids
        assert_close(ours(input_ids=ids, pixel_values_videos=pixels[None]).logits, logits, rtol=1e-4, atol=1e-4)


def newline_of(processor):
    """Return the token of the embedding after the frames."""
    return processor.tokenizer.convert_tokens_to_ids(NEWLINE_TOKEN)


def without_tiles(theirs, ids, embeddings):
    """Return ids with one picture and no tiles, and the source's logits for the embeddings of that picture."""
    is_picture = ids[0] == theirs.config.image_token_id
    first = int(is_picture.nonzero()[0])
    last = int(is_picture.nonzero()[-1])
    ids = torch.cat([ids[:, : first + embeddings.shape[1]], ids[:, last + 1 :]], dim=1)
    table = theirs.get_input_embeddings()(ids)
    table[ids == theirs.config.image_token_id] = embeddings[0]
    return ids, theirs(inputs_embeds=table).logits


def test_the_configuration_says_what_the_source_does(converted):
    kind, theirs, ours, _, processor, left_out, folder = converted
    config = ours.config
    layout = (config.connector, config.vision_feature_layer, [*config.frame_token_pooled], config.frame_feature_shape)
    assert layout == LAYOUTS[kind]
    assert config.speak == "every" and not config.routed_layers and processor.system_prompt == ""
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert config.tie_word_embeddings == tied == (kind == "internvl")
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
    names = [name for name in theirs.state_dict() if name.endswith("image_newline") and kind != "llava_onevision"]
    assert left_out == names + ["tiling of pictures"] * (kind != "llava")
    never = ours.generation_config.suppress_tokens
    assert config.frame_token_id in never and (kind != "llava_onevision" or newline_of(processor) in never)
    card = (folder / "ours" / "README.md").read_text()
    assert f"({kind}) as a streaming model" in card and "has not learned when to be silent" in card
    assert "videollm-mod narrate video.mp4 --model ours --every 2\n" in card
    assert 'videollm-mod ask video.mp4 "What happens?" --model ours\n' in card
    assert ("made for pictures" in card) == (kind in ("idefics3", "llava", "llava_next"))


def test_a_converted_model_streams_in_its_own_words(converted):
    """A session and an engine say the same every two seconds, and answer a question."""
    kind, _, ours, _, processor, _, _ = converted
    options = {"fps": 1, "every": 2.0, "max_new_tokens": 4}
    session, engine = ours.stream(processor, **options), StreamingEngine(ours, processor, max_streams=1, max_frames=8)
    stream = engine.open(**options)
    for frame in random_frames(3, size=(36, 60)):
        session.push(frame)
        stream.push(frame)
    engine.run()
    session.ask("What is this?")
    stream.ask("What is this?")
    engine.run()
    said, also = ([(e.time, e.role, e.token_ids) for e in x.events] for x in (session, stream.session))
    assert said == also and said[-1][1] == "assistant" and session.num_frames == 3
    assert {time for time, _, _ in said} <= {0.0, 2.0}
    text = processor.apply_chat_template([{"role": "stream", "num_frames": 1, "times": [0.0]}])
    language_model = ours.config.text_config.model_type
    assert text.startswith(BEGINNINGS.get(f"{kind} on {language_model}", BEGINNINGS[kind]))


def test_a_converted_model_forgets_within_its_context(converted):
    """Commands and servers always give limits, and a rotation that depends on the length would refuse them."""
    kind, theirs, ours, _, processor, _, folder = converted
    stretches = theirs.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert stretches == (kind == "internvl")
    limits = within_context(ours.config, processor.frame_text_tokens, max_frames=2)
    session = ours.stream(processor, every=2.0, max_new_tokens=2, **limits)
    session.push(random_frames(4, size=(36, 60)))
    assert session.num_remembered == 2
    card = (folder / "ours" / "README.md").read_text()
    assert ("Beyond 2,048 tokens the source stretches positions, and this model does not." in card) == stretches


# ------------------------------------------------------------------------------------------------------------ streams


def in_source_words(kind, processor, count, folder):
    """Return the processor with the source's own text before the frames of a video: their number and its length."""
    if kind != "smolvlm":
        return processor
    intro = SMOLVLM_INTRO.format(frame_count=num2words(count), video_duration=str(timedelta(seconds=count)))
    turns = {**processor.stream_format, "intro": intro}
    return AutoProcessor.from_pretrained(folder / "ours", trust_remote_code=True, stream_format=turns)


def embed(theirs, ours, ids, embeddings, newline):
    """Return the source's embeddings of our ids (sequence,), given its embeddings of the frames."""
    table, ids = theirs.get_input_embeddings()(torch.tensor([ids])), torch.tensor([ids])
    is_frame = ids == ours.config.frame_token_id
    table[is_frame] = embeddings.flatten(0, -2)[: int(is_frame.sum())]
    if newline is not None:
        table[ids == newline] = theirs.model.image_newline
    return table


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_session_equals_the_source(converted, count):
    """Frame by frame it has the source's tokens, logits and replies, also for a second question and later frames."""
    kind, theirs, ours, their_processor, processor, _, folder = converted
    # LLaVA-NeXT has no video path. Its processor cuts several pictures into tiles, and a stream has none.
    if kind == "llava_next" and count > 1:
        pytest.skip("the source cuts pictures into tiles")
    frames, more = random_frames(count, size=(36, 60)), random_frames(2, size=(36, 60), seed=1)
    processor = in_source_words(kind, processor, count, folder)
    newline = newline_of(processor) if kind == "llava_onevision" else None
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": ours.generation_config.suppress_tokens}
    end = processor.end_of_reply_id

    def check_reply(inputs, tokens):
        said = theirs.generate(**inputs, **options)[0]
        said = said[inputs["input_ids"].shape[1] :] if "input_ids" in inputs else said
        assert [token for token in said.tolist() if token != end] == list(tokens)

    inputs, embeddings, logits = run_source(kind, theirs, their_processor, frames)
    ids = inputs["input_ids"]
    embeddings = torch.cat([embeddings, run_source(kind, theirs, their_processor, more)[1]])
    if kind == "llava_next":
        embeddings = ours.get_video_features(processor.process_frames([*frames, *more])).pooler_output
        ids, logits = without_tiles(theirs, ids, embeddings[:1])
    ids = ids[0].tolist()
    if newline is not None:
        ids[ids.index(ours.config.frame_token_id) + 9 * count] = newline
    with torch.no_grad(), recording(ours) as fed:
        session = ours.stream(processor, fps=1, speak=lambda _: False, max_new_tokens=6)
        for question, shown in (("What is this?", frames), ("And where?", []), ("What now?", more)):
            for frame in shown:
                session.push(frame)
            session.ask(question)
            tokens = session.events[-1].token_ids
            # The last token of a reply that was cut is not fed yet.
            prompt = fed.ids[: len(fed.ids) - len(tokens) + (len(tokens) == 6)]
            if shown is frames:
                assert prompt == ids
                assert_close(torch.stack(fed.logits[: len(prompt)]), logits[0], rtol=1e-4, atol=1e-4)
            if shown is frames and kind != "llava_next":
                check_reply(inputs, tokens)
            check_reply({"inputs_embeds": embed(theirs, ours, prompt, embeddings, newline)}, tokens)
        whole = theirs(inputs_embeds=embed(theirs, ours, fed.ids, embeddings, newline)).logits[0]
        assert_close(torch.stack(fed.logits), whole, rtol=1e-4, atol=1e-4)
    assert session.num_frames == count + 2 and len(session.events) == 6


def test_two_turns_have_the_tokens_of_the_source(converted):
    """LLaVA's templates write a space or nothing where a reply was generated, so theirs differ there."""
    kind, _, _, their_processor, processor, _, _ = converted
    # A session feeds replies as they were generated, so it cannot equal such a template. The docs name this.
    if kind not in ("smolvlm", "idefics3", "internvl"):
        pytest.skip("the source's template writes earlier replies otherwise than it lets the model begin them")
    words = ["What is this?", "A ball.", "Where?"]
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "user"], words, strict=True)]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    expected = their_processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = processor(turns, add_generation_prompt=True, return_tensors=None)["input_ids"][0]
    assert ids == list(expected[0])


# ------------------------------------------------------------------------------------------------------------ options


def test_the_grid_of_an_mlp_is_free_and_that_of_a_pixel_shuffle_is_not(tmp_path):
    save_source("llava_next_video", tmp_path / "llava")
    options = {"mod_layers": "all", "mod_keep_ratio": 0.5, "dtype": "bfloat16"}
    convert(str(tmp_path / "llava"), tmp_path / "out", frame_token_pooled=(3, 2), **options)
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.layer_keep_counts == [3, 3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A frame is 3x2 tokens." in card and "The source has 2x2 tokens for a frame." in card
    assert "2 of 2 layers are routed. They keep 3 of a frame's 6 tokens" in card
    save_source("internvl", tmp_path / "internvl")
    with pytest.raises(ValueError, match="`frame_token_pooled` must stay 2x2: the model's projector reads squares"):
        convert(str(tmp_path / "internvl"), tmp_path / "other", frame_token_pooled=(3, 3))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("kind", "frame_size", "tokens"), [("smolvlm", 48, 9), ("idefics3", 16, 1), ("internvl", 16, 1)]
)
def test_frames_of_another_size_have_the_embeddings_of_the_source(tmp_path, kind, frame_size, tokens):
    theirs, _ = save_source(kind, tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours", frame_size=frame_size)
    ours = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    pixels = processor.process_frames(random_frames(3, size=(36, 60)))
    assert pixels.shape == (3, 3, frame_size, frame_size) and processor.frame_num_tokens == tokens
    with torch.no_grad():
        given = pixels if kind == "internvl" else pixels[None]
        expected = theirs.model.get_image_features(given).pooler_output
        expected = torch.stack(list(expected)).reshape(3, tokens, -1)
        assert_close(ours.get_video_features(pixels).pooler_output, expected, rtol=1e-5, atol=1e-5)
    session = ours.stream(processor, max_new_tokens=2)
    session.push(random_frames(2, size=(36, 60)))
    assert session.ask("What is this?")[-1].role == "assistant"


def test_the_newline_gets_a_new_row_where_the_table_is_full(tmp_path):
    theirs, processor = save_source("llava_onevision", tmp_path / "theirs")
    theirs.resize_token_embeddings(len(processor.tokenizer))
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert ours.config.text_config.vocab_size == theirs.config.text_config.vocab_size + 1
    assert torch.equal(ours.get_input_embeddings().weight[-1], theirs.model.image_newline)


def test_turns_that_are_known_by_a_token_only_are_named_in_the_card(tmp_path):
    _, theirs = save_source("llava_next_video", tmp_path / "theirs")
    theirs.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.tokenizer.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert processor.stream_format["user_before"] == "<|im_start|>user\n"
    assert "The source's line breaks between turns may be others." in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next_video"])
def test_silence_is_the_token_that_labels_teach(tmp_path, kind):
    """A language model may have several tokens that end its texts, and nothing stands between these frames."""
    _, theirs = save_source(kind, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    settings = json.loads(path.read_text())
    settings["text_config"]["eos_token_id"] = [1, theirs.tokenizer.eos_token_id]
    path.write_text(json.dumps(settings))
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    model = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    timed = [{"role": "assistant", "content": "A ball.", "time": 1.0}]
    labels = processor(timed, random_frames(2), fps=1, return_labels=True)["labels"][0]
    silence_and_opening = labels[labels >= 0][:2]
    logits = torch.eye(model.config.text_config.vocab_size)[silence_and_opening] * 30
    assert model.should_speak(logits)[0].tolist() == [False, True]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava_next_video", {"spatial_pool_mode": "max"}, "pools patches by 'max' before its projector"),
        ("llava_next_video", {"spatial_pool_stride": 3}, "pools 4x4 patches with stride 3, which drops some"),
        ("vipllava", {"vision_feature_layer": -2}, "it also has projector_layernorm.bias"),
        ("llava", {"vision_feature_layer": [-1, -2]}, "Supported is one layer, counted from the end"),
        ("llava", {"vision_feature_select_strategy": "full"}, "reads the encoder's class token too"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "drops the encoder's first patch"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, kind, changes, message):
    save_source(kind, tmp_path / "theirs", **changes)
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("internvl_chat", "of type 'internvl_chat'. Supported types are llava, .* names that end in '-hf'"),
        ("bert", "is a model of type 'bert'. Supported types are llava, llava_next"),
        ("videollm_mod", "is a streaming model already"),
    ],
)
def test_other_types_are_refused(tmp_path, model_type, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path), tmp_path / "ours")


def test_pixels_of_an_unknown_kind_are_refused(tmp_path):
    save_source("internvl", tmp_path / "theirs")
    path = tmp_path / "theirs" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"] |= {"size": {"height": 24, "width": 24}}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="makes frames of 24x24 pixels, but the encoder reads 32x32"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    settings["video_processor"] |= {"size": {"shortest_edge": 32}}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="makes frames of size .*shortest_edge.* which is not supported"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
