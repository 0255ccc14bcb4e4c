# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Load or build the model to train, and choose which of its parts train."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from videollm_mod import (
    VideoLLMMoDConfig,
    VideoLLMMoDForConditionalGeneration,
    VideoLLMMoDProcessor,
    VideoLLMMoDVideoProcessor,
)
from videollm_mod.routers_videollm_mod import ROUTERS
from videollm_mod.space.checkpoint_faults import in_one_line, load_weights
from videollm_mod.space.loading import check_finite


# Importing the arguments loads TRL, which only training needs.
if TYPE_CHECKING:
    from videollm_mod.train.sft_arguments import ModelArguments


logger = logging.get_logger(__name__)

# As in Llama 3: words with the space before them, digits one by one, and punctuation with the newlines after it.
_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


@contextmanager
def faults_of(given: str) -> Iterator[None]:
    """End the program in one line if what was given is wrong, for example "--checkpoint folder"."""
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SystemExit(f"error: {given}: {in_one_line(error)}") from None


def plan_model(arguments: "ModelArguments") -> tuple[VideoLLMMoDConfig, Any]:
    """
    Return the configuration and the processor of the model to train. No weights are loaded.

    Raises:
        `SystemExit`: With one line, if the model or an option is wrong.
    """
    _check_choice(arguments)
    with faults_of(_given(arguments)):
        config, processor = _plan_model(arguments)
        _check_router_loss(config)
        if _has_new_routers(arguments):
            teach_routers(config)
    return config, processor


def _plan_model(arguments: "ModelArguments") -> tuple[VideoLLMMoDConfig, Any]:
    options = arguments.config_fields()
    if arguments.model_config is not None:
        return _plan_new_model(arguments.model_config, **options)
    if arguments.checkpoint is not None:
        config = VideoLLMMoDConfig.from_pretrained(arguments.checkpoint, **options)
        config.validate()  # Transformers does so before it sets the options.
        return config, AutoProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    vision_config = _load_vision_config(arguments.vision_model)
    return _join_configs(
        AutoConfig.from_pretrained(arguments.language_model).get_text_config(),
        vision_config,
        _new_video_processor(vision_config, _find_image_processor(arguments.vision_model)),
        AutoTokenizer.from_pretrained(arguments.language_model),
        {"frame_token_interval": ","},
        **options | arguments.grid(),
    )


def _check_choice(arguments: "ModelArguments") -> None:
    parts = arguments.vision_model is not None and arguments.language_model is not None
    given = [arguments.checkpoint is not None, arguments.model_config is not None, parts]
    if sum(given) != 1:
        raise SystemExit("Give exactly one of --checkpoint, --model_config, and --vision_model with --language_model.")


def _given(arguments: "ModelArguments") -> str:
    """Return the options that name the model, as the command line has them."""
    names = ("checkpoint", "model_config", "vision_model", "language_model")
    return " ".join(f"--{name} {given}" for name in names if (given := getattr(arguments, name)) is not None)


def _check_router_loss(config: VideoLLMMoDConfig) -> None:
    if config.router_layers and config.mod_router_loss is not None and not ROUTERS[config.mod_router].learns:
        raise ValueError(
            f"--mod_router_loss {config.mod_router_loss} trains routers that learn, and --mod_router "
            f"{config.mod_router} does not: give --mod_router_loss none."
        )


def _has_new_routers(arguments: "ModelArguments") -> bool:
    """Whether routers that learn would be new, and neither an option nor a file says how they learn."""
    if arguments.mod_router_loss is not None:
        return False
    if arguments.model_config is not None:
        return "mod_router_loss" not in json.loads(Path(arguments.model_config).read_text(encoding="utf-8"))["model"]
    if arguments.checkpoint is None:
        return True
    config = VideoLLMMoDConfig.from_pretrained(arguments.checkpoint)
    return not (config.router_layers and ROUTERS[config.mod_router].learns)


