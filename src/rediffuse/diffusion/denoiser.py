"""The denoiser: a U-Net, what its output means, and the schedule it was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rediffuse.diffusion.schedule import Name, Predict, Schedule
from rediffuse.diffusion.unet import UNet


class Denoiser(nn.Module):
    """A network that predicts eps, x_0 or v, (B, C, H, W), float32, from x_t, t (int64 in 1..T) and labels.

    shape: (C, H, W) of the images, which are in [-1, 1]; clip: False for other data, which know no bounds.  class_names: of the labels
    0, 1, ..., none for an unconditional model; the label `classes`, one past the last, means "no label".  The schedule is no buffer: an
    average of the weights must not touch it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        T: int,
        schedule: Name,
        predict: Predict,
        class_names: Sequence[str],
        fold: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: int,
        dropout: float,
        clip: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.predict, self.clip = shape, predict, clip
        self.class_names, self.classes = tuple(class_names), len(class_names)
        self.schedule = Schedule.make(schedule, T)
        self.unet = UNet(
            shape,
            classes=self.classes,
            fold=fold,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            dropout=dropout,
        )

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        output: Tensor = self.unet(x_t, t / self.schedule.T, labels)
        return output.float()
