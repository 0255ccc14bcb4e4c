# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compare a tiny checkpoint in VideoLLM-online's layout before and after conversion."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import Hub
from peft import PeftModel
from programs import run_main
from published import save_live
from safetensors.torch import load_file, save_file
from tiny import random_frames, tiny_tokenizer
from transformers import AutoModel, AutoProcessor

from videollm_mod.convert.command import main
from videollm_mod.convert.videollm_online import convert
from videollm_mod.train.push import main as push


LAYOUTS = {"live1": (1, None), "live1+": (10, ",")}

pytestmark = pytest.mark.xdist_group("live")  # one process writes the checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Base, vision encoder and adapter on disk, and the adapted model in memory."""
    folder = tmp_path_factory.mktemp("live")
    return folder, save_live(folder / "base", folder / "vision", folder / "adapter")


def before(adapted, ids, features, frame_token_id):
    """Return logits as VideoLLM-online computes them, with the connector's output in place of the frame tokens."""
    live = adapted.base_model.model
    is_frame = ids == frame_token_id
    embeddings = live.get_input_embeddings()(ids.masked_fill(is_frame, 0))
    embeddings[is_frame] = live.connector(features).flatten(0, 1)
    with torch.no_grad():
        return live(inputs_embeds=embeddings[None]).logits[0]


def after(folder, out, live_version, **options):
    convert(
        str(folder / "base"),
        str(folder / "adapter"),
        out,
        vision_model=str(folder / "vision"),
        live_version=live_version,
        **options,
    )
    model = AutoModel.from_pretrained(out, trust_remote_code=True, dtype="auto").eval()
    return model, AutoProcessor.from_pretrained(out, trust_remote_code=True)


@pytest.mark.parametrize("live_version", LAYOUTS)
def test_the_same_logits_and_the_same_stream(checkpoint, tmp_path, live_version):
    folder, adapted = checkpoint
    model, processor = after(folder, tmp_path / "out", live_version)
    tokens, interval = LAYOUTS[live_version]
    assert (processor.frame_num_tokens, processor.frame_token_interval) == (tokens, interval)
    assert model.config.routed_layers == [] and model.config.interval_threshold == 0.725
    assert processor.frame_token_id == len(tiny_tokenizer()) == model.get_input_embeddings().num_embeddings
    frames = random_frames(3)
    pixels = processor.process_frames(frames)
    # Frames are scaled to the encoder's size, padded with zeros, and normalised with mean and deviation 0.5.
    wide = processor.process_frames(np.full((32, 64, 3), 255, dtype=np.uint8))[0]
    assert wide.shape == (3, 32, 32) and (wide[:, :8] == -1).all() and (wide[:, 24:] == -1).all()
    assert (wide[:, 9:23] == 1).all()
    with torch.no_grad():
        features = model.encode_frames(pixels)
    messages = [
        {"role": "user", "content": "Describe.", "time": 0.0},
        {"role": "assistant", "content": "A red ball.", "time": 1.0},
    ]
    batch = processor(messages, frames, fps=2)
    ids = batch["input_ids"][0]
    with torch.no_grad():
        logits = model(**batch).logits[0]
    torch.testing.assert_close(logits, before(adapted, ids, features, processor.frame_token_id), rtol=2e-4, atol=2e-4)

    # VideoLLM-online's inference loop, without a cache.
    session = model.stream(processor, fps=2, max_new_tokens=4, interval_threshold=0.0)
    session.ask("Describe.", time=-0.5, reply_now=False)
    events = [event for frame in frames for event in session.push(frame)]
    silence = processor.frame_token_interval_id or processor.tokenizer.eos_token_id
    turns = [{"role": "system", "content": processor.system_prompt}, {"role": "user", "content": "Describe."}]
    seen, said, opened = [], [], False
    for index in range(3):
        lead = (
            processor.encode_turns(turns, stream_open=opened, then="stream")
            if turns or not opened
            else ([] if interval is None else [silence])
        )
        seen, turns, opened = seen + lead + [processor.frame_token_id] * tokens, [], True
        scores = before(adapted, torch.tensor(seen), features[: index + 1], processor.frame_token_id)[-1]
        if int(scores.argmax()) == silence:
            continue
        seen += processor.encode_turns([], stream_open=True, then="assistant")
        reply = []
        while len(reply) < 4:
            scores = before(adapted, torch.tensor(seen), features[: index + 1], processor.frame_token_id)[-1]
            if int(scores.argmax()) == processor.tokenizer.eos_token_id:
                break
            reply.append(int(scores.argmax()))
            seen.append(reply[-1])
        seen.append(processor.tokenizer.eos_token_id)
        said.append(tuple(reply))
        opened = False
    assert [event.token_ids for event in events if event.role == "assistant"] == said


def test_an_unmerged_adapter_gives_the_same_logits(checkpoint, tmp_path):
    folder, _ = checkpoint
    merged, processor = after(folder, tmp_path / "merged", "live1+")
    base, _ = after(folder, tmp_path / "apart", "live1+", keep_adapter=True)
    batch = processor([{"role": "user", "content": "Hi."}], random_frames(2), add_generation_prompt=True)
    with torch.no_grad():
        expected, plain = merged(**batch).logits, base(**batch).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter").eval()
        torch.testing.assert_close(adapted(**batch).logits, expected, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(plain, expected, atol=0.1)


def test_new_routers_get_gradients(checkpoint, tmp_path):
    folder, _ = checkpoint
    model, processor = after(folder, tmp_path / "out", "live1+", mod_layers="interleaved", mod_keep_ratio=0.2)
    assert model.config.routed_layers and set(model.model.routers) == {str(i) for i in model.config.routed_layers}
    batch = processor(
        [{"role": "assistant", "content": "A ball.", "time": 1.0}], random_frames(3), fps=2, return_labels=True
    )
    model.train()(**batch).loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.model.routers.values())


