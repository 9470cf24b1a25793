"""inception-v3: Inception-v3 with the original TensorFlow weights, which gives the FID."""

from __future__ import annotations

import io
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from tqdm import tqdm

from rediffuse.evaluation import shared
from rediffuse.evaluation.shared import BuildContext, Record
from rediffuse.images.image_set import ImageSet
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.files import dvc_root, replace_file

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CONNECT_SECONDS = 10


class Inception(nn.Module):
    """Inception-v3 as the FID uses it (Heusel et al. 2017): weights of 2015-12-05, the last pooling, 2048.

    The 1008 logits are without bias, as in the inception score. Resizing and pixel range are
    torch-fidelity's.
    """

    def __init__(self, weights: bytes) -> None:
        super().__init__()
        layers, file = ["2048", "logits_unbiased"], io.BytesIO(weights)
        with torch.random.fork_rng(devices=[]):  # the layers draw weights, which are replaced
            network = FeatureExtractorInceptionV3("inception-v3", layers, feature_extractor_weights_path=file)
        self.extractor = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 2048) and logits (B, 1008) of uint8 images (B, C, H, W), C 1 or 3."""
        features, logits = self.extractor(images.expand(-1, 3, -1, -1))
        return features, logits


def fetch_weights() -> bytes:
    """Return the verified weights' file, from data/raw of the checkout or torch hub's checkpoints.

    It is downloaded into the latter if it is in neither.
    Raises UserError, with what to do, for a file that is not the original one, or if it cannot be downloaded.
    """
    placed = dvc_root() / "data/raw" / FILE
    cached = Path(torch.hub.get_dir(), "checkpoints", FILE)
    remedy = "delete the file, or replace it by the original one"
    for path in (placed, cached):
        if path.is_file():
            return shared.verify(path.read_bytes(), SHA256, str(path), remedy)
    try:
        data = _download(URL_INCEPTION_V3)
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the weights of inception-v3 are not here and could not be downloaded from {URL_INCEPTION_V3}"
            f" ({reason}).\nPlace the file {FILE}, SHA-256 {SHA256}, at\n  {placed}\nor {shared.OTHERS}"
        ) from None
    remedy = f"place {FILE} at {placed} by hand, or {shared.OTHERS}"
    shared.verify(data, SHA256, f"the download from {URL_INCEPTION_V3}", remedy)
    replace_file(cached, data)
    return data


def _download(url: str) -> bytes:
    """Return the content at this address, with progress on stderr."""
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm.wrapattr(response, "read", total=size, desc=FILE) as body:
            return b"".join(iter(lambda: body.read(1 << 20), b""))


def check(name: str, images: ImageSet) -> None:
    """Raise UserError unless the images can be measured and the weights are here or can be downloaded."""
    shared.check_channels(name, images)
    fetch_weights()


def make(context: BuildContext) -> tuple[Record, None]:
    """Return the record; the weights are kept elsewhere."""
    resize = "bilinear as in TensorFlow 1, without antialiasing, to 299 x 299"
    own = {"layer": "2048", "dimension": 2048, "sha256": SHA256, "resize": resize, "logits": 1008}
    return shared.imagenet_record(context, FILE, **own), None


def load(record: Record, folder: Path) -> nn.Module:
    """Load the network. Raises UserError unless its weights are those of the record in the folder."""
    shared.check_pinned(record, SHA256, folder)
    return Inception(fetch_weights()).eval()
