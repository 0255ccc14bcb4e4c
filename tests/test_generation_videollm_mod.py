# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`generate` in its usual modes, and the interval rule."""

import copy

import pytest
import torch
from tiny import SCHEMES, dialogue_ids, random_features, random_frames, tiny_model, tiny_processor
from torch.testing import assert_close
from transformers import GenerationConfig, LogitsProcessorList, TextIteratorStreamer, TopKLogitsWarper

from videollm_mod import interval_rule
from videollm_mod.cache_videollm_mod import CACHE_NAME, TokenRun


RUNS = [2, 1]


def prompt(model, seed=0):
    ids = dialogue_ids(model.config, RUNS, seed=seed)
    return {"input_ids": ids, "frame_features": random_features(model.config, 3, seed=seed)}


def greedy(model, inputs, steps):
    """Reference: no cache, one full forward pass per token."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids}, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.fixture(params=["full", "interleaved", "all", "early_exit", "change"])
def model(request):
    model = tiny_model(**SCHEMES[request.param])
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end-of-sequence: replies have a known length
    return model


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
def test_greedy_equals_one_full_forward_per_token(model, kind):
    inputs = prompt(model)
    expected = greedy(model, inputs, 6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, cache_implementation=kind), expected)


def test_without_cache(model):
    inputs = prompt(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, use_cache=False), greedy(model, inputs, 4))


def test_pixels_or_features(model):
    pixels = torch.randn(1, 3, 3, 32, 32)
    ids = dialogue_ids(model.config, RUNS)
    with torch.no_grad():
        features = model.encode_frames(pixels)
    assert torch.equal(
        model.generate(input_ids=ids, pixel_values_videos=pixels, max_new_tokens=5),
        model.generate(input_ids=ids, frame_features=features, max_new_tokens=5),
    )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_beams(model, kind):
    """The score of a beam equals that of one forward pass over its tokens."""
    inputs = prompt(model)
    output = model.generate(
        **inputs,
        max_new_tokens=5,
        num_beams=3,
        cache_implementation=kind,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    ids = output.sequences
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": ids}).logits.log_softmax(-1)
    new = logits[0, -6:-1].gather(1, ids[0, -5:, None]).sum()
    assert_close(output.sequences_scores[0], new, atol=1e-4, rtol=1e-4)
    plain = greedy(model, inputs, 5)
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": plain}).logits.log_softmax(-1)
    assert new >= logits[0, -6:-1].gather(1, plain[0, -5:, None]).sum() - 1e-4


def test_beams_encode_their_frames_once(model):
    calls = []
    model.model.vision_encoder.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    ids = dialogue_ids(model.config, RUNS)
    model.generate(input_ids=ids, pixel_values_videos=torch.randn(1, 3, 3, 32, 32), max_new_tokens=3, num_beams=4)
    assert calls == [3]


def test_sampling(model):
    inputs = prompt(model)
    torch.manual_seed(0)
    several = model.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=4)
    assert several.shape[0] == 4 and len({tuple(row.tolist()) for row in several}) > 1
    cold = model.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=1e-4)
    assert torch.equal(cold, greedy(model, inputs, 4))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("by_pipeline", [False, True])
def test_a_padded_batch_equals_its_rows(model, kind, by_pipeline):
    """
    Left-padded rows with different numbers of frames are continued as in batches of one. A pipeline also pads frames
    in front, and its counts are a list of lists.
    """
    short = {
        "input_ids": dialogue_ids(model.config, [1], seed=5),
        "frame_features": random_features(model.config, 1, seed=5),
    }
    rows = [prompt(model), short]
    longest = rows[0]["input_ids"].shape[1]
    ids = torch.zeros(2, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    features = torch.zeros(2, 3, 10, 16)
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        ids[index, -length:], mask[index, -length:] = row["input_ids"][0], 1
        count = row["frame_features"].shape[1]
        features[index, slice(3 - count, 3) if by_pipeline else slice(count)] = row["frame_features"][0]
    num_frames = [[3], [1]] if by_pipeline else [3, 1]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        frame_features=features,
        num_frames=num_frames,
        max_new_tokens=5,
        cache_implementation=kind,
    )
    for index, row in enumerate(rows):
        assert torch.equal(output[index, longest:], greedy(model, row, 5)[0, -5:])
    beams = model.generate(
        input_ids=ids,
        attention_mask=mask,
        frame_features=features,
        num_frames=num_frames,
        max_new_tokens=3,
        num_beams=2,
    )
    for index, row in enumerate(rows):
        assert torch.equal(beams[index, longest:], model.generate(**row, max_new_tokens=3, num_beams=2)[0, -3:])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_continues_from_a_cache(model, name):
    """With all ids, or new ids and a full mask, also with new frames; by the cache's new and old names."""
    inputs = prompt(model)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    cache = first[CACHE_NAME]
    more = torch.cat([first.sequences, dialogue_ids(model.config, [1], seed=3)], dim=1)
    new_features = random_features(model.config, 1, seed=3)
    both = torch.cat([inputs["frame_features"], new_features], dim=1)
    expected = greedy(model, {"input_ids": more, "frame_features": both}, 4)
    seen = int(cache.get_seq_length())
    fork = copy.deepcopy(cache)
    got = model.generate(input_ids=more, frame_features=new_features, max_new_tokens=4, **{name: cache})
    assert torch.equal(got, expected)
    got = model.generate(
        input_ids=more[:, seen:],
        attention_mask=torch.ones_like(more),
        frame_features=new_features,
        max_new_tokens=4,
        **{name: fork},
    )
    assert torch.equal(got[:, -4:], expected[:, -4:])


