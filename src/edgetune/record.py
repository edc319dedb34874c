"""The base of every noun on the line: frozen, JSON both ways, unknown keys refused, files never half-written."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgetune.errors import EdgetuneError, RunError

R = TypeVar("R", bound="Record")


class Frozen(BaseModel):
    """Fields that never change and refuse what they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Frozen):
    """A noun of the line: a frozen record that a person can read, diff and edit as JSON."""

    def save(self, path: str | Path) -> None:
        """Write as JSON; the file is either the old one or the whole new one, whatever happens meanwhile."""
        atomic_write(path, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls: type[R], path: str | Path, error: type[EdgetuneError] = RunError) -> R:
        """Read back what `save` wrote. Raises `error` naming the file and the first thing wrong in it."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as failure:
            raise error(f"'{path}' cannot be read ({failure}): "
                        "give the path of a file written by edgetune") from failure
        try:
            return cls.model_validate_json(text)
        except ValidationError as failure:
            first = failure.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise error(f"'{path}' is not a {cls.__name__}: {where}: {first['msg']}; "
                        "mend that entry or write the file anew") from failure


def atomic_write(path: str | Path, content: bytes) -> None:
    """Write `content` so that a kill or a full disk leaves the old file whole. Raises RunError when it cannot."""
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = str(target.parent / f".{target.name}.{uuid.uuid4().hex}")
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as failure:
        raise RunError(f"'{target}' cannot be written ({failure.strerror or failure}): "
                       "free some space or choose another folder with --out; "
                       "what was there before is untouched") from failure
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
