"""The command line of generation: `python -m jaxsplit.generate`."""

import codecs
import os
import re
import sys
from pathlib import Path

from absl import flags

from jaxsplit.cli.program import note, progress_bar, text_alone_on_stdout
from jaxsplit.errors import JaxsplitError

_DTYPES = ("bfloat16", "float16", "float32")

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "GGUF file (any one of a model in several) or checkpoint directory (default: demo model)",
)
_PROMPT = flags.DEFINE_string("prompt", None, "the prompt; \\n, \\t and \\\\ are escapes")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "read the prompt from a file; -: stdin")
_CHAT = flags.DEFINE_bool("chat", False, "put the prompt into the model's chat template")
_SYSTEM = flags.DEFINE_string("system", None, "system message, with --chat; escapes as in --prompt")
_SPECIAL = flags.DEFINE_bool("special", False, "special tokens may be written in the prompt")
_SHOW_SPECIAL = flags.DEFINE_enum(
    "show_special",
    "template",
    ["template", "all", "none"],
    "special tokens that the text shows: those with which the model's chat template marks thinking "
    "and tool calls, all, or none",
)
_N_PREDICT = flags.DEFINE_integer("n_predict", -1, "tokens to generate; -1: until the text ends")
_STOP = flags.DEFINE_multi_string(
    "stop", [], "end the text before this string (can be repeated); escapes as in --prompt"
)
_CTX_SIZE = flags.DEFINE_integer(
    "ctx_size",
    None,
    "tokens of context, at most as many as the model was trained for; 0: all of these (default: at "
    "most 4096)",
)

_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "randomness; 0: always the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 40, "choose among the k likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "choose among the likeliest that reach this probability")
_MIN_P = flags.DEFINE_float(
    "min_p", 0.05, "drop tokens less likely than this part of the likeliest"
)
_REPEAT = flags.DEFINE_float("repeat_penalty", 1.0, "make recent tokens unlikelier; 1: off")
_FREQUENCY = flags.DEFINE_float("frequency_penalty", 0.0, "subtracted for each recent occurrence")
_PRESENCE = flags.DEFINE_float("presence_penalty", 0.0, "subtracted if a token occurred recently")
_LAST_N = flags.DEFINE_integer("repeat_last_n", 64, "how many tokens are recent; -1: all")
_SEED = flags.DEFINE_integer(
    "seed", None, "same seed, same text, on any mesh; -1: random (default)"
)

_SPLIT_MODE = flags.DEFINE_string(
    "split_mode",
    "graph",
    "graph: every device works on a part of every layer; layer: on some of the layers; row: on "
    "some rows of every matrix; none: one device; auto: what should be fastest and fits",
)
_AUTO = flags.DEFINE_bool("auto", False, "the same as --split_mode=auto")
_MESH = flags.DEFINE_string(
    "mesh", None, "shape, such as tensor:4 or stage:2,tensor:2 (default: all devices)"
)
_TENSOR_SPLIT = flags.DEFINE_string(
    "tensor_split", None, "shares of the devices, such as 3,1 (default: by free memory, or alike)"
)
_DEVICES = flags.DEFINE_integer("devices", None, "use only the first so many devices")
_MAIN_DEVICE = flags.DEFINE_integer("main_device", 0, "which device, with --split_mode=none")
_WEIGHTS = flags.DEFINE_string(
    "weights", "quantized", f"keep them as in the file, or dequantize to {', '.join(_DTYPES)}"
)
_DTYPE = flags.DEFINE_string(
    "dtype", "auto", f"of activations: auto (what the devices are best at), {', '.join(_DTYPES)}"
)
_ACTIVATIONS = flags.DEFINE_string(
    "activations",
    "auto",
    "of decoding, in products with quantized matrices: float, int8, or auto (where it is fast)",
)
_PROMPT_DTYPE = flags.DEFINE_string(
    "prompt_dtype",
    "auto",
    "of prompts, in products with quantized matrices: auto (as --dtype) or float8 (faster from "
    "compute capability 8.9 on, less exact)",
)
_REDUCE_DTYPE = flags.DEFINE_string(
    "reduce_dtype",
    "auto",
    "in which devices exchange partial sums; auto: float32, but bfloat16 in prompts of that dtype",
)
_PEER_ACCESS = flags.DEFINE_bool(
    "peer_access",
    True,
    "kernels of several GPUs exchange numbers by writing to one another's memory, where they can; "
    "off: through NCCL and the host",
)
_CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype", "auto", f"of keys and values: {', '.join(_DTYPES)}, int8; auto: as --dtype"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, if there are several that Slurm, Open MPI or "
    "Kubernetes has not started",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
