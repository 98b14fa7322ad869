"""What do the foreground masks of FIMA (Eq. 6) hold? An example of a measure of one's own.

python examples/foreground.py --checkpoint runs/fima/checkpoint.pt
python examples/foreground.py --dataset ucf101 --data /data/ucf101 --encoder i3d        # an untrained encoder

Masks are those of pretraining: by the key encoder's activation on RGB, on frame differences and on both, with batch
norm by the statistics of a batch. Printed is the share of the test videos' "motion", the magnitude of the frame
differences, that lies inside them, and of generated videos that of the "objects", their area. For comparison: "another"
is the mask by both of another video, which holds what a mask can that has not seen this one; "frames" is by the change
of the frames themselves; "best" by these very sums. A random mask holds --foreground.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
import data
from augment import frame_difference
from cli import command_line, loader_workers, parse
from evaluate import RetrieveConfig, prepare, save_result
from features import clip_outputs, load_encoder, video_outputs
from losses import foreground_mask
from synthetic import object_masks
from train import option
from visualize import both_modalities, foreground_masks

MASKS = "rgb", "difference", "both", "another", "frames", "best"


@dataclasses.dataclass(frozen=True)
class ForegroundConfig(RetrieveConfig):
    """Options of the measure."""

    clips: int = option(1, "uniformly spaced clips of a test video", (1, 10_000))
    test_batch: int = option(32, "videos a forward, by which batch norm normalises, in each process", (1, 65_536))
    foreground: float = option(0.5, "portion of the pixels that is foreground, beta of Eq. 6", (0.01, 1))


class Frames(list):
    """Frames of a video, to be read as a `Video` is."""

    def stream(self, frames: list[int]) -> list[dict[int, np.ndarray]]:
        return [{k: self[k] for k in frames}]

    def times(self) -> range:
        return range(len(self))


class ObjectClips(data.TestClips):
    """Where the objects of generated videos are, cut as `data.TestClips` cuts the videos."""

    def open(self, path: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(Frames(object_masks(path)))


def main() -> None:
    process, config, encoder, _, test, _ = prepare(parse(ForegroundConfig, __doc__))
    encoder = load_encoder(config, key=True)[0].to(process.device)
    grid = []

    def masks_and_motion(clips: Tensor) -> Tensor:
        masks = foreground_masks(*both_modalities(encoder, clips, config.difference), config.foreground)  # (3, N, h, w)
        grid[:] = masks.shape[2:]
        motion = (frame_difference(clips / 255) - 0.5).abs().mean((1, 2))
        return torch.cat([masks, F.adaptive_avg_pool2d(motion, grid)[None]]).movedim(0, 1).flatten(2)

    def area(clips: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(clips.float().mean((1, 2)), grid).flatten(1)

    maps, good, bad = video_outputs(masks_and_motion, test, config, process, "test videos", average=False)
    masks, motion = maps[good].flatten(0, 1).split((3, 1), 1)  # (clips, 3, hw)
    another = masks[:, 2:].roll(len(masks) // 2, 0)  # from far off in the list: mostly of another class, too
    masks = torch.cat([masks, another, foreground_mask(motion, config.foreground)], 1)
    sums, result = {"motion": motion}, {}
    if config.dataset == "synthetic":
        objects = ObjectClips(test, config.crop, config.frames, config.frame_stride, config.clips)
        work = process, loader_workers(config), config.test_batch, "objects"
        sums["objects"] = clip_outputs(area, objects, *work)[0][good].flatten(0, 1)[:, None]
    for name, found in sums.items():
        best = foreground_mask(found, config.foreground)
        inside = (torch.cat([masks, best], 1) * found).sum(2) / found.sum(2)
        shares = zip(MASKS, (100 * inside.nanmean(0)).tolist(), strict=True)
        result |= {f"{name}_{mask}": round(share, 2) for mask, share in shares}
    save_result(process, config, {"inside_percent": result, "unreadable": bad}, result, len(test))


if __name__ == "__main__":
    command_line(main)
