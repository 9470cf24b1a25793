"""The U-Net as a model of diffusers, with weights named as in a checkpoint of ours.

An exported folder holds the source of `UNet` and of everything below the imports here: it needs no rediffuse.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from rediffuse.diffusion.unet import UNet


class RediffuseUNet(ModelMixin, ConfigMixin):
    """Predict the scheduler's `prediction_type` from images in [-1, 1] and a time.

    sample_size: (H, W).  T: steps it was trained on.  classes: number of labels.  label: of images for which
    the call gives none; None: no label.  network: the other arguments of `UNet`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int],
        in_channels: int,
        T: int,
        classes: int,
        label: int | None,
        network: dict[str, Any],
    ) -> None:
        super().__init__()
        self.unet = UNet((in_channels, *sample_size), classes=classes, **network)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Evaluate the network.  timestep: 0 to T - 1, our t - 1.  class_labels: int64 (B,)."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample)) + 1
        if class_labels is None and self.config.label is not None:
            class_labels = torch.full((len(sample),), self.config.label, device=sample.device)
        output = self.unet(sample, t / self.config.T, class_labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)
