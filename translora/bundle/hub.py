"""Where a base model lies: a directory here, or a snapshot of a hub's model, which is downloaded when it is missing."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path, PurePath

from translora.errors import InputError
from translora.run.redact import first_line

HUB_TIMEOUT_SECONDS = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*", "adapter_*"]


def locate(model: str, with_code: bool, revision: str | None) -> tuple[str, Path, str | None]:
    """Name, directory and commit (of the hub alone) of a base; raises InputError when there is none."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        if revision is not None:
            raise InputError(f"{model}: a directory, and `revision` is of a model on the hub; leave {revision} out")
        return name_of_path(os.path.abspath(path)), Path(path), None
    if os.path.exists(path):
        raise InputError(f"{model}: a file; give a model directory (convert GGUF or other single files first)")
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such directory; give a model directory or a hub id (owner/name)")
    snapshot = _find_on_hub(model, with_code, revision)
    return model, snapshot, snapshot.name


def name_of_path(path: str) -> str:
    """The last component of a base's path or hub id; the hub id's for a snapshot in the hub's cache."""
    parts = PurePath(path).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rsplit("--", 1)[-1]
    return parts[-1] if parts else path


@functools.cache
def _find_on_hub(model: str, with_code: bool, wanted: str | None) -> Path:
    """Download a hub model's config, safetensors and tokenizer, or take them from the hub's cache when offline.

    Asked once a process, which so keeps to one commit. Python files only `with_code`.

    A fault boundary: which errors the hub's client lets through depends on its version's HTTP library.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    advice = "give a local directory with config.json and *.safetensors, or an id that this machine can reach"
    revision, refusal = None, "no answer"
    try:
        # snapshot_download asks for the revision without a time limit, so it is asked for here.
        revision = HfApi().model_info(model, revision=wanted, timeout=HUB_TIMEOUT_SECONDS).sha
    except GatedRepoError as error:
        raise InputError(f"{model}: the hub asks for permission to download it; accept its terms and log in") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{model}: has no revision {wanted!r} on the hub; give a commit, a tag or a branch") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{model}: neither a directory here nor a model on the hub; {advice}") from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refusal = f"HTTP status {status}" if status else refusal
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision or wanted,
                local_files_only=revision is None,
                allow_patterns=[*_HUB_FILES, *(["*.py"] if with_code else [])],
                ignore_patterns=_HUB_IGNORED,
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        )
    except Exception as error:
        if revision is None:
            raise InputError(
                f"{model}: not a directory here, not in the hub's cache, and the hub cannot be reached ({refusal}); "
                f"{advice}"
            ) from error
        reason = first_line(error)
        raise InputError(f"{model}: the download from the hub failed ({reason}); run again, or {advice}") from error
