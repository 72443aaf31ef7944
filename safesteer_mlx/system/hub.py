"""What is fetched from the Hugging Face Hub, the model and the data set that the user named, and what is put there when
the user says so; nothing else."""

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import read_json, user_path
from .screen import UserError

DATASETS = "hf://datasets/"


def prepare(offline: bool = False) -> None:
    """Set the Hub library's environment, which it reads once, when it is imported.

    No telemetry and no update check; with `offline`, or HF_HUB_OFFLINE=1, no connection at all. A UserError if this
    process may open too few files.
    """
    for library in ("HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))  # as mlx-lm does, when it is imported
    except (ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        raise UserError(f"only {most} files may be open at once, and mlx-lm wants 4096; raise `ulimit -n`") from None


def is_offline() -> bool:
    """Whether no connection may be made."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def model_folder(name: str, revision: str | None = None, with_code: bool = False) -> Path:
    """The snapshot of a model repository, downloaded or from the cache; its `.py` files only with `with_code`. A
    UserError says what kept it from being fetched, and what helps."""
    from huggingface_hub import snapshot_download

    with _explained("model", name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=_fetched(with_code)))


def _fetched(with_code: bool) -> list[str]:
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    return [pattern for pattern in DEFAULT_ALLOW_PATTERNS if with_code or pattern != "*.py"]


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """A model's folder, or what the Hub's cache holds of it, perhaps not all; None if it is not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (folder := user_path(name)).is_dir():
        return folder
    patterns = _fetched(with_code=False)  # asked for more than was ever fetched, the library finds no snapshot
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns))
    except (LocalEntryNotFoundError, ValueError):
        return None


def is_here(name: str, revision: str | None = None) -> bool:
    """Whether all weights of a model are on this machine: in its folder, or in the Hub's cache."""
    if (folder := local_folder(name, revision)) is None:
        return False
    try:
        shards = {*folder.glob("*.safetensors")}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = {folder / shard for shard in read_json(index, str(index), "")["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(shards) and all(shard.is_file() for shard in shards)


def headers(name: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """A model's config.json, and (type, shape) of its tensors from the heads of its weight files. A UserError says what
    kept them from being fetched, and what helps."""
    with _explained("model", name, revision):
        from huggingface_hub import HfApi, constants, hf_hub_download

        config = json.loads(Path(hf_hub_download(name, "config.json", revision=revision)).read_text("utf-8"))
        files = HfApi(constants.ENDPOINT).get_safetensors_metadata(name, revision=revision).files_metadata.values()
        return config, {t: (i.dtype, tuple(i.shape)) for file in files for t, i in file.tensors.items()}


def dataset_file(address: str) -> Path:
    """The local copy of hf://datasets/ORG/NAME[@REVISION][/FILE]; FILE is train.jsonl if left out. A UserError if it is
    no such address, or as `fetch`."""
    parts = address.removeprefix(DATASETS).split("/", 2)
    if not address.startswith(DATASETS) or len(parts) < 2 or not all(parts):
        raise UserError(f"data {address} is no data set's address; write it {DATASETS}ORG/NAME/FILE")
    organisation, (name, _, revision) = parts[0], parts[1].partition("@")
    repository, file = f"{organisation}/{name}", parts[2] if len(parts) > 2 else "train.jsonl"
    return fetch(repository, file, revision or None)


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """The local copy of a data set's file, from the cache or the Hub; a UserError says what kept it from being fetched,
    and what helps."""
    with _explained("data set", repository, revision, file):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))


def licence(name: str) -> str | None:
    """The licence that a model's page names, if the page can be had."""
    from huggingface_hub import HfApi, constants

    try:
        data = HfApi(constants.ENDPOINT).model_info(name).card_data
        return None if data is None else data.get("license")
    except Exception:  # offline, gone, gated: the card goes without
        return None


def upload(folder: Path, name: str, public: bool) -> str:
    """Make a model repository, private unless `public`, and put the files of a folder into it; its address. One that is
    there already must be empty, and private unless `public`. A UserError says what kept it from being made or filled,
    and what helps."""
    _set_up()
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model {name} cannot be uploaded offline; leave out --offline and HF_HUB_OFFLINE")
    api = HfApi(constants.ENDPOINT)
    try:
        try:
            api.create_repo(name, private=not public)
        except errors.HfHubHTTPError as error:
            # One that is there and empty is an upload's that broke off.
            if error.response.status_code != 409 or set(api.list_repo_files(name)) - {".gitattributes"}:
                raise
            if not (public or api.model_info(name).private):
                raise UserError(
                    f"model {name} is on the Hub already, for all to see; make it private there, add --public or give "
                    f"another --name; what was to be uploaded is in {folder}"
                ) from None
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="safesteer-mlx export")
    except UserError:
        raise
    except Exception as error:  # httpx's, the Hub's and the system's errors share no base class but this
        first = (str(error).splitlines() or [type(error).__name__])[0][:150].rstrip(". ")
        status = getattr(getattr(error, "response", None), "status_code", None)
        unwelcome = "may not be made with your token; `hf auth login` with one that may write there"
        reason = {
            401: unwelcome,
            403: unwelcome,
            409: "exists on the Hub already; give another --name",
            429: "was not taken because the Hub limits your requests; wait some minutes and try again",
        }.get(status, f"could not be uploaded ({first}); try again later")
        if isinstance(error, errors.HFValidationError):
            reason = "is no name that the Hub allows; give letters, digits, dots and dashes"
        raise UserError(f"model {name} {reason}; what was to be uploaded is in {folder}") from None
    return f"{constants.ENDPOINT}/{name}"


