"""Views and clips of videos: sampling, cropping, and loading them in processes.

Can be copied with video.py into another project: the two import torch, numpy, av (PyAV) and tqdm only.

`PretrainingViews` makes two views of a video, `TestClips` its clips for evaluation, `StepSampler` says which make which
batch, `load_batches` makes these. Clips leave the loader as uint8; augment.py does the rest on the device.

Letters: N clips, S sub-clips of a view, T frames of a clip, H, W height and width in pixels.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import math
import mmap
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from video import WANTS, BadVideo, Video, blame_machine, frames_of, is_memory_short


def size_of(path: str) -> int:
    """A video's size: bytes of a file, frames of a folder, −1 if it is not there."""
    return len(frames_of(path)) or (os.path.getsize(path) if os.path.exists(path) else -1)


Region = tuple[int, int, int, int]  # top, left, height, width, in pixels
RATIO = 3 / 4, 4 / 3  # of a region's width to its height
JITTER = [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]  # of brightness, contrast, saturation (factors), and hue (shift in turns)
PREFETCH = 2  # batches that each worker makes ahead
# How processes start: forked on Linux, whatever Python's own choice.
PROCESSES = torch.multiprocessing.get_context("fork" if sys.platform == "linux" else None)
CRASHES = (-4, -5, -6, -8, -9, -11)  # of a fault in FFmpeg: SIGILL, SIGTRAP, SIGABRT, SIGFPE, SIGKILL, SIGSEGV
# In a process of `_in_processes`: the marks of what killed others before it, and how; and where the parent looks for
# the mark of what it reads, 0 for nothing, when it has died. (A message each would fill the pipe in a long step.)
_killers: dict[int, str] = {}
_reading: Tensor | None = None


@dataclass(frozen=True)
class VideoList:
    """Videos of one part of a data set: paths, labels (-1: unknown), class names, and a line on what was found.

    `shared` names the training videos that were left out because links make them held-out ones too, `closed` the
    folders that may not be listed; `features` are those of the videos' clips, (clips, C) by path, if from a file.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str]
    report: str
    shared: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def mark(self, root: str | Path) -> str:
        """What tells this list from others: numbers, and a check sum of paths below `root` and labels."""
        above = os.path.join(os.path.abspath(root), "")
        listed = repr([path.removeprefix(above) for path in self.paths] + self.labels + self.classes)
        return f"{len(self)} videos, {len(self.classes)} classes, check sum {zlib.crc32(listed.encode()):08x}"

    def seen(self, root: str | Path) -> list[list]:
        """Of each video its path below `root`, label, class, and size (`size_of`): what a run goes by."""
        above, classes = os.path.join(os.path.abspath(root), ""), [*self.classes, ""]
        videos = zip(self.paths, self.labels, map(size_of, self.paths), strict=True)
        return [[path.removeprefix(above), label, classes[label], size] for path, label, size in videos]


def draw_region(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float] = (0.2, 1.0)) -> Region:
    """Region of a frame, as RandomResizedCrop draws it (Szegedy et al. 2015); `scale` bounds its share of the frame's
    area. When ten draws don't fit, it is the largest central one of a `RATIO`."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_color(rng: np.random.Generator, jitter_p: float = 0.8, gray_p: float = 0.2, blur_p: float = 0.5) -> np.ndarray:
    """Draws the colour augmentation of ONE clip: float32 (6,), to be stacked and given to `augment.color_augment`.

    The six numbers are the factors of brightness, contrast and saturation, the hue shift in turns, 1 for grayscale
    else 0, and the standard deviation of the blur in pixels, 0 for no blur. What isn't applied holds its identity.
    The values are those of FAME's supplement, which FIMA (A.3) follows; the blur's deviation is uniform in [0.1, 2].
    `jitter_p`, `gray_p`, `blur_p` are probabilities of the jitter as a whole, of grayscale, of blur.
    """
    uniform = rng.random(8).tolist()  # all at once: NumPy's calls cost more than what they compute
    factors = [low + (high - low) * u for (low, high), u in zip(JITTER, uniform, strict=False)]
    jittered, gray, blurred = (u < p for u, p in zip(uniform[5:], (jitter_p, gray_p, blur_p), strict=True))
    sigma = (0.1 + 1.9 * uniform[4]) * blurred
    return np.array([*(factors if jittered else (1, 1, 1, 0)), gray, sigma], dtype=np.float32)


