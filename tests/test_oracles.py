# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Random models, dialogues and ways to give them, against the dense model of `dense_routing.py`.

`HYPOTHESIS_PROFILE=fuzz pytest tests/test_oracles.py` draws 20 times as many cases. A failing case is printed as code.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from dense_routing import CLOSE, DenseModel, stream_loss
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from tiny import TEXT_MODELS, tiny_model, tiny_vision_config
from torch.testing import assert_close

from videollm_mod import VideoLLMMoDConfig


FRAME, INTERVAL, VOCABULARY = 71, 5, 64
# float32 against float64: logits of these models are of size 1, and four layers round a few hundred times.
TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}


def cases(share: float) -> settings:
    """Return settings that draw this share of the profile's cases."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))


@st.composite
def text_options(draw: Any) -> dict[str, Any]:
    """Draw a small text model of a supported architecture."""
    kind, layers = draw(st.sampled_from(TEXT_MODELS)), draw(st.integers(1, 5))
    heads = draw(st.sampled_from([(4, 2), (2, 2), (3, 1)]))
    options = {"model_type": kind, "num_hidden_layers": layers, "vocab_size": VOCABULARY, "hidden_size": 24}
    options |= {"intermediate_size": 32, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    options |= {"head_dim": 8, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    options |= {"rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 10000.0]))}}
    options |= {"max_position_embeddings": 4096, "tie_word_embeddings": draw(st.booleans())}
    window = draw(st.sampled_from([None, 3, 12])) if kind != "llama" and kind != "qwen3" else None
    if kind == "mistral":
        options["sliding_window"] = window
    elif window is not None:
        options |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": layers // 2}
    if kind == "smollm3":
        options["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    return options


def ratios() -> st.SearchStrategy[float]:
    """Keep ratios, with the ends and what binary fractions round."""
    return st.one_of(st.sampled_from([0, 0.0, 1, 1.0, 0.2, 0.28, 0.7]), st.integers(0, 1000).map(lambda x: x / 1000))


@st.composite
def routing_options(draw: Any, layers: int) -> dict[str, Any]:
    """Draw a scheme, a router and a gate."""
    lists = st.lists(st.integers(0, layers - 1), unique=True)
    schemes = st.sampled_from([None, "interleaved", "interleaved_deep", "all", "all_deep"])
    options = draw(
        st.one_of(
            st.fixed_dictionaries({"mod_keep_ratio": ratios(), "mod_layers": st.one_of(schemes, lists)}),
            st.fixed_dictionaries({"mod_keep_ratio": st.lists(ratios(), min_size=layers, max_size=layers)}),
        )
    )
    options["mod_router"] = draw(st.sampled_from(["learned", "learned", "change", "uniform", "random"]))
    gates = ["linear", "sigmoid", "tanh", "straight_through"] + ["none"] * (options["mod_router"] != "learned")
    options |= {"mod_gate": draw(st.sampled_from(gates)), "mod_gate_on": draw(st.sampled_from(["update", "output"]))}
    options |= {"mod_keep_last": draw(st.booleans())}
    return options | draw(st.sampled_from([{}, {"mod_normalize_scores": True}, {"mod_normalize_scores": False}]))


@st.composite
def frame_options(draw: Any) -> dict[str, Any]:
    """Draw the tokens of a frame, of 4 x 4 patches, and what connects them to the text model."""
    kind = draw(st.sampled_from(["mlp", "mlp", "mlp", "mlp_pool_after", "pixel_shuffle"]))
    act = draw(st.sampled_from(["gelu", "gelu", None]))
    if kind == "mlp":
        grid = draw(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))))
        return {"frame_token_cls": grid is None or draw(st.booleans()), "frame_token_pooled": grid} | {
            "connector_hidden_act": act
        }
    sides = st.sampled_from([1, 2, 4]) if kind == "pixel_shuffle" else st.integers(1, 4)
    height = draw(sides)
    grid = (height, height if kind == "pixel_shuffle" else draw(sides))
    return {"connector": kind, "connector_hidden_act": act, "frame_token_cls": False, "frame_token_pooled": grid}


@dataclass
class Dialogue:
    """Tokens, the features (frames, rows, width) of the frames among them, and the places between two pieces."""

    ids: list[int] = field(default_factory=list)
    features: torch.Tensor | None = None
    seams: list[int] = field(default_factory=list)

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(f"Dialogue(ids={self.ids}, frames={0 if self.features is None else len(self.features)})")


@st.composite
def dialogues(draw: Any, config: VideoLLMMoDConfig, *, least_frames: int = 0) -> Dialogue:
    """Draw a dialogue of text and runs of frames; both may come first or last."""
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    runs = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
    if sum(frames for _, frames in runs) < least_frames:
        runs.append((0, least_frames))
    made, count = Dialogue(), 0
    for text, frames in runs:
        words = torch.randint(6, VOCABULARY, (text,), generator=chance).tolist()
        parts = [[word] for word in words]
        for index in range(frames):
            has_interval = index > 0 and draw(st.booleans())
            parts += [[INTERVAL]] * has_interval + [[FRAME] * config.frame_num_tokens]
        count += frames
        for part in parts:
            made.ids += part
            made.seams.append(len(made.ids))
    if not made.ids:
        made = Dialogue([7], None, [1])
    if count:
        made.features = torch.randn(count, *config.frame_feature_shape, generator=chance)
        if draw(st.booleans()):  # a still scene
            made.features[1::2] = made.features[: count - count % 2 : 2]
    return made


@dataclass
class Case:
    """A model of the package, and how to make its dense counterpart."""

    model: Any
    options: dict[str, Any]

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(f"Case({self.options}, {self.model.config.text_config.to_diff_dict()})")

    def dense(self) -> DenseModel:
        """Return the dense model, which has read nothing yet."""
        config = self.model.config
        dense = DenseModel(
            self.model.state_dict(),
            config.text_config,
            self.options,
            frame_token_id=FRAME,
            num_tokens=config.frame_num_tokens,
        )
        assert dense.counts == config.layer_keep_counts
        return dense

    def read(self, dialogue: Dialogue) -> tuple[DenseModel, torch.Tensor]:
        """Return the dense model after a dialogue, and its logits. Leaves out cases that float32 cannot tell apart."""
        dense = self.dense()
        logits = dense.read(dialogue.ids, dialogue.features)
        assume(dense.closest > CLOSE)
        return dense, logits


@st.composite
def models(draw: Any) -> Case:
    """Draw a model with random weights; those that are usually 0 or 1 are random too."""
    text = draw(text_options())
    options = draw(routing_options(text["num_hidden_layers"])) | draw(frame_options())
    ids = {"frame_token_id": FRAME, "frame_token_interval_id": INTERVAL}
    config = VideoLLMMoDConfig(text_config=text, vision_config=tiny_vision_config(), **options, **ids)
    attention = draw(st.sampled_from(["sdpa", "eager"]))
    model = tiny_model(config, seed=draw(st.integers(0, 2**16)), attn_implementation=attention)
    scale = draw(st.sampled_from([0.0, 0.3, 3.0]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "vision" not in name:
                weight += 0.1 * torch.randn(weight.shape)
            elif "router" in name:
                weight *= scale
    return Case(model, options)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits or scores with the dense model's."""
    assert_close(got, expected.to(got.dtype), **TOLERANCE)


