"""Names of layers as Keras numbers them, read into torch's names."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]

_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def is_keras(state: State) -> bool:
    """Whether a state carries Keras names."""
    return "conv2d.kernel" in state


def numbered(kind: str, index: int) -> str:
    """The index-th layer of a kind; Keras leaves the number of the first one away."""
    return f"{kind}_{index}" if index else kind


def rename_norm(state: State, source: str, target: str) -> State:
    """The four tensors of a batch norm under torch's names."""
    return {f"{target}.{new}": state[f"{source}.{old}"] for old, new in _NORM.items()}


def fold_conv_bias(state: State, norm: str, bias: torch.Tensor) -> None:
    """Let the norm's mean carry the bias of the convolution before it: (x + b) - m = x - (m - b)."""
    state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - bias
