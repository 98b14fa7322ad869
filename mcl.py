"""MCL: Motion-Focused Contrastive Learning of Video Representations (ICCV 2021).

MoCo-v2 whose clips are cut where a video moves (Sec. 3.2), and whose gradient, that of the similarity of two clips with
respect to the last convolution, is made to lie where the clip moves (L_MAL, Sec. 3.3). Motion maps say what moves: the
derivatives of TV-L1 flow (Sec. 3.1), made once for each video.

    pip install scikit-image                                                # TV-L1 flow, to make motion maps
    python mcl.py                                                           # small encoder, generated videos, on a CPU
    python mcl.py maps --dataset ucf101 --data /data/ucf101                 # all maps before training, on many cores
    python mcl.py --dataset ucf101 --data /data/ucf101                      # one GPU
    torchrun --nproc_per_node=8 mcl.py --dataset k400 --data /data/k400     # eight GPUs
"""

import dataclasses
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import moco
import pretrain
from cli import command_line, dispatch
from losses import crop_motion, foreground_mask, motion_alignment, motion_map, moving_windows, pool_motion, response_map
from models import last_norms, recorded_inputs
from train import UserError, detail, option, user_errors, write_file
from video import Video


@dataclasses.dataclass(frozen=True)
class MapsConfig(pretrain.VideosConfig):
    """Options of `mcl.py maps`, by the names that they have in training."""

    maps: str = option("", "folder of the motion maps (default: beside the data set's, its name and _maps)")
    flow_side: int = detail(120, "shorter side in pixels that frames are reduced to for the flow", (16, 4096))
    flow_warps: int = option(5, "warps of TV-L1 at each scale; with fewer it is faster, and coarser", (1, 1000))
    workers: int = option(os.cpu_count() or 1, "processes", (1, 1024))