@cases(0.1)
@given(st.data())
def test_a_batch_of_dialogues_in_one_forward(data):
    """Rows of different lengths and numbers of frames, padded on either side: logits, scores, choices and loss."""
    case = data.draw(models())
    model, config = case.model, case.model.config
    rows = data.draw(st.lists(dialogues(config), min_size=1, max_size=4))
    side, width = data.draw(st.sampled_from(["left", "right"])), max(len(row.ids) for row in rows)
    width += data.draw(st.sampled_from([0, 0, 3]))
    counts = [0 if row.features is None else len(row.features) for row in rows]
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.long)
    features = torch.zeros(len(rows), max(counts), *config.frame_feature_shape)
    places = []
    for index, row in enumerate(rows):
        begin = width - len(row.ids) if side == "left" else 0
        places.append(slice(begin, begin + len(row.ids)))
        ids[index, places[-1]], mask[index, places[-1]] = torch.tensor(row.ids), 1
        if counts[index]:
            features[index, : counts[index]] = row.features
    given_counts = data.draw(st.sampled_from([None, counts, torch.tensor(counts)]))
    learned = torch.rand(ids.shape, generator=torch.Generator().manual_seed(len(ids))) < 0.7
    inside = (ids == FRAME) | (mask == 0)
    labels = torch.where(learned & ~inside, ids, -100)
    inputs = {"frame_features": features if max(counts) else None, "num_frames": given_counts, "labels": labels}
    if width > min(len(row.ids) for row in rows) and (side == "left" or data.draw(st.booleans())):
        inputs["attention_mask"] = mask
    expected = [case.read(row) for row in rows]
    with torch.no_grad():
        outputs = model(input_ids=ids, output_router_scores=True, use_cache=data.draw(st.booleans()), **inputs)
    routed = [layer for layer, count in enumerate(expected[0][0].counts) if count < config.frame_num_tokens]
    assert len(outputs.router_scores) == len(outputs.kept_tokens) == len(routed)
    total, number = 0.0, 0
    for index, (dense, logits) in enumerate(expected):
        same(outputs.logits[index, places[index]], logits)
        for layer, scores, kept in zip(routed, outputs.router_scores, outputs.kept_tokens, strict=True):
            for frame in range(counts[index]):
                if layer in dense.scores[frame]:
                    same(scores[index, frame], dense.scores[frame][layer])
                    assert torch.equal(kept[index, frame], dense.choices[frame][layer])
                else:
                    assert not scores[index, frame].any() and not kept[index, frame].any()
        row_labels = labels[index, places[index]].tolist()
        row_loss, row_number = stream_loss(logits, rows[index].ids, row_labels, FRAME, config.stream_loss_weight)
        total, number = total + row_loss, number + row_number
    has_first = labels[:, 0][labels[:, 0] != -100].numel()  # nothing predicts the first token
    event(f"padding {side}, mask {'attention_mask' in inputs}")
    if not has_first and side == "right":
        assert_close(float(outputs.loss), total / max(number, 1), atol=1e-5, rtol=1e-5)
