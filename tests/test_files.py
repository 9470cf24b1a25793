"""The bytes of files that DVC hashes depend only on their content, not on time, machine or Python."""

import hashlib

import numpy as np
import torch

from rediffuse.images.files import save_png
from rediffuse.images.image_set import save_arrays
from rediffuse.runtime.files import write_csv, write_json
from rediffuse.runtime.weights import save_model
from rediffuse.vae.model import VAE

# PNG also depends on the zlib that Pillow brings, which requirements.lock pins.
RECORDED = {
    "curve.csv": "9bdff40dbe91fce711bbd180e4a2b5ff7d3dccdf52ef79b199b318b8082c6291",
    "images.npy": "4517d353bccba3849c98d483a7b9f4f36e5f98129e71bcf98493e5931c66fecb",
    "model/config.json": "1d9724626edc353c0c615ccb09ed0ea604dc5ca62cb533111d29867cf5b3eb84",
    "model/model.safetensors": "ef637384f51c692328e223917687c75a050d6d316f3e4dd7eb0c828e79e3e4ae",
    "picture.png": "f1b6de946bc1674511ff99030b65ab29c8c3897636a97a8f0cf3533842a9194e",
    "record.json": "8fba6b016ae144f544ef1483f5da9ccb45746cc16dc6ec1fe14e7fe86b7a6ffc",
}


def test_bytes_depend_only_on_the_content(tmp_path):
    images = np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8)
    save_arrays(tmp_path, images, None)
    save_png(images[0].transpose(1, 2, 0), tmp_path / "picture.png")
    write_json(tmp_path / "record.json", {"fd": 0.1 + 0.2, "n": 3, "class": "Ärmel", "none": None})
    write_csv(tmp_path / "curve.csv", ["images", "loss"], [[10, repr(1 / 3)], [20, ""]])
    vae = VAE((1, 8, 8), latent_dim=2, latent_channels=0, channels=[2], hidden=4, likelihood="bernoulli")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7)
    save_model(vae, tmp_path / "model")
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(RECORDED)
    for name, expected in RECORDED.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected, name
