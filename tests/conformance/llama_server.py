"""A pytest plugin: llama.cpp's tests of its server start jaxsplit's, with a tiny random model.

docs/conformance.md says how to run it. Texts of llama.cpp's model are not compared; tests of what
jaxsplit does not have are skipped.
"""

import tempfile
import threading
from pathlib import Path

import pytest
import utils  # llama.cpp's
from serving import wait_until_ready
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.config import SamplingConfig
from jaxsplit.server import chat, completions, llama, service
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.run import Server

FOLDER = Path(tempfile.mkdtemp())
MODEL = write_tiny_model(FOLDER / "tiny.gguf", context=8192)
NOT_APPLICABLE = (
    *("backend_sampling", "enable_ctx_shift", "gcp_compat", "lora_files", "mcp_servers_config"),
    *("mcp_servers_json", "media_path", "mmproj_url", "model_draft", "model_tags", "models_dir"),
    *("models_preset", "no_ui", "server_reranking", "server_tools", "sleep_idle_seconds"),
    *("slot_save_path", "spec_type", "ui_mcp_proxy"),
)
LOADED: dict[tuple[int, int], jaxsplit.LM] = {}


def loaded(slots: int, context: int) -> jaxsplit.LM:
    if (slots, context) not in LOADED:
        options = {"slots": slots, "ctx_size": context, "cache_tokens": slots * context}
        LOADED[slots, context] = jaxsplit.load(MODEL, devices=1, dtype="float32", **options)
    return LOADED[slots, context]


def start(self: utils.ServerProcess, timeout_seconds: int = 60) -> None:
    if found := [name for name in NOT_APPLICABLE if getattr(self, name)]:
        pytest.skip(f"not applicable: {found[0]}")
    slots, context = self.n_slots or 4, self.n_ctx or 4096
    lm = loaded(slots, context if self.kv_unified else context // slots)
    template, options = self.chat_template_file, {}
    if self.chat_template not in (None, "chatml"):  # chatml is the tiny model's own
        if " " not in self.chat_template:
            pytest.skip("not applicable: a template by its name")
        template = str(FOLDER / "template.jinja")
        Path(template).write_text(self.chat_template)
    if self.reasoning in ("on", "off"):
        thinking = "true" if self.reasoning == "on" else "false"
        options["chat_template_kwargs"] = f'{{"enable_thinking": {thinking}}}'
    config = ServerConfig(
        port=0,
        alias=self.model_alias,
        api_key=self.api_key,
        chat_template_file=template,
        reasoning_format="none" if self.reasoning_format == "none" else "auto",
        cors_origins=self.cors_origins,
        metrics=bool(self.server_metrics),
        slots_endpoint=bool(self.server_slots),
        **options,
    )
    sampling = SamplingConfig(seed=self.seed, temperature=self.temperature)
    state = service.Service(config, sampling, self.n_predict or -1, random_seeds=False)
    self.jaxsplit = Server(state, lambda: (lm, "tiny.gguf"))
    self.thread = threading.Thread(target=self.jaxsplit.run, daemon=True)
    self.thread.start()
    self.server_port = int(self.jaxsplit.url.rpartition(":")[2])
    utils.server_instances.add(self)
    wait_until_ready(self.jaxsplit)


def stop(self: utils.ServerProcess) -> None:
    if self in utils.server_instances:
        utils.server_instances.discard(self)
        self.jaxsplit.stop()
        self.thread.join(30)


utils.ServerProcess.start, utils.ServerProcess.stop = start, stop
utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.match_regex = lambda *_: True
for module in (service, chat, completions, llama):
    module.FINGERPRINT = "b0-jaxsplit"  # the tests expect llama.cpp's form