@pytest.mark.parametrize("masked", [False, True])
def test_continues_after_an_eviction(model, masked):
    """Rotary positions continue behind those of the tokens that are gone."""
    inputs, more, cache = prompt(model), dialogue_ids(model.config, [], seed=3), model.new_cache()
    seen = inputs["input_ids"].shape[1] - 11
    with torch.no_grad():
        model(**inputs, cache=cache)
        model.evict_tokens(cache, [TokenRun(5), TokenRun(11, 1, stays=False), TokenRun(seen - 5, 2)])
        fork, ids, new = copy.deepcopy(cache), more, more
        for _ in range(4):
            new = model(input_ids=new, cache=fork).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
    everything = torch.cat([torch.full((1, seen), 9), more], dim=1)
    given = {"input_ids": more, "attention_mask": torch.ones_like(everything)} if masked else {"input_ids": everything}
    got = model.generate(**given, cache=cache, max_new_tokens=4)
    assert torch.equal(got[:, -4:], ids[:, -4:])


def test_inputs_embeds(model):
    inputs = prompt(model)
    ids = inputs["input_ids"]
    mask = ids == model.config.frame_token_id
    embeddings = model.get_input_embeddings()(ids.masked_fill(mask, 0))
    got = model.generate(
        inputs_embeds=embeddings,
        frame_token_mask=mask,
        frame_features=inputs["frame_features"],
        max_new_tokens=4,
    )
    assert torch.equal(got, greedy(model, inputs, 4)[:, -4:])


def test_prompt_lookup_crops_the_cache(model):
    inputs = prompt(model)
    got = model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="static|does not work with assisted generation"):
        model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3, cache_implementation="static")
    assert torch.equal(got, greedy(model, inputs, 8))


def test_prompt_lookup_copies_no_frames(model):
    """The text before a frame comes again at the end. The frame token's id lies past the vocabulary, as in Llama 3."""
    inputs = prompt(model)
    ids = inputs["input_ids"]
    before = ids[:, 3:5]
    assert ids[0, 5] == model.config.frame_token_id >= model.get_input_embeddings().num_embeddings
    inputs["input_ids"] = torch.cat([ids, before], dim=1)
    got = model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=5)
    assert torch.equal(got, greedy(model, inputs, 8))


@pytest.mark.parametrize("kind", ["features", "pixels"])
def test_assistant_model(model, kind):
    inputs = prompt(model)
    if kind == "pixels":
        inputs = {"input_ids": inputs["input_ids"], "pixel_values_videos": torch.randn(1, 3, 3, 32, 32)}
    got = model.generate(**inputs, max_new_tokens=6, assistant_model=tiny_model(seed=1))
    assert torch.equal(got, greedy(model, inputs, 6))


def test_chunked_prefill_of_text(model):
    ids = {"input_ids": dialogue_ids(model.config, [])}
    assert torch.equal(model.generate(**ids, max_new_tokens=4, prefill_chunk_size=2), greedy(model, ids, 4))


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("size", [1, 7, 16, 23, 400])
def test_chunked_prefill_with_frames(model, size, kind):
    """Chunks that end within a frame run on to its end."""
    inputs, options = prompt(model), {"max_new_tokens": 4, "cache_implementation": kind}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    got = model.generate(**inputs, **options, prefill_chunk_size=size)
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.logits, expected.logits, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    longest = size + model.config.frame_num_tokens - 1
    assert max(lengths) <= longest and (len(lengths) > 4) == (longest < inputs["input_ids"].shape[1])


def test_chunked_prefill_of_pixels_in_padded_rows(model):
    """Each chunk encodes its own frames, and no chunk cuts a frame of any row."""
    calls = []
    model.model.vision_encoder.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    processor, lengths = tiny_processor(), (4, 2, 0)
    dialogues = [[{"role": "stream", "num_frames": n}] * (n > 0) + [{"role": "user", "content": "?"}] for n in lengths]
    videos = [random_frames(n, seed=n) if n else None for n in lengths]
    inputs = processor(dialogues, videos=videos, padding_side="left", add_generation_prompt=True)
    whole = model.generate(**inputs, max_new_tokens=4)
    assert calls == [6]
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, prefill_chunk_size=8), whole)
    assert sum(calls[1:]) == 6 and len(calls) > 2


