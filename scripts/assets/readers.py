"""Paragraphs out of the packages' formats: DocBook and help HTML, Mallard pages, game scenarios with catalogues.

Each reader yields `(section, paragraphs)` in a stable order; `section` is the same string in every language.
"""

import gettext
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

Section = tuple[str, list[str]]
_GNOME = {"en": "C", "zh": "zh_CN"}
_OFFICE = {"en": "en-US", "zh": "zh-CN"}
_GIMP = {"zh": "zh_CN"}
_WESNOTH = {"zh": "zh_CN"}
_INSTALL = {"zh": "zh_CN"}
_OFFICE_SKIP = ("sbasic", "shared/05", "shared/autopi", "shared/menu", "python")
_NO_PROSE = re.compile(
    r"navfooter|navheader|title|related|caption|legalnotice|screenshot|bascode|pycode|code\b|edition"
)


_VOID = {"br", "hr", "img", "input", "link", "meta", "col", "area", "base", "source", "wbr"}
_DROP = {"pre", "script", "style", "sup", "table", "footer", "nav", "head"}


class _Paragraphs(HTMLParser):
    """Text of the <p> elements that are prose."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._stack: list[tuple[str, bool]] = []
        self._text: list[str] | None = None

    def _dropping(self) -> bool:
        return bool(self._stack) and self._stack[-1][1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return self.handle_data(" ")
        if tag == "p":
            self._end_paragraph()
        drop = self._dropping() or tag in _DROP or bool(_NO_PROSE.search(dict(attrs).get("class") or ""))
        self._stack.append((tag, drop))
        if tag == "p" and not drop:
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._end_paragraph()
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place][0] == tag:
                del self._stack[place:]
                return

    def handle_data(self, data: str) -> None:
        if self._text is not None and not self._dropping():
            self._text.append(data)

    def _end_paragraph(self) -> None:
        if self._text:
            self.paragraphs.append("".join(self._text))
        self._text = None


def _html(path: Path) -> list[str]:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="strict"))
    return parser.paragraphs


def _html_tree(root: Path, pattern: str, skip: tuple[str, ...] = ()) -> Iterator[Section]:
    for path in sorted(root.rglob(pattern)):
        section = path.relative_to(root).as_posix()
        if not any(part in section for part in skip):
            yield section, _html(path)


def office(tree: Path, lang: str) -> Iterator[Section]:
    root = tree / "usr/share/libreoffice/help" / _OFFICE.get(lang, lang) / "text"
    return _html_tree(root, "*.html", _OFFICE_SKIP)


def install(tree: Path, lang: str) -> Iterator[Section]:
    root = tree / "usr/share/doc/installation-guide-amd64" / _INSTALL.get(lang, lang)
    return _html_tree(root, "*.html", ("ape", "apf", "index"))


def image(tree: Path, lang: str) -> Iterator[Section]:
    root = tree / "usr/share/gimp/2.0/help" / _GIMP.get(lang, lang)
    return _html_tree(root, "*.html", ("legal", "gfdl", "bibliography", "glossary", "index", "script-fu"))


def desktop(tree: Path, lang: str) -> Iterator[Section]:
    root = tree / "usr/share/help" / _GNOME.get(lang, lang)
    for path in sorted(root.rglob("*.page")):
        page = ElementTree.parse(path).getroot()
        yield path.relative_to(root).as_posix(), list(_mallard(page))


def _mallard(node: ElementTree.Element) -> Iterator[str]:
    tag = node.tag.rsplit("}", 1)[-1] if isinstance(node.tag, str) else ""
    if tag in ("info", "screen", "code", "table", "title"):
        return
    if tag == "p":
        links = [child for child in node.iter() if str(child.tag).endswith("}link")]
        if all("".join(link.itertext()).strip() for link in links):  # an empty link takes its text from elsewhere
            yield "".join(_inline(node))
        return
    for child in node:
        yield from _mallard(child)


def _inline(node: ElementTree.Element) -> Iterator[str]:
    keys = node.tag.endswith("}keyseq")
    yield node.text or ""
    for place, child in enumerate(node):
        yield "+" if keys and place else ""
        yield from _inline(child)
        yield "" if keys else child.tail or ""


_WML = re.compile(r'#textdomain\s+(\S+)|(message|story|description|note|text|speech)\s*=\s*_\s*"((?:[^"]|"")*)"')


def story(tree: Path, lang: str) -> Iterator[Section]:
    root = tree / "usr/share/games/wesnoth/1.16"
    catalogues: dict[str, gettext.NullTranslations] = {}
    for path in sorted((root / "data").rglob("*.cfg")):
        domain, paragraphs = "wesnoth", []
        for match in _WML.finditer(path.read_text(encoding="utf-8", errors="replace")):
            if match[1]:
                domain = match[1]
            else:
                catalogue = catalogues.setdefault(domain, _catalogue(root, lang, domain))
                paragraphs.append(_translated(catalogue, match[3].replace('""', '"'), lang))
        if paragraphs:
            yield path.relative_to(root).as_posix(), [text for text in paragraphs if text]


def _catalogue(root: Path, lang: str, domain: str) -> gettext.NullTranslations:
    path = root / "locale" / _WESNOTH.get(lang, lang) / "LC_MESSAGES" / f"{domain}.mo"
    if lang == "en" or not path.exists():
        return gettext.NullTranslations()
    with path.open("rb") as file:
        return gettext.GNUTranslations(file)


def _translated(catalogue: gettext.NullTranslations, text: str, lang: str) -> str:
    translated = text if lang == "en" else catalogue.gettext(text)
    if lang != "en" and translated == text:
        return ""
    return re.sub(r"<[^>]*>", "", translated.rsplit("^", 1)[-1])


READERS = {"office": office, "install": install, "desktop": desktop, "image": image, "story": story}
