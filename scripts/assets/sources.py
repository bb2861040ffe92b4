"""Where the training text comes from: Debian documentation packages, by name and licence, and how to fetch them.

Every source exists in (nearly) all eight languages and shares section names between them, so that a section can be
held out in every language at once. Needs `apt-get` and `dpkg` (Debian 12, or a container of it).
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

LANGS = ("en", "zh", "ru", "ko", "ja", "de", "fr", "es")
_DEBIAN_SUFFIX = {"en": "en-us", "zh": "zh-cn"}
_CAMPAIGNS = (
    "did",
    "dm",
    "dw",
    "ei",
    "httt",
    "l",
    "low",
    "nr",
    "sof",
    "sota",
    "sotbe",
    "thot",
    "trow",
    "tsg",
    "ttb",
    "utbs",
)
_SKIP = ("png", "jpg", "webp", "ogg", "pdf", "map", "svg", "js")


@dataclass(frozen=True)
class Source:
    name: str  # the `source` field of the corpus rows
    kind: str  # what sort of text it is
    licence: str
    packages: tuple[str, ...]


def _per_language(pattern: str, english: str) -> tuple[str, ...]:
    return tuple(pattern.format(english if lang == "en" else _DEBIAN_SUFFIX.get(lang, lang)) for lang in LANGS)


SOURCES = (
    Source("office", "help pages of an office suite", "MPL-2.0", _per_language("libreoffice-help-{}", "en-us")),
    Source("install", "operating system installation guide", "GPL-2.0-only", ("installation-guide-amd64",)),
    Source("desktop", "desktop user guide", "CC-BY-SA-3.0", ("gnome-user-docs",)),
    Source(
        "image", "manual of an image editor", "GFDL-1.2-no-invariants-or-later", _per_language("gimp-help-{}", "en")
    ),
    Source(
        "story",
        "fantasy stories: narration, dialogue, descriptions of creatures",
        "GPL-2.0-or-later",
        ("wesnoth-1.16-data", *(f"wesnoth-1.16-{c}" for c in _CAMPAIGNS)),
    ),
)


def fetch(cache: Path) -> dict[str, str]:
    """Download and unpack every package below `cache`; returns {package: version}. What is there stays."""
    archive, tree = cache / "deb", cache / "tree"
    archive.mkdir(parents=True, exist_ok=True)
    tree.mkdir(exist_ok=True)
    packages = [name for source in SOURCES for name in source.packages]
    missing = [name for name in packages if not list(archive.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=archive, check=True)
    versions = {}
    for name in packages:
        deb = next(iter(sorted(archive.glob(f"{name}_*.deb"))))
        fields = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True)
        versions[name] = fields.stdout.strip()
        _unpack(deb, tree)
    return versions


def _unpack(deb: Path, tree: Path) -> None:
    done = tree / f".{deb.name}.done"
    if done.exists():
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as tar:
        excludes = [f"--exclude=*.{ending}" for ending in _SKIP]
        subprocess.run(["tar", "-x", "-C", tree, *excludes], stdin=tar.stdout, check=True)
    done.touch()
