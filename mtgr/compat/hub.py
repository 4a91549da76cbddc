"""Checkpoints of the Hugging Face hub: files that hold tensors and settings, and never code."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError

# Neither scripts nor anything else that a loader could be made to run.
PATTERNS = ("*.safetensors", "*.json", "*.pt", "*.pth", "*.ckpt", "*.bin", "torch_module/*", "dynamicemb_module/**")

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository_id(text: str) -> bool:
    """Whether ``text`` has the form ``owner/name``."""
    return _REPOSITORY_ID.fullmatch(text) is not None


def download(repository: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """Directory of a repository's files: those that were downloaded before, else from the hub.

    Args:
        repository: ``owner/name``.
        revision: Branch, tag or commit; the default branch if None. Name a commit to get the same files always.
        cache: Where downloads are kept; the hub's own folder by default (``HF_HUB_CACHE``).

    Raises:
        ConfigurationError: If the package is missing, the hub cannot be reached, or there is no such repository.
    """
    try:
        hub: Any = import_module("huggingface_hub")
        errors: Any = import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ConfigurationError(
            f"{repository} is on the Hugging Face hub, but huggingface_hub is not installed; "
            "run `pip install 'huggingface_hub>=0.30,<2'`, or give a path."
        ) from error
    wanted = {"revision": revision, "cache_dir": cache, "allow_patterns": list(PATTERNS)}
    with suppress(errors.LocalEntryNotFoundError, OSError, ValueError):
        return Path(hub.snapshot_download(repository, local_files_only=True, **wanted))
    try:
        return Path(hub.snapshot_download(repository, **wanted))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"{repository} was not downloaded before, and the Hugging Face hub did not give it "
            f"({type(error).__name__}); go online, check its name, or give a path."
        ) from error