def empty_clips(*shape: int) -> Tensor:
    """Memory for clips, uint8 (..., 3, T, H, W), in which the channels of a pixel are neighbours, as in images."""
    *leading, channels, frames, height, width = shape
    return torch.empty(*leading, frames, height, width, channels, dtype=torch.uint8).movedim(-1, -4)


def crop_resize(images: Sequence[np.ndarray], region: Region, flip: bool, out: Tensor) -> Tensor:
    """Crop images, flip the crop and resize it; the only place that makes a box, so that it is the box applied.

    Takes T images uint8 (H, W, 3), and memory of `empty_clips` for the clip, uint8 (3, T, size, size). Returns its box,
    float32 (x0, y0, x1, y1) in pixels of the images: the column at x / size of the clip shows the image at
    x0 + (x / size)·(x1 − x0), so that a horizontal flip swaps x0 and x1.
    """
    top, left, h, w = region
    for i in range(0, len(images), 4):  # as many as fit in a core's cache
        crops = [image[top : top + h, left : left + w] for image in images[i : i + 4]]
        crops = torch.from_numpy(np.stack(crops) if len(crops) > 1 else crops[0][None])
        if flip:
            crops = crops.flatten(0, 1).flip(1).view_as(crops)  # in 3-D: faster than in 4-D
        crops, resized = crops.permute(0, 3, 1, 2), out[:, i : i + 4].transpose(0, 1)
        torch.ops.aten.upsample_bilinear2d.out(crops, out.shape[2:], False, out=resized)  # F.interpolate has no `out`
    x0, x1 = (left + w, left) if flip else (left, left + w)
    return torch.tensor([x0, top, x1, top + h], dtype=torch.float32)


def crop_frames(images: dict, frames: Sequence[int], region: Region, flip: bool, out: Tensor, box: Tensor) -> None:
    """Puts those of a clip's frames that are among the images of `Video.stream` in their places in `out`, the clip's
    uint8 (3, T, size, size), and the crop's box, which not all callers need, in `box`, float32 (4,)."""
    place = 0
    for there, part in itertools.groupby(frames, images.__contains__):
        part = list(part)
        if there:
            shown = [images[frame] for frame in part]
            box.copy_(crop_resize(shown, region, flip, out[:, place : place + len(part)]))
        place += len(part)


def _begin(path: str, draw: Hashable) -> None:
    """Is told what is drawn from which video before this is read; raises BadVideo if processes have died of it."""
    mark = int.from_bytes(hashlib.blake2b(repr(draw).encode(), digest_size=7).digest())
    if mark in _killers:
        raise BadVideo(path, _killers[mark])
    if _reading is not None:
        _reading.fill_(mark)


class Items:
    """Items that are made in memory that is given, for `load_batches`. A subclass has `videos`, `empty(*batch)`, which
    gives a dict of memory for an item or for a batch of them, and `write(key, memory)`, which makes an item there and
    returns (path, reason) of the videos that could not be read."""

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Hashable) -> dict:
        item = self.empty()
        return {**item, "bad": self.write(key, item)}


