"""What is installed is what was tested: every file travels in the package, every dependency has its pin."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "edgetune"
NOT_SHIPPED = {".py", ".pyc", ".so"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def test_every_file_beside_the_code_is_package_data(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]["edgetune"]
    shipped = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    present = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in NOT_SHIPPED}
    assert sorted(present - shipped) == []
    assert PACKAGE / "py.typed" in shipped


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_has_one_pin_a_python(project: dict[str, Any], python: str) -> None:
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [packaging.Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python}
    taken = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + extras["dev"] + extras["native"] + extras["zoo"]
    assert {requirement_name(each) for each in wanted} <= set(taken)
    assert len(taken) == len(set(taken))
