"""MCL: Motion-Focused Contrastive Learning of Video Representations (ICCV 2021).

MoCo-v2 whose clips are cut where a video moves (Sec. 3.2), and whose gradient, that of the similarity of two clips with
respect to the last convolution, is made to lie where the clip moves (L_MAL, Sec. 3.3). Motion maps say what moves: the
derivatives of TV-L1 flow (Sec. 3.1), made once for each video.

    pip install scikit-image                                                # TV-L1 flow, to make motion maps
    python mcl.py maps --dataset ucf101 --data /data/ucf101                 # the same again goes on after an interrupt

    python mcl.py                                                           # small encoder, generated videos, on a CPU
    python mcl.py --dataset ucf101 --data /data/ucf101                      # one GPU
    torchrun --nproc_per_node=8 mcl.py --dataset k400 --data /data/k400     # eight GPUs, the paper's setting

Tables of the paper as flags: 1 --temporal_sampling, --spatial_sampling, and --losses vv with the terms to add of t, s,
st; 2 --losses vv, and --alignment v1, v2, v3.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import os
import shlex
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
from pretrain import pool
from train import UserError, option, user_errors, write_file
from video import BadVideo, Video, blame_machine

SAMPLING = ("motion", "random")


@dataclasses.dataclass(frozen=True)
class MapsConfig(pretrain.VideosConfig):
    """Options of `mcl.py maps`, by the names that they have in training."""

    maps: str = option("", "folder of the motion maps (default: beside the data set's, its name and _maps)")
    flow_side: int = option(120, "shorter side in pixels that frames are reduced to for the flow", (16, 4096))
    flow_warps: int = option(5, "warps of TV-L1 at each scale; with fewer it is faster, and coarser", (1, 1000))
    workers: int = option(os.cpu_count() or 1, "processes", (1, 1024))


@dataclasses.dataclass(frozen=True)
class MCLConfig(moco.MoCoConfig, MapsConfig):
    """Options of MCL; the defaults are the paper's."""

    losses: str = option(
        "vv,t,s,st", "losses to sum, of vv (Eq. 3), and t, s, st (Eq. 7), which align over time, space and both"
    )
    alignment: str = option("v3", "what is aligned with motion (Table 2): Eq. 4, 5 or 6", ("v1", "v2", "v3"))
    temporal_sampling: str = option("motion", "windows that move most, or any (TA of Table 1)", SAMPLING)
    spatial_sampling: str = option("motion", "crops that hold what moves most, or any (SA of Table 1)", SAMPLING)

    KNOWN_LOSSES = ("vv", "t", "s", "st")
    FREE = moco.MoCoConfig.FREE | {"maps"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "vv" not in self.terms:
            raise UserError(f"--losses {self.losses}: t, s and st align the gradient of vv, add it")
        if self.compile == "on":
            raise UserError("--compile on: MCL differentiates a gradient, which torch can't do in it")


PAPER = dict(encoder="s3d", crop=224, batch_size=8, lr=0.04)
FLOW = {"synthetic": dict(flow_warps=1)}
PRESETS = {
    "synthetic": moco.PRESETS["synthetic"] | FLOW["synthetic"],
    "ucf101": PAPER | dict(epochs=200, queue=8192),
    "k400": PAPER | dict(epochs=400, queue=131072),
}


def tvl1_flow(images: Sequence[np.ndarray], side: int, warps: int = 5) -> Tensor:
    """Optical flow from each image to the next by TV-L1 (Zach et al. 2007), scikit-image's with its own parameters.

    Args:
        images: T images uint8 (H, W, 3), whose shorter side is reduced to `side` pixels if it is longer.
        warps: how often the later image is warped at each scale.

    Returns:
        (T − 1, 2, h, w), to the right and down, in pixels of the reduced images.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.registration import optical_flow_tvl1  # here, so that training does without
    except ImportError as error:
        raise UserError("motion maps need the TV-L1 flow of scikit-image: pip install scikit-image") from error
    scale = min(side / min(images[0].shape[:2]), 1)
    size = [max(round(scale * n), 1) for n in images[0].shape[:2]]
    luma = torch.tensor([0.299, 0.587, 0.114]) / 255
    gray = [(torch.tensor(image).float() @ luma)[None, None] for image in images]
    gray = [F.interpolate(image, size, mode="bilinear", antialias=True)[0, 0].numpy() for image in gray]
    flow = [optical_flow_tvl1(*pair, num_warp=warps, dtype=np.float32) for pair in itertools.pairwise(gray)]
    return torch.from_numpy(np.stack(flow)).flip(1)  # it gives rows first


class MotionMaps:
    """m of Eq. 1 for each frame of each video, averaged over cells, made once: that of ROOT/a/b.mp4 is kept in
    FOLDER/a/b.mp4.npz.

    A file holds the maps of a video (N, h, w) as square roots in 8 bits, and what they were made from: the size of the
    video's file, and a recipe; others are made anew. It holds no pickles.
    """

    CELLS = 24  # of the shorter side, at most
    CHUNK = 64  # frames read at once

    def __init__(self, config: MapsConfig):
        self.config, self.root = config, os.path.abspath(config.root)
        self.folder = Path(config.maps or f"{self.root}_maps")
        self.recipe = f"TV-L1, {config.flow_side} pixels, {config.flow_warps} warps"
        self.command = f"python mcl.py maps --dataset {config.dataset} --data {shlex.quote(self.root)}"
        for field in dataclasses.fields(MapsConfig):
            value = getattr(config, field.name)
            if field.name not in ("dataset", "data", "workers") and value:  # defaults too, over which presets win
                self.command += f" --{field.name} {shlex.quote(str(value))}"

    def compute(self, path: str) -> np.ndarray:
        """The maps of a video (N, h, w) ≥ 0; the last frame, from which nothing flows, has that of the one before (Sec.
        3.1). Raises BadVideo."""
        maps = []
        with Video(path) as video:
            for first in range(0, len(video) - 1, self.CHUNK):
                images = video.read(range(first, min(first + self.CHUNK + 1, len(video))))
                if min(images[0].shape[:2]) < 2:
                    raise BadVideo(path, f"no flow in frames of {images[0].shape[1]} x {images[0].shape[0]} pixels")
                flow = tvl1_flow(images, self.config.flow_side, self.config.flow_warps)
                cells = [min(n, round(n * self.CELLS / min(flow.shape[2:]))) for n in flow.shape[2:]]
                maps.append(F.adaptive_avg_pool2d(motion_map(flow), cells))
        return torch.cat([*maps, maps[-1][-1:]]).numpy()

    def file(self, path: str) -> Path:
        """Where the maps of a video lie."""
        return self.folder / (os.path.relpath(path, self.root) + ".npz")

    def visit(self, path: str) -> None:
        """Computes and writes the maps of a video; raises UserError where there is a file of something else."""
        file, foreign = self.file(path), False
        with contextlib.suppress(Exception), np.load(file) as held:  # damaged files raise all kinds
            foreign = "recipe" not in held
        if foreign:
            raise UserError(f"{file} holds something else than maps: name another folder for these")
        maps = self.compute(path)
        scale = max(float(maps.max()), 1e-12)
        levels = np.round(255 * np.sqrt(maps / scale)).astype(np.uint8)
        memory = io.BytesIO()
        np.savez_compressed(memory, levels=levels, scale=scale, size=os.path.getsize(path), recipe=self.recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, memory.getbuffer())

    def read(self, path: str, frames: int | None = None) -> np.ndarray:
        """The maps of a video, of so many frames if it is given: float32 (frames, h, w).

        Raises UserError when they are missing, damaged, or those of another video or another recipe, and OSError when
        they can't be read for a reason that is not in the file.
        """
        file, size, wrong = self.file(path), os.path.getsize(path), ""
        try:
            with np.load(file) as held:  # reading an entry compares its check sum
                levels, scale, made_from, recipe = (held[name] for name in ("levels", "scale", "size", "recipe"))
            if str(recipe) != self.recipe:
                wrong = f"made by another recipe ({recipe}, not {self.recipe})"
            if int(made_from) != size or frames not in (None, len(levels)):
                wrong = "of another video of this name"
            maps = np.float32(scale) * np.square(levels / np.float32(255))
        except FileNotFoundError:
            wrong = "missing"
        except Exception as error:  # damaged files raise all kinds
            blame_machine(error, str(file))
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a place out of the file
                raise
            wrong = f"damaged ({error})"
        if wrong:
            raise UserError(f"{file}: {wrong}; make it again with `{self.command}`")
        return maps

    def is_made(self, path: str) -> bool:
        """Whether there are whole maps of this video as it is now, by this recipe."""
        try:
            self.read(path)
        except (UserError, FileNotFoundError):  # the latter of a video that is gone, which making them will name
            return False
        return True

    def check(self, paths: Sequence[str]) -> None:
        """Raises UserError when there is a video without maps."""
        missing = [path for path in paths if not self.file(path).is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: nothing for {len(missing)} of {len(paths)} videos, such as {missing[0]!r}: run "
                f"`{self.command}`, and leave out with --exclude what it names as unreadable"
            )

    def make(self, paths: Sequence[str], workers: int) -> str:
        """Makes what is missing, of another recipe or of another video, in processes; returns a line on what there is.

        Videos that can't be read are added to FOLDER/bad_videos.txt, for `exclude`.
        """
        with user_errors((OSError,)):
            todo = [path for path in paths if not self.is_made(path)]
            report = f"{self.folder}: {len(paths) - len(todo)} of {len(paths)} were there"
            if not todo:
                return report
            self.folder.mkdir(parents=True, exist_ok=True)
            bad = self.folder / "bad_videos.txt"
            count = data.visit_videos(self.visit, todo, self.root, bad, workers, f"making {self.folder}", "a")
        exclude = shlex.quote(",".join(filter(None, [self.config.exclude, str(bad)])))
        advice = f", {count} videos can't be read: leave them out with --exclude {exclude}" if count else ""
        return f"{report}, {len(todo) - count} made{advice}"


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
        """As of every view, with "motion"."""
        return super().empty(*batch) | {"motion": torch.empty(*batch, self.windows, self.frames, self.SIZE, self.SIZE)}

    def write_views(self, rng: np.random.Generator, path: str, item: dict[str, Tensor]) -> np.ndarray:
        starts = super().write_views(rng, path, item)
        for start, box, out in zip(starts, item["box"], item["motion"], strict=True):
            out[:] = crop_motion(self._clip(start), box / self.frame, self.SIZE)
        return starts

    def possible_starts(self, video: Video) -> np.ndarray:
        """Those of windows that move, or of all, where fewer move than are drawn."""
        self.motion = torch.from_numpy(self.maps.read(video.path, len(video)))
        starts = super().possible_starts(video)
        if not self.temporal:
            return starts
        window = self.frames * self.frame_stride
        moving = starts[moving_windows(pool_motion(self.motion, "t"), window, self.frame_stride).numpy()]
        return moving if len(moving) >= self.windows else starts

    def _clip(self, start: int) -> Tensor:
        """m^ST of the whole frames of a clip, (frames, h, w)."""
        shown = self.motion[start : start + self.frames * self.frame_stride : self.frame_stride]
        return F.pad(shown, (0, 0, 0, 0, 0, self.frames - len(shown)))

    def draw_region(self, rng: np.random.Generator, height: int, width: int, start: int) -> tuple[int, int, int, int]:
        """The first of some regions that holds enough of the pixels that move most, or else the one that holds most."""
        self.frame = torch.tensor([width, height] * 2)
        if not self.spatial:
            return super().draw_region(rng, height, width, start)
        moving = foreground_mask(pool_motion(self._clip(start), "s")[None], self.MOVING)[0].numpy()
        rows, columns = moving.nonzero()
        y, x = (rows + 0.5) * height / moving.shape[0], (columns + 0.5) * width / moving.shape[1]
        best, most = None, -1
        for _ in range(self.DRAWS):
            top, left, h, w = region = super().draw_region(rng, height, width, start)
            held = np.count_nonzero((top <= y) & (y < top + h) & (left <= x) & (x < left + w))
            if held > most:
                best, most = region, held
            if most >= self.COVERED * len(y):
                break
        return best


class MCL(moco.MoCo):
    """L = L_NCE + L_MAL (Sec. 3.3, Fig. 1), in both directions: each view is once the query, once the key.

    h of Eq. 4 to 6 is the output of the last convolution, or of the last one of each branch, before batch norm and
    ReLU. The encoder's output would not do: what follows it, average pooling, has the same gradient everywhere.
    """

    def __init__(self, config: MCLConfig):
        super().__init__(config)
        self.aligned = [name for name in config.terms if name != "vv"]

    def make_views(self, videos: data.VideoList) -> data.PretrainingViews:
        """Views that follow motion maps, if anything does; on generated videos, makes these first.

        Raises:
            UserError: a video has no map.
        """
        config = self.config
        temporal, spatial = config.temporal_sampling == "motion", config.spatial_sampling == "motion"
        if not (temporal or spatial or self.aligned):
            return super().make_views(videos)
        maps = MotionMaps(config)
        if config.dataset == "synthetic":
            maps.make(videos.paths, os.cpu_count() or 1)
        maps.check(videos.paths)
        return super().make_views(videos, MotionViews, maps=maps, temporal=temporal, spatial=spatial)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `MotionViews` makes them, batched → the named losses; enqueues the keys at the end."""
        with recorded_inputs(last_norms(self.encoder)) as features:  # h, in as many parts as there are branches
            maps = self.encode(views)
        losses, keys = self.instance_losses(maps)  # Eq. 3
        if self.aligned:
            response = self.response(maps.query, keys["vv"], features)  # Eq. 4-6
            motion = self.both(views["motion"])  # m^ST, (2B, frames, SIZE, SIZE)
            motion = F.adaptive_avg_pool3d(motion, response.shape[1:])
            for name in self.aligned:
                losses[name] = motion_alignment(response, motion, name)  # Eq. 7
                unrelated = motion_alignment(response.detach(), motion.roll(1, 0), name)  # another video's
                self.metrics[f"chance/{name}"] = unrelated
        self.enqueue(keys)
        return losses

    def response(self, maps: Tensor, keys: Tensor, features: list[Tensor]) -> Tensor:
        """What is aligned with motion, (2B, T, H, W), of the query encoder's maps (2, B, C, T, H, W), their views' keys
        (2B, D), and h, (2B, C, T, H, W) in parts. Gradients pass through g."""
        gradient = None
        if self.config.alignment != "v1":
            query, key = self.project(self.head, pool(maps)), keys.unflatten(0, (2, -1)).flip(0)
            gradient = torch.cat(torch.autograd.grad((query * key).sum(), features, create_graph=True), 1)
        return response_map(torch.cat(features, 1), gradient, self.config.alignment)


def make_maps(config: MapsConfig) -> None:
    """Makes the motion maps that MCL trains with, once for each training video. Those that are there stay."""
    videos = config.find_videos()
    print(videos.report)
    print(MotionMaps(config).make(videos.paths, config.workers))


COMMANDS = {
    "": (functools.partial(pretrain.pretrain, MCL), MCLConfig, PRESETS),
    "maps": (make_maps, MapsConfig, FLOW),
}


def main() -> None:
    """`mcl.py maps …` makes motion maps, `mcl.py …` trains."""
    _, command, config, _ = dispatch(COMMANDS, __doc__)
    command(config)


if __name__ == "__main__":
    command_line(main)
