"""Make the weights of `digits_net` that ship in the package.

Trains on the factory's 797 clean digits only, on one thread, with everything drawn from fixed seeds; prints
accuracy on the field's digits, clean and drifted, and writes the file. Run it from the repository root:

    python scripts/pretrain_digits.py [--out src/edgetune/models/weights/digits_net.safetensors]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from edgetune.bench.pretrain import Cycle, teach
from edgetune.data import Augment, Pictures, Preprocess, batches, load_data
from edgetune.data.dataset import decode
from edgetune.data.digits import factory_listing
from edgetune.models import load_model, model_card

DEFAULT_OUT = Path("src/edgetune/models/weights/digits_net.safetensors")


def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Share of pictures told right."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(pictures, 200, shuffle=False))
    return right / len(pictures)


def pretrain(pictures: Pictures) -> nn.Module:
    """As the benches teach a network, at more epochs and with digits kept upright."""
    torch.manual_seed(0)
    model = load_model("digits_net")
    cycles = (Cycle(epochs=24, peak_rate=0.1, frozen=False), Cycle(epochs=12, peak_rate=0.03, frozen=True))
    teach(model, pictures, cycles, views=Augment(flip=False, shift_px=3))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    preprocess = Preprocess.from_input(model_card("digits_net").input)
    model = pretrain(decode(factory_listing(), preprocess, None, skip_bad_images=False)[0])
    for source in ("digits:clean", "digits"):
        print(f"{source}: {accuracy(model, load_data(source, preprocess).val):.4f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # counters of training steps are no use to anyone who adapts with frozen statistics
    save_file(
        {
            key: value.contiguous()
            for key, value in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        },
        out,
    )
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
