"""Serve a model over HTTP, to OpenAI's clients and to those of llama-server.

  jaxsplit serve --model=FILE.gguf
  jaxsplit serve --model=FILE.gguf --host=0.0.0.0 --api_key_file=KEYS

A page to chat is at the address that it prints; /openapi.json describes the
endpoints. Sampling flags are defaults, for requests that say nothing else.
"""

import logging
from typing import TYPE_CHECKING

from absl import flags

from jaxsplit.cli import options
from jaxsplit.cli.processes import Processes
from jaxsplit.cli.program import interrupts_raise, local_model, note, progress_bar
from jaxsplit.config import LoadConfig, SamplingConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.server.config import ServerConfig

if TYPE_CHECKING:
    from jaxsplit.llm import LM

GROUPS = {
    "model": "Model",
    "host": "Server",
    "n_predict": "Text",
    "coordinator": "Several processes",
    "compilation_cache": "Program",
    **options.GROUPS,
}

_MODEL = options.define_model()
_SERVER = options.define(ServerConfig)
_LOAD = options.define(LoadConfig)
_SAMPLING = options.define(SamplingConfig, skip=["logit_bias", "logprobs"], seed=-1)
_N_PREDICT = flags.DEFINE_integer(
    "n_predict", -1, "tokens of an answer at most; -1: until it ends", lower_bound=-1
)
_PROCESSES = Processes()
_COMPILE_CACHE = options.define_compilation_cache()
_QUIET = flags.DEFINE_bool("quiet", False, "no progress bar")


def main(_: list[str]) -> None:
    """Serves as the flags say."""
    try:
        import msgspec  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise JaxsplitError(
            f"{error.name} is not installed; pip install 'jaxsplit[server]' installs all that the "
            "server needs"
        ) from None
    options.use_compilation_cache(_COMPILE_CACHE.value)
    import jax

    several = _PROCESSES.start()
    if several:
        own = [_MODEL.name, _COMPILE_CACHE.name, _QUIET.name]
        _PROCESSES.agree(__name__, own)
    config = ServerConfig(**options.values(_SERVER))
    sampling = SamplingConfig(**options.values(_SAMPLING))
    load_config = LoadConfig(**options.values(_LOAD))
    import jaxsplit
    from jaxsplit.llm import demo_model
    from jaxsplit.server.run import Server
    from jaxsplit.server.service import Service

    model = str(demo_model()) if _MODEL.value is None else local_model(_MODEL.value)

    def load() -> "tuple[LM, str]":
        with progress_bar("loading", quiet=_QUIET.value) as progress:
            return jaxsplit.load(model, config=load_config, progress=progress), model

    if several and jax.process_index():
        load()[0].follow()
        return
    service = Service(
        config, sampling, n_predict=_N_PREDICT.value, random_seeds=_SAMPLING["seed"].value == -1
    )
    log = logging.getLogger("jaxsplit.server")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(logging.StreamHandler())  # to standard error
    with interrupts_raise():
        server = Server(service, load)
        note(f"listening on {server.url}")
        server.run()
