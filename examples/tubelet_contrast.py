"""Tubelet-Contrast (Thoker et al., ICCV 2023), an example that builds on MoCo: two clips that share a motion alone.

For each video of a batch, tubelets are drawn: patches that move and turn over time. They are pasted into a clip of this
video and into a clip of another one. These two are a positive pair; negatives, in MoCo's queue, have other tubelets.
Numbers are those of the authors' released configuration for R(2+1)D-18, whose clips have 112 pixels a side.

python examples/tubelet_contrast.py                                     # small encoder, generated videos, on a CPU
torchrun --nproc_per_node=4 examples/tubelet_contrast.py --dataset k400 --data /data/k400
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the project's files are
import moco
from cli import command_line
from pretrain import main
from train import UserError, option


@dataclasses.dataclass(frozen=True)
class TubeletContrastConfig(moco.MoCoConfig):
    """Options of Tubelet-Contrast."""

    losses: str = option("vv", "vv, the contrast of clips that have the same tubelets")
    temperature: float = option(0.2, "temperature of the contrast", (0.001, 1000))
    tubelets: int = option(2, "tubelets in a clip", (1, 100))
    motion: str = option("nonlinear", "along smoothed random points, or key frames", ("nonlinear", "linear"))
    transform: str = option("rotation", "what else changes over time", ("none", "scale", "rotation", "shear"))

    KNOWN_LOSSES = ("vv",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise UserError("--batch_size 1: a positive pair is of two videos, take 2 or more")


PAPER = dict(encoder="r2plus1d_18", crop=112, batch_size=8, lr=0.08, epochs=100)
PRESETS = {
    "synthetic": moco.PRESETS["synthetic"] | dict(tubelets=8, lr=0.4),  # with 2, features of so small clips collapse
    "ucf101": PAPER | dict(queue=2048),
    "k400": PAPER | dict(queue=16384),
}


def smooth_path(shape: tuple[int, ...], frames: int, device: torch.device) -> Tensor:
    """Non-linear motion: centres (*shape, frames, 2) on smoothed random points, in a box of 20 to 90 of 112 pixels."""
    points = torch.rand(math.prod(shape), 2, 48, device=device)
    kernel = torch.exp(-0.5 * (torch.arange(-24.0, 25, device=device) / 8) ** 2).expand(2, 1, -1)
    points = F.conv1d(F.pad(points, (24, 24), mode="reflect"), kernel, groups=2)
    low, high = points.amin(2, keepdim=True), points.amax(2, keepdim=True)
    chosen = torch.linspace(0, 47, frames, device=device).round().long()
    path = ((points - low) / (high - low))[..., chosen]
    extent = (20 + 70 * torch.rand(len(path), 1, 1, device=device)) / 112
    return (path * extent + torch.rand(len(path), 2, 1, device=device) * (1 - extent)).mT.unflatten(0, shape)


def drift(shape: tuple[int, ...], frames: int, velocity: float, device: torch.device) -> Tensor:
    """(*shape, frames), from 0 on, changing by up to `velocity` a frame, at another rate after up to two key frames."""
    slopes = velocity * (2 * torch.rand(*shape, 3, device=device) - 1)
    keys = torch.randint(1, 2 * frames, (*shape, 1, 2), device=device)  # half of them behind the end
    segment = (torch.arange(1, frames, device=device)[:, None] > keys).sum(-1)
    return F.pad(slopes.gather(-1, segment).cumsum(-1), (1, 0))


def draw_tubelets(shape: tuple[int, int], frames: int, config: TubeletContrastConfig, device: torch.device) -> dict:
    """Draws tubelets for (B, M), the largest of a clip first; lengths are shares of a clip's side.

    Returns:
        "center", "half": (B, M, T, 2), x and y of a tubelet's centre, and half of its width and height.
        "angle", "shear": (B, M, T), in radians, and in widths by height.
        "patch": (B, M, 2), the centre of what it shows; "frame": (B, M) in [0, T), when it does.
        "outline": (B, M), 0 rectangle, 1 ellipse, 2 rhombus; "edge", "opacity": (B, M), share of it that fades, and α.
    """

    def uniform(low: float, high: float, *last: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, *last, device=device)

    side = uniform(math.log(16 / 112), math.log(64 / 112)).exp().sort(descending=True).values
    ratio = uniform(math.log(0.5), math.log(2), 1) * torch.tensor([0.5, -0.5], device=device)
    half = side[..., None] / 2 * ratio.exp()
    changes = {"scale": 0.025, "rotation": math.radians(6), "shear": 0.066}  # a frame, at most
    moved = {name: drift(shape, frames, (config.transform == name) * v, device) for name, v in changes.items()}
    start = half + uniform(0, 1, 2) * (1 - 2 * half)
    if config.motion == "nonlinear":
        center = smooth_path(shape, frames, device)
    else:
        center = start[:, :, None] + drift((*shape, 2), frames, 5 / 112, device).mT
        center = center.clamp(half[:, :, None], 1 - half[:, :, None])
    return {
        "center": center,
        "half": half[:, :, None] * moved["scale"].exp()[..., None],
        "angle": moved["rotation"],
        "shear": moved["shear"],
        "patch": start,
        "frame": torch.randint(frames, shape, device=device),
        "outline": (uniform(0, 1)[..., None] > torch.tensor([0.5, 0.85], device=device)).sum(-1),
        "edge": torch.where(uniform(0, 1) < 0.5, 1e-6, uniform(0.1, 0.4)),
        "opacity": uniform(0.8, 1),
    }


def paste(clips: Tensor, source: Tensor, tubelets: dict[str, Tensor]) -> Tensor:
    """Pastes the same tubelets into the clips of a pair, (B, 2, 3, T, H, W), with patches of `source`, (B, 3, T, H, W);
    all uint8."""
    frames, height, width = clips.shape[3:]
    y = (torch.arange(height, device=clips.device)[:, None] + 0.5) / height
    x = (torch.arange(width, device=clips.device) + 0.5) / width
    pasted = clips.float()
    for i in range(tubelets["angle"].shape[1]):
        one = {name: value[:, i] for name, value in tubelets.items()}
        center_x, center_y, half_x, half_y = (
            part[:, :, None, None] for name in ("center", "half") for part in one[name].unbind(-1)
        )
        angle, shear = one["angle"][:, :, None, None], one["shear"][:, :, None, None]
        right, down = x - center_x, y - center_y  # (B, T, H, W)
        v = angle.cos() * down - angle.sin() * right
        u = (angle.cos() * right + angle.sin() * down - shear * v) / half_x
        v = v / half_y  # within a tubelet u and v are in [-1, 1]
        outline, edge, opacity = (one[name][:, None, None, None] for name in ("outline", "edge", "opacity"))
        other = torch.where(outline == 1, torch.hypot(u, v), u.abs() + v.abs())
        distance = torch.where(outline == 0, torch.maximum(u.abs(), v.abs()), other)
        alpha = opacity * ((1 - distance) / edge).clamp(0, 1)
        still = source[torch.arange(len(source), device=clips.device), :, one["frame"]].float()
        shown = one["patch"][:, None, None, None] + torch.stack([u, v], -1) * one["half"][:, :1, None, None]
        grid = (2 * shown - 1).flatten(1, 2)  # of all frames, one below the other
        patch = F.grid_sample(still, grid, padding_mode="border", align_corners=False).unflatten(2, (frames, height))
        pasted = pasted.lerp(patch[:, None], alpha[:, None, None])
    return pasted.round().byte()


class TubeletContrast(moco.MoCo):
    """InfoNCE of MoCo, in both directions, between clips of two videos that have the same tubelets."""

    def encode(self, views: dict[str, Tensor], motion: bool = False) -> moco.FeatureMaps:
        """As of MoCo, of a clip of each video and one of the last video, with patches of the next."""
        clips = torch.stack([views["clip"][:, 0], views["clip"][:, 1].roll(1, 0)], 1)
        tubelets = draw_tubelets((len(clips), self.config.tubelets), clips.shape[3], self.config, clips.device)
        return super().encode(views | {"clip": paste(clips, clips[:, 0].roll(-1, 0), tubelets)}, motion)


if __name__ == "__main__":
    command_line(lambda: main(TubeletContrast, TubeletContrastConfig, PRESETS, __doc__))
