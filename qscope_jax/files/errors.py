"""What can go wrong between a source's name and a file on this disk, one class per thing a person would do about it."""

from pathlib import PurePosixPath


class SourceError(OSError):
    """A source, or a file of it, cannot be had; the message says what was looked for and what to do."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """No such folder, repository or file."""


class AccessError(SourceError, PermissionError):
    """The place exists, but these credentials may not read it (gated, private, forbidden)."""


class RevisionError(SourceError, FileNotFoundError):
    """The repository exists, the revision does not."""


class OfflineError(SourceError, ConnectionError):
    """The network is off or the other side does not answer, and the local cache lacks what was asked for."""


class RateLimitError(SourceError, ConnectionError):
    """The other side answered "too many requests" more often than we are willing to wait."""


class UnsafeNameError(SourceError, ValueError):
    """A file name that would leave the source's own folder."""


def checked_name(name: str) -> str:
    """Returns `name` as a relative POSIX path; refuses one that leaves its folder (other people's JSON holds them).

    Raises:
        UnsafeNameError: for an empty or absolute name, and one that holds `..`, a backslash, a drive letter or NUL.
    """
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":"
    if not path.parts or path.is_absolute() or ".." in path.parts or drive or "\\" in name or "\0" in name:
        raise UnsafeNameError(
            f"{name!r} is not a file name inside a source: expected a relative path such as 'model.safetensors', "
            "without '..', a leading '/' or backslashes. If an index file names it, that file is damaged or hostile."
        )
    return path.as_posix()