@dataclass(eq=False, repr=False)
class PretrainingViews(Items):
    """Two views of a video, source and target, from windows at two random times (FIMA, sections 3.1 and 4.1).

    A window spans `frames × frame_stride` frames and starts anywhere in the video with equal chance, no two at the same
    frame as far as the video has others; a shorter video is continued with its last frame. Crops take from `min_scale`
    to all of the frame's area; `color` holds settings of `draw_color`. `windows`, 1 to train a classifier, is the
    number of views. An item is asked for by (epoch, index) and, but for "seconds", follows from these and the seed:

    - "clip": uint8 (2, 3, frames, crop, crop), every `frame_stride`-th frame of each window.
    - "sub_clips": uint8 (2, S, 3, window // S, crop, crop), each window cut in S parts at stride 1, each with a crop
      and a flip of its own; absent for S = 0.
    - "box": float32 (2, 4), where the clips lie in the frame, in its pixels (see `crop_resize`).
    - "color": float32 (2, 2 + S, 6), colour parameters of the clip, its frame difference, and each sub-clip's.
    - "overlap": float32 (), the share of a window's frames that another one shows, too; absent for one window.
    - "index", "label": int64 (), the video's place in the list and its class (-1: unknown).
    - "seconds": float32 (3,), what its making took, of reading the file, decoding, and scaling crops.
    - "bad": list of (path, reason) of the unreadable videos drawn before it.

    Raises OSError when `attempts` videos drawn for one item are all unreadable.
    """

    videos: VideoList
    crop: int
    frames: int = 16
    frame_stride: int = 2
    sub_clips: int = 2
    seed: int = 0
    min_scale: float = 0.2
    flip_p: float = 0.5
    color: dict = field(default_factory=dict)
    attempts: int = 10
    windows: int = 2

    def empty(self, *batch: int) -> dict[str, Tensor]:
        views, parts, size = self.windows, self.sub_clips, (self.crop, self.crop)
        memory = {name: torch.empty(batch, dtype=torch.int64) for name in ("index", "label")}
        memory["clip"] = empty_clips(*batch, views, 3, self.frames, *size)
        memory["box"], memory["seconds"] = torch.empty(*batch, views, 4), torch.zeros(*batch, 3)
        memory["color"] = torch.empty(*batch, views, 2 + parts, 6)
        if parts:
            memory["sub_clips"] = empty_clips(*batch, views, parts, 3, self.frames * self.frame_stride // parts, *size)
        if views > 1:
            memory["overlap"] = torch.empty(batch)
        return memory

    def write(self, key: tuple[int, int], item: dict[str, Tensor]) -> list[tuple[str, str]]:
        epoch, index = key
        bad = []
        for attempt in range(self.attempts):
            rng = np.random.default_rng([self.seed, epoch, index, attempt])
            drawn = int(rng.integers(len(self.videos))) if attempt else index
            try:
                path = self.videos.paths[drawn]
                _begin(path, (epoch, index, attempt))
                starts = self.write_views(rng, path, item)
                if self.windows > 1:
                    apart = [abs(int(a - b)) for a, b in itertools.combinations(starts, 2)]
                    shares = [max(1 - frames / (self.frames * self.frame_stride), 0) for frames in apart]
                    item["overlap"].fill_(sum(shares) / len(shares))
                item["index"].fill_(drawn)
                item["label"].fill_(self.videos.labels[drawn])
                return bad
            except BadVideo as error:
                bad.append((error.path, error.reason))
        several = f"{self.attempts} videos in a row can't be read; the last: " * (self.attempts > 1)
        raise OSError(f"{several}{bad[-1][0]!r}: {bad[-1][1]}")

    # What a subclass may override, to choose other windows or regions, or to add entries:

    def write_views(self, rng: np.random.Generator, path: str, item: dict[str, Tensor]) -> np.ndarray:
        """Makes an item of one video, without its index and label; returns the windows' first frames, (windows,)."""
        step, clock, scaling = 1 if self.sub_clips else self.frame_stride, time.perf_counter, 0.0
        began = clock()
        with Video(path) as video:
            starts = self.draw_starts(rng, video)
            opened = clock()
            window = np.arange(0, self.frames * self.frame_stride, step)
            frames = np.minimum(starts[:, None] + window, len(video) - 1).tolist()
            parts = video.stream(itertools.chain(*frames))
            first = next(parts)  # a decoded frame tells the size as it is shown, the file that of a turned one
            size = next(iter(first.values())).shape[:2]
            crops = []  # of a clip or sub-clip: its frames, region, flip, where it goes, and where its box goes
            for view, start in enumerate(starts):
                shown = frames[view][:: self.frame_stride // step]
                crops.append((shown, *self._draw_crop(rng, *size, start), item["clip"][view], item["box"][view]))
                colors = [draw_color(rng, **self.color) for _ in range(2 + self.sub_clips)]
                item["color"][view] = torch.from_numpy(np.stack(colors))
                for i in range(self.sub_clips):
                    part = item["sub_clips"][view, i]
                    shown = frames[view][i * part.shape[1] : (i + 1) * part.shape[1]]
                    crops.append((shown, *self._draw_crop(rng, *size, start), part, torch.empty(4)))
            for images in itertools.chain([first], parts):
                scaling -= clock()
                for crop in crops:
                    crop_frames(images, *crop)
                scaling += clock()
            item["seconds"][:] = torch.tensor([opened - began, clock() - opened - scaling, scaling])
        return starts

    def draw_starts(self, rng: np.random.Generator, video: Video) -> np.ndarray:
        """First frames of the windows of a video, (windows,), all different where there are as many."""
        starts = self.possible_starts(video)
        return np.resize(rng.choice(starts, min(self.windows, len(starts)), replace=False), self.windows)

    def possible_starts(self, video: Video) -> np.ndarray:
        """First frames that a window may have."""
        return np.arange(max(len(video) - self.frames * self.frame_stride, 0) + 1)

    def draw_region(self, rng: np.random.Generator, height: int, width: int, start: int) -> Region:
        """Region of a crop of the window that starts at frame `start`, of the video whose windows were drawn last."""
        return draw_region(rng, height, width, scale=(self.min_scale, 1.0))

    def _draw_crop(self, rng: np.random.Generator, *place: int) -> tuple[Region, bool]:
        return self.draw_region(rng, *place), bool(rng.random() < self.flip_p)


class TestClips(Items):
    """Clips for evaluation, N of each video at uniformly spaced times, a single one in the middle; short videos are
    continued by their last frame.

    The crop is the central square of 7/8 of the shorter side. An item is a dict: "clips" uint8 (N, 3, frames, crop,
    crop), "start" (N,), when each begins in seconds, and "bad", empty or [(path, reason)]: an unreadable video's clips
    are zeros, its starts nan.
    """

    def __init__(self, videos: VideoList, crop: int, frames: int = 16, frame_stride: int = 2, clips: int = 10):
        self.videos, self.crop, self.frames, self.frame_stride, self.clips = videos, crop, frames, frame_stride, clips

    def empty(self, *batch: int) -> dict[str, Tensor]:
        clips = empty_clips(*batch, self.clips, 3, self.frames, self.crop, self.crop)
        return {"clips": clips, "start": torch.zeros(*batch, self.clips)}

    def open(self, path: str) -> Video:
        """The video of an item; a subclass may give other frames."""
        return Video(path)

    def write(self, index: int, item: dict[str, Tensor]) -> list[tuple[str, str]]:
        path, times, out = self.videos.paths[index], np.arange(self.frames) * self.frame_stride, item["clips"]
        try:
            _begin(path, index)
            with self.open(path) as video:
                latest = max(len(video) - times[-1] - 1, 0)
                starts = np.linspace(0 if len(out) > 1 else latest / 2, latest, len(out)).round().astype(int)
                seconds = video.times()
                item["start"][:] = torch.tensor([float(seconds[k]) for k in starts])
                frames = np.minimum(starts[:, None] + times, len(video) - 1).ravel().tolist()
                for images in video.stream(frames):
                    height, width = next(iter(images.values())).shape[:2]
                    side = max(round(min(height, width) * 7 / 8), 1)
                    region = ((height - side) // 2, (width - side) // 2, side, side)
                    crop_frames(images, frames, region, False, out.transpose(0, 1).flatten(1, 2), torch.empty(4))
        except BadVideo as error:
            out.zero_()
            item["start"].fill_(math.nan)
            return [(error.path, error.reason)]
        return []


def read_clip(path: str | Path, frames: int = 16, stride: int = 2, crop: int = 224) -> Tensor:
    """The clip in the middle of a video, as `TestClips` cuts it: uint8 (3, frames, crop, crop). Raises BadVideo."""
    item = TestClips(VideoList([str(path)], [-1], [], ""), crop, frames, stride, clips=1)[0]
    for bad in item["bad"]:
        raise BadVideo(*bad)
    return item["clips"][0]


@dataclass(eq=False)
class StepSampler(Sampler):
    """Batch sampler of a whole run: for each step from `start_step` on, this rank's list of (epoch, index).

    Every epoch is a permutation of the data set drawn from (seed, epoch) and dealt out to the ranks; the tail that
    doesn't fill a batch on every rank is left out. `batch_size` counts the videos of one rank.

    Raises ValueError when the data set is smaller than one batch of all ranks.
    """

    length: int
    batch_size: int
    epochs: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start_step: int = 0

    def __post_init__(self):
        self.steps_per_epoch = self.length // (self.batch_size * self.world_size)
        if self.steps_per_epoch == 0:
            total = f"{self.batch_size} × {self.world_size} processes"
            lower = "lower --batch_size or --accumulate"
            raise ValueError(f"{self.length} videos, fewer than one batch of {total}: {lower}")

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start_step // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            first = max(self.start_step - epoch * self.steps_per_epoch, 0)
            for step in range(first, self.steps_per_epoch):
                begin = (step * self.world_size + self.rank) * self.batch_size
                yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]


def _serve(pipe: multiprocessing.connection.Connection, function: Callable, killers: dict, reading: Tensor) -> None:
    """What a process of `_in_processes` does, until its parent ends it or is gone."""
    global _killers, _reading
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of `scancel --full -s INT`: the parent saves, and ends this
    if hasattr(os, "setpgid"):  # a terminal's Ctrl-C and a launcher's SIGTERM reach the parent, which decides
        os.setpgid(0, 0)
    torch.set_num_threads(1)
    if sys.platform == "linux":  # keep freed memory, but give blocks of 8 MB and more, as of 4K frames, back
        for parameter, value in ((-1, 2**28), (-4, 2**16), (-3, 2**23)):  # M_TRIM_THRESHOLD, M_MMAP_MAX, …_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    _killers, _reading = killers, reading
    parent = multiprocessing.parent_process().sentinel
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        while parent not in multiprocessing.connection.wait([pipe, parent]):
            try:
                answer = "made", function(pipe.recv())
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = "error", error
            reading.zero_()
            pipe.send(answer)


def _memory_kills() -> list[str]:
    """Linux's count of the processes that it has killed for want of memory."""
    with contextlib.suppress(OSError):
        return [line for line in Path("/proc/vmstat").read_text().split("\n") if line.startswith("oom_kill ")]
    return []


def _in_processes(function: Callable, count: int, tasks: Iterable, ahead: int) -> Iterator:
    """Yields what a function makes of the tasks in so many processes, in order; each has up to `ahead` tasks.

    torch's DataLoader ends the run when a process dies. Here another one goes on with its tasks, and what killed two by
    a fault while memory was not short, as the last thing that `_begin` was told, is a BadVideo in the next. Raises what
    the function raises, and OSError when a process can't be started, or eleven die in a row by no video's fault.
    """
    tasks, deaths, kills, suspects, killers = iter(tasks), 0, _memory_kills(), set(), {}
    pending, processes, pipes = [deque() for _ in range(count)], {}, {}
    reading = _shared({"": torch.zeros(count, dtype=torch.int64)})[""]

    def launch(i: int) -> None:
        try:
            pipes[i], end = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_serve, args=(end, function, killers, reading[i]), daemon=True)
            process.start()
        except OSError as error:
            advice = WANTS.get(error.errno, "raise `ulimit -u`, or take fewer --workers")
            raise OSError(f"a loader process can't be started: {error.strerror or error}: {advice}") from error
        processes[i] = process
        end.close()  # the process has the only one, so that its death is the end of the pipe
        send(i, pending[i])

    def send(i: int, tasks: Iterable) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died, which the wait for its answer will find
            for task in tasks:
                pipes[i].send(task)

    for i in [*range(count)] * ahead:
        pending[i] += itertools.islice(tasks, 1)
    try:
        for i in range(count):
            launch(i)
        i = 0
        while pending[i]:
            try:
                kind, value = pipes[i].recv()
            except (EOFError, OSError):
                processes[i].join()
                code, draw, deaths = processes[i].exitcode, int(reading[i]), deaths + 1
                reading[i] = 0
                how = f"the process that read it died (exit code {code})"
                kills, before = _memory_kills(), kills
                if draw and code in CRASHES and kills == before and not is_memory_short():
                    if draw in suspects:
                        killers[draw], deaths = how, 0
                    suspects.add(draw)
                if deaths > 10:
                    advice = "if memory is short, take fewer --workers or smaller batches"
                    raise OSError(f"{deaths} times in a row, {how}: {advice}") from None
                launch(i)
                continue
            if kind == "error":
                blame_machine(value, getattr(value, "filename", None))
                raise value
            deaths = 0
            pending[i].popleft()
            following = [*itertools.islice(tasks, 1)]  # none, at the end
            pending[i] += following
            send(i, following)
            yield value
            i = (i + 1) % count
    finally:
        for i, process in processes.items():
            process.kill()
            process.join()
            pipes[i].close()


def _shared(plan: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory like tensors without any, for processes to share: where they are forked not in /dev/shm, which containers
    keep small and others fill. Raises OSError when there is too little."""
    if PROCESSES.get_start_method() != "fork":
        return {name: torch.empty_like(part, device="cpu").share_memory_() for name, part in plan.items()}
    memory = {name: torch.frombuffer(mmap.mmap(-1, part.nbytes), dtype=part.dtype) for name, part in plan.items()}
    return {name: memory[name].as_strided(part.shape, part.stride()) for name, part in plan.items()}


def _make_batch(items: Items, memory: dict[str, Tensor], task: tuple[int, Sequence]) -> tuple[int, int, list]:
    """Makes a batch of (slot, keys) in its slot of the memory; returns the slot, the batch's length and its "bad"."""
    slot, keys = task
    bad = []
    for place, key in enumerate(keys):
        bad += items.write(key, {name: part[slot, place] for name, part in memory.items()})
    return slot, len(keys), bad


def load_batches(items: Items, batches: Sampler, workers: int = 0) -> Iterator[dict]:
    """Yield batches: dicts of the items' entries, stacked, and the joined lists "bad".

    `batches` is a batch sampler, with a `batch_size` and a length. A batch is valid until the next one is asked for:
    `workers` processes (0: this one) write into a ring of batches in shared memory, which is made once. Sending each
    batch in new memory would cost as much as decoding it. A video that kills workers counts as unreadable.

    Raises OSError when there is too little shared memory, and what making the items raises.
    """
    workers = min(workers, len(batches))
    slots = min(PREFETCH * workers, len(batches)) + 1  # those the workers may have been asked for, and the one in use
    with torch.device("meta" if workers else "cpu"):
        memory = items.empty(slots, batches.batch_size)
    try:
        memory = _shared(memory) if workers else memory
    except OSError as error:
        size = sum(part.nbytes for part in memory.values()) / 2**30
        advice = WANTS.get(error.errno, WANTS[errno.ENOMEM])
        raise OSError(f"no {size:.2g} GiB of shared memory for batches ({error.strerror}): {advice}") from error
    tasks = ((step % slots, keys) for step, keys in enumerate(batches))
    make = functools.partial(_make_batch, items, memory)
    made = _in_processes(make, workers, tasks, PREFETCH) if workers else map(make, tasks)
    with contextlib.ExitStack() as locks:
        for n, (slot, length, bad) in enumerate(made):
            if n == 0 and torch.cuda.is_initialized():  # not before the processes have begun
                _lock_pages(memory.values(), locks)
            yield {name: part[slot][:length] for name, part in memory.items()} | {"bad": bad}


def _lock_pages(tensors: Iterable[Tensor], until: contextlib.ExitStack) -> None:
    """Keeps memory in place until the end of a block, where it can, so that a GPU copies from it beside other work."""
    runtime = torch.cuda.cudart()
    for tensor in tensors:
        if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):  # an enum, true whatever it says
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(1)  # takes the error that CUDA keeps for the next kernel
        else:
            until.callback(runtime.cudaHostUnregister, tensor.data_ptr())


def _visited(visit: Callable[[str], None], path: str) -> tuple[str, str]:
    """(path, why the video can't be read, or "")."""
    try:
        _begin(path, path)
        visit(path)
    except BadVideo as error:
        return path, error.reason
    return path, ""


def visit_videos(visit: Callable, paths: Sequence[str], root: str, out: str | Path, workers: int, what: str) -> int:
    """Calls `visit`, which raises BadVideo, for videos in processes, and says how far it is; returns how many are bad.
    Each of these is a line of the file `out`, for `find_videos` to exclude: path from `root` in quotes, a tab, reason.
    Until the end, and when it is stopped, they are in OUT.partial, and an older list stays. Raises FileExistsError when
    `out` is of another kind."""
    file = Path(os.path.realpath(out))
    if file.exists() and not (file.is_file() and re.match(rb"""\Z|(['"]).*\1\t""", file.read_bytes())):
        raise FileExistsError(f"{out} is no list of bad videos: name another file")
    bad, pause = 0, 0.5 if sys.stderr.isatty() else 30  # seconds, as in training
    partial = file.with_name(f"{file.name}.partial")
    visited = _in_processes(functools.partial(_visited, visit), workers, paths, 8)
    with open(partial, "w", encoding="utf-8", buffering=1) as lines, contextlib.closing(visited):  # none is lost
        for path, reason in tqdm(visited, what, len(paths), dynamic_ncols=True, mininterval=pause):
            if reason:
                bad += 1
                lines.write(f"{os.path.relpath(path, root)!a}\t{reason}\n")
    partial.replace(file)
    return bad


def main() -> None:
    """`data.py check ROOT` finds bad videos, `synthetic ROOT` makes videos; examples/shrink.py makes smaller copies."""
    import find
    from cli import dispatch
    from train import UserError, user_errors

    commands = {"check": (find.check, find.CheckConfig), "synthetic": (find.generate, find.SyntheticConfig)}
    name, function, config, words = dispatch(commands, main.__doc__, words="ROOT")
    if len(words) != 1:
        raise UserError(f"name the folder after {name}, before all flags")
    with user_errors():
        function(config, *words)


if __name__ == "__main__":
    from cli import command_line

    command_line(main)