def _set_up() -> None:
    """No progress bars where there is no terminal, and no waiting for ever for a server that does not answer."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        session = get_session()
    except Exception as error:  # a proxy that is none: httpx and what it calls raise what they like
        raise UserError(
            f"the proxy in http_proxy, https_proxy or all_proxy cannot be used ({error!s:.80}); correct or unset it"
        ) from None
    if _patient not in session.event_hooks["request"]:
        session.event_hooks = {**session.event_hooks, "request": [*session.event_hooks["request"], _patient]}


def _patient(request: Any) -> None:
    """Some of the library's requests ask for no timeout at all; those get the one that others have."""
    from huggingface_hub import constants

    own = request.extensions.get("timeout", {})
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    request.extensions["timeout"] = {kind: own.get(kind) or seconds for kind in ("connect", "read", "write", "pool")}


@contextmanager
def _explained(what: str, name: str, revision: str | None, file: str = "") -> Iterator[None]:
    """Whatever the Hub's library raises inside becomes one sentence."""
    _set_up()
    try:
        yield
    except Exception as error:  # httpx's, the Hub's and the system's errors share no base class but this
        reason = _reason(error, what, name, revision, file)
        raise UserError(f"{what} {name}{f' at revision {revision}' if revision else ''} {reason}") from None


def _reason(error: Exception, what: str, name: str, revision: str | None, file: str) -> str:
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in chain)

    statuses = [e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)]
    url = f"{constants.ENDPOINT}/{'datasets/' if what == 'data set' else ''}{name}"
    if isinstance(error, errors.HFValidationError):
        there = "neither a folder here nor a Hub id" if what == "model" else "no Hub id"
        return f"is {there} like org/name; check the name"
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return f"does not fit on the disk of {constants.HF_HUB_CACHE}; free some space or set HF_HOME to another disk"
    if caused_by(errors.GatedRepoError):
        return f"is gated; accept the licence at {url}, then `hf auth login`"
    if caused_by(errors.RevisionNotFoundError):
        return f"was not found on the Hub; choose one of the branches, tags and commits at {url}/tree/main"
    if caused_by(errors.RemoteEntryNotFoundError):
        return f"has no file {file or 'of that name'}; see {url}/tree/{revision or 'main'} for its files"
    if caused_by(errors.RepositoryNotFoundError):
        there = "neither a folder here nor a repository on the Hub" if what == "model" else "no data set on the Hub"
        return f"is {there} that you may read; check the name, or `hf auth login` if it is private"
    if 401 in statuses:
        return "was not given out because the Hub refuses your token; `hf auth login` with a valid one, or log out"
    if 403 in statuses:
        return f"may not be read with your token; ask for access at {url}, then `hf auth login`"
    if 429 in statuses:
        return "was not given out because the Hub limits your requests; wait some minutes and try again"
    if statuses and statuses[0] >= 500:
        return f"cannot be fetched because the Hub has trouble (HTTP {statuses[0]}); try again later"
    if constants.HF_HUB_OFFLINE:
        return "is not in the local cache as a whole, and offline nothing is fetched; run once online or give a folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "is not in the local cache as a whole and the Hub cannot be reached; check the name and the connection"
    return f"could not be downloaded as a whole ({type(error).__name__}); run it again, what has arrived is kept"
