"""inception-v3: Inception-v3 with the original TensorFlow weights, which gives the FID."""

from __future__ import annotations

import io
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from tqdm import tqdm

from rediffuse.evaluation.instrument_record import BuildContext, Record, new_record
from rediffuse.evaluation.pretrained import BATCH, OTHERS, check_channels, check_pinned, to_rgb, verify
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import replace_file

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CONNECT_SECONDS = 10


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
        features, logits = self.extractor(to_rgb(images))
        return features, logits


def load_network() -> Inception:
    """Return Inception-v3 with the original weights.  Raises UserError as `fetch_weights` does."""
    return Inception(fetch_weights()).eval()


def fetch_weights() -> bytes:
    """Return the weights' file, verified: from data/raw of the checkout, torch hub's checkpoints, or downloaded into the latter.

    Raises UserError, with what to do, for a file that is not the original one, or if it cannot be downloaded.
    """
    placed = Path(os.environ.get("DVC_ROOT", "."), "data/raw", FILE).resolve()
    cached = Path(torch.hub.get_dir(), "checkpoints", FILE)
    for path in (placed, cached):
        if path.is_file():
            return verify(path.read_bytes(), SHA256, str(path), "delete the file, or replace it by the original one")
    try:
        data = _download(URL_INCEPTION_V3)
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the weights of inception-v3 are not here and could not be downloaded from {URL_INCEPTION_V3} ({reason}).\n"
            f"Place the file {FILE}, SHA-256 {SHA256}, at\n  {placed}\nor {OTHERS}"
        ) from None
    verify(data, SHA256, f"what {URL_INCEPTION_V3} gave", f"place {FILE} at {placed} by hand, or {OTHERS}")
    replace_file(cached, data)
    return data


def _download(url: str) -> bytes:
    """Return the content at this address, with progress on stderr."""
    parts = []
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
        size = response.headers.get("Content-Length")
        with tqdm(total=int(size) if size else None, desc=FILE, unit="B", unit_scale=True) as bar:
            while part := response.read(1 << 20):
                parts.append(part)
                bar.update(len(part))
    return b"".join(parts)


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images can be measured and the weights can be had, which are downloaded if need be."""
    check_channels(name, images)
    fetch_weights()


def make(context: BuildContext) -> tuple[Record, None]:
    """Return the record; the weights are kept elsewhere."""
    return new_record(
        context,
        layer="2048",
        dimension=2048,
        sha256=SHA256,
        resize="bilinear as in TensorFlow 1, without antialiasing, to 299 x 299",
        logits=1008,
        trained_on={"set": "ImageNet", "weights": FILE},
        batch=BATCH,
        device=context.device.type,
    ), None


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network.  Raises UserError unless its weights are those of the record in the folder."""
    check_pinned(record, SHA256, folder)
    return load_network()