def teach_routers(config: VideoLLMMoDConfig) -> bool:
    """
    Let routers learn from the loss's gradient too, if they learn. docs/evidence.md compares both.

    Returns:
        `bool`: Whether they learn.
    """
    learns = bool(config.router_layers) and ROUTERS[config.mod_router].learns
    if learns:
        config.mod_router_loss = "gradient"
    return learns


def load_model(arguments: "ModelArguments", *, seed: int) -> tuple[VideoLLMMoDForConditionalGeneration, Any]:
    """
    Return the model to train and its processor.

    Raises:
        `SystemExit`: With one line, if the model or an option is wrong.
    """
    _check_choice(arguments)
    if arguments.load_in_4bit and arguments.checkpoint is None:
        raise SystemExit(
            "--load_in_4bit needs a --checkpoint: save the new model first, with --max_steps 0 in place of "
            "--load_in_4bit."
        )
    with faults_of(_given(arguments)):
        model, processor = _load_model(arguments, seed)
        _check_router_loss(model.config)
        if _has_new_routers(arguments) and teach_routers(model.config):
            logger.warning(
                "The routers are new and learn from the loss's gradient too. --mod_router_loss none trains them as in "
                "the paper."
            )
    if arguments.attn_implementation is not None:
        try:
            model.set_attn_implementation(arguments.attn_implementation)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"error: --attn_implementation {arguments.attn_implementation}: {error}") from None
    return model, processor


def _load_model(arguments: "ModelArguments", seed: int) -> tuple[VideoLLMMoDForConditionalGeneration, Any]:
    options: dict[str, Any] = arguments.config_fields()
    if arguments.model_config is not None:
        return new_model(arguments.model_config, seed=seed, **options)
    if arguments.checkpoint is None:
        parts, options = (arguments.vision_model, arguments.language_model), options | arguments.grid()
        return model_from_parts(*parts, seed=seed, dtype=arguments.dtype, **options)
    if arguments.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=["lm_head", "model.connector", "model.vision_encoder"],
        )
    kind = VideoLLMMoDForConditionalGeneration
    model = load_weights(kind, arguments.checkpoint, dtype=arguments.dtype, **options)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    check_finite(model)
    for name in arguments.config_fields():  # Transformers passes them on to the generation configuration.
        vars(model.generation_config).pop(name, None)
    return model, processor


def choose_parts(model: VideoLLMMoDForConditionalGeneration, arguments: "ModelArguments") -> Any | None:
    """Freeze the parts that do not train, and return the adapter's configuration if the language model gets one."""
    tuned = {
        "vision_encoder": arguments.tune_vision_encoder,
        "connector": arguments.tune_connector,
        "language_model": arguments.tune_language_model == "full",
        "routers": arguments.tune_routers,
    }
    routers = model.model.routers.values()  # in the language model, so they come after it
    for name, is_tuned in tuned.items():
        for part in routers if name == "routers" else [getattr(model.model, name)]:
            part.requires_grad_(is_tuned)
    model.lm_head.requires_grad_(tuned["language_model"])
    if arguments.tune_language_model != "lora":
        return None
    saved = [name for name in ("vision_encoder", "connector") if tuned[name]]
    saved += model.router_names if tuned["routers"] else []
    return model.make_lora_config(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        modules_to_save=saved or None,
    )


def merge_adapter(model: Any) -> Any:
    """
    Return the model with the adapter merged into its weights.

    If the language model is in 4 bits, TRL trains the other parts in bfloat16. They get back the dtype they were
    loaded in, so that the checkpoint has one dtype.
    """
    merged = model.merge_and_unload()
    if getattr(merged, "is_loaded_in_4bit", False):
        dtype = merged.get_input_embeddings().weight.dtype
        for weight in merged.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
    return merged


