"""`python -m edgetune` is the same as `edgetune`."""

from __future__ import annotations

from edgetune.cli import main

if __name__ == "__main__":
    main()
