"""Imports point one way. Read from the source text, so that a late import inside a function counts as well."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qscope_jax

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qscope_jax"
KERNELS = ROOT / "kernels" / "qscope_kernels"

# A component may import from lower rows; from its own row only where that makes no circle, and never in APART.
ROWS = [
    ["qscope_kernels"],
    ["files"],
    ["mesh", "taps", "totals", "data"],
    ["backbone", "sae", "analysis"],
    [
        *(
            "steering",
            "extract",
            "extract_folder",
            "evaluate",
            "generation",
            "objectives",
            "splice",
        ),
        *(
            "features",
            "training",
            "trials",
        ),
    ],
    ["benchmarks"],
    ["api", "explorer", "jobs"],
    ["__init__"],
    ["cli"],
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
APART = {"backbone", "sae", "analysis"}

# Large or risky packages, and the only places that know them.
ONLY_IN = {
    "grain": ("data/",),
    "orbax": ("training/",),
    "tyro": ("cli.py", "jobs/"),
    "matplotlib": ("explorer/figures.py",),
    "py3langid": ("analysis/text.py",),
    "regex": ("analysis/text.py",),
    "torch": ("benchmarks/",),
    "transformers": ("data/tokenizer.py", "benchmarks/"),
    "huggingface_hub": ("files/",),
    "datasets": (),
    "kernels": (),
    "pickle": (),
}


def imports(path: Path, package: Path) -> Iterator[str]:
    """Every module that a file imports, at whatever depth, as an absolute dotted name."""
    inside = [package.name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def component(path: Path, package: Path) -> str:
    return "qscope_kernels" if package == KERNELS else path.relative_to(package).with_suffix("").parts[0]


def target(module: str) -> str | None:
    """The component that a dotted name belongs to; None for other people's packages."""
    first, *rest = module.split(".")
    if first == "qscope_kernels":
        return first
    return (rest[0] if rest else "__init__") if first == "qscope_jax" else None


def sources() -> list[tuple[Path, Path]]:
    return [(path, package) for package in (PACKAGE, KERNELS) for path in sorted(package.rglob("*.py"))]


def faults(component_of: str, found: list[str]) -> list[str]:
    """What is wrong with a file of a component that imports `found`."""
    wrong = []
    for module in found:
        to = target(module)
        if to is None or to == component_of or component_of == "__init__":
            continue
        if to not in RANK or component_of not in RANK:
            wrong.append(f"{to if to not in RANK else component_of} has no row in this test: give it one")
        elif RANK[to] > RANK[component_of] or (RANK[to] == RANK[component_of] and component_of in APART):
            wrong.append(f"{component_of} must not import {module}")
    return wrong


@pytest.mark.parametrize(
    ("component_of", "module", "allowed"),
    [
        ("sae", "qscope_jax.backbone.forward.forward", False),
        ("analysis", "qscope_jax.sae.model", False),
        ("backbone", "qscope_jax.taps.Tap", True),
        ("files", "qscope_jax.data.text", False),
        ("qscope_kernels", "qscope_jax.taps", False),
        ("jobs", "qscope_jax.extract.extract", True),
        ("extract", "qscope_jax.jobs.run", False),
        ("data", "qscope_jax.cli", False),
        ("novelty", "qscope_jax.files", False),
        ("cli", "qscope_jax", True),
        ("jobs", "qscope_jax", False),
        ("jobs", "qscope_jax.load_sae", False),
        ("sae", "numpy", True),
    ],
)
def test_the_rule_itself(component_of, module, allowed):
    assert (faults(component_of, [module]) == []) is allowed


@pytest.mark.parametrize(("path", "package"), sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path, package):
    assert faults(component(path, package), list(imports(path, package))) == []


def test_no_circles_between_components():
    edges: dict[str, set[str]] = {}
    for path, package in sources():
        here = component(path, package)
        if here != "__init__":
            edges.setdefault(here, set()).update(
                to for to in map(target, imports(path, package)) if to not in (None, here)
            )
    done: set[str] = set()
    while ready := {name for name in edges if name not in done and edges[name] <= done | (set(RANK) - set(edges))}:
        done |= ready
    assert set(edges) - done == set()


_SHARED = {
    "run",
    "places",
    "opened",
    "answers",
    "progress",
    "recipes",
    "generate_inputs",
    "features_config",
    "train_config",
    "train_inputs",
    "train_results",
}


def test_jobs_share_only_what_is_no_command():
    for path in (PACKAGE / "jobs").glob("*.py"):
        others = {module.split(".")[2] for module in imports(path, PACKAGE) if module.startswith("qscope_jax.jobs.")}
        assert others <= _SHARED, f"jobs/{path.name} imports {others - _SHARED}"


@pytest.mark.parametrize("name", ONLY_IN)
def test_some_packages_are_known_in_one_place_only(name):
    for path, package in sources():
        where = path.relative_to(package).as_posix()
        if package == KERNELS or not where.startswith(ONLY_IN[name] or ("nowhere",)):
            used = [module for module in imports(path, package) if module.split(".")[0] == name]
            assert not used, f"{where} imports {used}; only {ONLY_IN[name]} may"


def test_no_star_imports():
    starred = [path for path, package in sources() if any(m.endswith(".*") for m in imports(path, package))]
    assert starred == []


def test_every_public_name_can_be_imported():
    assert qscope_jax.__all__
    for name in qscope_jax.__all__:
        assert getattr(qscope_jax, name) is not None


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        f"{node.module}.{alias.name}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {f"qscope_jax.{module}.{name}" for name, module in qscope_jax._HOMES.items()}


def test_the_version_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert qscope_jax.__version__ == project["version"]