def new_model(
    config_file: str | Path, *, seed: int = 0, **changes: Any
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """
    Build an untrained model and its processor.

    Args:
        config_file (`str` or `Path`): JSON with `model`, fields of [`VideoLLMMoDConfig`] without token ids and
            vocabulary; `system_prompt`; `vocab_size`, the maximum size of its vocabulary; and perhaps `generation`,
            fields of the generation configuration, such as `max_frames`.
        seed (`int`, *optional*, defaults to 0): Seed of the weights.
        changes: Fields of [`VideoLLMMoDConfig`] to override.

    Raises:
        `ValueError`, `OSError` or `StrictDataclassError`: If the file cannot be read, or has wrong fields.
    """
    config, processor = _plan_new_model(config_file, **changes)
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    set_seed(seed)
    model = VideoLLMMoDForConditionalGeneration(config)
    generation = json.loads(Path(config_file).read_text(encoding="utf-8")).get("generation", {})
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **special, **generation)
    return model, processor


def _plan_new_model(config_file: str | Path, **changes: Any) -> tuple[VideoLLMMoDConfig, VideoLLMMoDProcessor]:
    """Return the configuration and the processor of [`new_model`]."""
    settings = json.loads(Path(config_file).read_text(encoding="utf-8"))
    if missing := [name for name in ("model", "system_prompt", "vocab_size") if name not in settings]:
        raise ValueError(f"it has no `{missing[0]}`: train/configs has files of new models.")
    fields = settings["model"] | changes
    image_size = fields["vision_config"]["image_size"]
    fields.setdefault("frame_token_pooled", None)
    grid = fields["frame_token_pooled"] or (0, 0)
    processor = VideoLLMMoDProcessor(
        VideoLLMMoDVideoProcessor(size={"height": image_size, "width": image_size}),
        new_tokenizer(settings["vocab_size"], settings["system_prompt"]),
        frame_num_tokens=int(fields.get("frame_token_cls", True)) + grid[0] * grid[1],
        system_prompt=settings["system_prompt"],
    )
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # The frame token comes last and is never embedded or predicted: it needs no row.
    fields["text_config"] |= {"vocab_size": processor.frame_token_id, "pad_token_id": tokenizer.pad_token_id} | special
    config = VideoLLMMoDConfig(
        **fields, frame_token_id=processor.frame_token_id, frame_token_interval_id=processor.frame_token_interval_id
    )
    return config, processor


