"""Files of a Hugging Face repository: one question for the commit and its file names, then single files on demand.

Every file comes from that one commit. Without network the local cache answers, and says that it does.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from qscope_jax.files.errors import (
    AccessError,
    OfflineError,
    RateLimitError,
    RevisionError,
    SourceError,
    SourceNotFoundError,
)
from qscope_jax.files.folder import list_files

T = TypeVar("T")
log = logging.getLogger(__name__)
_ATTEMPTS = 4
_LONGEST_WAIT = 30.0


@dataclasses.dataclass(frozen=True)
class HubRepo:
    """One commit of a repository. `complete` is False where `listing` holds only what the cache happens to have."""

    repo: str
    asked: str
    commit: str
    listing: tuple[str, ...]
    complete: bool

    def names(self) -> tuple[str, ...]:
        return self.listing

    def has(self, name: str) -> bool:
        return name in self.listing

    def fetch(self, name: str) -> Path:
        import huggingface_hub

        if not self.complete:
            return self._from_cache(name)
        if not self.has(name):
            raise SourceNotFoundError(f"{self.repo} at {self.commit[:12]} has no file {name!r}")
        # By the name that was asked first: so the cache learns that name and can answer it offline later.
        for revision in dict.fromkeys((self.asked, self.commit)):
            path = Path(
                _patiently(self, name, lambda r=revision: huggingface_hub.hf_hub_download(self.repo, name, revision=r))
            )
            if self.commit in path.parts:
                return path
        raise SourceError(f"{self.repo}: {name} came from another commit than {self.commit}; try again.")

    def _from_cache(self, name: str) -> Path:
        import huggingface_hub

        path = huggingface_hub.try_to_load_from_cache(self.repo, name, revision=self.commit)
        if isinstance(path, str):
            return Path(path)
        raise OfflineError(
            f"{self.repo} at {self.commit[:12]}: {name} is not in the local cache and the hub cannot be asked. "
            f"Run once online: hf download {self.repo} {name} --revision {self.commit}"
        )


def open_repo(repo: str, revision: str | None) -> HubRepo:
    """Asks the hub which commit `revision` is and what it holds; without network, asks the cache.

    Raises:
        SourceNotFoundError, RevisionError, AccessError, RateLimitError, OfflineError: told apart by what the hub says.
    """
    import huggingface_hub

    asked = revision or "main"
    if huggingface_hub.is_offline_mode():
        return _cached_repo(repo, asked, "HF_HUB_OFFLINE is set")
    here = HubRepo(repo, asked, "", (), True)
    try:
        info = _patiently(here, None, lambda: huggingface_hub.HfApi().model_info(repo, revision=asked, timeout=10))
    except (OfflineError, RateLimitError) as error:
        why = "it limits requests" if isinstance(error, RateLimitError) else "it does not answer"
        found = _cached_repo(repo, asked, why)
        log.warning("%s Using the cached commit %s.", error, found.commit[:12])
        return found
    if info.sha is None:
        raise SourceError(f"{repo}: the hub did not say which commit {asked!r} is; try again or name a commit.")
    names = tuple(sorted(s.rfilename for s in info.siblings or ()))
    return dataclasses.replace(here, commit=info.sha, listing=names)


def _cached_repo(repo: str, asked: str, why: str) -> HubRepo:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = cache / "refs" / asked
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else asked
    snapshot = cache / "snapshots" / commit
    if snapshot.is_dir():
        return HubRepo(repo, asked, commit, list_files(snapshot), False)
    held = sorted(p.name for p in (cache / "snapshots").iterdir()) if (cache / "snapshots").is_dir() else []
    hint = f" The cache holds: {', '.join(f'{repo}@{c}' for c in held[:3])}." if held else ""
    raise OfflineError(
        f"{repo}@{asked} is not in the local cache and the hub cannot be asked ({why}).{hint} "
        f"Run once online (hf download {repo}), or name a local folder."
    )


def _patiently(place: HubRepo, name: str | None, ask: Callable[[], T]) -> T:
    """Calls `ask`, waits and asks again on "too many requests" a bounded number of times, and names other failures."""
    from huggingface_hub import errors

    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except (_transport(), errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
            limited = _limited(error)
            if limited is None:
                _explain(place, name, error)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(min(limited if limited > 0 else 2.0**attempt, _LONGEST_WAIT))
    raise RateLimitError(
        f"{place.repo}: the hub still answers 429 (too many requests) after {_ATTEMPTS} attempts. "
        "Wait some minutes, or log in (hf auth login): named users have higher limits."
    )


def _limited(error: BaseException) -> float | None:
    """Seconds that a 429 asks us to wait (0 where it names none); None for every other error."""
    at: BaseException | None = error
    while at is not None:  # the download call wraps the answer in "not found in the cache"
        response = getattr(at, "response", None)
        if response is not None and response.status_code == 429:
            after = str(response.headers.get("Retry-After", "0"))
            return float(after) if after.isdigit() else 0.0
        at = at.__cause__
    return None


def _explain(place: HubRepo, name: str | None, error: Exception) -> NoReturn:
    from huggingface_hub import errors

    repo, what = place.repo, f"{name} of {place.repo}" if name else place.repo
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        raise AccessError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in (hf auth login "
            "or HF_TOKEN)."
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise SourceNotFoundError(
            f"{repo} is not a repository on the hub, or is private. Check the spelling (owner/name); for a private one "
            f"log in (hf auth login or HF_TOKEN); for a local folder write ./{repo}."
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise RevisionError(
            f"{repo} has no revision {place.asked!r}: expected a branch, a tag or a full commit; "
            f"see https://huggingface.co/{repo}/commits/main"
        ) from error
    if isinstance(error, errors.LocalEntryNotFoundError) or (status is None and isinstance(error, _transport())):
        raise OfflineError(
            f"{what} is not in the local cache and the hub does not answer ({_first_line(error)}). "
            "Check the connection, or name a local folder."
        ) from error
    if isinstance(error, errors.EntryNotFoundError):
        raise SourceNotFoundError(f"{repo} at {place.commit[:12] or place.asked} has no file {name!r}") from error
    if isinstance(error, errors.HFValidationError):
        raise SourceNotFoundError(f"{repo!r} is not a repository name: {_first_line(error)}") from error
    if status in (401, 403):
        raise AccessError(f"The hub refuses {what} ({status}): log in (hf auth login), or renew HF_TOKEN.") from error
    if isinstance(error, ConnectionError | TimeoutError) or (status or 0) >= 500:
        raise OfflineError(f"The hub does not answer for {what} ({_first_line(error)}).") from error
    raise SourceError(f"{what} could not be read from the hub: {_first_line(error)}") from error


def _transport() -> type[Exception]:
    """The base of the HTTP client's errors: of httpx or httpx2, by the version of huggingface_hub."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
