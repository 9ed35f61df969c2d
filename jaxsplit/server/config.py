"""The options of the server."""

import dataclasses

from jaxsplit.config import Config, option


@dataclasses.dataclass(frozen=True)
class ServerConfig(Config):
    """How a model is served. See `jaxsplit.config` for what a field becomes."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(8080, "port to listen on; 0: any that is free", low=0, high=65535)
    alias: str | None = option(None, "the model's name in answers (default: the file's)")
    api_key: str | None = option(None, "key that clients must send; several are comma-separated")
    api_key_file: str | None = option(None, "a file of such keys, one per line")
    ssl_key_file: str | None = option(None, "private key for HTTPS, in PEM format")
    ssl_cert_file: str | None = option(None, "certificate for HTTPS, in PEM format")
    allowed_hosts: str | None = option(
        None,
        "host names that the server answers to, comma-separated; *: any (default: localhost and "
        "its addresses where --host is one of them, else any)",
    )
    cors_origins: str | None = option(
        None, "web origins that may use the server, comma-separated; *: any (default: none)"
    )
    timeout: float = option(3600.0, "seconds that a request may take", low=0.001)
    max_queue: int = option(
        256, "completions that may wait in the queue; more are refused (429)", low=1
    )
    max_connections: int = option(1024, "connections; more are refused (503)", low=1)
    max_body: int = option(16, "largest body of a request, in MiB", low=1)
    sse_ping_interval: float = option(
        30.0, "send a keep-alive comment in a stream after this many idle seconds", low=0.01
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
