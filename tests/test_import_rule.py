"""Who may import whom, read from the sources: CONTRIBUTING.md states the rule, this file tests it.

kernels → torch, triton and the standard library; the core of fastmaf → fastmaf.kernels; images → the core; metrics →
images; capsule and inspection → those, but not each other; reproduction → both; the command line → all of these;
fastmaf.bench → all of fastmaf. Nothing imports fastmaf.bench but the tests, and the command line for its command
``bench``. Above the core, only the public modules of it are imported. The core itself needs torch, numpy and
safetensors alone. What is imported is declared in pyproject.toml. No module imports itself through others, not even for
types or within functions.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The rooms above the core, each with those below it that it may import.
ROOMS = {
    "images": ("images",),
    "metrics": ("metrics", "images"),
    "capsule": ("capsule", "metrics", "images"),
    "inspection": ("inspection", "metrics", "images"),
    "reproduction": ("reproduction", "capsule", "inspection", "metrics", "images"),
    "cli": ("cli", "reproduction", "capsule", "inspection", "metrics", "images"),
}
ROOM_OF = {"__main__": "cli"}
# What rooms above the core may import of it, besides the names of ``fastmaf`` itself.
PUBLIC_CORE = (
    *("fastmaf.doctor", "fastmaf.extras", "fastmaf.io", "fastmaf.optim", "fastmaf.threads", "fastmaf.training"),
    "fastmaf.transforms.fallback",
)
CORE_NEEDS = {"torch", "numpy", "safetensors"}
BENCH_USERS = ("fastmaf.bench", "fastmaf.cli", "tests")
STDLIB = sys.stdlib_module_names | {"tomllib"}  # of every supported version, whichever runs this
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn", "pytest-benchmark": "pytest_benchmark"}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_of(path: Path, root: Path = ROOT) -> str:
    """The name that a source file has when installed: kernels/a/op.py is fastmaf.kernels.a.op."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = ("fastmaf", *parts) if parts[0] in ("kernels", "bench") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str, str | None]]:
    """Each import as (line, module, name): name is what `from module import name` takes, else None."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # one dot is the package itself, each further dot its parent
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, base, alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, None


def refusal(module: str, target: str, name: str | None, known: set[str]) -> str | None:
    """Why `module` may not import `target` (or `name` from it), or None. `known` are the modules of the project."""
    full = f"{target}.{name}" if name and f"{target}.{name}" in known else target
    top = target.partition(".")[0]
    if top == "tests" and not within(module, "tests"):
        return "nobody imports tests"
    if top in ("kernels", "bench"):
        return f"{top}/ is installed, and imported, as fastmaf.{top}"
    if within(full, "fastmaf.bench") and not any(within(module, own) for own in BENCH_USERS):
        return "nobody imports the bench but its own modules, the tests and the command line"
    if within(module, "fastmaf.kernels"):
        allowed = within(full, "fastmaf.kernels") or top in {"torch", "triton"} or top in STDLIB
        return None if allowed else "kernels import torch, triton, the standard library and themselves"
    room, target_room = room_of(module), room_of(full)
    if room is None:
        if not within(module, "fastmaf") or within(module, "fastmaf.bench"):
            return None
        if target_room:
            return "the core of fastmaf imports no room above it"
        allowed = within(full, "fastmaf") or top in CORE_NEEDS or top in STDLIB
        return None if allowed else f"the core of fastmaf imports {', '.join(sorted(CORE_NEEDS))} alone"
    if target_room:
        return None if target_room in ROOMS[room] else f"{room} imports {', '.join(ROOMS[room])} and the core"
    if within(full, "fastmaf.bench"):
        return None
    allowed = top != "fastmaf" or full == "fastmaf" or any(within(full, public) for public in PUBLIC_CORE)
    return None if allowed else f"{room} uses the public names of fastmaf"


def room_of(module: str) -> str | None:
    """Returns the room above the core that a module is in, None for the core and whatever is not fastmaf."""
    parts = module.split(".")
    if parts[0] != "fastmaf" or len(parts) == 1:
        return None
    name = ROOM_OF.get(parts[1], parts[1])
    return name if name in ROOMS else None


def undeclared(module: str, target: str) -> str | None:
    """Why a third-party import is not covered by the dependencies in pyproject.toml, or None."""
    top = target.partition(".")[0]
    own = {"fastmaf", "kernels", "bench", "tests"}
    if top in own or top in STDLIB or top in declared_for(module):
        return None
    part = "fastmaf.bench" if within(module, "fastmaf.bench") else module.partition(".")[0]
    return f"{top} is declared in no dependency of {part} in pyproject.toml"


def declared_for(module: str) -> set[str]:
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"]]
    of = {
        "fastmaf.kernels": ["triton"],
        **{f"fastmaf.{room}": ["inspection"] for room in ("images", "metrics", "capsule", "reproduction")},
        "fastmaf.inspection": ["inspection", "export"],
        "fastmaf.inspection.serve": ["serve"],
        "fastmaf.cli": ["cli"],
        "fastmaf.bench": ["bench", "inspection"],
        "fastmaf.bench.dev": ["test"],
        "tests": ["bench", "cli", "export", "inspection", "serve", "test"],
        "tests.fuzz": ["fuzz"],
    }
    for folder, extra in ((folder, extra) for folder, extras_of in of.items() for extra in extras_of):
        if within(module, folder):
            requirements += extras[extra]
    names = [re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements]
    return {IMPORT_NAMES.get(name, name) for name in names}


def check(source: str, path: str, known: set[str]) -> list[str]:
    """Everything that one source file imports against the rule, as `path:line: import: why`."""
    module = module_of(ROOT / path)
    found = []
    for line, target, name in imports(source, module, path.endswith("__init__.py")):
        why = undeclared(module, target) or refusal(module, target, name, known)
        if why:
            found.append(f"{path}:{line}: {target}{f' ({name})' if name else ''}: {why}")
    return found


def module_graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Returns the modules of the project that each one imports, wherever in the file."""
    modules = {module_of(ROOT / path): path for path in texts}
    graph = {}
    for module, path in modules.items():
        found = imports(texts[path], module, path.endswith("__init__.py"))
        full = {f"{target}.{name}" if f"{target}.{name}" in modules else target for _, target, name in found}
        graph[module] = {target for target in full if target in modules and target != module}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Returns a closed path of imports for each group of modules that import each other."""
    sorter = TopologicalSorter(graph)
    found = []
    while True:
        try:
            sorter.prepare()
        except CycleError as error:
            cycle: list[str] = error.args[1][::-1]
            found.append(" → ".join(cycle))
            graph = {**graph, cycle[0]: graph[cycle[0]] - {cycle[1]}}
            sorter = TopologicalSorter(graph)
        else:
            return found


def sources() -> dict[str, str]:
    folders = ("fastmaf", "kernels", "bench", "tests")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_every_source_keeps_the_rule() -> None:
    texts = sources()
    assert {"fastmaf/__init__.py", "fastmaf/cli/app.py", "kernels/__init__.py"} <= set(texts)
    known = {module_of(ROOT / path) for path in texts}
    known |= {name.rpartition(".")[0] for name in known}  # folders without an __init__.py
    assert [line for path, source in texts.items() for line in check(source, path, known)] == []


def test_no_module_imports_itself_through_others() -> None:
    assert cycles(module_graph(sources())) == []


def test_cycles_are_found_at_any_depth_of_a_file() -> None:
    texts = {
        "fastmaf/a.py": "from fastmaf import b",
        "fastmaf/b.py": "if TYPE_CHECKING:\n    from fastmaf.c import C",
        "fastmaf/c.py": "def f():\n    from .a import f",
        "fastmaf/d.py": "import fastmaf.a",
    }
    (found,) = cycles(module_graph(texts))
    assert set(found.split(" → ")) == {"fastmaf.a", "fastmaf.b", "fastmaf.c"}
    assert cycles(module_graph({**texts, "fastmaf/c.py": "import fastmaf.e"})) == []


KNOWN = {
    "fastmaf",
    "fastmaf.nn",
    "fastmaf.doctor",
    "fastmaf.cli",
    "fastmaf.cli.app",
    "fastmaf.capsule",
    "fastmaf.capsule.train",
    "fastmaf.inspection",
    "fastmaf.images.dataset",
    "fastmaf.kernels",
    "fastmaf.bench",
    "fastmaf.bench.run",
}


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("kernels/layout.py", "import numpy as np", "kernels import torch"),
        ("kernels/layout.py", "import fastmaf", "kernels import torch"),
        ("kernels/layout.py", "from fastmaf import nn", "kernels import torch"),
        ("kernels/masked_linear/op.py", "from ...nn import MADE", "kernels import torch"),
        ("kernels/masked_linear/op.py", "def f():\n    from fastmaf.nn import MADE", "kernels import torch"),
        ("kernels/layout.py", "import kernels.backends", "imported, as fastmaf.kernels"),
        ("fastmaf/nn.py", "from fastmaf.images.dataset import load_image", "core of fastmaf imports"),
        ("fastmaf/nn.py", "from fastmaf import capsule", "core of fastmaf imports"),
        ("fastmaf/nn.py", "from . import cli", "core of fastmaf imports"),
        ("fastmaf/__init__.py", "from .capsule import train", "core of fastmaf imports"),
        ("fastmaf/doctor.py", "import importlib\nimportlib.import_module('fastmaf.cli')", "core of fastmaf imports"),
        ("fastmaf/convert/__init__.py", "from .. import cli", "core of fastmaf imports"),
        (
            "fastmaf/io/marks.py",
            "from PIL.PngImagePlugin import PngInfo",
            "PIL is declared in no dependency of fastmaf",
        ),
        ("fastmaf/training/step.py", "def f():\n    from tqdm import tqdm", "tqdm is declared in no dependency"),
        ("fastmaf/nn.py", "import bench.run", "imported, as fastmaf.bench"),
        ("fastmaf/nn.py", "import fastmaf.bench.run", "nobody imports the bench"),
        ("fastmaf/capsule/train.py", "from fastmaf.bench import run", "nobody imports the bench"),
        ("kernels/layout.py", "from fastmaf.bench import run", "nobody imports the bench"),
        ("bench/run.py", "from tests.tolerances import TABLE", "nobody imports tests"),
        ("fastmaf/cli/app.py", "from tests import tolerances", "nobody imports tests"),
        ("fastmaf/nn.py", "from kernels import layout", "imported, as fastmaf.kernels"),
        ("fastmaf/cli/app.py", "from fastmaf.nn import MADE", "public names"),
        ("fastmaf/cli/app.py", "import fastmaf.nn", "public names"),
        ("fastmaf/cli/app.py", "from fastmaf import nn", "public names"),
        ("fastmaf/cli/app.py", "from .. import kernels", "public names"),
        ("fastmaf/capsule/train.py", "from fastmaf.kernels import dispatch", "public names"),
        ("fastmaf/capsule/train.py", "from ..nn import MADE", "public names"),
        ("fastmaf/capsule/train.py", "import fastmaf.cli", "capsule imports"),
        ("fastmaf/nn.py", "import pandas", "pandas is declared in no dependency of fastmaf"),
        ("fastmaf/nn.py", "import pytest", "pytest is declared in no dependency of fastmaf"),
        ("fastmaf/images/dataset.py", "from fastmaf.metrics import auroc", "images imports images and the core"),
        ("fastmaf/metrics/plots.py", "from fastmaf.capsule import train", "metrics imports metrics, images"),
        (
            "fastmaf/capsule/train.py",
            "def f():\n    from fastmaf import inspection",
            "capsule imports capsule, metrics",
        ),
        ("fastmaf/inspection/fit.py", "from ..capsule import train", "inspection imports inspection, metrics"),
        ("fastmaf/capsule/train.py", "from fastmaf.reproduction import reproduce", "capsule imports capsule, metrics"),
        ("bench/run.py", "import pandas", "pandas is declared in no dependency of fastmaf.bench"),
        ("tests/test_x.py", "import pandas", "pandas is declared in no dependency of tests"),
    ],
)
def test_a_forbidden_import_is_named(path: str, source: str, why: str) -> None:
    (found,) = check(source, path, KNOWN)
    assert found.startswith(f"{path}:{len(source.splitlines())}: ")
    assert why in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "kernels/masked_linear/op.py",
            "import math\nimport torch\nimport triton.language as tl\nfrom ..layout import PackedLayout",
        ),
        ("kernels/masked_linear/op.py", "from fastmaf.kernels import dispatch\nfrom . import reference"),
        ("fastmaf/nn.py", "import numpy\nfrom fastmaf import degrees\nfrom fastmaf.kernels.layout import PackedLayout"),
        (
            "fastmaf/cli/app.py",
            "import fastmaf\nfrom fastmaf import MAF, doctor\nfrom fastmaf.capsule import train\nimport typer",
        ),
        ("fastmaf/capsule/train.py", "import PIL.Image, sklearn.metrics\nfrom . import train\nfrom .. import MAF"),
        ("fastmaf/__main__.py", "from fastmaf.cli import main"),
        (
            "bench/run.py",
            "import zuko\nimport fastmaf.kernels\nfrom fastmaf.bench import cases\nfrom fastmaf.capsule import train",
        ),
        ("fastmaf/cli/app.py", "def bench():\n    from fastmaf.bench import run"),
        ("tests/test_x.py", "import pytest\nfrom fastmaf.capsule import train\nimport fastmaf.bench.run"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert check(source, path, KNOWN) == []
