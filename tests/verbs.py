"""Running verbs in this process, and pictures to run them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

QUICK = ("--method", "exact", "--last", "1", "--epochs", "1", "--batch-size", "4", "--no-baseline")
"""Options of a training that is over at once."""


def run_verb(*words: object, width: int = 140) -> Result:
    """Run `edgetune WORDS`; an error that is no refusal comes out as it is."""
    from edgetune.cli import app

    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": str(width)})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def refusal(*words: object) -> str:
    """The sentence with which a command is refused; checks that it is one, and nothing else is said."""
    done = run_verb(*words)
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.stdout == ""
    assert lines[-1].startswith("edgetune: ")
    sentence = lines[-1].removeprefix("edgetune: ")
    assert ": " in sentence or "; " in sentence, "a refusal says what to do"
    return sentence


def draw(path: Path, value: int, mode: str = "RGB") -> None:
    """A picture of 32 x 32 pixels with some pattern, around brightness `value`."""
    generator = np.random.default_rng(value)
    pixels = np.clip(generator.normal(value, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
