"""Weights on the Hugging Face Hub: `hf://OWNER/NAME@BRANCH`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from dualsm.exchange.weight_files import FILE_NAMES, INDEX, read_json_object
from dualsm.process.errors import UserError
from dualsm.process.paths import local_copy

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^@\s]+))?")
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_TIMEOUT = 20  # seconds


@contextlib.contextmanager
def local_path(weights: str) -> Iterator[Path]:
    """Yields the local path of weights; downloads weights from the Hub or a bucket.

    Args:
      weights: a path, `gs://...`, or `hf://OWNER/NAME`, optionally with `@BRANCH`, a tag or a commit
        (default `main`).

    Raises:
      UserError: if the repository, branch or file does not exist, or the Hub cannot be reached.
    """
    if not weights.startswith(SCHEME):
        with local_copy(weights) as copy:
            yield Path(copy)
        return
    repository, revision = _parse(weights, "--weights")
    yield _download(f"--weights={weights}:", repository, revision)


def list_branches(address: str, flag: str) -> list[str]:
    """Returns the branches of the repository `hf://OWNER/NAME`, sorted.

    Args:
      address: of the repository.
      flag: flag that sets the address, for messages.

    Raises:
      UserError: if the repository does not exist, or the Hub cannot be reached.
    """
    repository, _ = _parse(address, flag)
    prefix = f"{flag}={address}:"
    try:
        info = _model_info(prefix, repository, "main")
    except UserError:
        raise
    except Exception as error:  # the network libraries, and their errors, depend on the version
        raise UserError(
            f"{prefix} cannot reach the Hugging Face Hub ({_reason(error)}); check the network, or download "
            "the branches on another machine and pass the folder that contains them"
        ) from error
    return sorted(branch.name for branch in _hub().HfApi().list_repo_refs(info.id).branches)


def _parse(address: str, flag: str) -> tuple[str, str]:
    """Returns the repository and the revision."""
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise UserError(f"{flag}={address}: must have the form hf://OWNER/NAME or hf://OWNER/NAME@BRANCH")
    return match[1], match[2] or "main"


def _hub():
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            "huggingface_hub is not installed; run pip install 'dualsm[hub]', or download the files"
        ) from error
    return huggingface_hub


def _model_info(prefix: str, repository: str, revision: str):
    """Returns the Hub's description of a revision; raises `UserError` if it does not exist."""
    errors = _hub().errors
    try:
        return _hub().HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
    except errors.HFValidationError as error:
        raise UserError(f"{prefix} {repository} is not a valid repository name; check the name") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{prefix} {repository} has no branch {revision}; check the name") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{prefix} no public repository {repository}; check the name, or log in with `hf auth login`"
        ) from error


def _download(prefix: str, repository: str, revision: str) -> Path:
    """Returns the folder in the cache of the Hub that contains the files of a revision."""
    huggingface_hub = _hub()
    try:
        info = _model_info(prefix, repository, revision)
    except UserError:
        raise
    except Exception as error:  # the network libraries, and their errors, depend on the version
        return _cached(prefix, repository, revision, error)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    found = next((name for name in FILE_NAMES if name in names), None)
    if found is None:
        raise UserError(f"{prefix} contains none of {', '.join(FILE_NAMES)}; choose another branch")
    wanted = [name for name in _SETTINGS if name in names] + [found]
    try:
        for name in wanted:
            path = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
            if name.endswith(INDEX):
                shards = read_json_object(path).get("weight_map", {})
                wanted += sorted(names.intersection(map(str, shards.values())))
    except Exception as error:
        raise UserError(
            f"{prefix} the download of {name} failed ({_reason(error)}); run the same command again"
        ) from error
    return path.parent


def _cached(prefix: str, repository: str, revision: str, error: Exception) -> Path:
    """Returns the folder of an earlier download. Raises `UserError` if there is none."""
    import huggingface_hub

    for name in FILE_NAMES:
        path = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    raise UserError(
        f"{prefix} cannot reach the Hugging Face Hub ({_reason(error)}), and the files were not downloaded "
        "before; check the network, or download them on another machine and pass their folder"
    ) from error


def _reason(error: Exception) -> str:
    """Returns the first line of an error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
