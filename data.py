"""Video data for self-supervised learning: finding videos, reading them frame by frame, sampling and cropping views.

Can be copied alone into another project: it imports torch, numpy and av (PyAV) only.

What flows: `find_videos` lists a data set's videos, `Video` reads chosen frames of one of them, `PretrainingViews`
makes a source and a target view of a video, `TestClips` its clips for evaluation, `StepSampler` says which videos make
which batch. Clips leave the loader as uint8; colour augmentation and normalisation run on the device, in batch.

Letters: N clips, S sub-clips of a view, T frames of a clip, H, W height and width in pixels, P colour parameters.
"""

import argparse
import ast
import contextlib
import csv
import datetime
import itertools
import json
import math
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Discard
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

SKIPPING_CODECS = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")  # others lose frames when told to skip some
CONTAINERS = "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,asf"  # no playlists: they open other files
DEADLINE = 60.0  # seconds that opening a video may take, and one reading of frames
MAX_FRAMES = 1_000_000  # of a video
MAX_PIXELS = 8192 * 4320  # of a frame
MAX_BYTES = 4 * 2**30  # of a video's packets, and of the frames of one reading


class BadVideo(Exception):
    """A video that can't be read: `path` says which one, `reason` why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Video:
    """Frame-exact reader of a video file's frames in display order, which decodes only what the chosen frames need.

    with Video(path) as video:
        images = video.read(range(0, len(video), 2))

    The packets are read once (the compressed file is held in memory) and each frame gets a time: its time stamp, or,
    where these are missing or wrong, the place of its packet. Time stamps are wrong in AVI: those of packed MPEG-4
    (UCF101, HMDB51) come out as 1, 2, 4, 3, 5, 7, 6, …. Decoding starts at the last key frame before each group of
    wanted frames.

    Raises BadVideo when the file can't be opened, is none of `CONTAINERS`, holds fewer than two frames of video, or
    more than `MAX_FRAMES`, `MAX_PIXELS` or `MAX_BYTES`, or when that is not known after `DEADLINE` seconds.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._container = None
        try:
            with self._bad_video():
                if os.path.exists(self.path) and not os.path.isfile(self.path):
                    raise BadVideo(self.path, "not a file")  # opening a pipe would wait for its other end
                options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
                self._container = av.open(
                    f"file:{self.path}", metadata_errors="ignore", options=options, timeout=DEADLINE
                )
                self._index()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _bad_video(self) -> Iterator[None]:
        """Starts the clock for a block, whose failures in FFmpeg are a BadVideo."""
        self._deadline = monotonic() + DEADLINE
        try:
            yield
        except (av.error.FFmpegError, MemoryError) as error:
            reasons = {av.error.ExitError: f"not read within {DEADLINE:g} s", MemoryError: "not enough memory"}
            if self._container is None:
                reasons[av.error.ArgumentError] = f"in none of the formats {CONTAINERS.replace(',', ', ')}"
            reason = reasons.get(type(error)) or getattr(error, "strerror", None) or type(error).__name__
            raise BadVideo(self.path, reason) from error

    def _check_time(self) -> None:
        if monotonic() > self._deadline:
            raise BadVideo(self.path, f"not read within {DEADLINE:g} s")

    def _index(self) -> None:
        """Read the packets; fill `_times` (one each packet), `_order` (the frames' times, sorted) and `_starts`."""
        stream = self._container.streams.best("video")
        if stream is None:
            raise BadVideo(self.path, "no video stream")
        for other in self._container.streams:
            if other is not stream:
                other.discard = Discard.all
        self._codec = stream.codec_context
        if self._codec is None:
            raise BadVideo(self.path, "no decoder for its video codec")
        self._codec.thread_type, self._codec.thread_count = "SLICE", 1  # the default takes every core from the others
        self._codec.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may change its size
        self._size = width, height = (self._codec.width, self._codec.height)
        if not 0 < width * height <= MAX_PIXELS:
            raise BadVideo(self.path, f"no frames of 1 to {MAX_PIXELS} pixels (said to have {width} × {height})")
        self._to_rgb = VideoReformatter()
        self._packets, size = [], 0
        for packet in self._container.demux(stream):
            self._check_time()
            if packet.size:
                self._packets.append(packet)
                size += packet.size
            if len(self._packets) > MAX_FRAMES or size > MAX_BYTES:
                limits = f"{MAX_FRAMES} frames or {MAX_BYTES / 2**30:g} GiB"
                raise BadVideo(self.path, f"more than {limits} of video: cut it into clips")
        self._delay = 0
        shown = [packet.pts for packet in self._packets if not packet.is_discard]
        avi = "avi" in self._container.format.name.split(",")
        if avi and self._codec.name == "mpeg4":
            # While packet i is decoded, frame i - delay comes out. A frame close behind a key frame may refer to
            # frames before it, and a tiny "key" packet may be an empty picture: keep clear of both.
            self._clock, self._delay = "packet", int(self._codec.has_b_frames)
            self._starts = [(i + 4, i) for i, packet in enumerate(self._packets) if self._is_mpeg4_key(packet)]
        elif avi or None in shown or len(set(shown)) < len(shown):
            # Pictures may come out of order, and which packet shows frame k is unknown: decode on until it is out.
            self._clock, self._delay, self._starts = "count", len(self._packets), []
        else:
            self._clock = "stamp"
            self._starts = [(p.pts, i) for i, p in enumerate(self._packets) if p.is_keyframe and p.pts is not None]
        self._starts.sort()
        if self._clock == "stamp":
            self._times = [None if packet.is_discard else packet.pts for packet in self._packets]
        else:
            self._times = list(range(len(self._packets)))
        self._packet_at = {time: i for i, time in enumerate(self._times) if time is not None}
        self._order = sorted(self._packet_at)
        if len(self._order) < 2:
            raise BadVideo(self.path, f"{len(self._order)} frames, where a video has at least 2")

    @staticmethod
    def _is_mpeg4_key(packet: av.Packet) -> bool:
        """Whether a packet holds an intra-coded picture (VOP of coding type 0; ISO/IEC 14496-2, 6.2.5)."""
        if not packet.is_keyframe or packet.size <= 32:
            return False
        _, _, picture = bytes(packet).partition(b"\0\0\1\xb6")
        return len(picture) > 0 and picture[0] >> 6 == 0

    def __len__(self) -> int:
        """Number of frames, from the packets (nothing is decoded)."""
        return len(self._order)

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Give the file, the decoder's memory and its threads back."""
        if self._container is not None:
            self._container.close()

    def read(self, frames: Sequence[int]) -> list[np.ndarray]:
        """Decode frames, given by their index in display order (any order, repeats allowed), in one pass.

        Returns one uint8 array (H, W, 3) of RGB for each index, turned upright; repeats share one array. A frame that
        can't be decoded is replaced by its nearest neighbour in time. Raises BadVideo when that befalls more than a
        quarter of the different frames asked for, when these take more than `MAX_BYTES`, or after `DEADLINE` seconds;
        IndexError when an index is out of range.
        """
        times = [self._order[k] for k in frames]
        wanted = set(times)
        width, height = self._size
        if 3 * width * height * len(wanted) > MAX_BYTES:
            limit = f"{MAX_BYTES / 2**30:g} GiB"
            raise BadVideo(self.path, f"{len(wanted)} frames of {width} × {height} pixels take more than {limit}")
        runs = self._runs(wanted)
        with self._bad_video():
            found = self._decode(wanted, runs, skip=self._clock != "count" and self._codec.name in SKIPPING_CODECS)
            if len(found) < len(wanted):  # streams refreshed bit by bit need more than their last "key" frame
                found = self._decode(wanted, [(0, runs[-1][1])], skip=False)
        missing = wanted - found.keys()
        if 4 * len(missing) > len(wanted):
            raise BadVideo(self.path, f"{len(missing)} of {len(wanted)} frames could not be decoded")
        nearest = {time: min(found, key=lambda other: abs(other - time)) for time in missing}
        return [found[nearest.get(time, time)] for time in times]

    def _runs(self, wanted: set[int]) -> list[tuple[int, int]]:
        """The stretches of packets (first, last) to decode for the wanted times, in order and apart."""
        runs = []
        for time in sorted(wanted):
            place = bisect_right(self._starts, (time, len(self._packets)))
            first = self._starts[place - 1][1] if place else 0
            last = min(self._packet_at[time] + self._delay, len(self._packets) - 1)
            if runs and first <= runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
            else:
                runs.append((first, last))
        return runs

    def _decode(self, wanted: set[int], runs: list[tuple[int, int]], skip: bool) -> dict[int, np.ndarray]:
        """Decode runs of packets; `skip` leaves out pictures that are neither wanted nor referred to by others."""
        needed = {self._packet_at[time] + d for time in wanted for d in (0, self._delay)}
        found = {}
        for first, last in runs:
            self._codec.flush_buffers()
            count = 0
            for i in range(first, last + 2):  # one past the last: take what the decoder still holds
                self._check_time()
                self._codec.skip_frame = "NONREF" if skip and i not in needed else "DEFAULT"
                try:
                    images = self._codec.decode(self._packets[i] if i <= last else None)
                except av.error.FFmpegError:
                    continue  # damaged here; the caller counts what stays missing
                for image in images:
                    time = {"stamp": image.pts, "packet": i - self._delay, "count": count}[self._clock]
                    count += 1
                    if time in wanted:
                        found[time] = self._pixels(image)
                if len(found) == len(wanted):
                    return found
        return found

    def _pixels(self, image: av.VideoFrame) -> np.ndarray:
        rgb = self._to_rgb.reformat(image, *self._size, "rgb24", threads=1)  # unscaled: several times faster
        plane, (width, height) = rgb.planes[0], self._size
        pixels = np.ndarray((height, width, 3), np.uint8, buffer=plane, strides=(plane.line_size, 3, 1))  # no copy
        return np.rot90(pixels, image.rotation // 90 % 4) if image.rotation else pixels


# ---------------------------------------------------------------------------------------------------------------------
# Finding videos
# ---------------------------------------------------------------------------------------------------------------------

DATASETS = ("synthetic", "folder", "ucf101", "hmdb51", "k400", "diving48", "ssv2")
SUFFIXES = ("avi", "mp4", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "ts", "mts", "m2ts", "flv", "wmv", "3gp", "h264")
K400_TRAIN, K400_VALIDATION = r".*train\.csv", r".*(val|validate|validation)\.csv"
LAYOUTS = {
    "synthetic": "train/CLASS/*.mp4 and test/CLASS/*.mp4, and perhaps unlabeled/*.mp4 for pretraining",
    "folder": "videos anywhere below it, a folder a class, and above them, if wanted, train/ and test/ (or val/)",
    "ucf101": "UCF-101/Class/v_Class_gGG_cCC.avi and ucfTrainTestlist/{classInd,trainlist0K,testlist0K}.txt "
    "(or data/Class/ and anno/)",
    "hmdb51": "class/*.avi (or data/class/) and testTrainMulti_7030_splits/class_test_splitK.txt (or anno/)",
    "k400": "train/ and val/ (or train_256/, val_256/) of ID_000417_000427.mp4, flat or in class folders, train.csv "
    "and val.csv with columns label and youtube_id (or, without them, class folders)",
    "diving48": "rgb/VID_NAME.mp4, Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json",
    "ssv2": "ID.webm below any folder, labels.json, train.json and validation.json",
}
OFFICIAL_COUNTS = {  # train and test videos of each split
    "ucf101": [(9537, 3783), (9586, 3734), (9624, 3696)],
    "hmdb51": [(3570, 1530)] * 3,
    "diving48": [(15027, 1970)],
    "ssv2": [(168913, 24777)],
}


@dataclass(frozen=True)
class VideoList:
    """Videos of one part of a data set: paths, labels (-1: unknown), class names, and a line on what was found."""

    paths: list[str]
    labels: list[int]
    classes: list[str]
    report: str

    def __len__(self) -> int:
        return len(self.paths)


def find_videos(
    dataset: str,
    root: str | Path,
    train: bool,
    split: int = 1,
    list_file: str | Path | None = None,
    exclude: str | Path | None = None,
    unlabeled: bool = False,
) -> VideoList:
    """List the training or test videos of a data set (validation where the test labels are not public: k400, ssv2).

    Reads directory listings and the data set's own lists, never a video. Videos and lists are found by their names
    anywhere below `root`, so that flat folders, class folders and other people's folder names all work (`LAYOUTS`).
    Videos that are listed and not on disk are left out and counted in the report. Class indices follow the data set's
    own list where it has one (UCF101: classInd.txt), else the sorted names.

    `list_file`, for "folder" only, names a file of "path label" lines instead: paths below `root`, relative to it or
    absolute (`root` "/" takes any), spaces allowed; labels optional, all integers or names. Links below `root` are
    followed, wherever they lead. `exclude` names a file of videos to leave out, as `check_videos` writes it.
    `unlabeled` takes those of "synthetic" that are for pretraining, where there are any (`make_synthetic`).

    Raises ValueError for an unknown data set or split and for a list that can't be understood or names a path outside
    `root`, FileNotFoundError for a missing folder or list or when no video is found.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known are {', '.join(DATASETS)}")
    splits = len(OFFICIAL_COUNTS.get(dataset, [None]))
    if not 1 <= split <= splits:
        raise ValueError(f"{dataset} has no split {split}; it has {splits}")
    if list_file is not None and dataset != "folder":
        raise ValueError(f"a list file goes with the data set 'folder', not with {dataset!r}")
    root = os.path.abspath(root)
    if dataset == "synthetic":
        marker = Path(root, SYNTHETIC_MARKER)
        outdated = marker.is_file() and f'"version": {SYNTHETIC_VERSION},' not in marker.read_text()
        if outdated or not os.path.isdir(os.path.join(root, "train")):
            make_synthetic(root)
        elif not marker.is_file():
            raise ValueError(f"{root}: not made by this project; with videos of your own, give --dataset folder")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; {dataset} expects {LAYOUTS[dataset]}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"{root}: no permission to list this folder")
    part = "train" if train else "validation" if dataset in ("k400", "ssv2") else "test"
    title = f"{dataset} {part} split {split}" if splits > 1 else f"{dataset} {part}"
    expected = f" of {OFFICIAL_COUNTS[dataset][split - 1][not train]} expected" if dataset in OFFICIAL_COUNTS else ""
    if list_file is not None:
        title = f"{dataset} list {list_file}"
        names, labels, classes = _read_list(root, list_file)
        there = {folder: set(_names_in(folder)) for folder in {os.path.dirname(path) for path in names}}
        paths = [path if os.path.basename(path) in there[os.path.dirname(path)] else None for path in names]
    else:
        videos, lists = _walk(root)
        apart = {path for path in videos if dataset == "synthetic" and Path(path).is_relative_to(Path(root, UNLABELED))}
        if unlabeled and apart:
            title = f"{dataset} {UNLABELED}"
            names, labels, classes = sorted(apart), [-1] * len(apart), []
            paths = names
        elif dataset in OFFICIAL_COUNTS or (dataset == "k400" and lists.named(rf"{K400_TRAIN}|{K400_VALIDATION}")):
            names, labels, classes = _read_official(dataset, root, lists, train, split)
            paths = _match(names, [classes[label] for label in labels], videos, id_only=dataset == "k400")
            expected = expected or f" of {len(names)} listed"  # copies of k400 differ
        else:
            videos = [path for path in videos if path not in apart]
            names, labels, classes, halved = _read_tree(root, videos, train, kinetics=dataset == "k400")
            paths = names
            title = title if halved else f"{dataset} (no train/ and test/ folders: one list for both)"
    excluded = _read_bad(root, exclude) if exclude else set()
    found = [(path, label) for path, label in zip(paths, labels, strict=True) if path and path not in excluded]
    missing = [name for path, name in zip(paths, names, strict=True) if not path]
    report = f"{title}: {len(found)} videos{expected}, {f'{len(classes)} classes' if classes else 'no labels'}"
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        report += f"; {len(missing)} of {len(names)} listed videos are not on disk: {some}"
    if excluded:
        report += f"; {sum(path in excluded for path in paths)} of the {len(excluded)} named in {exclude} left out"
    if not found:
        raise FileNotFoundError(f"{root}: no videos found ({report}); {dataset} expects {LAYOUTS[dataset]}")
    return VideoList([path for path, _ in found], [label for _, label in found], classes, report)


def _names_in(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


class _Lists:
    """The lists (.txt, .csv, .json) below a folder, by name; of equal names the topmost."""

    def __init__(self):
        self.paths: dict[str, str] = {}
        self.last_read = ""

    def named(self, pattern: str) -> list[str]:
        """Names that match a regular expression, whatever their case, in alphabetical order."""
        return sorted(name for name in self.paths if re.fullmatch(pattern, name, re.IGNORECASE))

    def read(self, pattern: str) -> str:
        """Text of the first list whose name matches; raises FileNotFoundError."""
        if not (names := self.named(pattern)):
            raise FileNotFoundError(pattern.replace("\\", "").replace("(something-something-v2-)?", ""))
        self.last_read = self.paths[names[0]]
        return Path(self.last_read).read_text(encoding="utf-8-sig", errors="surrogateescape")  # as file names are

    def lines(self, pattern: str) -> list[str]:
        return [line.strip() for line in self.read(pattern).splitlines() if line.strip()]


def _walk(root: str) -> tuple[list[str], _Lists]:
    """Paths of all videos below a folder, and its lists."""
    videos, lists, seen = [], _Lists(), set()
    for folder, below, names in os.walk(root, followlinks=True):
        below.sort()
        if os.path.realpath(folder) in seen:  # a link to a folder that was here before
            below.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in sorted(names):
            suffix = name.rpartition(".")[2].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                videos.append(os.path.join(folder, name))
            elif suffix in ("txt", "csv", "json"):
                lists.paths.setdefault(name, os.path.join(folder, name))
    return videos, lists


def _letters(name: str) -> str:
    """A name's letters and digits in lower case: what all ways of making a folder's name from a class's keep."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _match(names: list[str], classes: list[str], videos: list[str], id_only: bool) -> list[str | None]:
    """Path of each named video (its file name without suffix), by preference in a folder with its class's name.

    id_only: compare only the first 11 characters, a YouTube identifier; what follows it is written in several ways.
    """
    stems = {}
    for path in videos:
        stem = os.path.splitext(os.path.basename(path))[0]
        stems.setdefault(stem[:11] if id_only else stem.casefold(), []).append(path)
    matched = []
    for name, label in zip(names, classes, strict=True):
        paths = stems.get(name if id_only else name.casefold(), [None])
        if len(paths) > 1:
            paths = [p for p in paths if _letters(p.split(os.sep)[-2]) == _letters(label)] or paths
        matched.append(paths[0])
    return matched


def _read_official(
    dataset: str, root: str, lists: _Lists, train: bool, split: int
) -> tuple[list[str], list[int], list[str]]:
    """Names (without suffix) and labels of the listed videos, and the classes, by the data set's own lists."""
    read = {"ucf101": _ucf101, "hmdb51": _hmdb51, "k400": _k400, "diving48": _diving48, "ssv2": _ssv2}[dataset]
    try:
        rows, classes = read(lists, train, split)
        names, labels = zip(*rows, strict=True) if rows else ((), ())
        if labels and not 0 <= min(labels) <= max(labels) < len(classes):
            raise ValueError(f"labels from {min(labels)} to {max(labels)}, but {len(classes)} classes")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root}: no list {error} below it; {dataset} expects {LAYOUTS[dataset]}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{lists.last_read}: not a list of {dataset} as it is published ({what})") from error
    return list(names), list(labels), classes


