"""`/v1/models`, `/lora-adapters`, `/v1/embeddings`, `/health`, `/metrics`."""

import asyncio
import base64
import math
from typing import Any

import numpy as np

from jaxsplit.server import schemas
from jaxsplit.server.errors import ApiError
from jaxsplit.server.service import Service


async def health(service: Service) -> schemas.Health:
    """Whether it answers; while it does not, the status is 503."""
    return schemas.Health(status=service.state)  # pyright: ignore[reportArgumentType]


async def models(service: Service) -> schemas.Models:
    """The model that is served, and its adapters."""
    return schemas.Models(data=_models(service))


async def model(service: Service, name: str) -> schemas.Model:
    """The model that is served, or one of its adapters, by its name.

    Raises:
      ApiError: there is no such name.
    """
    found = {model.id: model for model in _models(service)}
    if name not in found:
        known = ", ".join(map(repr, found))
        raise ApiError(
            404, f"there is no model {name!r}; this server has {known}", code="model_not_found"
        )
    return found[name]


async def lora_adapters(service: Service) -> list[schemas.LoraAdapter]:
    """The adapters, by the numbers that requests give."""
    return [
        schemas.LoraAdapter(id=i, name=one.name, path=str(one.path), scale=scale)
        for i, (one, scale) in enumerate(zip(service.lm.adapters, service.lora_scales, strict=True))
    ]


async def set_lora_adapters(service: Service, scales: list[schemas.LoraScale]) -> schemas.Success:
    """Sets the adapters of later requests that choose none: the listed ones, with their scales.

    Raises:
      ApiError: there is no such adapter, or a scale is not finite.
    """
    service.set_lora(scales)
    return schemas.Success()


def _models(service: Service) -> list[schemas.Model]:
    lm, config = service.lm, service.lm.config
    tensors = lm.file.tensors.values()
    meta = schemas.ModelMeta(
        n_vocab=config.vocab,
        n_ctx_train=config.context,
        n_ctx=lm.engine.context,
        n_embd=config.embed,
        n_params=sum(math.prod(tensor.shape) for tensor in tensors),
        size=sum(tensor.nbytes for tensor in tensors),
    )
    names = dict.fromkeys([service.name, *(adapter.name for adapter in lm.adapters)])
    return [schemas.Model(id=name, created=service.started, meta=meta) for name in names]


async def embeddings(service: Service, request: schemas.EmbeddingRequest) -> schemas.Embeddings:
    """A vector of each text: of length 1."""
    lm = service.lm
    if request.dimensions not in (None, lm.config.embed):
        raise ApiError(
            400,
            f"dimensions={request.dimensions}: this model's embeddings have {lm.config.embed}",
            param="dimensions",
        )
    prompts = await service.prompts(request.input, "input")
    if not all(prompts):
        raise ApiError(400, "input has an empty text; give at least one token", param="input")
    service.admit(len(prompts))
    pooling, lora = request.pooling or "mean", service.lora(request)

    def embed(prompt: list[int]) -> np.ndarray:
        return pooled(lm.hidden(prompt, lora=lora), pooling)

    data, read = [], sum(map(len, prompts))
    vectors = await asyncio.gather(*(asyncio.to_thread(embed, prompt) for prompt in prompts))
    for index, vector in enumerate(vectors):
        found: Any = vector.tolist()
        if request.encoding_format == "base64":
            found = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append(schemas.Embedding(index=index, embedding=found))
    usage = schemas.EmbeddingUsage(prompt_tokens=read, total_tokens=read)
    return schemas.Embeddings(data=data, model=service.name, usage=usage)


def pooled(hidden: np.ndarray, pooling: str) -> np.ndarray:
    """One vector of length 1 from those of all tokens.

    Args:
      hidden: float32 `[time, embed]`.
      pooling: `mean`, `last` or `cls`.
    """
    vector = {"mean": hidden.mean(axis=0), "last": hidden[-1], "cls": hidden[0]}[pooling]
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
