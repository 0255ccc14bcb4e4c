# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Language models that write text for data: a local one, or one behind an endpoint, both with a cache of replies."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from videollm_mod.space.checkpoint_faults import load_weights
from videollm_mod.train.endpoint import Endpoint, EndpointError, NoReplyError
from videollm_mod.train.reply_cache import Reply, ReplyCache


Conversation = Sequence[Mapping[str, str]]
# Requests in a row without a reply, after which an endpoint is given up.
_MOST_FAILURES = 20


class Writer(Protocol):
    """What writes text: [`LocalWriter`] or [`EndpointWriter`]."""

    name: str

    def write(self, conversations: Iterable[tuple[Any, Conversation]]) -> Iterator[tuple[Any, Reply | str]]:
        """
        Yield the key of each conversation with its reply, or with the reason why it has none, in any order.

        Args:
            conversations (iterable of `tuple[Any, Conversation]`): Keys and conversations. They are taken as needed.

        Raises:
            [`EndpointError`]: If no further conversation can have a reply. What was yielded before is in the cache.
        """
        ...


class LocalWriter:
    """
    A language model of Transformers with a chat template.

    Args:
        name (`str`): A folder or a Hub id.
        max_tokens (`int`, *optional*, defaults to 2048): Number of tokens after which a reply is cut.
        temperature (`float`, *optional*, defaults to 0.0): Temperature of sampling. 0 takes the likeliest tokens.
        batch_size (`int`, *optional*, defaults to 8): Conversations that are written together.
        device (`str`, *optional*, defaults to `"auto"`): Device, or `"auto"` to spread the model over all GPUs.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
        cache (`str` or `Path`, *optional*): Folder that keeps each reply.

    Raises:
        `ValueError` or `OSError`: If the model cannot be loaded, or if it has no chat template.
    """

    def __init__(
        self,
        name: str,
        *,
        max_tokens: int = 2048,
        temperature: float = 0.0,
        batch_size: int = 8,
        device: str = "auto",
        dtype: str = "auto",
        cache: str | Path | None = None,
    ) -> None:
        self.name, self.batch_size = name, batch_size
        self.options = {"max_tokens": max_tokens, "temperature": temperature}
        self.cache = None if cache is None else ReplyCache(cache)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            self.model = load_weights(AutoModelForCausalLM, name, dtype=dtype, device_map=device).eval()
        except (ValueError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The language model '{name}' cannot be loaded: {reason}") from None
        if self.tokenizer.chat_template is None:
            raise ValueError(f"'{name}' has no chat template. Choose a model that is tuned for instructions.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def write(self, conversations: Iterable[tuple[Any, Conversation]]) -> Iterator[tuple[Any, Reply | str]]:
        """Yield the key of each conversation with its reply (see [`Writer`])."""
        todo: list[tuple[Any, dict[str, Any]]] = []
        for key, conversation in conversations:
            request = {"model": self.name, "messages": list(conversation), **self.options}
            reply = None if self.cache is None else self.cache.find(request)
            if reply is not None:
                yield key, reply
                continue
            todo.append((key, request))
            if len(todo) == self.batch_size:
                yield from self._write_new(todo)
                todo = []
        if todo:
            yield from self._write_new(todo)

    def _write_new(self, todo: list[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[Any, Reply | str]]:
        replies = self._generate([request["messages"] for _, request in todo])
        for (key, request), reply in zip(todo, replies, strict=True):
            if self.cache is not None and isinstance(reply, Reply):
                self.cache.keep(request, reply)
            yield key, reply

    @torch.inference_mode()
    def _generate(self, batch: list[Conversation]) -> list[Reply | str]:
        texts = [self.tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in batch]
        counts = [len(self.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = None if room is None else room - self.options["max_tokens"]
        fits = [longest is None or count <= longest for count in counts]
        replies = iter(self._generate_texts([text for text, fit in zip(texts, fits, strict=True) if fit]))
        return [next(replies) if fit else "prompt too long for the language model" for fit in fits]

    def _generate_texts(self, texts: list[str]) -> list[Reply]:
        if not texts:
            return []
        temperature = self.options["temperature"]
        chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            # A batch is sampled in the same way in each run.
            torch.manual_seed(0)
            chosen = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(self.model.device)
        padding = {"pad_token_id": self.tokenizer.pad_token_id}
        output = self.model.generate(**inputs, max_new_tokens=self.options["max_tokens"], **chosen, **padding)
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        is_cut = ~torch.isin(new, torch.tensor(ends)).any(dim=1)
        said = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [Reply(text, cut) for text, cut in zip(said, is_cut.tolist(), strict=True)]


class EndpointWriter:
    """
    A language model behind an endpoint, asked by several threads.

    Args:
        endpoint ([`Endpoint`]): The endpoint, with its cache.
        max_tokens (`int`, *optional*, defaults to 2048): Number of tokens after which a reply is cut.
        temperature (`float`, *optional*, defaults to 0.0): Temperature of sampling.
        concurrency (`int`, *optional*, defaults to 8): Requests at the same time.
    """

    def __init__(
        self, endpoint: Endpoint, *, max_tokens: int = 2048, temperature: float = 0.0, concurrency: int = 8
    ) -> None:
        self.name, self.endpoint, self.concurrency = endpoint.model, endpoint, concurrency
        self.options = {"max_tokens": max_tokens, "temperature": temperature}

    def write(self, conversations: Iterable[tuple[Any, Conversation]]) -> Iterator[tuple[Any, Reply | str]]:
        """Yield the key of each conversation with its reply, as the replies come (see [`Writer`])."""
        rest, num_asked, failures = iter(conversations), 0, 0
        asked: Queue[tuple[Any, Conversation] | None] = Queue()
        replies: Queue[tuple[Any, Reply | Exception]] = Queue()
        ended = Event()
        # A program that is interrupted would wait for the threads of a pool: minutes, if the endpoint hangs.
        for _ in range(self.concurrency):
            Thread(target=self._ask_all, args=(asked, replies, ended), daemon=True).start()
        try:
            while True:
                for request in islice(rest, 2 * self.concurrency - num_asked):
                    asked.put(request)
                    num_asked += 1
                if not num_asked:
                    return
                key, reply = replies.get()
                num_asked -= 1
                if isinstance(reply, Exception) and not isinstance(reply, NoReplyError):
                    raise reply
                failures = 0 if isinstance(reply, Reply) else failures + 1
                yield key, reply if isinstance(reply, Reply) else "no reply from the endpoint"
                if failures == _MOST_FAILURES:
                    where = self.endpoint.base_url
                    raise EndpointError(f"{where} gave no reply {failures} times in a row, the last time: {reply}")
        finally:
            ended.set()
            for _ in range(self.concurrency):
                asked.put(None)

    def _ask_all(self, asked: Queue, replies: Queue, ended: Event) -> None:
        """Ask for replies until there is nothing left to ask."""
        while (request := asked.get()) is not None and not ended.is_set():
            key, conversation = request
            try:
                replies.put((key, self.endpoint.reply(list(conversation), **self.options)))
            except Exception as error:  # the other thread raises it
                replies.put((key, error))