def model_from_parts(
    vision_model: str,
    language_model: str,
    *,
    seed: int = 0,
    dtype: Any = None,
    frame_token_interval: str | None = ",",
    **fields: Any,
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """
    Build a model from a trained vision encoder and a trained language model, with new connector and routers.

    Args:
        vision_model (`str`): An image encoder, with or without a text tower: a folder or a Hub id.
        language_model (`str`): A decoder-only language model: a folder or a Hub id.
        seed (`int`, *optional*, defaults to 0): Seed of the new weights.
        dtype (`torch.dtype`, *optional*): Dtype of all weights. Default: the language model's.
        frame_token_interval (`str`, *optional*, defaults to `","`): Text between frames, or `None`.
        fields: Fields of [`VideoLLMMoDConfig`], such as `mod_layers` or `frame_token_pooled`.
    """
    vision_config = _load_vision_config(vision_model)
    text = load_weights(AutoModelForCausalLM, language_model, dtype=dtype or "auto")
    kind = MODEL_MAPPING[type(vision_config)]
    encoder = load_weights(kind, vision_model, config=vision_config, dtype=text.dtype)
    return join_parts(
        encoder,
        text.base_model,
        text.get_output_embeddings(),
        video_processor=_new_video_processor(vision_config, _find_image_processor(vision_model)),
        tokenizer=AutoTokenizer.from_pretrained(language_model),
        generation_config=text.generation_config,
        seed=seed,
        processor_options={"frame_token_interval": frame_token_interval},
        **fields,
    )


def take_language_model(model: PreTrainedModel, processor: Any, trained: PreTrainedModel, other: Any) -> int:
    """
    Copy the weights of a trained model's language model, which may have another vocabulary. The routers stay new.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model whose weights are replaced.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        trained ([`VideoLLMMoDForConditionalGeneration`]): The model to copy from. Its layers have the same sizes.
        other ([`VideoLLMMoDProcessor`]): Its processor. Tokens of both vocabularies keep their embeddings.

    Returns:
        `int`: Number of tokens whose embeddings were copied.

    Raises:
        `ValueError`: If a weight has another shape.
    """
    into, given = model.model.language_model.state_dict(), trained.model.language_model.state_dict()
    words = [name for name in into if name.endswith("embed_tokens.weight")]
    for name, weight in into.items():
        if name in words or ".router." in name:
            continue
        if name not in given or given[name].shape != weight.shape:
            found = tuple(given[name].shape) if name in given else "missing"
            raise ValueError(f"The language models differ: {name} is {tuple(weight.shape)} here and {found} there.")
        weight.copy_(given[name])
    known = other.tokenizer.get_vocab()
    pairs = [(index, known[token]) for token, index in processor.tokenizer.get_vocab().items() if token in known]
    embeddings = [(model.get_input_embeddings(), trained.get_input_embeddings())]
    if not model.config.text_config.tie_word_embeddings:
        embeddings.append((model.get_output_embeddings(), trained.get_output_embeddings()))
    for new, old in embeddings:
        size, length = len(new.weight), len(old.weight)  # The frame token has no row.
        both = [(index, place) for index, place in pairs if index < size and place < length]
        with torch.no_grad():
            new.weight[[index for index, _ in both]] = old.weight[[place for _, place in both]]
    return len(both)


def _load_vision_config(vision_model: str) -> Any:
    config = AutoConfig.from_pretrained(vision_model)
    config = getattr(config, "vision_config", config)
    if getattr(config, "patch_size", None) is None:
        raise ValueError(f"'{vision_model}' is a {config.model_type}, which has no patches. Give an image encoder.")
    return config


def _new_video_processor(vision_config: Any, image_processor: Any | None) -> VideoLLMMoDVideoProcessor:
    if getattr(vision_config, "image_size", None) is None:
        side = vision_config.patch_size * math.isqrt(vision_config.num_patches)
    else:
        side = vision_config.image_size
    pixels: dict[str, Any] = {"size": {"height": side, "width": side}}
    if image_processor is not None:
        pixels |= {"image_mean": image_processor.image_mean, "image_std": image_processor.image_std}
    return VideoLLMMoDVideoProcessor(**pixels)


def join_parts(
    encoder: PreTrainedModel,
    language_model: PreTrainedModel,
    head: torch.nn.Module,
    *,
    video_processor: VideoLLMMoDVideoProcessor,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    processor_options: dict[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """
    Build a model with the weights of these parts, and new connector and routers.

    Args:
        encoder (`PreTrainedModel`): The vision encoder.
        language_model (`PreTrainedModel`): The decoder layers, without their head.
        head (`torch.nn.Module`): The language model's head.
        video_processor ([`VideoLLMMoDVideoProcessor`]): Makes frames of the encoder's size.
        tokenizer (`PreTrainedTokenizerBase`): The language model's tokenizer.
        generation_config (`GenerationConfig`): The language model's.
        processor_options (`dict[str, Any]`, *optional*): Further arguments of [`VideoLLMMoDProcessor`].
        seed, fields: See [`model_from_parts`].
    """
    text_config = copy.deepcopy(language_model.config)
    # A published configuration may say otherwise than its weights.
    text_config.tie_word_embeddings = head.weight is language_model.get_input_embeddings().weight
    config, processor = _join_configs(
        text_config, encoder.config, video_processor, tokenizer, processor_options, **fields
    )
    set_seed(seed)
    model = VideoLLMMoDForConditionalGeneration._from_config(config, dtype=language_model.dtype)
    model.model.vision_encoder.load_state_dict(encoder.state_dict())
    inner = model.model.language_model
    inner.load_state_dict({**inner.state_dict(), **language_model.state_dict()})  # its routers stay new
    model.lm_head.load_state_dict(head.state_dict())
    model.generation_config = generation_config
    return model, processor


def _join_configs(
    text_config: Any,
    vision_config: Any,
    video_processor: VideoLLMMoDVideoProcessor,
    tokenizer: PreTrainedTokenizerBase,
    processor_options: dict[str, Any] | None = None,
    **fields: Any,
) -> tuple[VideoLLMMoDConfig, VideoLLMMoDProcessor]:
    """Return the configuration and the processor of a model of these parts."""
    if stretches_positions(text_config):
        # Up to the context it is the default rotation, and a stream stays within the context to evict tokens.
        rope = {name: value for name, value in text_config.rope_parameters.items() if name not in ("factor", "type")}
        text_config.rope_parameters = {**rope, "rope_type": "default"}
    fields = {"text_config": text_config, "vision_config": vision_config, **fields}
    processor = VideoLLMMoDProcessor(
        video_processor,
        tokenizer,
        frame_num_tokens=VideoLLMMoDConfig(**fields).frame_num_tokens,
        **(processor_options or {}),
    )
    if text_config.eos_token_id is None or processor.frame_token_interval_id is None:
        # Labels teach silence by the tokenizer's token, and the model reads it by the configuration's.
        text_config.eos_token_id = tokenizer.eos_token_id
    config = VideoLLMMoDConfig(
        frame_token_id=processor.frame_token_id, frame_token_interval_id=processor.frame_token_interval_id, **fields
    )
    return config, processor


def stretches_positions(text_config: Any) -> bool:
    """Return whether rotary positions change once a sequence is longer than `max_position_embeddings`."""
    return (getattr(text_config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"


def _find_image_processor(name: str) -> Any | None:
    try:
        return AutoImageProcessor.from_pretrained(name)
    except OSError:
        logger.warning(f"'{name}' has no image processor: pixels are normalised to [-1, 1].")
        return None


def routing_fields(mod_layers: Any, mod_keep_ratio: Any, mod_router: str | None = None) -> dict[str, Any]:
    """Return the routing fields of [`VideoLLMMoDConfig`], or those of full compute if no routing is given."""
    if isinstance(mod_layers, str):
        mod_layers = layers_of(mod_layers)
    asked = {"mod_layers": mod_layers, "mod_keep_ratio": mod_keep_ratio, "mod_router": mod_router}
    return {name: value for name, value in asked.items() if value is not None} or {"mod_keep_ratio": 1.0}


def layers_of(text: str) -> str | list[int]:
    """Parse layers for the configuration: the name of a scheme, or "1,3,5" as indices."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else text


def new_tokenizer(vocab_size: int, system_prompt: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with one token for each word of StreamWorld and DoomWorld."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(vocab_size, system_prompt)),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=4096,
    )


@lru_cache
def _trained_tokenizer(vocab_size: int, system_prompt: str) -> str:
    """Train the tokenizer of [`new_tokenizer`], which takes four seconds, and return it as JSON."""
    from videollm_mod.train.data.doom.words import sentences
    from videollm_mod.train.data.world.clip import WORLDS
    from videollm_mod.train.data.world.dialogues import KINDS, make_dialogue
    from videollm_mod.train.data.world.events import make_clip

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        # The hard world adds words for what is near.
        for world, count in (("full", 300), ("hard", 100)):
            for seed in range(count):
                yield f"{system_prompt}\n\nUser: \nAssistant: ]\n[\n]\nUser:"
                clip = make_clip(seed, WORLDS[world])
                for kind in KINDS:
                    yield from (f": {message['content']}" for message in make_dialogue(clip, kind)[0])

        yield from (f": {sentence}" for sentence in sentences(100))

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer.to_str()