def _ucf101(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    classes = [line.split()[1] for line in lists.lines(r"classInd\.txt")]
    index = {_letters(name): i for i, name in enumerate(classes)}
    rows = []
    for line in lists.lines(rf"{'train' if train else 'test'}list0{split}\.txt"):
        folder, _, name = line.split()[0].partition("/")  # what follows, in training lists only, is the class again
        rows.append((os.path.splitext(name)[0], index[_letters(folder)]))
    return rows, classes


def _hmdb51(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    end = f"_test_split{split}.txt"
    files = lists.named(rf".+_test_split{split}\.txt")
    if not files:
        raise FileNotFoundError("CLASS" + end)
    rows = []
    for label, file in enumerate(files):
        for line in lists.lines(re.escape(file)):
            name, tag = line.rsplit(maxsplit=1)
            if int(tag) == (1 if train else 2):  # 0: not in this split
                rows.append((os.path.splitext(name)[0], label))
    return rows, [file[: -len(end)] for file in files]


def _k400(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    tables = {}
    for half, pattern in ((True, K400_TRAIN), (False, K400_VALIDATION)):
        if half == train or lists.named(pattern):
            header, *lines = lists.lines(pattern)
            fields = [field.strip().lower() for field in header.split(",")]
            tables[half] = [(row["youtube_id"], row["label"]) for row in csv.DictReader(lines, fields)]
    classes = sorted({label for table in tables.values() for _, label in table})
    index = {name: i for i, name in enumerate(classes)}
    return [(name, index[label]) for name, label in tables[train]], classes


def _diving48(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    classes = [" ".join(dive) for dive in json.loads(lists.read(r"Diving48_vocab\.json"))]
    entries = json.loads(lists.read(rf"Diving48_V2_{'train' if train else 'test'}\.json"))
    return [(str(entry["vid_name"]), entry["label"]) for entry in entries], classes


def _ssv2(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    prefix = r"(something-something-v2-)?"
    index = {name: int(i) for name, i in json.loads(lists.read(prefix + r"labels\.json")).items()}
    entries = json.loads(lists.read(prefix + ("train" if train else "validation") + r"\.json"))
    rows = [(str(entry["id"]), index[entry["template"].replace("[", "").replace("]", "")]) for entry in entries]
    return rows, sorted(index, key=index.get)


def _read_tree(
    root: str, videos: list[str], train: bool, kinetics: bool
) -> tuple[list[str], list[int], list[str], bool]:
    """Paths and labels of a tree whose folders are the classes, the classes, and whether train/ and test/ divide it."""
    rows = []
    for path in videos:
        folders = path[len(root) :].strip(os.sep).split(os.sep)[:-1]
        half = re.fullmatch(r"(train|test|val)(idation|idate)?[_-]?\d*", folders[0].lower()) if folders else None
        rows.append((half and half[1], folders, path))
    halves = {half for half, _, _ in rows}
    halved = kinetics or None not in halves  # else these are names of classes
    rows = [(half, "/".join(folders[halved:]), path) for half, folders, path in rows if half or not halved]
    fold = _letters if kinetics else str
    names = {fold(name): name.replace("_", " ") if kinetics else name for _, name, _ in rows if name}
    classes = sorted(names.values())
    index = {fold(name): i for i, name in enumerate(classes)}
    held_out = "val" if kinetics or "test" not in halves else "test"
    part = "train" if train else held_out
    kept = [(path, index.get(fold(name), -1)) for half, name, path in rows if not halved or half == part]
    return [path for path, _ in kept], [label for _, label in kept], classes, halved


def _read_list(root: str, list_file: str | Path) -> tuple[list[str], list[int], list[str]]:
    """Paths and labels (-1 where none is given) of a file of "path label" lines, and the classes."""
    file = next((f for f in (os.path.abspath(list_file), os.path.join(root, list_file)) if os.path.isfile(f)), None)
    if file is None:
        raise FileNotFoundError(f"{os.path.abspath(list_file)}: no such list file, and none by that name in {root}")
    paths, given = [], []
    text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")  # as file names are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(rf"(.+\.(?:{'|'.join(SUFFIXES)}))(?:[\s,]+(.*))?", line.strip(), re.IGNORECASE)
        if match is None:
            raise ValueError(f"{file}, line {number}: no video file (.{', .'.join(SUFFIXES)}) in {line!r}")
        path = os.path.normpath(os.path.join(root, match[1]))
        if os.path.commonpath([root, path]) != root:
            where = f"{file}, line {number}: {match[1]!r}"
            raise ValueError(f"{where} is not in {root}: give a folder that holds all videos (--data)")
        if re.fullmatch(r"-?\d+[\s,]+-?\d+", match[2] or ""):
            raise ValueError(f"{file}, line {number}: two numbers after {match[1]!r}; lines are 'path label'")
        paths.append(path)
        given.append(match[2])
    named = sorted({label for label in given if label})
    if all(re.fullmatch(r"-?\d+", label) for label in named):
        labels = [max(int(label), -1) if label else -1 for label in given]
        if max(labels, default=0) > 1_000_000:
            raise ValueError(f"{file}: label {max(labels)}; labels count the classes from 0")
        return paths, labels, [str(i) for i in range(max(labels, default=-1) + 1)]
    return paths, [named.index(label) if label else -1 for label in given], named


def _read_bad(root: str, file: str | Path) -> set[str]:
    """Paths named by a list of `check_videos`, by a run's bad_videos.log, or by a file of bare paths, one a line."""
    paths = set()
    text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.rstrip("\r").split("\t")
        name = next((field for field in fields if field[:1] in ("'", '"')), "")
        try:
            name = os.fspath(ast.literal_eval(name)) if name else fields[0]
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(f"{file}, line {number}: no path in quotes, {name}") from None
        if name:
            paths.add(os.path.normpath(os.path.join(root, name)))
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def draw_region(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Region (top, left, height, width) in pixels, as RandomResizedCrop draws it (Szegedy et al. 2015).

    `scale` bounds its share of the frame's area (uniform), `ratio` its width / height (uniform in the logarithm).
    Falls back to the largest central region of an allowed ratio when ten draws don't fit in the frame.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def empty_clips(*shape: int) -> Tensor:
    """Memory for clips, uint8 (..., 3, T, H, W), in which the channels of a pixel are neighbours, as in images."""
    *leading, channels, frames, height, width = shape
    return torch.empty(*leading, frames, height, width, channels, dtype=torch.uint8).movedim(-1, -4)


def crop_resize(
    images: Sequence[np.ndarray], region: tuple[int, int, int, int], flip: bool, size: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Crop images, flip the crop and resize it; the only place that makes a box, so that it is the box applied.

    Args:
        images: T images uint8 (H, W, 3).
        region: (top, left, height, width) in pixels.
        out: memory of `empty_clips` for the clip; new if absent.

    Returns:
        The clip, uint8 (3, T, size, size), and its box, float32 (x0, y0, x1, y1) in pixels of the images: the column at
        x / size of the clip shows the image at x0 + (x / size)·(x1 − x0), so that a horizontal flip swaps x0 and x1.
    """
    clip = empty_clips(3, len(images), size, size) if out is None else out
    top, left, h, w = region
    for i in range(0, len(images), 4):  # as many as fit in a core's cache
        crops = torch.from_numpy(np.stack([image[top : top + h, left : left + w] for image in images[i : i + 4]]))
        if flip:
            crops = crops.flatten(0, 1).flip(1).view_as(crops)  # in 3-D: faster than in 4-D
        crops, resized = crops.permute(0, 3, 1, 2), clip[:, i : i + 4].transpose(0, 1)
        torch.ops.aten.upsample_bilinear2d.out(crops, (size, size), False, out=resized)  # F.interpolate has no `out`
    x0, x1 = (left + w, left) if flip else (left, left + w)
    return clip, torch.tensor([x0, top, x1, top + h], dtype=torch.float32)


class PretrainingViews(Dataset):
    """Two views of a video, source and target, from windows at independent random times (FIMA, sections 3.1 and 4.1).

    A window spans `frames × frame_stride` frames and starts anywhere in the video with equal chance; a shorter video
    is continued with its last frame. Crops take from `min_scale` to all of the frame's area; `color` holds settings of
    `draw_color`. With another number of `windows`, 1 to train a classifier, there are as many views instead of 2. An
    item is asked for by (epoch, index) and depends on nothing but these and the seed:

    - "clip": uint8 (2, 3, frames, crop, crop), every `frame_stride`-th frame of each window.
    - "sub_clips": uint8 (2, S, 3, window // S, crop, crop), each window cut in S parts at stride 1, each with a crop
      and a flip of its own; absent for S = 0.
    - "box": float32 (2, 4), where the clips lie in the frame, in its pixels (see `crop_resize`).
    - "color": float32 (2, 2 + S, P), colour parameters of the clip, its frame difference, and each sub-clip's.
    - "index", "label": int64 (), the video's place in the list and its class (-1: unknown).
    - "bad": list of (path, reason) of the unreadable videos drawn before it.

    Each draw is noted in `current` as (epoch, index, attempt), which may be shared memory, and one that is in `crashed`
    counts as unreadable: a process died of it. Raises OSError when `attempts` videos drawn for one item are all
    unreadable.
    """

    def __init__(
        self,
        videos: VideoList,
        crop: int,
        frames: int = 16,
        frame_stride: int = 2,
        sub_clips: int = 2,
        seed: int = 0,
        min_scale: float = 0.2,
        flip_p: float = 0.5,
        color: dict | None = None,
        attempts: int = 10,
        windows: int = 2,
    ):
        self.videos, self.crop, self.frames, self.frame_stride = videos, crop, frames, frame_stride
        self.sub_clips, self.seed, self.min_scale, self.flip_p = sub_clips, seed, min_scale, flip_p
        self.color, self.attempts, self.windows = color or {}, attempts, windows
        self.current, self.crashed = torch.zeros(3, dtype=torch.int64), {}

    def __len__(self) -> int:
        return len(self.videos)

    def empty(self, *batch: int) -> dict[str, Tensor]:
        """Memory for an item, or for `batch` of them."""
        views, parts, length = self.windows, self.sub_clips, self.frames * self.frame_stride // max(self.sub_clips, 1)
        colors = len(draw_color(np.random.default_rng(), **self.color))
        memory = {
            "clip": empty_clips(*batch, views, 3, self.frames, self.crop, self.crop),
            "sub_clips": empty_clips(*batch, views, parts, 3, length, self.crop, self.crop),
            "box": torch.empty(*batch, views, 4),
            "color": torch.empty(*batch, views, 2 + parts, colors),
            "index": torch.empty(batch, dtype=torch.int64),
            "label": torch.empty(batch, dtype=torch.int64),
        }
        return {name: tensor for name, tensor in memory.items() if parts or name != "sub_clips"}

    def __getitem__(self, key: tuple[int, int]) -> dict:
        item = self.empty()
        return {**item, "bad": self.write(key, item)}

    def write(self, key: tuple[int, int], item: dict[str, Tensor]) -> list[tuple[str, str]]:
        """Make an item in memory of `empty`; returns its "bad"."""
        epoch, index = key
        bad = []
        for attempt in range(self.attempts):
            rng = np.random.default_rng([self.seed, epoch, index, attempt])
            drawn = int(rng.integers(len(self.videos))) if attempt else index
            path, draw = self.videos.paths[drawn], (epoch, index, attempt)
            self.current[:] = torch.tensor(draw)
            try:
                if draw in self.crashed:
                    raise BadVideo(path, self.crashed[draw])
                self._write_views(rng, path, item)
                item["index"].fill_(drawn)
                item["label"].fill_(self.videos.labels[drawn])
                return bad
            except BadVideo as error:
                bad.append((error.path, error.reason))
        raise OSError(f"{self.attempts} videos in a row can't be read; the last: {bad[-1][0]!r}: {bad[-1][1]}")

    def _write_views(self, rng: np.random.Generator, path: str, item: dict[str, Tensor]) -> np.ndarray:
        """Makes an item of one video, without its index and label; returns the windows' first frames, (windows,)."""
        window = self.frames * self.frame_stride
        step = 1 if self.sub_clips else self.frame_stride
        with Video(path) as video:
            starts = self._draw_starts(rng, video)
            images = video.read(np.minimum(starts[:, None] + np.arange(0, window, step), len(video) - 1).ravel())
        for view, start in enumerate(starts):
            seen = images[view * window // step : (view + 1) * window // step]
            shown = seen[:: self.frame_stride // step]
            _, item["box"][view] = self._random_crop(rng, shown, start, item["clip"][view])
            colors = [draw_color(rng, **self.color) for _ in range(2 + self.sub_clips)]
            item["color"][view] = torch.from_numpy(np.stack(colors))
            for i in range(self.sub_clips):
                part = item["sub_clips"][view, i]
                self._random_crop(rng, seen[i * part.shape[1] : (i + 1) * part.shape[1]], start, part)
        return starts

    def _draw_starts(self, rng: np.random.Generator, video: Video) -> np.ndarray:
        """First frames of the windows of a video, (windows,)."""
        return rng.integers(max(len(video) - self.frames * self.frame_stride, 0) + 1, size=self.windows)

    def _draw_region(self, rng: np.random.Generator, height: int, width: int, start: int) -> tuple[int, int, int, int]:
        """Region of a crop of the window that starts at frame `start`, of the video whose windows were drawn last."""
        return draw_region(rng, height, width, scale=(self.min_scale, 1.0))

    def _random_crop(
        self, rng: np.random.Generator, images: list[np.ndarray], start: int, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        region = self._draw_region(rng, *images[0].shape[:2], start)
        return crop_resize(images, region, bool(rng.random() < self.flip_p), self.crop, out)


class TestClips(Dataset):
    """Clips for evaluation, N of each video at uniformly spaced times; short videos are continued by their last frame.

    The crop is the central square of 7/8 of the shorter side: what resizing the shorter side to 8/7 of `crop` and then
    cropping the centre gives. An item is a dict: "clips" uint8 (N, 3, frames, crop, crop), "label" int (-1: unknown),
    "index" int, and "bad", empty or [(path, reason)]: an unreadable video gives zeros and is never replaced, so that it
    can be counted as wrong.
    """

    __test__ = False  # not a test case, whatever its name makes pytest think

    def __init__(self, videos: VideoList, crop: int, frames: int = 16, frame_stride: int = 2, clips: int = 10):
        self.videos, self.crop, self.frames = videos, crop, frames
        self.frame_stride, self.clips = frame_stride, clips
        self.current, self.crashed = torch.zeros(1, dtype=torch.int64), {}  # as in PretrainingViews, of the index

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        clips = empty_clips(self.clips, 3, self.frames, self.crop, self.crop)
        item = {"clips": clips, "label": self.videos.labels[index], "index": index, "bad": []}
        times = np.arange(self.frames) * self.frame_stride
        self.current.fill_(index)
        try:
            if (index,) in self.crashed:
                raise BadVideo(self.videos.paths[index], self.crashed[index,])
            with Video(self.videos.paths[index]) as video:
                starts = np.linspace(0, max(len(video) - times[-1] - 1, 0), self.clips).round().astype(int)
                images = video.read(np.minimum(starts[:, None] + times, len(video) - 1).ravel())
        except BadVideo as error:
            clips.zero_()
            return {**item, "bad": [(error.path, error.reason)]}
        height, width = images[0].shape[:2]
        side = max(round(min(height, width) * 7 / 8), 1)
        region = ((height - side) // 2, (width - side) // 2, side, side)
        crop_resize(images, region, False, self.crop, clips.transpose(0, 1).flatten(1, 2))
        return item


class StepSampler(Sampler):
    """Batch sampler of a whole run: for each step from `start_step` on, this rank's list of (epoch, index).

    Every epoch is a permutation of the data set drawn from (seed, epoch) and dealt out to the ranks; the tail that
    doesn't fill a batch on every rank is left out. `batch_size` counts the videos of one rank.

    Raises ValueError when the data set is smaller than one batch of all ranks.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        epochs: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ):
        self.length, self.batch_size, self.epochs, self.seed = length, batch_size, epochs, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.steps_per_epoch = length // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise ValueError(f"{length} videos don't fill one batch of {batch_size} × {world_size} processes")

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start_step // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            first = max(self.start_step - epoch * self.steps_per_epoch, 0)
            for step in range(first, self.steps_per_epoch):
                begin = (step * self.world_size + self.rank) * self.batch_size
                yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]


def collate(items: list[dict]) -> dict:
    """Stack the items' entries into a batch; the lists "bad" are joined into one."""
    batch = {name: default_collate([item[name] for item in items]) for name in items[0] if name != "bad"}
    return {**batch, "bad": [entry for item in items for entry in item["bad"]]}


def _serve(pipe: multiprocessing.connection.Connection, function: Callable, start: Callable | None, i: int) -> None:
    """What process i of `_in_processes` does, until its parent ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the parent, which decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    torch.set_num_threads(1)
    if start:
        start(i)
    parent = multiprocessing.parent_process().sentinel
    while parent not in multiprocessing.connection.wait([pipe, parent]):
        try:
            answer = function(pipe.recv()), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        pipe.send(answer)


def _in_processes(functions: Sequence, tasks: Iterable, ahead: int, start: Callable | None = None) -> Iterator:
    """Yield what the functions, each in a process of its own, make of the tasks, in turn and in order.

    torch's DataLoader ends the run when a process of its own dies. Here the function's method `crashed` is told the
    task and how the process died (of a fault in FFmpeg, or of want of memory), and another process goes on with it.
    Each process has up to `ahead` tasks and calls `start`, given its number, at first.

    Raises what the functions raise, and OSError when processes die more than ten times in a row of one task.
    """
    tasks, deaths = iter(tasks), 0
    pending, processes, pipes = [deque() for _ in functions], [None] * len(functions), [None] * len(functions)

    def launch(i: int) -> None:
        pipes[i], end = multiprocessing.Pipe()
        processes[i] = torch.multiprocessing.Process(target=_serve, args=(end, functions[i], start, i), daemon=True)
        processes[i].start()
        end.close()  # the process has the only one, so that its death is the end of the pipe
        send(i, pending[i])

    def send(i: int, tasks: Iterable) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died, which the wait for its answer will find
            for task in tasks:
                pipes[i].send(task)

    def hand_out(i: int) -> None:
        new = list(itertools.islice(tasks, 1))
        pending[i].extend(new)
        send(i, new)

    try:
        for i in range(len(functions)):
            launch(i)
        for i in list(range(len(functions))) * ahead:
            hand_out(i)
        turns = itertools.cycle(range(len(functions)))
        i = next(turns)
        while pending[i]:
            try:
                result, error = pipes[i].recv()
            except (EOFError, OSError):  # while it answered, or, where memory is shared, before that was taken
                processes[i].join()
                deaths += 1
                how = f"the process that read it died (exit code {processes[i].exitcode})"
                if deaths > 10:
                    raise OSError(f"{deaths} times in a row, {how}") from None
                functions[i].crashed(pending[i][0], how)
                launch(i)
                continue
            if error:
                raise error
            deaths = 0
            pending[i].popleft()
            hand_out(i)
            yield result
            i = next(turns)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            if process is not None:
                process.kill()
                process.join()
                pipe.close()


PREFETCH = 2  # batches that each worker makes ahead


@dataclass
class _BatchWriter:
    """Makes the batch of some keys in a slot of a ring of batches; returns (slot, the batch's "bad")."""

    views: PretrainingViews
    ring: dict[str, Tensor]
    current: Tensor

    def __call__(self, task: tuple[int, list[tuple[int, int]]]) -> tuple[int, list[tuple[str, str]]]:
        self.views.current = self.current
        slot, keys = task
        bad = []
        for place, key in enumerate(keys):
            bad += self.views.write(key, {name: memory[slot, place] for name, memory in self.ring.items()})
        return slot, bad

    def crashed(self, _task: tuple, how: str) -> None:
        self.views.crashed[tuple(self.current.tolist())] = how


@dataclass
class _Collator:
    """Makes the items of some indices of a data set, collated."""

    items: Dataset
    current: Tensor

    def __call__(self, indices: Sequence[int]) -> dict:
        self.items.current = self.current
        return collate([self.items[i] for i in indices])

    def crashed(self, _task: Sequence[int], how: str) -> None:
        self.items.crashed[tuple(self.current.tolist())] = how


def load_items(
    items: Dataset,
    batches: Iterable[Sequence[int]],
    workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterator[dict]:
    """Yield the items of each batch of indices, collated, made by `workers` processes (0: this one).

    The data set is one like `TestClips`, with its `current` and `crashed`: a video that kills a worker counts as
    unreadable.
    """
    collators = [_Collator(items, items.current.clone().share_memory_()) for _ in range(workers or 1)]
    yield from _in_processes(collators, batches, PREFETCH, worker_init_fn) if workers else map(collators[0], batches)


def load_batches(
    views: PretrainingViews,
    sampler: StepSampler,
    workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterator[dict]:
    """Yield the sampler's batches: dicts of the views' entries, stacked, and the joined lists "bad".

    A batch is valid until the next one is asked for: `workers` processes (0: this one) write into a ring of batches
    in shared memory, which is made once. Sending each batch in new memory would cost as much as decoding it. A video
    that kills a worker counts as unreadable.

    Raises OSError when there is too little shared memory, and what making the items raises.
    """
    slots = PREFETCH * workers + 1  # those the workers may have been asked for, and the one in use
    ring = views.empty(slots, sampler.batch_size)
    current = torch.zeros(workers or 1, 3, dtype=torch.int64)
    try:
        for memory in (*ring.values(), current) if workers else ():
            memory.share_memory_()
    except RuntimeError as error:
        size = sum(memory.nbytes for memory in ring.values()) / 2**30
        raise OSError(
            f"no {size:.2g} GiB of shared memory for {slots} batches: take fewer loader workers or smaller batches, or "
            "enlarge /dev/shm (docker run --shm-size)"
        ) from error
    writers = [_BatchWriter(views, ring, row) for row in current]
    tasks = ((step % slots, keys) for step, keys in enumerate(sampler))
    for slot, bad in _in_processes(writers, tasks, PREFETCH, worker_init_fn) if workers else map(writers[0], tasks):
        yield {**{name: memory[slot] for name, memory in ring.items()}, "bad": bad}


# --------------------------------------------------------------------------------------------------------------------
# Colour augmentation: drawn per clip in the loader, applied in batch on the device
# --------------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


def draw_color(
    rng: np.random.Generator,
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    gray_p: float = 0.2,
    blur_p: float = 0.5,
) -> np.ndarray:
    """Draws the colour augmentation of ONE clip: float32 (6,), to be stacked and given to `color_augment`.

    The six numbers are the factors of brightness, contrast and saturation, the hue shift in turns, 1 for grayscale
    else 0, and the standard deviation of the blur in pixels, 0 for no blur. What isn't applied holds its identity.
    The defaults are those of FAME's supplement, which FIMA (A.3) follows; the blur's deviation is uniform in [0.1, 2].

    Args:
        jitter: strength of brightness, contrast and saturation (factors in [max(0, 1 − s), 1 + s]) and of hue
            (shift in [−s, s], s ≤ 0.5), as in torchvision's ColorJitter.
        jitter_p, gray_p, blur_p: probabilities of the jitter as a whole, of grayscale, of blur.

    Raises:
        ValueError: a strength is negative or that of hue is above 0.5.
    """
    if min(jitter) < 0 or jitter[3] > 0.5:
        raise ValueError(f"colour jitter {tuple(jitter)}: strengths must be ≥ 0, and that of hue (the last) ≤ 0.5")
    uniform = rng.random(8).tolist()  # all at once: NumPy's calls cost more than what they compute
    ranges = [(max(1 - s, 0), 1 + s) for s in jitter[:3]] + [(-jitter[3], jitter[3])]
    factors = [low + (high - low) * u for (low, high), u in zip(ranges, uniform, strict=False)]
    jittered, gray, blurred = (u < p for u, p in zip(uniform[5:], (jitter_p, gray_p, blur_p), strict=True))
    sigma = (0.1 + 1.9 * uniform[4]) * blurred
    return np.array([*(factors if jittered else (1, 1, 1, 0)), gray, sigma], dtype=np.float32)


def _grayscale(clips: Tensor) -> Tensor:
    """(N, 3, ...) → (N, 1, ...): luma with the weights of ITU-R BT.601."""
    red, green, blue = clips.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _shift_hue_(clips: Tensor, shift: Tensor) -> None:
    """Turns the hue of HSV in place by `shift` ∈ [−0.5, 0.5] turns, (N, 1, 1, 1); exact, without division.

    Hue is kept multiplied by the chroma c (6c is a full turn). A channel is then the largest value minus
    min(max(d − c, 0), c), where d is the distance on the circle from the hue to the channel's own (0, 2c, 4c).
    """
    red, green, blue = (clips[:, channel] for channel in range(3))
    high = torch.maximum(red, green).maximum(blue)
    chroma = high - torch.minimum(red, green).minimum(blue)
    hue = (red - green).add_(chroma, alpha=4)  # lerp chooses exactly by weights of 0 and 1, and is quicker than where
    hue.lerp_((blue - red).add_(chroma, alpha=2), (green == high).to(hue.dtype))
    hue.lerp_(green - blue, (red == high).to(hue.dtype)).addcmul_(chroma, shift, value=6)
    half = chroma * 3
    for channel, own in ((red, 0), (green, 2), (blue, 4)):
        distance = hue.sub(chroma, alpha=own).abs_().sub_(half).abs_().sub_(half).abs_()
        channel.copy_(high).sub_(distance.sub_(chroma).clamp_(min=0).clamp_(max=chroma))


def _blur(clips: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of every frame, (N, 3, T, H, W), reflected at the border; sigma (N, 1), 0 for none."""
    height, width = clips.shape[-2:]
    radius = max(int(0.1 * height) // 2, 1)
    distance = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)) ** 2)  # sigma 0: the identity
    weights = weights / weights.sum(1, keepdim=True)
    images = clips.reshape(1, -1, height, width)  # every frame and colour a channel with a kernel of its own
    kernels = weights.repeat_interleave(images.shape[1] // len(clips), 0)[:, None, None]
    with torch.autocast(clips.device.type, enabled=False):
        images = F.conv2d(F.pad(images, (radius, radius, 0, 0), mode="reflect"), kernels, groups=len(kernels))
        images = F.conv2d(F.pad(images, (0, 0, radius, radius), mode="reflect"), kernels.mT, groups=len(kernels))
    return images.view_as(clips)


def color_augment(clips: Tensor, params: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, grayscale and blur, in this order, the same on every frame of a clip.

    Values are those of torchvision's `adjust_*`, `rgb_to_grayscale` and `gaussian_blur`, except that contrast refers
    to the mean of the whole clip. The blur's kernel is a tenth of the height, made odd, at least 3. Works on the
    clips' device and in their precision (also under autocast) and never makes the host wait for the device.

    Args:
        clips: floating point (N, 3, T, H, W) in [0, 1], at least 2 × 2 pixels; left as they are.
        params: (N, 6), one row of `draw_color` for each clip.

    Returns:
        (N, 3, T, H, W) in [0, 1].
    """
    params = params.to(clips.device, clips.dtype, non_blocking=True)
    on_cpu = clips.device.type == "cpu"
    if on_cpu and len(clips) > 1:  # one at a time, they stay in the processor's cache
        return torch.cat([color_augment(*one) for one in zip(clips.split(1), params.split(1), strict=True)])
    brightness, contrast, saturation, hue, gray, sigma = params[:, :, None, None, None, None].unbind(1)

    def applied(values: Tensor, identity: float) -> bool:
        """Whether a clip needs this; yes on a GPU, where the host would have to wait for the answer."""
        return not on_cpu or bool((values != identity).any())

    clips = (clips * brightness).clamp_(max=1)
    if applied(params[:, :3], 1) or applied(hue, 0):
        clips.lerp_(_grayscale(clips.mean((2, 3, 4), keepdim=True)), 1 - contrast).clamp_(0, 1)
        clips.lerp_(_grayscale(clips), 1 - saturation).clamp_(0, 1)
        _shift_hue_(clips, hue[:, 0])
    if applied(gray, 0):
        clips.lerp_(_grayscale(clips), gray)
    if applied(sigma, 0):
        clips = _blur(clips, params[:, 5:])
    return clips.clamp_(0, 1)


def normalize(clips: Tensor) -> Tensor:
    """(..., 3, T, H, W) in [0, 1] → the same less the mean, by the deviation, of Kinetics-400; passes no gradient."""
    made = torch.empty_like(clips)
    for channel, target, mean, std in zip(clips.unbind(-4), made.unbind(-4), MEAN, STD, strict=True):
        torch.sub(channel, mean, out=target).div_(std)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Checking videos
# ---------------------------------------------------------------------------------------------------------------------


def _progress(items: Iterable, total: int, what: str) -> Iterator:
    """Passes items on and says how far it is: twice a second in a terminal, twice a minute in a file."""
    terminal = sys.stderr.isatty()
    begin = shown = monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = monotonic()
        if done == total or now - shown > (0.5 if terminal else 30):
            shown, left = now, datetime.timedelta(seconds=round((now - begin) / done * (total - done)))
            end = "\r" if terminal and done < total else "\n"
            print(f"{what}: {done}/{total}, {left} left ", end=end, file=sys.stderr, flush=True)


class VideoVisitor:
    """What is done to videos one by one, in processes: `visit` does it, and raises BadVideo for those it can't read."""

    def __init__(self):
        self.reasons: dict[str, str] = {}  # why a video killed the process that visited it

    def visit(self, path: str) -> None:
        raise NotImplementedError

    def __call__(self, path: str) -> tuple[str, str]:
        """Gives (path, why the video can't be read, or "")."""
        try:
            if path in self.reasons:
                raise BadVideo(path, self.reasons[path])
            self.visit(path)
        except BadVideo as error:
            return path, error.reason
        return path, ""

    def crashed(self, path: str, how: str) -> None:
        self.reasons[path] = how


class _Checker(VideoVisitor):
    """Reads the first, middle and last 32 frames of a video, or all."""

    def __init__(self, full: bool):
        super().__init__()
        self.full = full

    def visit(self, path: str) -> None:
        with Video(path) as video:
            last = max(len(video) - 32, 0)
            step = 32 if self.full else max(math.ceil(last / 2), 1)
            for start in (*range(0, last, step), last):
                video.read(range(start, min(start + 32, len(video))))


def visit_videos(
    visitor: VideoVisitor, paths: Sequence[str], root: str, out: str | Path, workers: int, what: str, mode: str = "w"
) -> int:
    """Visits videos in processes, and says how far it is; returns how many are bad.

    Each bad video found is a line of the file `out`, which is written anew, or added to in `mode` "a": its path from
    `root` in quotes, a tab, the reason; `find_videos` takes it as `exclude`.
    """
    bad = 0
    with open(out, mode, encoding="utf-8", buffering=1) as file:  # by lines, so that an interrupt loses none
        for path, reason in _progress(_in_processes([visitor] * workers, paths, ahead=8), len(paths), what):
            if reason:
                bad += 1
                file.write(f"{os.path.relpath(path, root)!a}\t{reason}\n")
    return bad


def check_videos(root: str | Path, out: str | Path, workers: int, full: bool = False) -> tuple[int, int]:
    """Reads frames of all videos below a folder, in processes; returns how many there are and how many are bad.

    Reads the first, middle and last 32 frames of each, or with `full` all, several times slower. The bad ones are
    listed in the file `out` (see `visit_videos`).

    Raises FileNotFoundError when there is no video.
    """
    root = os.path.abspath(root)
    paths = _walk(root)[0]
    if not paths:
        raise FileNotFoundError(f"{root}: no videos (.{', .'.join(SUFFIXES)}) below it")
    return len(paths), visit_videos(_Checker(full), paths, root, out, workers, f"checking {root}")


class FrameMaps(VideoVisitor):
    """A map of each frame of each video, computed once and kept in files: that of ROOT/a/b.mp4 in FOLDER/a/b.mp4.npz.

    A file holds the maps of a video (N, h, w), not negative, as square roots in 8 bits, and what they were made from:
    the size of the video's file, and a recipe. It holds no pickles.

    Args:
        root: folder of the videos.
        folder: of the maps.
        recipe: says how they are computed; others are made anew.
        command: makes them; named where one is missing.
    """

    def __init__(self, root: str | Path, folder: str | Path, recipe: str, command: str):
        super().__init__()
        self.root, self.folder = os.path.abspath(root), Path(folder)
        self.recipe, self.command = recipe, command

    def compute(self, path: str) -> np.ndarray:
        """The maps of a video, floating point (N, h, w) ≥ 0; raises BadVideo."""
        raise NotImplementedError

    def file(self, path: str) -> Path:
        """Where the maps of a video lie."""
        return self.folder / (os.path.relpath(path, self.root) + ".npz")

    def visit(self, path: str) -> None:
        """Computes and writes the maps of a video; at every moment their file is whole, or as it was."""
        maps, file = self.compute(path), self.file(path)
        scale = max(float(maps.max()), 1e-12)
        levels = np.round(255 * np.sqrt(maps / scale)).astype(np.uint8)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        with open(partial, "wb") as out:
            np.savez_compressed(out, levels=levels, scale=scale, size=os.path.getsize(path), recipe=self.recipe)
        os.replace(partial, file)

    def is_made(self, path: str) -> bool:
        """Whether there are maps of this video as it is now, by this recipe."""
        with contextlib.suppress(Exception), np.load(self.file(path)) as held:  # damaged files raise all kinds
            return (int(held["size"]), str(held["recipe"])) == (os.path.getsize(path), self.recipe)
        return False

    def read(self, path: str, frames: int) -> np.ndarray:
        """The maps of a video of so many frames: float32 (frames, h, w).

        Raises ValueError when they are missing, damaged, or those of another video or another recipe.
        """
        file = self.file(path)
        try:
            with np.load(file) as held:
                levels, scale = held["levels"], np.float32(held["scale"])
                size, recipe = int(held["size"]), str(held["recipe"])
            wrong = "" if recipe == self.recipe else f"made by another recipe ({recipe}, not {self.recipe})"
            wrong = wrong if (len(levels), size) == (frames, os.path.getsize(path)) else "of another video of this name"
        except Exception as error:
            wrong = f"missing or damaged ({error})"
        if wrong:
            raise ValueError(f"{file}: {wrong}; make it again with `{self.command}`")
        return scale * np.square(levels / np.float32(255))

    def check(self, paths: Sequence[str]) -> None:
        """Raises FileNotFoundError when there is a video without maps."""
        missing = [path for path in paths if not self.file(path).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: nothing for {len(missing)} of {len(paths)} videos, such as {missing[0]!r}: run "
                f"`{self.command}`, and leave out with --exclude what it names as unreadable"
            )

    def make(self, paths: Sequence[str], workers: int) -> str:
        """Makes what is missing, of another recipe or of another video, in processes; returns a line on what there is.

        Videos that can't be read are added to FOLDER/bad_videos.txt, for `exclude`.
        """
        todo = [path for path in paths if not self.is_made(path)]
        report = f"{self.folder}: {len(paths) - len(todo)} of {len(paths)} were there"
        if not todo:
            return report
        self.folder.mkdir(parents=True, exist_ok=True)
        bad = self.folder / "bad_videos.txt"
        count = visit_videos(self, todo, self.root, bad, workers, f"making {self.folder}", "a")
        advice = f", {count} videos can't be read: leave them out with --exclude {bad}" if count else ""
        return f"{report}, {len(todo) - count} made{advice}"


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data set: real video files in which the class is the motion and nothing else
# ---------------------------------------------------------------------------------------------------------------------

MOTIONS = ("bounce", "fall", "grow", "orbit", "pulse", "rise", "shrink", "spin", "sway", "sway_then_bounce")
SHAPES = ("disc", "ring", "square", "triangle", "star", "cross")
SYNTHETIC_VERSION = 2  # to be raised with every change of what is drawn, so that older copies are made anew
SYNTHETIC_MARKER = "synthetic.json"  # says how the set was made
UNLABELED = "unlabeled"  # folder of videos for pretraining alone, in each of which the motion changes
OBJECTS = 3  # in a video, all in the same motion, so that crops hold one
SPRITE = 64  # pixels of an object's picture, in each direction; objects are drawn smaller than this


def _motion(name: str, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, ...]:
    """One course of a motion: moves to the right and down (in sides of the frame), size (log2), turns; each (frames,).

    Any half of the video shows the motion, and a horizontal flip leaves it what it is: what moves sideways or turns
    does so both ways. The draws are the same for all motions; what a motion leaves alone stays where it was drawn.
    """
    travel, amplitude, doublings, period, phase, direction, size, turns = rng.uniform(
        (0.5, 0.17, 1.2, 11, 0, -1, -0.5, 0), (0.6, 0.28, 1.6, 17, 2, 1, 0.5, 1)
    )
    if name == "sway_then_bounce":
        period = 6 + period / 4  # at most 16, so that 32 frames hold both
    progress = np.arange(frames) / frames - 0.5
    cycle = np.arange(frames) / period + phase
    wave = np.sin(2 * np.pi * cycle)
    bounce = 1 - 8 * (cycle % 1) * (1 - cycle % 1)  # parabolas, in [-1, 1]
    right, down, size, turns = (np.full(frames, start) for start in (0, 0, size * doublings, turns))
    match name:
        case "rise":
            down = -travel * progress
        case "fall":
            down = travel * progress
        case "sway":
            right = amplitude * wave
        case "bounce":
            down = amplitude * bounce
        case "sway_then_bounce":
            swaying = cycle % 2 < 1
            right = np.where(swaying, amplitude * wave, 0)
            down = np.where(swaying, amplitude, amplitude * bounce)
        case "orbit":
            right = amplitude * wave
            down = amplitude * np.cos(2 * np.pi * cycle) * np.sign(direction)
        case "grow":
            size = doublings * progress
        case "shrink":
            size = -doublings * progress
        case "pulse":
            size = doublings / 2 * wave
        case "spin":
            turns = turns + np.sign(direction) * cycle / 1.5
    return right, down, size, turns


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A gradient, stripes, checks or smooth noise between two unlike colours: float32 (height, width, 3) in [0, 1]."""
    y, x = (axis.astype(np.float32) / min(height, width) - 0.5 for axis in np.ogrid[:height, :width])
    kind = rng.choice(["gradient", "stripes", "checks", "noise"])
    count = {"checks": 2, "noise": 10}.get(kind, 1)
    low, high = {"gradient": (0.3, 0.5), "stripes": (2, 5), "checks": (1, 3), "noise": (0.7, 8)}[kind]
    cycles = np.exp(rng.uniform(np.log(low), np.log(high), count))
    angles = rng.uniform(0, 2 * np.pi, count)
    if kind == "checks":
        angles[1] = angles[0] + np.pi / 2
    phases = rng.random(count) * (kind != "gradient")  # a gradient changes in the middle, so that it shows
    along = x[..., None] * np.cos(angles) + y[..., None] * np.sin(angles)
    waves = np.sin(2 * np.pi * (along * cycles + phases))
    field = waves.prod(-1) if kind == "checks" else waves.sum(-1)
    field = 0.5 + 0.5 * np.tanh(rng.uniform(1, 4) * field)
    first = rng.random(3)
    second = (first + rng.uniform(0.35, 0.65, 3)) % 1
    return (first + (second - first) * field[..., None]).astype(np.float32)


def _sprite(rng: np.random.Generator) -> np.ndarray:
    """A textured shape with a soft edge: float32 (SPRITE, SPRITE, 4), colour and opacity, transparent at the border."""
    y, x = np.ogrid[-1 : 1 : SPRITE * 1j, -1 : 1 : SPRITE * 1j]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    match rng.choice(SHAPES):
        case "disc":
            depth = 0.85 - radius
        case "ring":
            depth = 0.25 - np.abs(radius - 0.62)
        case "square":
            depth = 0.7 - np.maximum(np.abs(x), np.abs(y))
        case "triangle":
            depth = 0.4 - np.max([radius * np.cos(angle - 2 * np.pi * k / 3) for k in range(3)], axis=0)
        case "star":
            depth = 0.65 + 0.25 * np.cos(5 * angle) - radius
        case "cross":
            depth = np.minimum(0.8 - np.maximum(np.abs(x), np.abs(y)), 0.28 - np.minimum(np.abs(x), np.abs(y)))
    opacity = np.clip(0.5 + depth / rng.uniform(0.1, 0.2), 0, 1)
    return np.concatenate([_texture(rng, SPRITE, SPRITE), opacity[..., None]], axis=2, dtype=np.float32)


def _shot(motion: str, rng: np.random.Generator, camera: np.ndarray, height: int, width: int) -> tuple[np.ndarray, ...]:
    """One object's course while the camera moves by (frames, 2): center x and y, radius, angle; each (frames,)."""
    side = min(height, width)
    right, down, size, turns = _motion(motion, rng, len(camera))
    radius = rng.uniform(0.092, 0.108) * side * 2**size
    centers = []
    for path, moved, length in ((right * side, camera[:, 0], width), (down * side, camera[:, 1], height)):
        path = path - moved
        inside = (radius - path).max(), (length - radius - path).min()  # where it may start so as never to leave
        centers.append(path + rng.uniform(*sorted(inside)))  # or, if that can't be, to leave on both sides
    return *centers, radius, 2 * np.pi * turns


def _draw_video(
    motions: Sequence[str], rng: np.random.Generator, frames: int, height: int, width: int, shake: float = 0.008
) -> np.ndarray:
    """Draws one video: objects before a background, a shaky camera; uint8 (shots * frames, H, W, 3).

    Each motion is a shot of so many frames. From shot to shot, objects keep their looks and take another place.
    """
    time = np.arange(len(motions) * frames)[:, None] / frames
    camera = np.sin(2 * np.pi * (time * rng.uniform(1, 4, 2) + rng.random(2)))
    camera = camera * rng.uniform(shake / 4, shake, 2) * min(height, width)  # to the right and down, pixels
    margin = math.ceil(np.abs(camera).max())
    background = 0.6 * _texture(rng, height + 2 * margin + 1, width + 2 * margin + 1)
    objects = []
    for _ in range(OBJECTS):
        shots = [
            _shot(motion, rng, moved, height, width)
            for motion, moved in zip(motions, np.split(camera, len(motions)), strict=True)
        ]
        sprite = _sprite(rng)
        sprite[..., :3] = 1 - 0.6 * sprite[..., :3]  # lighter than most of the background
        objects.append((*np.concatenate(shots, axis=1), sprite))
    inverted = rng.random() < 0.5
    rows, columns = np.ogrid[:height, :width]
    video = np.empty((len(camera), height, width, 3), np.uint8)
    for t, (dx, dy) in enumerate(camera):
        left, top = margin + math.floor(dx), margin + math.floor(dy)
        view = background[top : top + height + 1, left : left + width + 1]
        view = view[:-1] + np.float32(dy % 1) * (view[1:] - view[:-1])
        view = view[:, :-1] + np.float32(dx % 1) * (view[:, 1:] - view[:, :-1])
        for center_x, center_y, radius, angle, sprite in objects:
            x, y = (columns - center_x[t]) / radius[t], (rows - center_y[t]) / radius[t]
            cos, sin = np.cos(angle[t]), np.sin(angle[t])
            turned = np.stack([cos * y - sin * x, cos * x + sin * y])  # rows, columns
            drawn = sprite[tuple(((turned + 1) * (SPRITE / 2)).clip(0, SPRITE - 1).astype(int))]
            view += drawn[..., 3:] * (drawn[..., :3] - view)
        video[t] = 255 * (1 - view if inverted else view) + 0.5
    return video


def _write_video(path: Path, video: np.ndarray) -> None:
    """Encodes uint8 (T, H, W, 3) as MPEG-4 with B-frames in MP4: FFmpeg's own encoder, so every build has it."""
    reformatter = VideoReformatter()
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qmin": "3", "qmax": "3", "flags": "+bitexact"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.max_b_frames = "yuv420p", 32, 2
        stream.thread_count = 1
        for pts, picture in enumerate(video):
            frame = reformatter.reformat(av.VideoFrame.from_ndarray(picture), format="yuv420p", threads=1)
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make_synthetic(
    root: str | Path,
    train: int = 1500,
    test: int = 500,
    seed: int = 0,
    frames: int = 48,
    size: tuple[int, int] = (40, 40),
    shake: float = 0.008,
    shots: int = 1,
) -> None:
    """Writes the embedded data set once: root/{train,test}/<motion>/<motion>_0001.mp4, classes `MOTIONS` in turn.

    The class is the motion alone. Shape, texture, colours, size, background, speed, phase, place and the camera's
    shake are drawn for each video from (seed, part, number), whatever its class. The set is made in a folder beside
    `root` that takes its name at the end, so that `root` never holds half of it. A complete set of the same arguments
    and version is kept as it is; another is replaced.

    Args:
        train, test: number of videos.
        frames, size: length in frames (at 25 a second), height and width in pixels.
        shake: how far the camera moves at most, in sides of the frame; a quarter of it is the least.
        shots: from 2 on, there are as many videos again, root/unlabeled/0001.mp4, on which pretraining is done instead:
            of so many shots of the same objects before the same background, each in another motion.

    Raises:
        ValueError: a part without videos, fewer than two frames, no pixel, a negative or infinite number, or more
            shots than motions.
        FileExistsError: `root` holds other files than a synthetic set; it is left alone.
    """
    if seed < 0 or not 0 <= shake < math.inf or min(train, test, *size) < 1 or frames < 2:
        given = f"train {train}, test {test}, seed {seed}, shake {shake}, frames {frames}, size {size}"
        raise ValueError(
            f"a synthetic set needs a video of each part, two frames and a pixel, none below 0: not {given}"
        )
    if not 1 <= shots <= len(MOTIONS):
        raise ValueError(f"a video has 1 to {len(MOTIONS)} shots, each in another motion: not shots {shots}")
    root = Path(root).resolve()
    recipe = {"version": SYNTHETIC_VERSION, "train": train, "test": test, "seed": seed, "frames": frames, "size": size}
    recipe = json.dumps(recipe | {"shake": shake, "shots": shots})
    parts = {"train": train, "test": test, UNLABELED: train if shots > 1 else 0}
    jobs = [(part, n) for part, count in parts.items() for n in range(count)]

    def is_complete() -> bool:
        marker = root / SYNTHETIC_MARKER
        return marker.is_file() and marker.read_text() == recipe and len([*root.rglob("*.mp4")]) == len(jobs)

    def make(job: tuple[str, int]) -> None:
        part, n = job
        rng = np.random.default_rng([seed, [*parts].index(part), n])
        if part == UNLABELED:
            motions, path = rng.choice(MOTIONS, shots, replace=False), made / part / f"{n + 1:04}.mp4"
        else:
            motions = [motion := MOTIONS[n % len(MOTIONS)]]
            path = made / part / motion / f"{motion}_{n // len(MOTIONS) + 1:04}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_video(path, _draw_video(motions, rng, frames, *size, shake))

    if is_complete():
        return
    found = set(os.listdir(root)) if root.exists() else set()
    if found and (SYNTHETIC_MARKER not in found or found - {*parts, SYNTHETIC_MARKER}):
        raise FileExistsError(f"{root} holds other files: give the synthetic data set a folder of its own")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as partial:
        made = Path(partial) / "made"
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy and FFmpeg run without the interpreter's lock
            for _ in _progress(pool.map(make, jobs), len(jobs), f"making the synthetic data set in {root}"):
                pass
        (made / SYNTHETIC_MARKER).write_text(recipe)
        if not is_complete():  # else another process was faster
            shutil.rmtree(root, ignore_errors=True)
            made.rename(root)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check the videos below a folder, or make the synthetic data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="find videos that can't be read; exit code 1 if there are any")
    check.add_argument("root", help="the folder given as --data in training")
    check.add_argument("--out", default="bad_videos.txt", help="list to write, for --exclude (default: %(default)s)")
    check.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    check.add_argument("--full", action="store_true", help="read all frames, not only 32 at three places: slower")
    synthetic = commands.add_parser("synthetic", help="make videos in which the class is the motion alone")
    synthetic.add_argument("root", help="folder to make")
    for name, default in (("train", 1500), ("test", 500), ("seed", 0), ("frames", 48), ("size", 40)):
        synthetic.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    described = "how far the camera moves at most, in sides of the frame (default: %(default)s)"
    synthetic.add_argument("--shake", type=float, default=0.008, help=described)
    described = "from 2 on: as many videos again, unlabeled, of so many shots, each in another motion; pretraining is "
    synthetic.add_argument("--shots", type=int, default=1, help=f"{described}done on these (default: %(default)s)")
    return parser


def main() -> int:
    """Command line: `python data.py check ROOT`, `python data.py synthetic ROOT`; returns the exit code."""
    options = _parser().parse_args()
    try:
        if options.command == "synthetic":
            size = (options.size, options.size)
            given = options.train, options.test, options.seed, options.frames, size, options.shake, options.shots
            make_synthetic(options.root, *given)
            return 0
        count, bad = check_videos(options.root, options.out, max(options.workers, 1), options.full)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{bad} of {count} videos can't be read" + (f": leave them out with --exclude {options.out}" if bad else ""))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