@dataclasses.dataclass(frozen=True)
class MCLConfig(moco.MoCoConfig, MapsConfig):
    """Options of MCL; their defaults are the paper's. Presets have the others."""

    losses: str = option("vv,t,s,st", "losses to sum, of vv (Eq. 3), and t, s, st (Eq. 7): over time, space and both")
    alignment: str = detail("v3", "what is aligned with motion (Table 2): Eq. 4, 5 or 6", ("v1", "v2", "v3"))
    temporal_sampling: str = detail("motion", "windows that move most, or any (TA of Table 1)", ("motion", "random"))
    spatial_sampling: str = detail("motion", "crops of what moves most, or any (SA of Table 1)", ("motion", "random"))

    KNOWN_LOSSES = ("vv", "t", "s", "st")
    FREE = moco.MoCoConfig.FREE | {"maps"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "vv" not in self.terms:
            raise UserError(f"--losses {self.losses}: t, s and st align the gradient of vv, add it")
        if self.compile == "on":
            raise UserError("--compile on: MCL differentiates a gradient, which torch can't do in it")


MAPS = {"synthetic": dict(flow_warps=1)}
PRESETS = {
    "synthetic": moco.PRESETS["synthetic"] | MAPS["synthetic"],
    "ucf101": pretrain.PRESETS["ucf101"] | dict(encoder="s3d", queue=8192),
    "k400": pretrain.PRESETS["k400"] | dict(encoder="s3d", epochs=400, queue=131072),
}


def tvl1_flow(images: Sequence[np.ndarray], side: int, warps: int = 5) -> Tensor:
    """Optical flow from each image to the next by TV-L1 (Zach et al. 2007), scikit-image's with its own parameters.

    T images uint8 (H, W, 3), whose shorter side is reduced to `side` pixels if it is longer → (T − 1, 2, h, w), to the
    right and down, in pixels of the reduced images. At each scale the later image is warped `warps` times.

    Raises UserError where scikit-image is not installed.
    """
    try:
        from skimage.registration import optical_flow_tvl1  # here, so that training does without
    except ImportError as error:
        raise UserError("motion maps need the TV-L1 flow of scikit-image: pip install scikit-image") from error
    scale = min(side / min(images[0].shape[:2]), 1)
    size = [max(round(scale * n), 2) for n in images[0].shape[:2]]
    luma = torch.tensor([0.299, 0.587, 0.114]) / 255
    gray = [(torch.tensor(image).float() @ luma)[None, None] for image in images]
    gray = [F.interpolate(image, size, mode="bilinear", antialias=True)[0, 0].numpy() for image in gray]
    flow = [optical_flow_tvl1(*pair, num_warp=warps, dtype=np.float32) for pair in itertools.pairwise(gray)]
    return torch.from_numpy(np.stack(flow)).flip(1)  # it gives rows first


class MotionMaps:
    """m of Eq. 1 for each frame of each video, averaged over cells, made once: when first read, or by `mcl.py maps`.

    FOLDER/flow_SIDE_WARPS/a/b.mp4.SIZE.npz holds the maps of ROOT/a/b.mp4 (`data.size_of`), as square roots in
    8 bits. Each video has a scale of its own, which neither sampling nor alignment knows.
    """

    CELLS = 24  # of the shorter side, at most
    CHUNK = 64  # frames read at once

    def __init__(self, config: MapsConfig):
        self.config, root = config, os.path.abspath(config.root)
        self.folder = Path(config.maps or f"{root}_maps", f"flow_{config.flow_side}_{config.flow_warps}")

    def compute(self, path: str) -> np.ndarray:
        """The maps of a video (N, h, w) ≥ 0; the last frame, from which nothing flows, has that of the one before (Sec.
        3.1). Raises BadVideo."""
        maps = []
        with Video(path) as video:
            for first in range(0, len(video) - 1, self.CHUNK):
                images = video.read(range(first, min(first + self.CHUNK + 1, len(video))))
                flow = tvl1_flow(images, self.config.flow_side, self.config.flow_warps)
                cells = [min(n, round(n * self.CELLS / min(flow.shape[2:]))) for n in flow.shape[2:]]
                maps.append(F.adaptive_avg_pool2d(motion_map(flow), cells))
        return torch.cat([*maps, maps[-1][-1:]]).numpy()

    def file(self, path: str) -> Path:
        """Where the maps of a video lie, as it is now."""
        return self.folder / f"{os.path.relpath(path, self.config.root)}.{data.size_of(path)}.npz"

    def visit(self, path: str) -> None:
        """Makes the maps of a video, if there are none. Raises BadVideo."""
        file, memory = self.file(path), io.BytesIO()
        if not file.exists():
            maps = self.compute(path)
            np.savez_compressed(memory, np.round(255 * np.sqrt(maps / max(maps.max(), 1e-12))).astype(np.uint8))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, memory.getbuffer())

    def read(self, path: str, frames: int) -> np.ndarray:
        """The maps of a video of so many frames, which it may first have to make: float32 (frames, h, w) in [0, 1].

        Raises UserError where its file is damaged, and BadVideo.
        """
        self.visit(path)
        content = self.file(path).read_bytes()
        try:
            levels = np.load(io.BytesIO(content))["arr_0"]
            if len(levels) != frames:
                raise ValueError(f"{len(levels)} frames, the video has {frames}")
        except Exception as error:  # damaged files raise all kinds
            raise UserError(f"{self.file(path)} is damaged, delete it: {error}") from error
        return np.square(levels / np.float32(255))


class MotionViews(data.PretrainingViews):
    """Views of windows and crops that move (Sec. 3.2), which bring their motion maps along.

    One more entry, "motion": float32 (2, frames, SIZE, SIZE), the clip's ST-motion; 0 where a short video's last frame
    is shown again.
    """

    SIZE = 28  # bins of a crop, of which feature pixels are averages
    MOVING, COVERED, DRAWS = 0.1, 0.8, 50  # of the pixels; of these, by a crop; how often a crop is drawn at most

    def __init__(self, *arguments, maps: MotionMaps, temporal: bool, spatial: bool, **options):
        super().__init__(*arguments, **options)
        self.maps, self.temporal, self.spatial = maps, temporal, spatial

    def empty(self, *batch: int) -> dict[str, Tensor]:
        return super().empty(*batch) | {"motion": torch.empty(*batch, self.windows, self.frames, self.SIZE, self.SIZE)}

    def write_views(self, rng: np.random.Generator, path: str, item: dict[str, Tensor]) -> np.ndarray:
        starts = super().write_views(rng, path, item)
        for start, box, out in zip(starts, item["box"], item["motion"], strict=True):
            out[:] = crop_motion(self.clips[start], box / self.frame, self.SIZE)
        return starts

    def possible_starts(self, video: Video) -> np.ndarray:
        """Those of windows that move, or of all, where fewer move than are drawn."""
        window, motion = self.frames * self.frame_stride, torch.from_numpy(self.maps.read(video.path, len(video)))
        motion = F.pad(motion, (0, 0, 0, 0, 0, max(window - len(motion), 0)))
        self.clips = motion.unfold(0, window, 1)[..., :: self.frame_stride].movedim(3, 1)  # m^ST by first frame
        starts = super().possible_starts(video)
        moving = starts[moving_windows(pool_motion(motion, "t"), window, self.frame_stride).numpy()]
        return moving if self.temporal and len(moving) >= self.windows else starts

    def draw_region(self, rng: np.random.Generator, height: int, width: int, start: int) -> tuple[int, int, int, int]:
        """The first of some regions that holds enough of the pixels that move most, or else the one that holds most."""
        self.frame = torch.tensor([width, height] * 2)
        moving = foreground_mask(pool_motion(self.clips[start], "s")[None], self.MOVING)[0].numpy()
        rows, columns = moving.nonzero()
        y, x = (rows + 0.5) * height / moving.shape[0], (columns + 0.5) * width / moving.shape[1]
        held = {}  # how many of them, by region
        for _ in range(self.DRAWS if self.spatial else 1):
            top, left, h, w = region = super().draw_region(rng, height, width, start)
            held[region] = np.count_nonzero((top <= y) & (y < top + h) & (left <= x) & (x < left + w))
            if held[region] >= self.COVERED * len(y):
                break
        return max(held, key=held.get)


