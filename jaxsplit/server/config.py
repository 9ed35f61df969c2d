"""The options of the server."""

import dataclasses

from jaxsplit.config import Config, option


@dataclasses.dataclass(frozen=True)
class ServerConfig(Config):
    """How a model is served. See `jaxsplit.config` for what a field becomes."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(8080, "port to listen on; 0: any that is free", low=0, high=65535)
    alias: str | None = option(None, "the model's name in answers (default: the file's)")
    api_key: str | None = option(
        None, "what clients must send as bearer token; several with commas between"
    )
    api_key_file: str | None = option(None, "a file of such keys, one a line")
    ssl_key_file: str | None = option(None, "private key for HTTPS, in PEM format")
    ssl_cert_file: str | None = option(None, "certificate for HTTPS, in PEM format")
    allowed_hosts: str | None = option(
        None,
        "names by which clients may reach the server, with commas between; *: any (default: those "
        "of the loopback interface where --host is on it, else any)",
    )
    cors_origins: str | None = option(
        None, "origins whose pages may use the server, with commas between; *: any (default: none)"
    )
    timeout: float = option(3600.0, "seconds that a request may take", low=0.001)
    max_queue: int = option(256, "texts that may wait to be begun; more are refused (429)", low=1)
    max_connections: int = option(1024, "connections; more are refused (503)", low=1)
    max_body: int = option(16, "MiB of a request", low=1)
    sse_ping_interval: float = option(
        30.0, "seconds without news after which a stream says that it is alive", low=0.01
    )
    reasoning_format: str = option(
        "auto",
        "auto: reasoning is a field of its own, reasoning_content; none: it stays in the text",
        choices=("auto", "none"),
    )
    chat_template_file: str | None = option(
        None, "a file with a Jinja chat template (default: the model's own)"
    )
    chat_template_kwargs: str | None = option(
        None, 'JSON object of variables of the chat template, such as {"enable_thinking": false}'
    )
    metrics: bool = option(True, "serve /metrics, for Prometheus")
    slots_endpoint: bool = option(True, "serve /slots: the requests that run, without texts")
