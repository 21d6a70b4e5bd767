"""Which argument is a repository on the Hugging Face hub, and the folder that its files are downloaded to."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)  # "user/name", and no path that begins with "."


def is_hub_id(folder: str | os.PathLike[str]) -> bool:
    """Whether an argument names a repository on the hub: a string "user/name", and nothing here has that path."""
    return isinstance(folder, str) and _ID.fullmatch(folder) is not None and not os.path.lexists(folder)


def fetch(folder: str | os.PathLike[str], files: Sequence[str], revision: str | None) -> Path:
    """The folder itself, or for a hub id the folder of huggingface_hub's cache that has the repository's files.

    All files are of one commit. Where the cache has them, only the commit's hash is asked for, and without a connection
    (or with the environment variable HF_HUB_OFFLINE=1) nothing.

    Args:
        folder: a path, or a hub id "user/name" (see `is_hub_id`).
        files: the names of those that the caller may read. No others are downloaded.
        revision: a branch, a tag or the hash of a commit; None is the branch "main".

    Raises:
        ImportError: a hub id, and huggingface_hub is not installed.
        FileNotFoundError: no such repository, revision or file, or the hub cannot be reached and the cache has none.
        ValueError: a revision of what is no hub id.
    """
    if not is_hub_id(folder):
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {os.fspath(folder)!r} is a local path and no hub id 'user/name'"
            )
        return Path(folder)
    missing = f"there is no folder {folder!r}"
    hub = huggingface_hub(f"{missing}; to download it from the Hugging Face hub,")
    at = "" if revision is None else f" at the revision {revision!r}"
    try:
        found = Path(hub.snapshot_download(folder, revision=revision, allow_patterns=list(files)))
    except hub.errors.HFValidationError:
        return Path(folder)
    except hub.errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{missing}, and {folder!r} on the Hugging Face hub has no revision {revision!r}"
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{missing}, and the Hugging Face hub has no repository {folder!r} that you may read: check the name; for "
            "a private or gated one, log in (hf auth login) or set HF_TOKEN"
        ) from error
    except hub.errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{missing}, and {folder!r}{at} is not in the cache {hub.constants.HF_HUB_CACHE} and cannot be downloaded: "
            "connect to the Hugging Face hub and unset HF_HUB_OFFLINE, set HF_HOME to the folder that has the cache, "
            "or give the path of a folder"
        ) from error
    if not any((found / name).is_file() for name in files):
        raise FileNotFoundError(f"{folder!r}{at} on the Hugging Face hub has none of the files {', '.join(files)}")
    return found


def huggingface_hub(purpose: str) -> Any:
    """The package. Raises ImportError, which begins with `purpose`, where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(f"{purpose} the package huggingface_hub is needed: pip install 'adapter-ops[hub]'") from error
    return huggingface_hub
