"""Image folders: train/<class>/*.jpg and val/<class>/*.jpg, or one folder with a folder per class."""

from __future__ import annotations

from pathlib import Path

from edgetune.data.picture import EXTENSIONS, open_picture
from edgetune.data.source import ALL, TRAIN, VAL, Listing, Source
from edgetune.errors import DataError

_VAL_NAMES = ("val", "valid", "validation", "test")


def open_folder(root: Path) -> Source:
    """List the pictures of a folder; nothing is decoded yet. Raises DataError when it has another shape."""
    folders = _folders(root)
    names = {folder.name: folder for folder in folders}
    if TRAIN not in names:
        held_out = next((name for name in _VAL_NAMES if name in names), None)
        if held_out is not None and len(folders) == 1:
            raise DataError(
                f"data folder '{root}' has '{held_out}' but no 'train': add it, or give '{root / held_out}'"
            )
        classes = _class_names(root, folders)
        return Source(name=str(root), classes=classes, splits={ALL: _list(root, classes)})
    classes = _class_names(names[TRAIN], _folders(names[TRAIN]))
    val = next((names[name] for name in _VAL_NAMES if name in names), None)
    if val is None:
        return Source(name=str(root), classes=classes, splits={ALL: _list(names[TRAIN], classes)})
    if strangers := sorted(set(_class_names(val, _folders(val))) - set(classes)):
        raise DataError(
            f"class '{strangers[0]}' stands in '{val}' but not in '{names[TRAIN]}': "
            "give both the same class folders"
        )
    return Source(
        name=str(root),
        classes=classes,
        splits={TRAIN: _list(names[TRAIN], classes), VAL: _list(val, classes)},
    )


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(
            entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))
        )
    except OSError as failure:
        raise DataError(
            f"data folder '{root}' cannot be read ({failure.strerror or failure}): "
            "check the path and its permissions"
        ) from failure


def _class_names(root: Path, folders: list[Path]) -> tuple[str, ...]:
    if not folders:
        what = "holds pictures but no class folders" if _pictures(root) else "is empty"
        raise DataError(
            f"data folder '{root}' {what}: put the pictures into one folder per class, such as "
            f"{root.name}/cat/1.jpg"
        )
    return tuple(folder.name for folder in folders)


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(".") and entry.is_file()
    )


def _list(root: Path, classes: tuple[str, ...]) -> Listing:
    found = [(path, label) for label, name in enumerate(classes) for path in _pictures(root / name)]
    paths = tuple(path for path, _ in found)
    return Listing(
        names=tuple(str(path.relative_to(root)) for path in paths),
        sizes=tuple(path.stat().st_size for path in paths),
        labels=tuple(label for _, label in found),
        open_image=lambda index: open_picture(paths[index]),
    )
