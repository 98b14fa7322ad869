"""MCL: Motion-Focused Contrastive Learning of Video Representations (ICCV 2021).

MoCo-v2 whose clips are cut where a video moves (Sec. 3.2), and whose gradient, of the similarity of two clips with
respect to the last convolution, is made to lie where the clip moves (L_MAL, Sec. 3.3). What moves is said by motion
maps, the derivatives of TV-L1 flow (Sec. 3.1), made once for each video:

    pip install opencv-contrib-python-headless                              # TV-L1 flow, for `maps` alone
    python mcl.py maps --dataset ucf101 --data /data/ucf101                 # again after an interrupt: goes on

    python mcl.py                                                           # small encoder, generated videos, on a CPU
    python mcl.py --dataset ucf101 --data /data/ucf101                      # one GPU
    torchrun --nproc_per_node=8 mcl.py --dataset k400 --data /data/k400     # eight GPUs, the paper's setting

Tables of the paper as flags: 1 --temporal_sampling, --spatial_sampling, --losses vv and, of t, s, st, what is added;
2 --losses vv, and --alignment v1, v2, v3.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import moco
from losses import motion_alignment, motion_map, response_map
from train import Options, UserError, command_line, option, parse, user_errors

SAMPLING = ("motion", "random")
LAST_NORMS = {  # the batch norms behind an encoder's last convolutions, of which it has one, or one a branch
    "conv4": r"units\.3\.batch3d",
    "i3d": r"mixed_5c\.branch_(0|[123]\.1)\.batch3d",
    "r2plus1d_18": r"layer4\.1\.conv2\.1",
    "r3d_18": r"layer4\.1\.conv2\.1",
    "s3d": r"features\.15\.(branch0\.1|branch[12]\.1\.1\.1|branch3\.1\.1)",
}


@dataclasses.dataclass(frozen=True)
class MapsConfig(Options):
    """Options of `mcl.py maps`; those of training have the same names."""

    dataset: str = option("synthetic", "of whose training videos to make motion maps", data.DATASETS)
    data: str = option("", "folder of the data set (default: datasets/DATASET)")
    list_file: str = option("", "with --dataset folder: a file of lines 'path label', label optional")
    exclude: str = option("", "file of videos to leave out")
    split: int = option(1, "official split of the data set", least=1)
    maps: str = option("", "folder of the motion maps (default: beside that of the data set, NAME_maps)")
    flow_side: int = option(
        120, "shorter side in pixels of the frames that flow is computed on, or their own if less", least=16, most=4096
    )
    workers: int = option(os.cpu_count() or 1, "processes", least=1)


@dataclasses.dataclass(frozen=True)
class MCLConfig(moco.MoCoConfig, MapsConfig):
    """Options of MCL; the defaults are the paper's."""

    losses: str = option(
        "vv,t,s,st", "losses to sum, of vv (Eq. 3) and the terms of Eq. 7: t, s, st align over time, space, both"
    )
    alignment: str = option("v3", "what is aligned with motion (Table 2; Eq. 4, 5, 6)", ("v1", "v2", "v3"))
    temporal_sampling: str = option("motion", "windows that move most, or any (TA of Table 1)", SAMPLING)
    spatial_sampling: str = option("motion", "crops that hold what moves most, or any (SA of Table 1)", SAMPLING)
    bn: str = option(
        "shuffle",
        "batch norm with several processes. shuffle: keys are made of clips dealt out over the processes, as in MoCo; "
        "local: of each process's own clips",
        ("shuffle", "local"),
    )

    KNOWN_LOSSES = ("vv", "t", "s", "st")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "vv" not in self.terms:
            raise UserError(f"--losses {self.losses}: t, s and st align the gradient of vv, add it")
        if self.compile == "on":
            raise UserError("--compile on: torch.compile cannot differentiate a gradient, as L_MAL does; leave it off")


PAPER = dict(encoder="s3d", crop=224, batch_size=8, lr=0.04)
PRESETS = {
    "synthetic": moco.PRESETS["synthetic"],
    "ucf101": PAPER | dict(epochs=200, queue=8192),
    "k400": PAPER | dict(epochs=400, queue=131072),
}


# --------------------------------------------------------------------------------------------------------- motion maps


def tvl1_flow(images: Iterable[np.ndarray], side: int) -> Iterator[np.ndarray]:
    """Optical flow from each image to the next by TV-L1 (Zach et al. 2007), in OpenCV's form and with its parameters.

    Args:
        images: uint8 (H, W, 3).
        side: their shorter side is reduced to this, where it is longer.

    Yields:
        float32 (2, h, w), to the right and down, in pixels of the reduced image.

    Raises:
        UserError: OpenCV's contributed modules are not installed.
    """
    try:
        import cv2  # here, so that training does without

        method = cv2.optflow.createOptFlow_DualTVL1()
    except (ImportError, AttributeError) as error:
        raise UserError("motion maps need TV-L1 flow: pip install opencv-contrib-python-headless") from error
    cv2.setNumThreads(1)  # there is a process for each core

    def reduced(image: np.ndarray) -> np.ndarray:
        scale = min(side / min(image.shape[:2]), 1)
        size = [round(scale * n) for n in (image.shape[1], image.shape[0])]
        return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)

    for earlier, later in itertools.pairwise(map(reduced, images)):
        yield method.calc(earlier, later, None).transpose(2, 0, 1)


