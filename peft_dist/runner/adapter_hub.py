"""Adapters from the Hugging Face Hub, through its own client: HF_TOKEN, offline mode, cache and progress are its."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_files import CONFIG_NAME, PICKLE_NAME, SAFETENSORS_NAME

# The root of the exceptions of whichever HTTP library this release of the client uses.
_HttpError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def download(repo: str, revision: str | None, allow_pickle: bool) -> Path:
    """Folder of the repository's adapter files in the Hub's cache, fetched unless they are there already.

    Raises:
        AdapterError: no such repository or revision, no access to it, no network and not in the cache, or the
            repository holds no adapter.
    """
    where = f"adapter {repo}@{revision}" if revision else f"adapter {repo}"
    try:
        folder = _snapshot(repo, revision, SAFETENSORS_NAME)
        if allow_pickle and not (folder / SAFETENSORS_NAME).exists():
            folder = _snapshot(repo, revision, PICKLE_NAME)
    except (_HttpError, OSError, ValueError) as error:
        raise AdapterError(f"{where} {_explain(error)}") from error
    if not (folder / CONFIG_NAME).exists():
        raise AdapterError(f"{where} holds no {CONFIG_NAME} on the Hub: give a repository that PEFT's save wrote")
    return folder


def _snapshot(repo: str, revision: str | None, weights: str) -> Path:
    return Path(snapshot_download(repo, revision=revision, allow_patterns=[CONFIG_NAME, weights]))


def _explain(error: Exception) -> str:
    match error:
        case GatedRepoError():
            return "is gated on the Hub: ask for access on its page, then set HF_TOKEN"
        case RevisionNotFoundError():
            return "has no such revision on the Hub: correct what follows the @"
        case RepositoryNotFoundError():
            return "is neither a local folder nor on the Hub, or it is private: correct the id, or set HF_TOKEN"
        case HFValidationError():
            return f"is neither a local folder nor a valid Hub id ({error}): correct it"
        case LocalEntryNotFoundError() if isinstance(error.__cause__, OfflineModeIsEnabled):
            return "is not in the Hub's cache, and HF_HUB_OFFLINE is set: download it once online, or unset that"
        case HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return "was refused by the Hub: check that HF_TOKEN is valid and may read it"
        case LocalEntryNotFoundError():
            return f"is not in the Hub's cache, and the Hub cannot be reached ({error.__cause__}): check the network"
    return f"cannot be downloaded ({type(error).__name__}: {error}): check the network, HF_ENDPOINT and the disk"