def test_the_head_weight_is_optional(checkpoint, tmp_path):
    folder, adapted = checkpoint
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.lm_head.base_layer.weight"
    other = tmp_path / "adapter"
    other.mkdir()
    (other / "adapter_config.json").write_text((folder / "adapter" / "adapter_config.json").read_text())
    weight = adapted.base_model.model.lm_head.base_layer.weight.detach().clone()
    if name in tensors:
        del tensors[name]
    else:
        tensors[name] = weight
    save_file(tensors, other / "adapter_model.safetensors")
    (tmp_path / "base").symlink_to(folder / "base")
    (tmp_path / "vision").symlink_to(folder / "vision")
    one, processor = after(folder, tmp_path / "one", "live1+")
    two, _ = after(tmp_path, tmp_path / "two", "live1+")
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


def changed_adapter(folder, place, change):
    """Copy the adapter with changed tensors."""
    place.mkdir()
    (place / "adapter_config.json").write_text((folder / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, place / "adapter_model.safetensors")
    return str(place)


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.connector.0.bias"), r"Missing: connector\.0\.bias"),
        (lambda t: t.pop(LORA), r"Missing: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight"),
        (lambda t: t.update({"base_model.model.vision.lora_A.weight": torch.ones(1)}), r"Unknown: vision\.lora_A"),
        (lambda t: t.update({LORA: torch.ones(3, 5)}), r"q_proj\.lora_A\.weight is \(3, 5\), expected \(4, \d+\)"),
        (
            lambda t: t.update({"base_model.model.connector.0.bias": torch.ones(3)}),
            r"Wrong shape: connector\.0\.bias is \(3,\), expected",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(checkpoint, tmp_path, change, message):
    folder, _ = checkpoint
    adapter = changed_adapter(folder, tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        convert(str(folder / "base"), adapter, tmp_path / "out", vision_model=str(folder / "vision"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_another_kind_of_adapter_fails_and_another_base_warns(checkpoint, tmp_path, monkeypatch):
    folder, _ = checkpoint
    adapter = Path(changed_adapter(folder, tmp_path / "adapter", lambda _: None))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    arguments = {"vision_model": str(folder / "vision")}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "alpha_pattern": {"q_proj": 64}}))
    with pytest.raises(ValueError, match="not uniform LoRA: it has alpha_pattern"):
        convert(str(folder / "base"), str(adapter), tmp_path / "out", **arguments)
    named = {**settings, "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    told = []
    monkeypatch.setattr("videollm_mod.convert.videollm_online.logger.warning", told.append)
    convert(str(folder / "base"), str(adapter), tmp_path / "out", **arguments)
    assert len(told) == 1 and "was trained on 'meta-llama/Meta-Llama-3-8B-Instruct'" in told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mod_keep_ratio", "1.5"], "error: `mod_keep_ratio` must lie in [0, 1], got 1.5."),
        (["--mod_layers", "1,9"], "error: `mod_layers` names layer 9, but the decoder has layers 0 to 3."),
        (["--vision_model", "base"], "which has no patches. Give an image encoder."),
    ],
)
def test_mistakes_are_answered_in_one_line(checkpoint, tmp_path, monkeypatch, capsys, options, message):
    folder, _ = checkpoint
    given = ["--vision_model", "vision", *options]
    given = [str(folder / word) if word in ("vision", "base") else word for word in given]
    arguments = [folder / "base", folder / "adapter", tmp_path / "out", *given]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as failed:
        main()
    loading, error = capsys.readouterr().err.splitlines()
    assert loading.startswith("loading ") and message in error
    assert failed.value.code == 1 and not (tmp_path / "out").exists()


def test_the_command(checkpoint, tmp_path, caplog):
    folder, _ = checkpoint

    def command(out, *options):
        parts = (folder / "base", folder / "adapter", out, "--vision_model", folder / "vision")
        return run_main(main, *parts, *options, program="convert")

    done = command(tmp_path / "out", "--mod_layers", "all", "--mod_keep_ratio", 0.5)
    assert done.returncode == 0 and f"wrote {tmp_path / 'out'}. " in done.stdout, done.stderr
    assert done.stderr.startswith("loading ") and len(done.stderr.splitlines()) == 1
    assert "has no image processor" in caplog.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mod_layers"], config["mod_keep_ratio"]) == ("all", 0.5)
    assert config["mod_router_loss"] == "gradient"
    with Hub() as hub:
        with hub.used_here(tmp_path / "home"):
            pushed = run_main(push, tmp_path / "out", "somebody/routed")
        assert pushed.returncode == 0, pushed.stderr
        card = hub.files("somebody/routed")["README.md"].decode()
    assert (
        "of base, adapter, vision." in card
        and "Its routers are new: fine-tune it." in card
        and str(tmp_path) not in card
    )
    assert "layers are routed. They keep 5 of a frame's 10 tokens" in card
    # Layers by index, and the adapter unmerged. The card's code loads both.
    done = command(tmp_path / "apart", "--mod_layers", "1,3", "--keep_adapter")
    assert done.returncode == 0 and "PeftModel.from_pretrained(" in done.stdout, done.stderr
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["mod_layers"] == [1, 3]
    card = (tmp_path / "apart" / "README.md").read_text()
    code = card.split("```python\n")[1].split("for event in")[0].replace('"apart"', repr(str(tmp_path / "apart")))
    loaded = {}
    exec(code.replace(', device_map="auto"', ""), loaded)
    assert type(loaded["model"]).__name__ == "PeftModelForCausalLM" and loaded["model"].config.routed_layers == [1, 3]
    again = command(tmp_path / "out")
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].endswith(
        "is not empty. Choose another folder."
    )