@dataclasses.dataclass
class MotionMaps:
    """Motion maps in files: that of ROOT/a/b.mp4 is FOLDER/a/b.mp4.npz, which holds no pickles.

    A file holds the map of every frame, (N, h, w), averaged over cells, of which the shorter side has at most `CELLS`,
    as the square root in 8 bits; and the size of the video's file and `side`, by which it is known to be stale.

    Args:
        root: folder of the videos, absolute.
        side: of the frames that flow is computed on.
    """

    CELLS, CHUNK = 24, 64  # cells; frames read at once

    root: str
    folder: Path
    side: int
    crashed_on: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: MapsConfig) -> "MotionMaps":
        """Those of a run's options."""
        root = os.path.abspath(config.data or f"datasets/{config.dataset}")
        return cls(root, Path(config.maps or f"{root}_maps"), config.flow_side)

    def file(self, video: str) -> Path:
        """Where the map of a video lies."""
        return self.folder / (os.path.relpath(video, self.root) + ".npz")

    def fits(self, video: str) -> bool:
        """Whether there is a map of this very file."""
        with contextlib.suppress(Exception), np.load(self.file(video)) as held:  # whatever a damaged file gives
            return (int(held["bytes"]), int(held["side"])) == (os.path.getsize(video), self.side)
        return False

    def read(self, video: str, frames: int) -> np.ndarray:
        """m of Eq. 1 for each frame of a video, (frames, h, w), float32.

        Raises:
            ValueError: missing, damaged, or of another video.
        """
        try:
            with np.load(self.file(video)) as held:
                levels, scale, size = held["levels"], held["scale"], int(held["bytes"])
            found = f"{len(levels)} frames and {size} bytes"
        except Exception as error:
            found = f"none that can be read ({error})"
        if found != (wanted := f"{frames} frames and {os.path.getsize(video)} bytes"):
            raise ValueError(
                f"{self.file(video)}: {found}, where {video} has {wanted}: make it again with `python mcl.py maps`"
            )
        return np.square(levels / np.float32(255)) * scale

    def write(self, video: str, motion: np.ndarray) -> None:
        """Keeps the map (N, h, w) of a video; at every moment the file is whole or not there."""
        file, scale = self.file(video), max(motion.max(), np.float32(1e-12))
        levels = np.round(255 * np.sqrt(motion / scale)).astype(np.uint8)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        with open(partial, "wb") as out:
            np.savez_compressed(out, levels=levels, scale=scale, bytes=os.path.getsize(video), side=self.side)
        os.replace(partial, file)

    def compute(self, path: str) -> np.ndarray:
        """m of Eq. 1 for each frame, the last being that of the frame before (Sec. 3.1), in cells: (N, h, w)."""
        with data.Video(path) as video:
            starts = range(0, len(video), self.CHUNK)
            chunks = (video.read(range(start, min(start + self.CHUNK, len(video)))) for start in starts)
            maps = []
            for flow in tvl1_flow(itertools.chain.from_iterable(chunks), self.side):
                motion = motion_map(torch.from_numpy(flow)[None])
                cells = [min(n, round(n * self.CELLS / min(flow.shape[1:]))) for n in flow.shape[1:]]
                maps.append(F.adaptive_avg_pool2d(motion, cells)[0])
        return torch.stack([*maps, maps[-1]]).numpy()

    def __call__(self, video: str) -> tuple[str, str]:
        """Makes the map of a video; gives (path, why the video can't be read, or "")."""
        if video in self.crashed_on:
            return video, self.crashed_on[video]
        try:
            self.write(video, self.compute(video))
        except data.BadVideo as error:
            return video, error.reason
        return video, ""

    def crashed(self, video: str, how: str) -> None:
        """Notes that a process died of a video."""
        self.crashed_on[video] = how

    def make(self, videos: Sequence[str], workers: int) -> str:
        """Makes those that are missing or stale, in processes; returns a line on what was done.

        Raises:
            UserError: OpenCV is missing, or a map cannot be written.
        """
        missing = [video for video in videos if not self.fits(video)]
        report = f"{len(videos) - len(missing)} of {len(videos)} motion maps were in {self.folder}"
        if not missing:
            return report
        next(tvl1_flow([], self.side), None)  # is it there?
        bad = self.folder / "bad_videos.txt"
        with user_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            count = data.visit_videos([self] * workers, missing, self.root, bad, f"motion maps in {self.folder}")
        advice = f"; {count} videos can't be read: leave them out with --exclude {bad}" if count else ""
        return f"{report}, {len(missing) - count} were made{advice}"
