"""The denoiser: a U-Net, the meaning of its output, and the schedule it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import Tensor

from rediffuse.diffusion.schedule import Name, Predict, Schedule
from rediffuse.diffusion.unet import Architecture as UNetArchitecture
from rediffuse.diffusion.unet import UNet, unet_arguments
from rediffuse.runtime.kinds import Kind
from rediffuse.runtime.weights import Rebuildable

GUIDE = "guide"  # in the folder of a denoiser: an early average of its weights, for autoguidance


class Architecture(UNetArchitecture):
    """The arguments of a Denoiser except the images' shape, classes and range."""

    T: int
    schedule: Name
    predict: Predict


class Denoiser(Rebuildable):
    """Predict eps, x_0 or v, (B, C, H, W), float32, from x_t, t (int64 in 1..T) and labels.

    told: as in `UNet`.

    shape: (C, H, W).  clip: True for images, which are in [-1, 1]; False for unbounded data such as latents.
    class_names: names of the labels 0, 1, ...; empty for an unconditional model.  The label `classes`, one
    past the last, means "no label".  `config` holds the arguments that rebuild it.
    """

    kind: ClassVar[Kind] = "ddpm"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        class_names: Sequence[str] = (),
        clip: bool = True,
        **architecture: Unpack[Architecture],
    ) -> None:
        super().__init__()
        self.config = {"shape": list(shape), "class_names": list(class_names), "clip": clip, **architecture}
        self.shape, self.predict, self.clip = (shape[0], shape[1], shape[2]), architecture["predict"], clip
        self.class_names, self.classes = tuple(class_names), len(class_names)
        self.schedule = Schedule.make(architecture["schedule"], architecture["T"])
        self.unet = UNet(shape, classes=self.classes, **unet_arguments(architecture))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None, told: Tensor | None = None) -> Tensor:
        output: Tensor = self.unet(x_t, t / self.schedule.T, labels, told)
        return output.float()
