"""Weights from a file into a network: pickles only when trusted, and never a silent mismatch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from edgetune.errors import ModelError, WeightsError
from edgetune.models.head import find_head
from edgetune.record import Record

State = dict[str, torch.Tensor]


class LoadReport(Record):
    """What went from a file into a network.

    `head` is the classifier's name; `head_loaded` is False when the file's has another class count
    (`file_classes`) or none at all, and then the network's own stays. `missing` and `unexpected` are empty
    unless `allow_partial`.
    """

    path: str
    loaded: int
    head: str | None
    head_loaded: bool
    file_classes: int | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load_weights(
    model: nn.Module, path: str | Path, trust_pickle: bool = False, allow_partial: bool = False
) -> LoadReport:
    """Load a safetensors file (or, trusted, a pickle read with weights_only) into `model`, in place.

    A head with another class count is left out, and so is one that the file lacks; both are reported.
    Prefixes such as `module.` are taken off. With `allow_partial`, other keys may be missing or left over as
    well. Raises WeightsError saying which keys do not fit, and how many; the model is then unchanged.
    """
    own = model.state_dict()
    state = _strip_prefix(_read(Path(path), trust_pickle), own)
    translate = getattr(model, "translate_state", None)
    if translate is not None:
        state = _translated(translate, state, path)
    head = _head(model)
    head_keys = {key for key in own if head and key.startswith(f"{head}.")}
    state, head_loaded, file_classes = _without_unfit_head(state, own, head_keys)
    misshapen = [key for key in state if key in own and state[key].shape != own[key].shape]
    if misshapen:
        key = misshapen[0]
        raise WeightsError(
            f"'{path}' does not fit: {_some(misshapen)} of another shape "
            f"({key}: file {tuple(state[key].shape)}, network {tuple(own[key].shape)}); "
            "choose the network and width that the file was made from"
        )
    optional = head_keys | {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in optional]
    unexpected = [key for key in state if key not in own]
    if (missing or unexpected) and (not allow_partial or len(missing) == len(own.keys() - optional)):
        raise WeightsError(_complaint(path, missing, unexpected, len(own)))
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    return LoadReport(
        path=str(path),
        loaded=len(state) - len(unexpected),
        head=head,
        head_loaded=head_loaded,
        file_classes=file_classes,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
    )


def _head(model: nn.Module) -> str | None:
    try:
        return find_head(model)
    except ModelError:
        return None


def _without_unfit_head(state: State, own: State, head_keys: set[str]) -> tuple[State, bool, int | None]:
    """Take out a head that has other classes or is incomplete; say whether it stays, and its class count."""
    weight = next((key for key in head_keys if key.endswith("weight")), None)
    if weight is None or weight not in state:
        return state, False, None
    theirs, ours = state[weight].shape, own[weight].shape
    other_classes = theirs[0] != ours[0] and theirs[1:] == ours[1:]
    if other_classes or not head_keys <= state.keys():
        return {key: value for key, value in state.items() if key not in head_keys}, False, int(theirs[0])
    return state, True, int(theirs[0])


def _complaint(path: str | Path, missing: list[str], unexpected: list[str], total: int) -> str:
    parts = [f"{_some(missing)} missing"] if missing else []
    parts += [f"{_some(unexpected)} unknown to the network"] if unexpected else []
    way_out = (
        "choose the network that the file was made from"
        if len(missing) > total // 2
        else "load what there is with --allow-partial, or choose the network that the file was made from"
    )
    return f"'{path}' does not fit: {' and '.join(parts)}; {way_out}"


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} ({shown})"


def _strip_prefix(state: State, own: State) -> State:
    """Wrappers put one prefix before every key; DistributedDataParallel and torch.compile do."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        wrapped = all(key.startswith(prefix) for key in state)
        if wrapped and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _translated(translate: Any, state: State, path: str | Path) -> State:
    try:
        return translate(state)
    except KeyError as failure:
        raise WeightsError(
            f"'{path}' does not fit: the key {failure} is missing; choose the network that the file "
            "was made from"
        ) from failure


def _read(path: Path, trust_pickle: bool) -> State:
    if not path.is_file():
        raise WeightsError(f"weights file '{path}' does not exist: check the path given to --weights")
    with path.open("rb") as file:
        start = file.read(16)
    if _is_pickle(start):
        return _read_pickle(path, trust_pickle)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as failure:
        raise WeightsError(
            f"'{path}' is not a whole safetensors file ({failure}): fetch or save it again"
        ) from failure


def _is_pickle(start: bytes) -> bool:
    """torch.save writes a zip, or a bare pickle in its old form; safetensors have "{" at byte 8."""
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{")


def _read_pickle(path: Path, trusted: bool) -> State:
    if not trusted:
        raise WeightsError(
            f"'{path}' is a pickle, which can run code when opened: convert it to safetensors, or add "
            "--trust-pickle if you trust where it comes from"
        )
    try:
        with path.open("rb") as file:  # by its name, torch would take *.safetensors for what it is not
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as failure:  # unpickling damaged bytes raises nearly anything
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise WeightsError(
            f"'{path}' cannot be read as weights alone ({reason}): save its state_dict() and nothing else"
        ) from failure
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not _all_tensors(content.values()):
        raise WeightsError(f"'{path}' holds no state dict: save model.state_dict() and nothing else")
    return content


def _all_tensors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)
