"""The model, and what the endpoints share: its state, prompts, sampling, names."""

import asyncio
import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxsplit import __version__
from jaxsplit.config import SamplingConfig
from jaxsplit.conversation import EncodedTexts
from jaxsplit.errors import JaxsplitError
from jaxsplit.llm import LM
from jaxsplit.paths import os_errors, user_path
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.errors import ApiError
from jaxsplit.server.metrics import Metrics
from jaxsplit.server.running import Running, Waker
from jaxsplit.server.schemas import LoraScale, PromptDetails, SamplingFields, Timings, Usage
from jaxsplit.text import ChatTemplate, Grammar

FINGERPRINT = f"jaxsplit-{__version__}"

_LONG_TEXT = 20_000
"""Characters from which on a text is encoded on a thread of its own."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "mirostat": (0,),
    "min_keep": (0, 1),
    "n_keep": (0, -1),
    "n_discard": (0,),
    "n_indent": (0,),
    "post_sampling_probs": (False,),
}
"""Fields of llama.cpp for samplers that there are not, and the values that switch these off."""

_WITHOUT = (
    "xtc_threshold",
    "dynatemp_exponent",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "mirostat_tau",
    "mirostat_eta",
)
"""Fields that have no effect while the samplers above are off."""

_SAMPLERS = ("penalties", "top_k", "top_p", "min_p", "temperature")
"""The order in which tokens are chosen; llama.cpp's others are off."""

_OFF = {"dry", "top_n_sigma", "typ_p", "typical_p", "xtc", "adaptive_p", "infill"}