def test_chunked_prefill_with_an_assistant_model(model):
    inputs, options = prompt(model), {"max_new_tokens": 6, "prefill_chunk_size": 16}
    got = model.generate(**inputs, **options, assistant_model=tiny_model(seed=1))
    assert torch.equal(got, greedy(model, inputs, 6))


def test_chunked_prefill_goes_on_from_a_cache(model):
    """The prompt may be given in full again, or from the first new token on."""
    inputs, more = prompt(model), prompt(model, seed=1)
    length, ids = inputs["input_ids"].shape[1], torch.cat([inputs["input_ids"], more["input_ids"]], dim=1)
    frames = torch.cat([inputs["frame_features"], more["frame_features"]], dim=1)
    expected = greedy(model, {"input_ids": ids, "frame_features": frames}, 4)
    for given in (ids, ids[:, length:]):
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).cache
        options = {CACHE_NAME: cache, "attention_mask": torch.ones_like(ids), "prefill_chunk_size": 16}
        got = model.generate(input_ids=given, frame_features=more["frame_features"], max_new_tokens=4, **options)
        assert torch.equal(got[:, -4:], expected[:, -4:])


def test_streamer_and_scores(model):
    processor = tiny_processor()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    inputs = prompt(model)
    output = model.generate(
        **inputs,
        max_new_tokens=6,
        streamer=streamer,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_logits=True,
    )
    assert "".join(streamer) == processor.tokenizer.decode(output.sequences[0, -6:])
    assert len(output.logits) == 6 and len(output.hidden_states[0]) == 5
    assert output[CACHE_NAME].get_seq_length() == inputs["input_ids"].shape[1] + 5
    warped = model.generate(**inputs, max_new_tokens=3, logits_processor=LogitsProcessorList([TopKLogitsWarper(1)]))
    assert torch.equal(warped, greedy(model, inputs, 3))


def test_a_frame_token_within_the_vocabulary_is_never_generated():
    """It is there after `resize_token_embeddings(len(tokenizer))` and in padded vocabularies."""
    model = tiny_model()
    frame_token_id = model.config.frame_token_id
    model.resize_token_embeddings(frame_token_id + 8, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[frame_token_id] = 10 * torch.randn(model.lm_head.weight.shape[1])
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        tokens = model.generate(**prompt(model), max_new_tokens=6, eos_token_id=None, pad_token_id=0, **options)
        new = tokens[0, prompt(model)["input_ids"].shape[1] :]
        assert len(new) == 6 and not (new == frame_token_id).any()
    events = list(model.narrate(tiny_processor(), random_frames(2), interval_threshold=1.0, max_new_tokens=4))
    assert events and not any(frame_token_id in event.token_ids for event in events)


def test_unknown_caches_are_refused(model):
    with pytest.raises(ValueError, match="'quantized'.*'dynamic', 'static'"):
        model.generate(**prompt(model), max_new_tokens=2, cache_implementation="quantized")


# ----------------------------------------------------------------------------------------------------- interval rule


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


@pytest.mark.parametrize(
    ("probabilities", "threshold", "speaks"),
    [
        ([0.8, 0.1, 0.1], 0.725, False),  # likely enough
        ([0.7, 0.2, 0.1], 0.725, True),  # most likely, but below the threshold
        ([0.7, 0.2, 0.1], 0.0, False),  # no threshold: the most likely token decides
        ([0.4, 0.5, 0.1], 0.0, True),
        ([0.4, 0.5, 0.1], 0.3, True),  # above the threshold, but not the most likely
    ],
)
def test_interval_rule(probabilities, threshold, speaks):
    speak, silence = interval_rule(logits_of(*probabilities).double(), 0, threshold)
    assert bool(speak) == speaks and float(silence) == pytest.approx(probabilities[0])
    # At exactly the threshold the model is silent if silence is most likely.
    at_threshold, _ = interval_rule(logits_of(*probabilities).double(), 0, float(silence))
    assert bool(at_threshold) == (probabilities[0] < probabilities[1])


def test_interval_rule_takes_any_shape():
    speak, silence = interval_rule(torch.randn(4, 3, 50).half(), 7, 0.5)
    assert speak.shape == silence.shape == (4, 3) and silence.dtype == torch.float32


def test_should_speak_uses_the_models_own_token_and_threshold():
    model = tiny_model(interval_threshold=0.9)
    scores = torch.zeros(1, model.config.text_config.vocab_size)
    scores[0, model.config.frame_token_interval_id] = 8.0
    speak, silence = model.should_speak(scores)
    assert 0.8 < float(silence) < 0.9 and speak
    assert not model.should_speak(scores, 0.5)[0]
    without = tiny_model(frame_token_interval_id=None)
    scores[0, 2] = 20.0
    assert not without.should_speak(scores)[0]
