"""Imports go one way: a module imports only from its left on the line, a heavy library only where used.

`quantize` stands behind the hosts and methods, whose gradients and kernels it uses, and before `apply`: it makes a
network of its own, with its own list of what learns, and is told nothing of plans.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "edgetune"
FILES = sorted(SOURCE.rglob("*.py"))

LINE = [
    "errors", "units", "shapes", "record", "kernels", "codecs", "overlap", "recognise", "graph", "blocks", "contract",
    "hosts", "methods", "quantize", "fold", "route", "rewire", "packed", "claims", "apply", "allocator", "scratch",
    "outcome", "meter", "update", "hold", "profile", "stopwatch", "draft", "alone", "calibrate", "knapsack", "prospect",
    "timeline", "cuts", "stretches", "plan", "reasons", "front", "sparse", "lowrank", "models", "data", "cache",
    "frozen", "costs", "distil", "fit", "run", "loop", "job", "train", "compress", "report", "bench", "doctor", "cli",
    "__main__",
]  # fmt: skip
BASICS = {"errors", "units", "shapes", "record"}
NARROW = {"models": BASICS, "data": BASICS}
"""Rooms that see even less than what stands to their left."""

STANDARD = set(sys.stdlib_module_names)
CORE = {"torch", "numpy", "pydantic", "safetensors", "PIL", "edgetune"}
AT_THE_TOP = {"cli": {"typer", "rich"}}
"""Third-party modules that a room may import while it is itself imported; all others go inside functions."""

Import = tuple[str, int]


def room_of(file: Path) -> str:
    """`models` for models/resnet.py, `plan` for plan.py, `__init__` for the package itself."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imports(tree: ast.AST, package: str = "edgetune") -> Iterator[Import]:
    """Every imported module with its line; `from edgetune import x` counts as edgetune.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
            else:
                module = node.module or ""
            names = [f".{alias.name}" for alias in node.names] if module == "edgetune" else [""]
            yield from ((module + name, node.lineno) for name in names)


def against_the_line(room: str, tree: ast.AST, package: str = "edgetune") -> list[str]:
    """What a module of `room` imports though it stands to the right of it."""
    allowed = NARROW.get(room, set(LINE[: LINE.index(room)])) | {room}
    wrong = []
    for name, line in imports(tree, package):
        if name.split(".")[0] == "edgetune":
            wanted = [*name.split("."), "the package itself"][1]
            if wanted not in allowed:
                wrong.append(f"line {line}: {room} imports {wanted}, which is not to its left")
    return wrong


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without what only a type checker sees."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Prune().visit(tree)


def package_of(file: Path) -> str:
    return ".".join(("edgetune", *file.relative_to(SOURCE).parent.parts))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
class TestFile:
    def test_has_a_place_on_the_line(self, file: Path) -> None:
        assert room_of(file) in {*LINE, "__init__"}, "give the new module its place in LINE"

    def test_imports_only_from_its_left(self, file: Path) -> None:
        if file != SOURCE / "__init__.py":
            assert not against_the_line(room_of(file), ast.parse(file.read_text()), package_of(file))

    def test_imports_heavy_libraries_where_used(self, file: Path) -> None:
        allowed = STANDARD | CORE | AT_THE_TOP.get(room_of(file), set())
        outside = [
            (name, line)
            for name, line in imports(at_module_level(ast.parse(file.read_text())))
            if name.split(".")[0] not in allowed
        ]
        assert not outside, "import it inside the function that uses it"

    def test_leaves_native_code_to_the_kernels(self, file: Path) -> None:
        if room_of(file) != "kernels":
            found = {name.split(".")[0] for name, _ in imports(ast.parse(file.read_text()))}
            assert not found & {"ctypes", "cffi"}


@pytest.mark.parametrize(
    ("room", "source", "complaint"),
    [
        ("graph", "from edgetune.overlap import cells", None),
        ("graph", "from edgetune import overlap", None),
        ("graph", "from edgetune.plan import Plan", "line 1: graph imports plan"),
        ("graph", "def f():\n    from edgetune import plan", "line 2: graph imports plan"),
        ("graph", "import edgetune", "line 1: graph imports the package itself"),
        ("graph", "from .plan import Plan", "line 1: graph imports plan"),
        ("models", "from edgetune.record import Record", None),
        ("models", "from edgetune.graph import Graph", "line 1: models imports graph"),
    ],
)
def test_the_check_finds_a_wrong_import(room: str, source: str, complaint: str | None) -> None:
    found = against_the_line(room, ast.parse(source))
    assert [text.partition(",")[0] for text in found] == ([complaint] if complaint else [])


def test_module_level_leaves_out_functions_and_type_checking() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c\nclass D:\n    import d"
    assert [name for name, _ in imports(at_module_level(ast.parse(source)))] == ["a", "d"]


def test_importing_edgetune_is_light() -> None:
    heavy = ["sklearn", "scipy", "kornia", "matplotlib", "timm", "torchvision", "typer", "torch._inductor"]
    code = f"import sys, edgetune; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
