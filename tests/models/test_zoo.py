"""Other people's zoos, where they are installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from edgetune.errors import ModelError
from edgetune.models import head_classes, load_model, model_card

timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


@timm
def test_timm() -> None:
    model = load_model("timm:mobilenetv3_small_050", 5)
    assert head_classes(model) == 5
    assert model_card("timm:mobilenetv3_small_050").input.size == (224, 224)
    with pytest.raises(ModelError, match="did you mean"):
        load_model("timm:mobilenetv3_smal_050")


@torchvision
def test_torchvision_with_our_key_names() -> None:
    for name in ("mobilenet_v2", "mobilenet_v3_small", "resnet18"):
        theirs, ours = load_model(f"torchvision:{name}", 5), load_model(name, 5)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    with pytest.raises(ModelError, match="did you mean"):
        load_model("torchvision:resnt18")


def test_the_core_imports_no_zoo() -> None:
    code = (
        "import sys; from edgetune.models import load_model as m; m('resnet20');"
        "assert not {'timm', 'torchvision', 'sklearn'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
