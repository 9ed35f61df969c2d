"""Models by name: `owner/repo` or `owner/repo:type`, fetched from the Hugging Face Hub.

Files are kept in the cache of `huggingface_hub`, which other programs share.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import user_path

DEFAULT_TYPE = "Q4_K_M"
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<type>[\w./-]+))?", re.ASCII)
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_TYPE = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*?|TQ\d_\d|MXFP4\w*?|NVFP4|BF16|FP?16|FP?32))(?=[-./]|$)",
    re.IGNORECASE | re.ASCII,
)
_NO_MODELS = ("mmproj", "imatrix")  # parts of the names of other files
_TIMEOUT = 10.0  # seconds


def find_model(path: str | os.PathLike[str], name: str = "the path") -> Path:
    """The path of a model: a local one, or that of files which are fetched if they are not cached.

    Args:
      path: a path, which wins if something is there; or `owner/repo` of the Hub, where `:type` may
        follow: the type of the weights as file names have it, in any case, or a file's name.
        Without it, the file of type Q4_K_M, or the only one.
      name: the flag or argument, for messages.

    Raises:
      JaxsplitError: the Hub cannot be reached, or has no such model, or several, or refuses it.
    """
    local = user_path(path, name)
    found = _NAME.fullmatch(os.fspath(path))
    is_file = found is None or (found["type"] is None and local.suffix.lower() == ".gguf")
    if found is None or is_file or os.path.lexists(local):
        return local
    return _fetch(found["repo"], found["type"])


def choose_files(repo: str, names: Sequence[str], wanted: str | None) -> list[str]:
    """The files of one model, in their order.

    Args:
      repo: `owner/repo`, for messages.
      names: of the repository's files.
      wanted: type of the weights, or a file's name; None: the default.

    Raises:
      JaxsplitError: there is none or more than one, or a part of it is missing.
    """
    models = _models(names)
    if not models:
        raise JaxsplitError(
            f"{repo} has no GGUF files; models as GGUF files are often in repositories whose names "
            "end with -GGUF"
        )
    kind = wanted or DEFAULT_TYPE
    types = {model: _type(model) for model in models}
    chosen = [model for model in models if kind in (model, *models[model])]
    chosen = chosen or [m for m in models if (types[m] or "").lower() == kind.lower()]
    bounded = re.compile(rf"(?:^|[-./]){re.escape(kind)}(?:[-./]|$)", re.IGNORECASE)
    chosen = chosen or [m for m in models if bounded.search(m.removesuffix(".gguf"))]
    if not chosen and wanted is None and len(models) == 1:
        chosen = [*models]
    if not chosen:
        known = ", ".join(sorted({type or model for model, type in types.items()}))
        raise JaxsplitError(
            f"{repo} has no model of type {kind}; choose one of {known}, as in "
            f"model={repo}:{next(iter(types.values())) or next(iter(models))}"
        )
    if len(chosen) > 1:
        raise JaxsplitError(
            f"{repo} has several models of type {kind}: {', '.join(sorted(chosen))}; give the "
            f"file's name, as in model={repo}:{chosen[0]}"
        )
    files = models[chosen[0]]
    part = _SPLIT.fullmatch(files[0])
    if part and len(files) != int(part["count"]):
        raise JaxsplitError(
            f"{repo} has {len(files)} of the {int(part['count'])} files of {chosen[0]}; choose "
            "another type or repository"
        )
    return files


def _models(names: Sequence[str]) -> dict[str, list[str]]:
    """The files of each model, by its file's name without the number of a part."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        base = name.rpartition("/")[2].lower()
        if base.endswith(".gguf") and not any(other in base for other in _NO_MODELS):
            part = _SPLIT.fullmatch(name)
            models.setdefault(f"{part['stem']}.gguf" if part else name, []).append(name)
    return models


def _type(name: str) -> str | None:
    """The type of the weights in a file's name, or in that of its folder."""
    folder, _, base = name.removesuffix(".gguf").rpartition("/")
    found = _TYPE.findall(base) or _TYPE.findall(folder)
    return found[-1] if found else None


def _fetch(repo: str, wanted: str | None) -> Path:
    """The path of a model's first file, all of whose files are in the cache then."""
    hub = _library(repo)
    try:
        with _errors(repo):
            info = hub.HfApi(library_name="jaxsplit").model_info(repo, timeout=_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
    except _Unreachable as error:
        cached = _cached(hub, repo)
        if not cached:
            raise
        try:
            return cached[choose_files(repo, [*cached], wanted)[0]]
        except JaxsplitError as missing:
            raise JaxsplitError(f"{missing} (of the files in the cache, since {error})") from None
    paths = []
    for name in choose_files(repo, names, wanted):
        with _errors(repo):
            paths.append(hub.hf_hub_download(repo, name, library_name="jaxsplit"))
    return Path(paths[0])


def _library(repo: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise JaxsplitError(
            f"no such file: {repo}; to fetch models by name, install huggingface_hub with: "
            "pip install 'jaxsplit[hub]'"
        ) from None
    return huggingface_hub


def _cached(hub: ModuleType, repo: str) -> dict[str, Path]:
    """The files in the cache, of the newest version there, by their names in the repository."""
    with contextlib.suppress(hub.CacheNotFound):
        for found in hub.scan_cache_dir().repos:
            if found.repo_id == repo and found.repo_type == "model" and found.revisions:
                newest = max(found.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
                root = newest.snapshot_path
                files = (file.file_path for file in newest.files)
                return {path.relative_to(root).as_posix(): path for path in files}
    return {}


class _Unreachable(JaxsplitError):
    """The Hub does not answer."""


@contextlib.contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Turns what the library raises into one line.

    Raises:
      JaxsplitError: the repository is missing, private or gated, or the disk is at fault.
      _Unreachable: the Hub does not answer, or says that it cannot.
    """
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise JaxsplitError(
            f"{repo} is gated: accept its terms on {where}/{repo}, and log in with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise JaxsplitError(
            f"no such file: {repo}; nor is there such a model on {where}, or it is private: then "
            "log in with: hf auth login"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        kind = _Unreachable if status >= 500 or status == 429 else JaxsplitError
        raise kind(f"{where} refuses {repo} with HTTP status {status}; try again later") from None
    except OSError as error:
        if error.errno is not None:
            raise JaxsplitError(
                f"{repo} cannot be written to {constants.HF_HUB_CACHE}: {error.strerror}; free the "
                "disk, or set HF_HOME to another directory"
            ) from None
        raise _unreachable(where, repo, error) from None
    except Exception as error:  # of httpx, httpx2 or requests, whichever the library uses
        raise _unreachable(where, repo, error) from None


def _unreachable(where: str, repo: str, error: Exception) -> _Unreachable:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return _Unreachable(
        f"no such file: {repo}; nor can it be fetched from {where} ({reason}); check the network, "
        "or give a GGUF file"
    )