_BLOCK = flags.DEFINE_integer(
    "decode_block",
    None,
    "tokens decoded on the devices before the text is printed (default: as many as take a tenth of "
    "a second, at most 32)",
    lower_bound=1,
)
_COMPILE_CACHE = flags.DEFINE_string(
    "compilation_cache", "auto", "folder of compiled programs; auto: the user's cache; none: off"
)
_QUIET = flags.DEFINE_bool("quiet", False, "only the text and errors")


def _prompt() -> str:
    if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
        raise JaxsplitError("--prompt and --prompt_file are both given; leave one out")
    if _PROMPT_FILE.value is not None:
        return _decoded(_read_prompt_file(_PROMPT_FILE.value))
    if _PROMPT.value is None:
        raise JaxsplitError('no prompt is given; use --prompt="..." or --prompt_file=FILE')
    return _unescaped(_PROMPT.value)


def _read_prompt_file(path: str) -> bytes:
    try:
        if path != "-":
            return Path(path).expanduser().read_bytes()
        if sys.stdin is None:
            raise JaxsplitError("--prompt_file=-: standard input is closed")
        return sys.stdin.buffer.read()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JaxsplitError(f"--prompt_file={path} cannot be read: {reason}") from None


def _decoded(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; U+FFFD for other bytes."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig", "replace")


def _unescaped(text: str) -> str:
    meant = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda escape: meant[escape[1]], text)


def _use_compilation_cache() -> None:
    """Keeps compiled programs, unless the environment already says where."""
    if _COMPILE_CACHE.value == "none" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax
    import platformdirs

    folder = _COMPILE_CACHE.value
    if folder == "auto":
        folder = platformdirs.user_cache_dir("jaxsplit", appauthor=False)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _note(message: str) -> None:
    if not _QUIET.value:
        note(message)


def _agree(prompt: str | None) -> str:
    """Makes process 0's flags hold in all, but for those about its machine; returns its prompt."""
    from jaxsplit.sharding import from_first

    own = {_MODEL.name, _PROMPT_FILE.name, _COMPILE_CACHE.name, _PROCESS_ID.name, _QUIET.name}
    values = {
        flag.name: flag.value
        for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
        if flag.name not in own
    }
    values, prompt = from_first((values, prompt))
    for name, value in values.items():
        flags.FLAGS[name].value = value
    return prompt


def main(_: list[str]) -> None:
    """Generates text as the flags say."""
    _use_compilation_cache()
    import jax

    import jaxsplit
    from jaxsplit.sharding import launcher, start_processes

    if _PROCESS_ID.value is not None or launcher():
        text_alone_on_stdout()
    several = start_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    leads = not several or jax.process_index() == 0
    prompt = _prompt() if leads else None
    if _SEED.value in (None, -1):
        flags.FLAGS[_SEED.name].value = int.from_bytes(os.urandom(4), "little")
    if several:
        prompt = _agree(prompt)
    if not leads:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        flags.FLAGS[_QUIET.name].value = True
    sys.stdout.reconfigure(errors="replace")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise JaxsplitError("--system needs --chat")
    sampling = jaxsplit.SamplingConfig(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repeat_penalty=_REPEAT.value,
        frequency_penalty=_FREQUENCY.value,
        presence_penalty=_PRESENCE.value,
        repeat_last_n=_LAST_N.value,
        seed=_SEED.value,
    )
    with progress_bar("loading", quiet=_QUIET.value) as progress:
        lm = jaxsplit.load(
            _MODEL.value,
            split_mode="auto" if _AUTO.value else _SPLIT_MODE.value,
            devices=_DEVICES.value,
            mesh=_MESH.value,
            tensor_split=_TENSOR_SPLIT.value,
            main_device=_MAIN_DEVICE.value,
            weights=_WEIGHTS.value,
            dtype=_DTYPE.value,
            activations=_ACTIVATIONS.value,
            prompt_dtype=_PROMPT_DTYPE.value,
            reduce_dtype=_REDUCE_DTYPE.value,
            peer_access=_PEER_ACCESS.value,
            cache_dtype=_CACHE_DTYPE.value,
            ctx_size=_CTX_SIZE.value,
            progress=progress,
        )
    prompt_ids: str | list[int] = prompt
    if _CHAT.value:
        system = [] if _SYSTEM.value is None else [_unescaped(_SYSTEM.value)]
        messages = [{"role": "system", "content": text} for text in system]
        prompt_ids = lm.chat_prompt([*messages, {"role": "user", "content": prompt}])
    stream = lm.stream(
        prompt_ids,
        _N_PREDICT.value,
        stop=[_unescaped(stop) for stop in _STOP.value],
        parse_special=_SPECIAL.value,
        show_special=_SHOW_SPECIAL.value,
        block=_BLOCK.value,
        sampling=sampling,
    )
    _note(lm.describe())
    if not _CHAT.value:
        print(prompt, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    _note(f"[{stream.stop_reason}]  load {lm.load_seconds:.2f} s | {stream.timings()}")