class MCL(moco.MoCo):
    """L = L_NCE + L_MAL (Sec. 3.3, Fig. 1), in both directions: each view is once the query, once the key.

    h of Eq. 4 to 6 is the output of the last convolution, or of the last one of each branch, before batch norm and
    ReLU. The encoder's output would not do: what follows it, average pooling, has the same gradient everywhere.
    """

    def make_views(self, videos: data.VideoList) -> data.PretrainingViews:
        """Views that follow motion maps, if anything does."""
        config = self.config
        temporal, spatial = config.temporal_sampling == "motion", config.spatial_sampling == "motion"
        if not (temporal or spatial or len(config.terms) > 1):
            return super().make_views(videos)
        return super().make_views(videos, MotionViews, maps=MotionMaps(config), temporal=temporal, spatial=spatial)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `MotionViews` makes them, batched → the named losses; enqueues the keys at the end."""
        with recorded_inputs(last_norms(self.encoder)) as features:  # h, in as many parts as there are branches
            maps = self.encode(views)
        losses, keys = self.instance_losses(maps)  # Eq. 3
        if aligned := [name for name in self.config.terms if name != "vv"]:
            g = None
            if self.config.alignment != "v1":  # g, through which gradients pass
                positive = keys["vv"].unflatten(0, (2, -1)).flip(0)
                score = (self.project(self.head, pretrain.pool(maps.query)) * positive).sum()
                g = torch.cat(torch.autograd.grad(score, features, create_graph=True), 1)
            response = response_map(torch.cat(features, 1), g, self.config.alignment)  # Eq. 4-6, (2B, T, H, W)
            if "t" in aligned and response.shape[1] < 2:
                raise UserError(f"--losses t needs feature maps of several frames: raise --frames {self.config.frames}")
            motion = F.adaptive_avg_pool3d(self.both(views["motion"]), response.shape[1:])  # m^ST
            for name in aligned:
                losses[name] = motion_alignment(response, motion, name)  # Eq. 7
                unrelated = motion_alignment(response.detach(), motion.roll(1, 0), name)  # another video's
                self.metrics[f"chance/{name}"] = unrelated
        self.enqueue(keys)
        return losses


def make_maps(config: MapsConfig) -> None:
    """Makes the motion maps that MCL trains with, once for each training video. Those that are there stay."""
    videos, maps = config.find_videos(), MotionMaps(config)
    print(videos.report)
    bad = maps.folder / "bad_videos.txt"
    with user_errors((OSError,), bad):
        maps.folder.mkdir(parents=True, exist_ok=True)
        count = data.visit_videos(maps.visit, videos.paths, config.root, bad, config.workers, f"making {maps.folder}")
    advice = f"; {count} can't be read: {bad}, for --exclude" * (count > 0)
    print(f"{maps.folder} holds the maps of {len(videos) - count} videos{advice}")


def main() -> None:
    """`mcl.py maps …` makes motion maps, `mcl.py …` trains."""
    train = (lambda config: pretrain.pretrain(MCL, config)), MCLConfig, PRESETS
    _, command, config, _ = dispatch({"": train, "maps": (make_maps, MapsConfig, MAPS)}, __doc__)
    command(config)


if __name__ == "__main__":
    command_line(main)
