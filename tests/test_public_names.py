"""The public names: found on demand, never hidden by the modules they live in, and none loads torch before its time."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import edgetune as et


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", et.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert not isinstance(getattr(et, name), ModuleType)
    assert getattr(et, name).__module__.startswith("edgetune")


HIDDEN = ["apply", "plan", "profile", "train", "compress", "report"]


@pytest.mark.parametrize("first", ["", "et.apply, et.plan, et.profile, et.train, et.compress, et.report"])
def test_functions_are_not_hidden_by_their_modules(first: str) -> None:
    imports = "\n".join(f"import edgetune.{name}" for name in HIDDEN)
    told = run_python(
        f"import edgetune as et\n{first}\n{imports}\nprint([type(getattr(et, n)).__name__ for n in {HIDDEN}])"
    )
    assert told == str(["function"] * len(HIDDEN))


def test_modules_are_still_reached_by_name() -> None:
    assert all(isinstance(importlib.import_module(f"edgetune.{name}"), ModuleType) for name in HIDDEN)


def test_import_alone_does_not_load_torch() -> None:
    assert (
        run_python("import sys, edgetune, edgetune.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])")
        == "[]"
    )


def test_a_plan_knows_the_methods_at_once() -> None:
    code = (
        "import edgetune as et; p = et.Plan.model_validate_json("
        '\'{"input_shape": [1, 1, 8, 8], "layers": {"a": [{"method": "exact"}]}}\'); print(len(p.layers))'
    )
    assert run_python(code) == "1"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = et.tarin
