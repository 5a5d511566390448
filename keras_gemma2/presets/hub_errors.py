"""What a hub's library raised, told as one or two sentences with the step to take."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import sys
from collections.abc import Iterator

from keras_gemma2.errors import CheckpointError, HubError

# Names of classes rather than classes: the HTTP library below huggingface_hub changed twice (requests, httpx, httpx2), and
# none of them is imported to explain an error of another.
_UNREACHABLE = {
    "ConnectionError",
    "NetworkError",
    "OfflineModeIsEnabled",
    "ProxyError",
    "RemoteProtocolError",
    "ChunkedEncodingError",
    "Timeout",
    "TimeoutError",
    "TimeoutException",
    "gaierror",
}


@dataclasses.dataclass(frozen=True)
class Access:
    """How a person gets at a model; every error message is made of these.

    Args:
        hub: the hub's name.
        model: the model's name there, with its revision or version.
        page: URL of the model's page, where its terms are accepted.
        log_in: the step that logs in.
        cache_variable: the environment variable that moves the library's cache.
    """

    hub: str
    model: str
    page: str
    log_in: str
    cache_variable: str


@contextlib.contextmanager
def explained(access: Access) -> Iterator[None]:
    """Turns whatever a hub's library raises inside into a `HubError`.

    What the library prints goes to stderr: stdout carries a command's result.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except CheckpointError:
        raise
    except Exception as error:  # the libraries share no base class
        raise HubError(explanation(access, error)) from error


def missing_library(name: str, where: str) -> HubError:
    """The error for an address whose hub's library is not installed."""
    return HubError(f"{where!r} needs the library {name}, which is not installed. Install it with: pip install {name}")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that led to it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        several = getattr(error, "failed_files", None)  # modelscope: one exception for each file that failed
        waiting += list(several.values()) if isinstance(several, dict) else []
        waiting.append(error.__cause__ or error.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception, or one that led to it, carries."""
    for each in chain(error):
        # A failed response of requests is falsy, so `or` would lose it.
        response = getattr(each, "response", None)
        for status in (getattr(response, "status_code", None), getattr(each, "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def is_offline_mode(error: BaseException) -> bool:
    """Whether the user switched the network off, as `HF_HUB_OFFLINE=1` does."""
    return "OfflineModeIsEnabled" in _class_names(error)


def explanation(access: Access, error: BaseException) -> str:
    """One or two sentences: what happened and what to do."""
    names, status = _class_names(error), status_of(error)
    hub, model = access.hub, f"{access.model!r}"
    if "GatedRepoError" in names or status == 403:
        return (
            f"{hub} gives the files of {model} only to those who accepted its terms. Accept them (for Google's models the "
            f"Gemma terms) on {access.page}, then {access.log_in}, with the same account."
        )
    if "RevisionNotFoundError" in names:
        return f"{hub} has no revision {model}. See the branches, tags and commits on {access.page}."
    if status == 401 and "RepositoryNotFoundError" not in names:
        return f"{hub} refused the login for {model} (401): the token is missing, wrong or expired. To log in, {access.log_in}."
    if status in (401, 404) or names & {"RepositoryNotFoundError", "NotExistError"}:
        return (
            f"{hub} has no public model {model}, or not the file asked for. Check the name on {access.page}; if the model is "
            f"private, {access.log_in}."
        )
    if status == 429:
        return f"{hub} gets too many requests from here (429). Wait some minutes; to be allowed more, {access.log_in}."
    if status is not None and status >= 500:
        return f"{hub} has a fault of its own (status {status}). Try again later, or pass a folder that holds the files."
    return _local_explanation(access, error, names)


def _local_explanation(access: Access, error: BaseException, names: set[str]) -> str:
    numbers = {each.errno for each in chain(error) if isinstance(each, OSError)}
    text = " ".join(str(error).split())
    if errno.ENOSPC in numbers or errno.EDQUOT in numbers or "No space left" in text:
        return (
            f"The disk is full: the files of {access.model!r} do not fit. Free some space, or set {access.cache_variable} to a "
            "folder on another disk."
        )
    if is_offline_mode(error):
        return (
            f"The network is switched off (HF_HUB_OFFLINE) and the cache does not hold all files of {access.model!r}. Unset "
            "HF_HUB_OFFLINE once to download them, or pass a folder that holds them."
        )
    if names & _UNREACHABLE or "certificate" in text:
        return (
            f"{access.hub} could not be reached for {access.model!r}: {_root(error)}. Check the network and the proxy "
            f"(HTTPS_PROXY), or pass a folder that holds the files, or point {access.cache_variable} to a cache that has them."
        )
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"The cache cannot be written: {text}. Set {access.cache_variable} to a folder that can."
    return (
        f"{access.hub} gave no files of {access.model!r}: {type(error).__name__}: {_shortened(text)}. Try again, or download them "
        f"from {access.page} and pass their folder."
    )


def _class_names(error: BaseException) -> set[str]:
    return {base.__name__ for each in chain(error) for base in type(each).__mro__}


def _root(error: BaseException) -> str:
    """What the innermost exception says, such as "Connection refused": the outer ones repeat it in longer words."""
    texts = [" ".join(str(each).split()) or type(each).__name__ for each in chain(error)]
    return _shortened(texts[-1])


def _shortened(text: str) -> str:
    return (text if len(text) <= 200 else text[:200] + "...").rstrip(".")
