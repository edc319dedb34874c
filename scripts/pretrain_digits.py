"""Make the weights of `digits_net` that ship in the package.

Trains on the factory's 797 clean digits only, on one thread, with everything drawn from fixed seeds; prints
accuracy on the field's digits, clean and drifted, and writes the file. Run it from the repository root:

    python scripts/pretrain_digits.py [--out src/edgetune/models/weights/digits_net.safetensors]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from edgetune.data import Augment, Pictures, Preprocess, batches, load_data
from edgetune.data.dataset import decode
from edgetune.data.digits import factory_listing
from edgetune.models import load_model, model_card

DEFAULT_OUT = Path("src/edgetune/models/weights/digits_net.safetensors")
BATCH = 64


def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Share of pictures told right."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(pictures, 200, shuffle=False))
    return right / len(pictures)


def pretrain(pictures: Pictures) -> nn.Module:
    """Train with norms that follow their batches, then with frozen ones.

    A network that only ever trained with batch statistics sits where the loss is too sharp for any usual
    learning rate once the norms are frozen, as they are on the device; the second part leaves such places.
    """
    torch.manual_seed(0)
    model = load_model("digits_net")
    _cycle(model.train(), pictures, epochs=24, peak_rate=0.1, first_epoch=0)
    _cycle(model.eval(), pictures, epochs=12, peak_rate=0.03, first_epoch=24)
    return model


def _cycle(model: nn.Module, pictures: Pictures, epochs: int, peak_rate: float, first_epoch: int) -> None:
    """SGD with momentum and one triangular cycle of the learning rate, over shifted views."""
    steps = epochs * -(-len(pictures) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, steps, anneal_strategy="linear")
    for epoch in range(first_epoch, first_epoch + epochs):
        for x, y in batches(pictures, BATCH, seed=0, epoch=epoch, settings=Augment(flip=False, shift_px=3)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


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