@dataclasses.dataclass
class Service:
    """What the endpoints share.

    Attributes:
      config: of the server.
      sampling: what requests do not say.
      n_predict: tokens of an answer at most, where a request does not say.
      random_seeds: requests without a seed get one each; else all have that of `sampling`.
      state: `loading`, `ok` or `draining`.
      metrics: counters.
      active: requests that run.
      started: when the server started, in seconds since 1970.
    """

    config: ServerConfig
    sampling: SamplingConfig
    n_predict: int = -1
    random_seeds: bool = True
    state: str = "loading"
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    active: set[Running] = dataclasses.field(default_factory=set)
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._lm: LM | None = None
        self._waker: Waker | None = None
        self._lora_scales: dict[str, float] | None = None
        self.path = self.name = ""
        self.variables = _json_object(self.config.chat_template_kwargs)
        self.template_source: str | None = None
        if self.config.chat_template_file is not None:
            file = user_path(self.config.chat_template_file, "chat_template_file")
            with os_errors(file):
                self.template_source = file.read_text("utf-8", "replace")
            ChatTemplate(self.template_source)  # an invalid one is refused now

    # Life

    def set_model(self, lm: LM, path: str) -> None:
        """Hands the model over, once it is loaded.

        Args:
          lm: the model.
          path: its file.
        """
        self.path, self.name = path, self.config.alias or Path(path).stem
        if self.template_source is not None:
            own = ChatTemplate.from_metadata(dict(lm.file.metadata) | _AS_TEMPLATE)
            self._template = ChatTemplate(self.template_source, own.bos_token, own.eos_token)
        else:
            try:
                self._template = ChatTemplate.from_metadata(lm.file.metadata)
            except JaxsplitError as error:
                self._template = error
        self.texts = EncodedTexts(lm.tokenizer)
        self.metrics.watch(lm)
        self._lm = lm

    def set_ready(self) -> None:
        """Begins to answer."""
        self.state = "ok"

    @property
    def lm(self) -> LM:
        """The model.

        Raises:
          ApiError: it is being loaded.
        """
        if self.state == "loading" or self._lm is None:
            raise ApiError(503, "the model is being loaded; try again later", headers=_LATER)
        return self._lm

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
          JaxsplitError: the model has none, or an invalid one.
        """
        if isinstance(self._template, JaxsplitError):
            raise self._template
        return self._template

    @property
    def template_or_none(self) -> ChatTemplate | None:
        """The chat template, if there is a valid one."""
        return None if isinstance(self._template, JaxsplitError) else self._template

    # Tokens

    def token_bytes(self, id: int) -> bytes:
        """A token's bytes, special ones as in the vocabulary."""
        return self.lm.tokenizer.decode_bytes([id], show_special="all", continuation=True)

    def token_text(self, id: int) -> str:
        """A token's text; bytes that are not UTF-8 as OpenAI writes them."""
        data = self.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    # Prompts

    async def encode(self, text: str, **options: Any) -> list[int]:
        """A text's ids, encoded without holding up others."""
        encode = functools.partial(self.lm.tokenizer.encode, text, **options)
        return await asyncio.to_thread(encode) if len(text) > _LONG_TEXT else encode()

    async def prompts(self, given: str | Sequence[Any], field: str = "prompt") -> list[list[int]]:
        """The prompts of a field: a text, ids, a list of texts and ids (one prompt, if there is an
        id in it), or a list of prompts.

        Args:
          given: the field's value.
          field: its name.

        Raises:
          ApiError: it is none of these.
        """
        if isinstance(given, str):
            return [await self.encode(given, parse_special=True)]
        if not given:
            raise ApiError(400, f"{field} is an empty list; give at least one token", param=field)
        if any(type(one) is int for one in given):
            return [await self._mixed(given, field)]
        found = []
        for one in given:
            if not isinstance(one, str | list) or any(isinstance(x, list) for x in one):
                raise ApiError(
                    400,
                    f"{field} must be text, a list of token ids, or a list of these",
                    param=field,
                )
            found += await self.prompts(one, field)
        return found

    async def _mixed(self, given: Sequence[Any], field: str) -> list[int]:
        """Ids of one prompt of ids and texts."""
        ids: list[int] = []
        for one in given:
            if isinstance(one, str):
                ids += await self.encode(one, add_special=not ids, parse_special=True)
            elif type(one) is int:
                ids.append(one)
            else:
                raise ApiError(
                    400, f"{field} has {one!r:.40}; token ids and texts are expected", param=field
                )
        return ids

    async def compiled(self, grammar: Grammar | None) -> Grammar | None:
        """The same grammar, compiled without holding up others.

        Raises:
          JaxsplitError: it is invalid.
        """
        if grammar is not None:
            await asyncio.to_thread(self.lm.check_grammar, grammar)
        return grammar

    # Generations

    def lora(self, fields: Any) -> dict[str, float] | None:
        """The adapters that a request chooses: by `lora`, or by its model's name; else those of the
        server.

        Raises:
          ApiError: there is no adapter of that number.
        """
        if (given := getattr(fields, "lora", None)) is not None:
            return self._chosen(given)
        model = getattr(fields, "model", None)
        own = {one.name: one.scale for one in self.lm.adapters if one.name == model != self.name}
        return own or self._lora_scales

    def set_lora(self, given: Sequence[LoraScale]) -> None:
        """Chooses the adapters of requests that do not.

        Raises:
          ApiError: there is no adapter of that number, or a scale is not finite.
        """
        self._lora_scales = self._chosen(given)

    @property
    def lora_scales(self) -> list[float]:
        """What each adapter has in requests that do not choose."""
        adapters, scales = self.lm.adapters, self._lora_scales
        return [one.scale if scales is None else scales.get(one.name, 0.0) for one in adapters]

    def _chosen(self, given: Sequence[LoraScale]) -> dict[str, float]:
        adapters = self.lm.adapters
        for one in given:
            if one.id >= len(adapters):
                raise ApiError(
                    400,
                    f"lora has the id {one.id}; the server has {len(adapters)} adapters, "
                    "numbered from 0: see /lora-adapters",
                    param="lora",
                )
            if not math.isfinite(one.scale):
                raise ApiError(400, f"lora has the scale {one.scale}", param="lora")
        return {adapters[one.id].name: one.scale for one in given}

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        fields: SamplingFields,
        *,
        n_predict: int | None,
        copies: int = 1,
        **options: Any,
    ) -> Running:
        """Begins to generate.

        Args:
          prompts: token ids.
          fields: how tokens are chosen.
          n_predict: tokens of each answer at most; None: the server's default.
          copies: answers to each prompt, with seeds that differ.
          **options: more of `LM.submit`.

        Raises:
          ApiError, JaxsplitError: a prompt is too long, too many wait, or a value does not suit.
        """
        lm = self.lm
        for prompt in prompts:
            if len(prompt) >= lm.engine.context and n_predict != 0:
                raise ApiError(
                    400,
                    f"the prompt of {len(prompt)} tokens exceeds the available context size of "
                    f"{lm.engine.context} tokens, which must hold the answer, too; shorten it, or "
                    "start the server with a larger --ctx_size",
                    kind="exceed_context_size_error",
                    code="context_length_exceeded",
                    n_prompt_tokens=len(prompt),
                    n_ctx=lm.engine.context,
                )
        self.admit(len(prompts) * copies)
        sampling = self.sampling_config(fields)
        timeout = self.config.timeout
        if fields.t_max_predict_ms is not None:
            timeout = min(timeout, fields.t_max_predict_ms / 1000)
        generations = []
        try:
            for prompt in prompts:
                for i in range(copies):
                    own = dataclasses.replace(sampling, seed=((sampling.seed or 0) + i) % 2**32)
                    generations.append(
                        lm.submit(
                            prompt,
                            self.n_predict if n_predict is None else n_predict,
                            sampling=own,
                            stop=fields.stop or None,
                            stop_ids=fields.stop_token_ids or (),
                            ignore_eos=bool(fields.ignore_eos),
                            priority=fields.priority or 0,
                            share_prefix=fields.cache_prompt is not False,
                            timeout=timeout,
                            lora=self.lora(fields),
                            **options,
                        )
                    )
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        if self._waker is None:
            self._waker = Waker(asyncio.get_running_loop())
        running = Running(generations, self._waker, copies)
        self.active.add(running)
        return running

    def admit(self, count: int) -> None:
        """Checks that some more texts may be begun.

        Raises:
          ApiError: the server is ending, or too many wait.
        """
        if self.state == "draining":
            raise ApiError(503, "the server is ending; try again later", headers=_LATER)
        most = self.config.max_queue
        waiting = sum(
            not generation.request.timings.started
            for running in self.active
            for generation in running.generations
        )
        if count > most:
            raise ApiError(
                400, f"this asks for {count} texts at once; at most {most} may wait (--max_queue)"
            )
        if waiting + count > most:
            raise ApiError(
                429,
                f"{waiting} texts are waiting, at most {most} may (--max_queue); try again later",
                headers={"Retry-After": "1"},
            )

    def end(self, running: Running) -> None:
        """Ends what has begun, finished or not, and counts it."""
        running.cancel()
        if running in self.active:
            self.active.discard(running)
            for generation in running.generations:
                self.metrics.count(generation)

    def sampling_config(self, fields: SamplingFields) -> SamplingConfig:
        """How a request chooses tokens.

        Raises:
          ApiError: a field asks for a sampler that there is not.
          JaxsplitError: a value is out of range.
        """
        for name, values in _NEUTRAL.items():
            value = getattr(fields, name)
            if value is not None and value not in values:
                _refuse(name, value)
        if fields.samplers is not None:
            known = [name for name in fields.samplers if name not in _OFF]
            if known != [name for name in _SAMPLERS if name in known]:
                raise ApiError(
                    400,
                    f"samplers={fields.samplers} is not supported: their order is "
                    f"{', '.join(_SAMPLERS)}",
                    param="samplers",
                )
        given = {
            field.name: getattr(fields, field.name)
            for field in dataclasses.fields(SamplingConfig)
            if getattr(fields, field.name, None) is not None
            and field.name not in ("logit_bias", "logprobs")
        }
        if (seed := given.get("seed")) is not None:
            given["seed"] = seed if seed == -1 else seed % 2**32
        elif self.random_seeds:
            given["seed"] = -1
        if fields.logit_bias:
            given["logit_bias"] = self._bias(fields.logit_bias)
        return SamplingConfig.of(given, self.sampling)

    def _bias(self, given: dict[str, float] | list[tuple[int | str, float | bool]]) -> Any:
        """Biases by token id: OpenAI's object, or llama.cpp's pairs, of which false forbids a
        token, and a text stands for all of its tokens."""
        pairs = list(given.items()) if isinstance(given, dict) else given
        bias: dict[int, float] = {}
        for token, value in pairs:
            amount = -math.inf if value is False else float(value)
            if isinstance(token, str) and not (isinstance(given, dict) and token.isdigit()):
                ids = self.lm.tokenizer.encode(token, add_special=False)
            else:
                ids = [int(token)]
            bias |= dict.fromkeys(ids, amount)
        return bias

    # Accounts

    def usage(self, running: Running) -> Usage:
        """Tokens of a request; a prompt of several answers counts once."""
        requests = [g.request for g in running.generations]
        first = requests[:: running.copies]
        read = sum(len(request.spec.prompt) for request in first)
        generated = sum(len(request.tokens) for request in requests)
        cached = sum(max(request.cached_tokens, 0) for request in first)
        return Usage(
            prompt_tokens=read,
            completion_tokens=generated,
            total_tokens=read + generated,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )

    @staticmethod
    def timings(running: Running, index: int = 0) -> Timings:
        """Times of one generation."""
        request = running.generations[index].request
        t, cached = request.timings, max(request.cached_tokens, 0)
        read, generated = len(request.spec.prompt) - cached, len(request.tokens)
        prompt = max(t.first_token - t.started, 0.0) * 1e3
        predicted = max(t.last_token - t.first_token, 0.0) * 1e3
        steps = max(generated - 1, 0)  # the first token comes with the prompt
        return Timings(
            cache_n=cached,
            prompt_n=read,
            prompt_ms=prompt,
            prompt_per_token_ms=prompt / read if read else 0.0,
            prompt_per_second=1e3 * read / prompt if prompt else 0.0,
            predicted_n=generated,
            predicted_ms=predicted,
            predicted_per_token_ms=predicted / steps if steps else 0.0,
            predicted_per_second=1e3 * steps / predicted if predicted else 0.0,
        )


_LATER = {"Retry-After": "5"}

_AS_TEMPLATE = {"tokenizer.chat_template": "-"}
"""Metadata of a model without a template, for the texts of its BOS and EOS."""


def _refuse(name: str, value: Any) -> NoReturn:
    raise ApiError(400, f"{name}={value} is not supported; leave it out", param=name)


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise JaxsplitError(f"chat_template_kwargs={text} is not a JSON object")
    return found
