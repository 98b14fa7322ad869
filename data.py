"""Video data for self-supervised learning: finding videos, reading them frame by frame, sampling and cropping views.

Can be copied alone into another project: it imports torch, numpy and av (PyAV) only.

What flows: `find_videos` lists a data set's videos, `Video` reads chosen frames of one of them, `PretrainingViews`
makes a source and a target view of a video, `TestClips` its clips for evaluation, `StepSampler` says which videos make
which batch. Clips leave the loader as uint8; colour augmentation and normalisation run on the device, in batch.

Letters: N clips, S sub-clips of a view, T frames of a clip, H, W height and width in pixels, P colour parameters.
"""

import argparse
import ast
import codecs
import contextlib
import csv
import ctypes
import datetime
import errno
import functools
import io
import itertools
import json
import math
import mmap
import multiprocessing.connection
import multiprocessing.reduction
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, thread_time
from typing import NoReturn, TextIO

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
ONE_BY_ONE = {"mpeg4": b"\0\0\1\xb6", "mpeg1video": b"\0\0\1\0", "mpeg2video": b"\0\0\1\0"}  # and their pictures' mark
TINY = 19  # bytes of a packet of MPEG-4 that may stand for a picture which came in a packet before
CONTAINERS = (  # no playlists: they open other files
    "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,asf,ogg,mxf,dv,ivf,mjpeg,jpeg_pipe"
)
DEADLINE = 60.0  # seconds that opening a video may take, and one reading of frames
MAX_FRAMES = 1_000_000  # of a video
MAX_PIXELS = 8192 * 4320  # of a frame
MAX_BYTES = 4 * 2**30  # of a video's packets, and of the frames of one reading
CHUNK = 32 * 2**20  # bytes of RGB that are held while frames are streamed
_watched: dict[tuple, tuple] = {}  # what `Video._watch` found, by file


def shown(name: str) -> str:
    """A name for a line of text: what isn't printable, as terminals' codes and bytes of no character, by its number."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in name)


class BadVideo(Exception):
    """A video that can't be read: `path` says which one, `reason` why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


WANTS = {  # of the machine, which no video is to blame for: by the number of the error, what to do
    errno.EMFILE: "raise `ulimit -n`, or take fewer --workers",
    errno.ENFILE: "raise `sysctl fs.file-max`, or take fewer --workers",
    errno.ENOMEM: "take fewer --workers (0: none) or smaller batches",
    errno.ENOSPC: "make room, or set TMPDIR to another disk",
} | dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN), "mount the disk again")


def _is_memory_short() -> bool:
    """Whether the system refuses 256 MiB, more than a video whose frames have `MAX_PIXELS` needs to ask for at once."""
    try:
        mmap.mmap(-1, 2**28).close()
    except OSError:
        return True
    return False


def _blame_machine(error: Exception, path: str | None) -> None:
    """Raises OSError where an error in reading a video comes of what the machine lacks, not of the video's bytes.

    Decoders that get no memory call a video damaged; one that asks for too much gets none on any machine.
    """
    short, number = _is_memory_short(), getattr(error, "errno", None)
    if short or (number in WANTS and number != errno.ENOMEM):
        number = errno.ENOMEM if short else number
        raise OSError(number, f"{os.strerror(number)}: {WANTS[number]}", path) from error


def _file_state(path: str) -> os.stat_result:
    """What the system knows of a file that holds something; raises BadVideo for anything else.

    To open a pipe may wait for its other end, a device and a file of /proc (which says 0 bytes) may have no end.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        _blame_machine(error, path)
        raise BadVideo(path, error.strerror) from error
    if not stat.S_ISREG(state.st_mode):
        raise BadVideo(path, "not a file")
    if not state.st_size:
        raise BadVideo(path, "empty")
    return state


class Video:
    """Frame-exact reader of a video file's frames in display order, which decodes only what the chosen frames need.

    with Video(path) as video:
        images = video.read(range(0, len(video), 2))

    Frame k is the k-th picture that a player shows. The packets are read once (the compressed file is held in memory).
    Decoding starts at the last key frame before each group of wanted frames. Which packet shows frame k follows

    - from the time stamps, where they reorder pictures as far as the decoder says that it does;
    - from the packets' order, where each is a picture (as of MJPEG), or makes one come out (MPEG-1, 2, 4): in AVI
      (UCF101, HMDB51) there are no stamps, and those that others make up for packed B-frames are 1, 2, 4, 3, 5, …;
    - else from decoding the whole video once, when it is opened: other codecs without stamps (in AVI, or raw) or with
      stamps that rise although pictures are reordered; interlaced H.264, of which a packet may be half a frame; videos
      with losses, or that begin between key frames: what can't be decoded is no frame. The process remembers what came
      out for the next time that it opens the file.

    Raises BadVideo when the file can't be opened, is none of `CONTAINERS`, holds fewer than two frames of video, or
    more than `MAX_FRAMES`, `MAX_PIXELS` or `MAX_BYTES`, or when that is not known after `DEADLINE` seconds.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._container = None
        try:
            with self._bad_video():
                self._state = _file_state(self.path)
                options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
                tags = {"metadata_errors": "ignore"} if av.__version__.startswith("18.") else {}  # 19 takes any bytes
                self._container = av.open(f"file:{self.path}", options=options, timeout=DEADLINE, **tags)
                self._read_packets()
                self._find_order()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _bad_video(self) -> Iterator[None]:
        """Starts the clock for a block, whose failures are a BadVideo, or an OSError where the machine is to blame.

        The clock counts the computing of this thread, as others may make it wait.
        """
        self._deadline = thread_time() + DEADLINE
        try:
            yield
        except (av.error.FFmpegError, MemoryError, BadVideo) as error:
            idle = isinstance(error, av.error.ExitError) and thread_time() < self._deadline - DEADLINE / 2
            _blame_machine(TimeoutError(errno.ETIMEDOUT, "") if idle else error, self.path)
            if isinstance(error, BadVideo):
                raise
            reasons = {av.error.ExitError: f"not read within {DEADLINE:g} s", MemoryError: "not enough memory"}
            if self._container is None:
                reasons[av.error.ArgumentError] = f"in none of the formats {CONTAINERS.replace(',', ', ')}"
            reason = reasons.get(type(error)) or getattr(error, "strerror", None) or type(error).__name__
            raise BadVideo(self.path, reason) from error

    def _check_time(self) -> None:
        if thread_time() > self._deadline:
            raise BadVideo(self.path, f"not read within {DEADLINE:g} s")

    def _read_packets(self) -> None:
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
        self._to_rgb, self._matrix = VideoReformatter(), None
        self._packets, size = [], 0
        for packet in self._container.demux(stream):
            self._check_time()
            if packet.size:
                self._packets.append(packet)
                size += packet.size
            if len(self._packets) > MAX_FRAMES or size > MAX_BYTES:
                limits = f"{MAX_FRAMES} frames or {MAX_BYTES / 2**30:g} GiB"
                raise BadVideo(self.path, f"more than {limits} of video: cut it into clips")

    def _find_order(self) -> None:
        """Fill `_order`, each frame's ticket, and `_starts`, pairs of a frame and the packet from which to decode it.

        The ticket of a picture that comes out is, by the `_clock`, the "index" of its packet, that of the packet which
        was "fed" then, or its "count". `_near`: which packets hold a frame, from its ticket on, at most.
        """
        packets, codec = self._packets, self._codec
        stamps = [packet.pts for packet in packets]
        for i, packet in enumerate(packets):
            packet.pts, packet.dts = i, None  # which decoders hand on to the picture
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        shown = [i for i, packet in enumerate(packets) if not packet.is_discard]
        if codec.name in ("vp8", "vp9"):
            shown = [i for i in shown if self._is_shown(packets[i])]
        times = {stamps[i] for i in shown}
        stamped = len(times) == len(shown) and None not in times and "avi" not in self._container.format.name.split(",")
        self._order = sorted(shown, key=stamps.__getitem__) if stamped else shown  # AVI's stamps are made up
        self._clock, self._near, self._skip = "index", (0, 0), codec.name in SKIPPING_CODECS
        lag = codec.reorder_depth
        if codec.codec.intra_only:
            keys = shown
        elif any(packet.is_corrupt for packet in packets) or not (stamped and self._agrees(stamps, shown)):
            if codec.name in ONE_BY_ONE and len(shown) == len(packets) > 1 and self._is_one_by_one():
                self._clock, self._near, self._order = "fed", (-lag, 0), range(lag, lag + len(packets))
            else:
                self._clock, self._order, keys = self._watch()
                self._near, self._skip = (0, len(packets) if self._clock == "count" else 1), False
        if self._clock == "fed":
            safe = [(max(i + 4 + lag, self._next_anchor(i)), i) for i in keys if self._is_intra(packets[i])]
            self._starts = [(bisect_left(self._order, ticket), i) for ticket, i in safe]
        else:
            keys = set(keys)
            self._starts = [(frame, i) for frame, i in enumerate(self._order) if i in keys]
        if len(self._order) < 2:
            raise BadVideo(self.path, f"{len(self._order)} frames, where a video has at least 2")

    def _is_shown(self, packet: av.Packet) -> bool:
        """Whether a packet of VP8 or VP9 holds a picture for showing, not one that others only refer to."""
        first, last = memoryview(packet)[0], memoryview(packet)[-1]
        if self._codec.name == "vp8":  # RFC 6386, 9.1
            return bool(first & 0x10)
        if last & 0xE0 == 0xC0:  # several in one, of which the last is shown (VP9 bitstream, annex B)
            return True
        return bool(first & (0b101 if first & 0x30 == 0x30 else 0b1010))  # show_existing_frame, show_frame (6.2)

    def _agrees(self, stamps: list[int], shown: list[int]) -> bool:
        """Whether stamps can be display times: pictures are reordered as far as the decoder says that they are, none of
        the first is a leftover that refers to what isn't there, and a packet of H.264 holds a whole picture."""
        place, depth = {packet: p for p, packet in enumerate(shown)}, self._codec.reorder_depth
        if len(shown) < 2 or not self._packets[0].is_keyframe:
            return False
        late = max(place[packet] - frame for frame, packet in enumerate(self._order))
        if late > depth or late == 0 < depth or stamps[0] is None or stamps[self._order[0]] < stamps[0]:
            return False
        steps = np.diff([stamps[packet] for packet in self._order])
        if self._container.format.name == "mpegts" and steps.max() > 3 * np.median(steps):
            return False  # something is lost in between
        return self._codec.name != "h264" or (_is_progressive(self._codec.extradata) and self._starts_anew())

    def _starts_anew(self) -> bool:
        """Whether the first packet of H.264 holds an IDR picture (NAL unit type 5; ISO/IEC 14496-10, 7.4.1.2.4)."""
        packet, header = bytes(self._packets[0]), self._codec.extradata
        if header[0] != 1:
            return re.search(rb"\0\0\x01[%\x05Ee]", packet) is not None
        size, at = (header[4] & 3) + 1, 0  # of the lengths before the units
        while at + size < len(packet):
            if packet[at + size] & 31 == 5:
                return True
            at += size + int.from_bytes(packet[at : at + size])
        return False

    def _type(self, packet: av.Packet) -> int:
        """Coding type of a packet's first picture: 0 intra, 1 predicted, 2 between others; −1 for none (ISO/IEC 11172-2
        and 13818-2, picture_coding_type; 14496-2, vop_coding_type)."""
        _, _, picture = bytes(memoryview(packet)[:1024]).partition(ONE_BY_ONE[self._codec.name])
        if len(picture) < 2:
            return -1
        return picture[0] >> 6 if self._codec.name == "mpeg4" else (picture[1] >> 3 & 7) - 1

    def _is_intra(self, packet: av.Packet) -> bool:
        return packet.size > 32 and self._type(packet) == 0  # a tiny one may be an empty picture

    def _next_anchor(self, i: int) -> int:
        """The packet with the next picture after packet i that later ones refer to: then those before i are through."""
        later = range(i + 1, len(self._packets))
        return next(
            (j for j in later if self._packets[j].size > 32 and self._type(self._packets[j]) != 2), len(self._packets)
        )

    def _is_one_by_one(self) -> bool:
        """Whether each packet makes a picture come out: the first needs none before it, and for each empty one of
        MPEG-4 another holds two."""
        packets, mark = self._packets, ONE_BY_ONE[self._codec.name]
        if any(packet.is_corrupt for packet in packets) or self._type(packets[0]) != 0 or self._type(packets[1]) == 2:
            return False
        empty = sum(packet.size <= TINY for packet in packets) if self._codec.name == "mpeg4" else 0
        return not empty or empty <= sum(bytes(packet).count(mark) - 1 for packet in packets)

    def _watch(self) -> tuple[str, list[int], list[int]]:
        """Decode all packets: the clock, the pictures' tickets in the order in which they come out, and key packets."""
        file = self.path, self._state.st_size, self._state.st_mtime_ns
        if file not in _watched:
            out = [(i, image.pts, image.key_frame) for i, image in self._pictures(0, len(self._packets) - 1)]
            clock = "fed" if self._codec.name in ONE_BY_ONE else "index"
            tickets = [fed if clock == "fed" else index for fed, index, _ in out]
            keys = [index for _, index, is_key in out if is_key]
            if len({*tickets} - {None}) < len(out):
                clock, tickets, keys = "count", range(len(out)), []
            if len(_watched) >= 2**15:
                del _watched[next(iter(_watched))]
            _watched[file] = clock, np.array(tickets, np.int32), np.array(keys, np.int32)
        clock, *numbers = _watched[file]
        return clock, *(part.tolist() for part in numbers)

    def __len__(self) -> int:
        """Number of frames."""
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
        count, (width, height) = len(set(frames)), self._size
        if 3 * width * height * count > MAX_BYTES:
            limit = f"{MAX_BYTES / 2**30:g} GiB"
            raise BadVideo(self.path, f"{count} frames of {width} × {height} pixels take more than {limit}")
        found = {}
        for images in self.stream(frames):
            found |= images
        return [found[k] for k in frames]

    def stream(self, frames: Iterable[int]) -> Iterator[dict[int, np.ndarray]]:
        """As `read`, but gives the different frames as they come out, in parts of at most `CHUNK` bytes, index → image.

        A part is emptied when the next one is asked for.
        """
        wanted = {self._order[k]: k for k in frames}
        missing, images, size = set(wanted), {}, 3 * self._size[0] * self._size[1]
        last = self._last(max(wanted, default=0))
        with self._bad_video():
            # Streams refreshed bit by bit need more than their last "key" frame: what is missing is tried from 0 on.
            for runs, skip in ((self._runs(wanted), self._skip), ([(0, last)], False)):
                for ticket, image in self._decode(missing, runs, skip) if missing else ():
                    images[wanted[ticket]] = image
                    del image  # of 8K, it is 100 MB
                    if (len(images) + 1) * size > CHUNK:
                        yield images
                        images.clear()
            if missing:
                _blame_machine(MemoryError(), self.path)
            if 4 * len(missing) > len(wanted):
                raise BadVideo(self.path, f"{len(missing)} of {len(wanted)} frames could not be decoded")
            if missing:
                found = sorted(wanted[ticket] for ticket in wanted.keys() - missing)
                nearest = {k: min(found, key=lambda other: abs(other - k)) for k in (wanted[t] for t in missing)}
                again = {self._order[k] for k in nearest.values()}
                held = {wanted[t]: image for t, image in self._decode(again, [(0, self._last(max(again)))], False)}
                images |= {k: held[near] for k, near in nearest.items()}
        if images:
            yield images

    def _last(self, ticket: int) -> int:
        """The last packet to feed for a ticket; what the decoder still holds then is taken out of it."""
        return min(ticket + self._near[1], len(self._packets) - 1)

    def _runs(self, wanted: dict[int, int]) -> list[tuple[int, int]]:
        """The stretches of packets (first, last) to decode for the wanted tickets and frames, in order and apart."""
        runs = []
        for frame, ticket in sorted((frame, ticket) for ticket, frame in wanted.items()):
            place = bisect_right(self._starts, (frame, len(self._packets)))
            first, last = self._starts[place - 1][1] if place else 0, self._last(ticket)
            if runs and first <= runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
            else:
                runs.append((first, last))
        return runs

    def _decode(self, missing: set[int], runs: list[tuple[int, int]], skip: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Decode runs of packets for the missing tickets, and take out of these what comes, as (ticket, image).

        `skip` leaves out pictures that are neither wanted nor referred to by others.
        """
        needed = {ticket + near for ticket in missing for near in self._near} if skip else None
        for first, last in runs:
            for count, (i, image) in enumerate(self._pictures(first, last, needed)):
                ticket = {"index": image.pts, "fed": i, "count": count}[self._clock]
                if ticket in missing:
                    missing.remove(ticket)
                    yield ticket, self._pixels(image)
                if not missing:
                    return

    def _pictures(self, first: int, last: int, needed: set[int] | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode packets, and give each picture with the number of the packet that was fed; of those to which no other
        refers, only what is `needed`."""
        self._codec.flush_buffers()
        for i in range(first, last + 2):  # one past the last: take what the decoder still holds
            self._check_time()
            self._codec.skip_frame = "DEFAULT" if needed is None or i in needed else "NONREF"
            try:
                images = self._codec.decode(self._packets[i] if i <= last else None)
            except (av.error.FFmpegError, ValueError) as error:  # ValueError: av 19, once it could not open its decoder
                _blame_machine(error, self.path)
                continue  # damaged here; the caller counts what stays missing
            for image in images:
                yield i, image

    def _pixels(self, image: av.VideoFrame) -> np.ndarray:
        rgb = self._to_rgb.reformat(image, *self._size, "rgb24", threads=1)  # unscaled: several times faster
        plane, (width, height) = rgb.planes[0], self._size
        pixels = np.ndarray((height, width, 3), np.uint8, buffer=plane, strides=(plane.line_size, 3, 1))  # no copy
        if self._matrix is None:
            held = image.side_data.get("DISPLAYMATRIX")
            self._matrix = np.frombuffer(held, np.int32)[[0, 1, 3, 4]].tolist() if held else [1, 0, 0, 1]
        a, b, c, d = self._matrix  # (x, y) is shown at (ax + cy, bx + dy)
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        if a < 0 or d < 0:
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1].copy()
        return pixels


def _is_progressive(extradata: bytes | None) -> bool:
    """Whether a sequence parameter set of H.264 is known to allow whole frames only (ISO/IEC 14496-10, 7.3.2.1.1)."""
    found = re.match(rb"\x01.{7}", extradata or b"", re.DOTALL) or re.search(
        rb"\0\0\x01(?=[\x07'Gg])", extradata or b""
    )
    if found is None:
        return False
    content = extradata[found.end() : found.end() + 256].replace(b"\0\0\3", b"\0\0")
    bits = iter("".join(f"{byte:08b}" for byte in content))

    def number(length: int) -> int:
        return int("0" + "".join(itertools.islice(bits, length)), 2)

    def code() -> int:  # Exp-Golomb, 9.1
        zeros = sum(1 for _ in itertools.takewhile("0".__eq__, bits))
        return 2**zeros - 1 + number(zeros)

    number(8)
    profile = number(8)
    number(16), code()
    if profile not in (66, 77, 88):
        number(code() == 3), code(), code(), number(1)  # chroma, depths
        if number(1):
            return False  # scaling lists: rare, and long to read
    code()
    kind = code()  # of the order count
    if kind == 0:
        code()
    elif kind == 1:
        number(1), code(), code()
        for _ in range(code()):
            code()
    code(), number(1), code(), code()
    return number(1) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Finding videos
# ---------------------------------------------------------------------------------------------------------------------

DATASETS = ("synthetic", "folder", "ucf101", "hmdb51", "k400", "diving48", "ssv2")
SUFFIXES = (  # of files in CONTAINERS, without those of sounds and single pictures
    *("avi", "divx", "xvid", "mp4", "m4v", "mp4v", "mpeg4", "mov", "qt", "f4v", "3gp", "3gpp", "3g2", "3gp2", "ismv"),
    *("mkv", "mk3d", "webm", "mpg", "mpeg", "mpe", "mpv", "m1v", "m2v", "m2p", "mp2v", "mpv2", "vob", "evo", "vro"),
    *("tod", "mod", "ts", "mts", "m2ts", "m2t", "tp", "trp", "flv", "wmv", "asf", "h264", "264", "avc", "h26l", "26l"),
    *("h265", "265", "hevc", "mjpg", "mjpeg", "ogv", "ogg", "ogm", "mxf", "dv", "dif", "ivf"),
)
NOT_READ = re.compile(  # names of files and folders that operating systems, network storage and editors make
    r"\..*|@eadir|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|~snapshot|\$recycle\.bin|recycler|lost\+found|"
    r"system volume information|__macosx|network trash folder|temporary items|__pycache__|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
PART = re.compile(  # names of folders that divide a data set
    r"(?:(train)(?:ing)?|(test)(?:ing)?|(val)(?:id(?:at(?:e|ion))?)?)(?:[_ -]?set)?[_ -]?(?:\d+(?:p|x\d+)?)?",
    re.IGNORECASE,
)
SEPARATED = r"[\s,;|]+"  # what may stand between the fields of a list
SUFFIXED, BARE = rf"\.({'|'.join(SUFFIXES)})(?=[\s,;|]|$)", r"(?<=[^\s,;|])(?=[\s,;|]|$)"  # ends of a video's name
LABEL = r"\s*\S*|(\s+[+-]?\d+(\.\d*)?)*|\s*[,;|\t].*"  # after a name without suffix; of "a b c", "b c" may be its name
QUOTED = r"""(["'])((?:(?!\1).|\1\1)*)\1(?=[\s,;|]|$)"""  # a field in quotes, in which a quote is doubled
HEADER = (
    r"sep=.|[^\d\\/.]*(\b|_)(path|video|file|clip|name|id|label|class|category|action)s?_?(path|name|id)?\b[^\d\\/]*"
)
K400_TRAIN, K400_VALIDATION = r".*train\.csv", r".*(val|valid|validate|validation)\.csv"
LAYOUTS = {
    "synthetic": "train/CLASS/*.mp4 and test/CLASS/*.mp4, and perhaps unlabeled/*.mp4 for pretraining",
    "folder": "videos anywhere below it, a folder a class, and if wanted train/ and test/ (or val/) side by side",
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
    """Videos of one part of a data set: paths, labels (-1: unknown), class names, and a line on what was found.

    `shared` names the training videos that were left out because links make them held-out ones too, `closed` the
    folders that may not be listed, whose videos are missing.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str]
    report: str
    shared: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def seen(self, root: str | Path) -> list[list]:
        """Of each video its path below `root`, label, class, and size in bytes (−1: no file): what a run goes by."""

        def size(path: str) -> int:
            try:
                return os.stat(path).st_size
            except OSError:
                return -1

        above, classes = os.path.join(os.path.abspath(root), ""), [*self.classes, ""]
        labelled = zip(self.paths, self.labels, strict=True)
        return [[path.removeprefix(above), label, classes[label], size(path)] for path, label in labelled]


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

    Without such lists, a folder that holds a training part (train, training, trainset, train_256, …; any case) and
    a held-out one (test, testing, testset, val, valid, validation, …) divides the videos, at whatever depth; what lies
    outside of these parts is left out and counted in the report. A part without the other divides nothing (a class may
    be called "train"), unless all videos lie in parts. Where there are both, "test" is held out and "val" is not used
    (k400: the other way round). Hidden files and folders, and those of `NOT_READ`, are never read. A training video
    that is a held-out one too, by a link, is left out of training and counted.

    `list_file`, for "folder" only, names a file of "path label" lines instead (`_read_list`): paths below `root`,
    relative to it or absolute (`root` "/" takes any), spaces allowed; labels optional, all integers or names. Links
    below `root` are followed, wherever they lead. `exclude` names a file of videos to leave out, as `check_videos`
    writes it, or several with commas between. `unlabeled` takes those of "synthetic" that are for pretraining, where
    there are any (`make_synthetic`).

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
    outside, passed, twice, closed = 0, Counter(), set(), []
    if list_file is not None:
        paths, names, labels, classes, note = _read_list(root, list_file)
        title = f"{dataset} list {list_file}{note}"
    else:
        videos, lists, passed, closed = _walk(root)
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
            tree = [path for path in videos if path not in apart]
            paths, labels, classes, held, outside, halved = _read_tree(root, tree, train, dataset == "k400")
            names = paths
            title = title if halved else f"{dataset} (no train/ and test/ folders: one list for both)"
            # By numbers of files first, as few have one in common. They are no proof: each file system has its own.
            numbers = {videos[path] for path in held} & {videos[path] for path in paths} if train else ()
            twice = {*same_files(*([path for path in part if videos[path] in numbers] for part in (paths, held)))}
    excluded = _read_bad(root, exclude) if exclude else set()
    twice -= excluded
    left_out = excluded | twice
    found = [(path, label) for path, label in zip(paths, labels, strict=True) if path and path not in left_out]
    missing = [name for path, name in zip(paths, names, strict=True) if not path]
    report = f"{title}: {len(found)} videos{expected}, {f'{len(classes)} classes' if classes else 'no labels'}"
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        report += f"; {len(missing)} of {len(names)} listed videos are not on disk: {some}"
    if excluded:
        report += f"; {sum(path in excluded for path in paths)} of the {len(excluded)} named in {exclude} left out"
    if outside:
        report += f"; {outside} videos outside of the training and the held-out folder left out"
    if twice:
        report += f"; {len(twice)} that are held-out videos too (links) left out"
    if passed:
        kinds = [f"{count} {kind}" for kind, count in passed.most_common(5)] + ["…"] * (len(passed) > 5)
        report += f"; {passed.total()} other files passed over ({', '.join(kinds)})"
    if closed:
        report += f"; {len(closed)} folders left out, for want of permission to list them, such as {closed[0]}"
    if not found:
        raise FileNotFoundError(f"{root}: no videos found ({report}); {dataset} expects {LAYOUTS[dataset]}")
    paths, labels = [path for path, _ in found], [label for _, label in found]
    return VideoList(paths, labels, classes, shown(report), tuple(sorted(twice)), tuple(closed))


def same_files(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of the paths whose file is among the others, by whatever name or link, symbolic or hard."""

    def identity(path: str) -> tuple[int, int] | str:
        try:
            status = os.stat(path)
        except OSError:  # a link to nothing
            return path
        return status.st_dev, status.st_ino

    known = set(map(identity, others))
    return [path for path in paths if identity(path) in known]


def _read_text(file: str | Path) -> str:
    """A list's text, UTF-16 with its mark (as Excel writes it) or UTF-8, lines ended by "\\n"; other bytes stay as in
    file names. Raises ValueError for what is no file, such as a pipe, which might have no end."""
    state = os.stat(file)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{file}: not a file on a disk")
    content = Path(file).read_bytes() if state.st_size else b""  # files of /proc say 0
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", "replace")
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
        return _read_text(self.last_read)

    def lines(self, pattern: str) -> list[str]:
        return [line.strip() for line in self.read(pattern).splitlines() if line.strip()]


def _walk(root: str) -> tuple[dict[str, int], _Lists, Counter, list[str]]:
    """Paths of all videos below a folder with the numbers (inodes) of their files, its lists, how many other files
    there are, by suffix, and the folders that may not be listed."""
    videos, lists, passed, closed, seen = {}, _Lists(), Counter(), [], set()
    suffixes = frozenset(SUFFIXES)
    folders = [(root, os.path.realpath(root), "")]
    while folders:
        folder, real, part = folders.pop()
        if (part, real) in seen or re.match(r"/(proc|sys)(/|$)", real):  # seen: by a link, in the same part of the set
            continue
        seen.add((part, real))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            closed.append(folder)
            continue
        below = []
        for entry in entries:
            name, state = entry.name, None
            suffix = os.path.splitext(name)[1][1:].lower()
            if NOT_READ.fullmatch(name):
                continue
            if entry.is_symlink():
                try:
                    state = os.stat(entry.path)
                except OSError as error:  # of a video, reading it will say so
                    if isinstance(error, PermissionError) and suffix not in suffixes:
                        closed.append(entry.path)
                        continue
            if stat.S_ISDIR(state.st_mode) if state else entry.is_dir(follow_symlinks=False):
                target = os.path.realpath(entry.path) if state else os.path.join(real, name)
                if not f"{real}{os.sep}".startswith(f"{target}{os.sep}"):  # a link upwards would find all once more
                    below.append((entry.path, target, part or (entry.path if PART.fullmatch(name) else "")))
                continue
            if suffix in suffixes:
                videos[entry.path] = state.st_ino if state else entry.inode()
            elif suffix in ("txt", "csv", "json"):
                lists.paths.setdefault(name, entry.path)
            else:
                passed[f".{suffix}" if suffix else "without suffix"] += 1
        folders += reversed(below)
    return videos, lists, passed, closed


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
    root: str, videos: Iterable[str], train: bool, kinetics: bool
) -> tuple[list[str], list[int], list[str], list[str], int, bool]:
    """Paths and labels of a part of a tree whose folders are the classes, the classes, the paths of the held-out part,
    how many videos lie outside of both, and whether there are parts (`find_videos` says what they are).

    A class is named by the folders below a part, and by those above where these differ: ucf/train/jump and
    hmdb/train/jump, or jump/train.
    """
    folders = {folder: folder[len(root) :].strip(os.sep).split(os.sep) for folder in map(os.path.dirname, videos)}
    places, kinds_in = {}, {}  # of each folder, the parts in its path; of the folder above a part, the parts there
    for folder, names in folders.items():
        matches = [(i, match) for i, name in enumerate(names) if (match := PART.fullmatch(name))]
        places[folder] = [(tuple(names[:i]), match[match.lastindex].lower(), names[i + 1 :]) for i, match in matches]
        for above, kind, _ in places[folder]:
            kinds_in.setdefault(above, set()).add(kind)
    divided = {above for above, kinds in kinds_in.items() if "train" in kinds and len(kinds) > 1}
    if apart := not divided and (kinetics or all(places.values())):
        divided = set(kinds_in)
    alike = [len(set(level)) == 1 for level in zip(*divided, strict=False)]  # levels of folders above the parts
    common = [*alike, False].index(False)
    rows = {}  # of a folder, its part and class
    for folder, names in folders.items():
        inside = [place for place in places[folder] if place[0] in divided]
        if inside:
            above, kind, below = inside[0]
            rows[folder] = kind, "/".join(below if apart and below else [*above[common:], *below])
        elif not (divided or kinetics):
            rows[folder] = None, "/".join(names)
    fold = _letters if kinetics else str
    classes = {fold(name): name.replace("_", " ") if kinetics else name for _, name in rows.values() if name}
    index = {fold(name): i for i, name in enumerate(sorted(classes.values()))}
    held_out = "val" if kinetics or "test" not in {kind for kind, _ in rows.values()} else "test"
    found = [(*rows.get(os.path.dirname(path), ("outside", "")), path) for path in videos]
    wanted = (None, "train" if train else held_out)
    kept = [(path, index.get(fold(name), -1)) for kind, name, path in found if kind in wanted]
    held = [path for kind, _, path in found if kind == held_out]
    outside = sum(kind not in (None, "train", held_out) for kind, _, _ in found)
    paths, labels = [path for path, _ in kept], [label for _, label in kept]
    return paths, labels, sorted(classes.values()), held, outside, kinetics or bool(divided)


def _ways(line: str, ends: str) -> list[tuple[str, str]]:
    """Ways to read a line of a list as a name, which stops at a match of `ends`, and the rest; long names first."""
    ways = [(line[: match.end()], line[match.end() :]) for match in re.finditer(ends, line, re.IGNORECASE)][::-1]
    if quoted := re.match(QUOTED, line):
        inner = quoted[2].replace(2 * quoted[1], quoted[1])
        ways += [(name, rest + line[quoted.end() :]) for name, rest in _ways(inner, ends)]
    return ways


def _read_list(root: str, list_file: str | Path) -> tuple[list[str | None], list[str], list[int], list[str], str]:
    """The lines "path label" of a file: paths (None: not on disk), names, labels (-1: none), classes, a remark.

    Fields stand apart by blanks, tabs, commas, semicolons or bars, and may be quoted; folders may stand apart as on
    Windows, and a suffix may be missing where one video fits. The first way to read a line by which a video is there
    counts, and names as they stand are tried before all others: "#20; (a, b).avi" may be one. Else lines that begin
    with "#" are comments, and the first one may be a header. `_read_labels` tells what lines of more fields mean.
    """
    file = next((f for f in (os.path.abspath(list_file), os.path.join(root, list_file)) if os.path.isfile(f)), None)
    if file is None:
        raise FileNotFoundError(f"{os.path.abspath(list_file)}: no such list file, and none by that name in {root}")

    @functools.cache
    def names_in(folder: str) -> set[str]:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return {name for name in names if not NOT_READ.fullmatch(name)}

    @functools.cache
    def stems_in(folder: str) -> dict[str, list[str]]:
        stems = {}
        for name in sorted(names_in(folder)):
            stem, suffix = os.path.splitext(name)
            if suffix[1:].lower() in SUFFIXES:
                stems.setdefault(stem, []).append(name)
        return stems

    def path_of(name: str) -> str | None:
        path = os.path.normpath(os.path.join(root, name))
        return path if path.startswith(root.rstrip(os.sep) + os.sep) else None

    def fits(name: str, bare: bool) -> list[str]:
        for path in filter(None, map(path_of, dict.fromkeys((name, name.replace("\\", "/"))))):
            folder, last = os.path.split(path)
            if fit := stems_in(folder).get(last, []) if bare else [last] * (last in names_in(folder)):
                return [os.path.join(folder, found) for found in fit]
        return []

    rows, strange, completed, columns, remark = [], "", False, 0, ""
    for number, line in enumerate(map(str.strip, _read_text(file).split("\n")), 1):
        where = f"{file}, line {number}"
        if len(line) > 9000:
            raise ValueError(f"{where}: {len(line)} characters, more than a path and a label: not a list of lines")
        ways = _ways(line, SUFFIXED)
        bare = not ways
        ways = ways or [way for way in _ways(line, BARE) if re.fullmatch(LABEL, way[1])]
        name, rest, paths = next(((*way, fit) for way in ways if (fit := fits(way[0], bare))), ("", "", []))
        if len(paths) > 1:
            raise ValueError(f"{where}: {name!r} may be {' or '.join(map(os.path.basename, paths))}: write its suffix")
        completed |= bool(paths) and bare
        if not paths:
            if not line.strip(" \t,;|") or line.startswith("#"):
                continue
            if re.match(r"[\"']?[a-z]:[\\/]", line, re.IGNORECASE):
                raise ValueError(f"{where}: {line!r} has a drive of Windows: name videos by their path from {root}")
            if bare and not rows and re.fullmatch(HEADER, line, re.IGNORECASE):
                columns, remark = len(re.split(r"[,;|\t]", line)), f" (line {number} is a header)"
                continue
            if bare and not strange:
                strange = f"{where}: no video file in {line!r}, and none that it names without suffix, in {root}"
            name, rest = ways[:2][-1] if bare else ways[0]
            if path_of(name.replace("\\", "/")) is None and not bare:
                raise ValueError(
                    f"{where}: {name!r} is not in {root}: give a folder that holds all (--data), and paths from there"
                )
        rows.append((where, name, rest, *(paths or [None])))
    if strange and not completed:  # else it is missing like others, without suffix too
        raise ValueError(strange)
    labels, classes, more = _read_labels([row[:3] for row in rows], columns)
    return [row[3] for row in rows], [row[1] for row in rows], labels, classes, remark + more


def _read_labels(rows: list[tuple[str, str, str]], columns: int) -> tuple[list[int], list[str], str]:
    """Labels (-1: none) of the lines of a list, of which (where, name, rest) is given; the classes, a remark.

    What numbers before the label are is told by all lines together. One on every line is the number of frames, if it is
    never below 2 and once not below a label that is a number (else the two may be start and end), or if names come with
    several; else it is part of the class's name. Two (start and end) are refused, as videos are read as a whole.
    """
    given, lines = [], []
    for where, name, rest in rows:
        text = re.sub(r"(^|\s)#(\s.*)?$", "", rest).strip(" \t,;|")
        if (quoted := re.match(QUOTED, text)) and quoted.end() == len(text):
            text = quoted[2].replace(2 * quoted[1], quoted[1])
        given.append(text)
        fields = [field.strip("\"'") for field in re.split(SEPARATED, text)]
        numbers = [bool(re.fullmatch(r"[+-]?\d+(\.\d*)?", field)) for field in fields]
        before, after = (len([*itertools.takewhile(bool, flags)]) for flags in (numbers, numbers[::-1]))
        extra = before - all(numbers) or (after if after > 1 and not before else 0)
        if text:
            label = re.split(SEPARATED, text, maxsplit=1)[-1].strip("\"'")
            many = {2: "two", 3: "three"}.get(extra + all(numbers), extra + all(numbers))
            lines.append((f"{where}: {many} numbers after {name!r}", extra, all(numbers), fields[0], label))
    fewest = min((extra for _, extra, *_ in lines), default=0)
    pairs = {line[3:] for line in lines}
    counted = fewest == 1 and all(re.fullmatch(r"0*([2-9]|[1-9]\d+)", frames) for frames, _ in pairs)
    if counted and all(numeric for _, _, numeric, _, _ in lines):
        counted = all(line[1] == 1 for line in lines) and any(int(frames) >= float(label) for frames, label in pairs)
    elif counted:
        counted = 2 * len(pairs) > len(lines) and len({label for _, label in pairs}) < len(pairs)
    for where, extra, numeric, _, _ in lines:
        if fewest > 1 or (numeric and extra > counted):
            raise ValueError(f"{where}; lines are 'path label': start and end are not read, cut the videos instead")
    if columns > 2 and not fewest and any(re.search(SEPARATED, text) for text in given):
        raise ValueError(f"{rows[0][0]}: {columns} columns; lines are 'path label': keep these two")
    if counted:
        given = [re.split(SEPARATED, text, maxsplit=1)[-1].strip("\"'") for text in given]
    named = sorted({label for label in given if label})
    remark = " (lines of path, number of frames, label)" if counted else ""
    if all(re.fullmatch(r"-?\d+", label) for label in named):
        labels = [max(int(label), -1) if label else -1 for label in given]
        if max(labels, default=0) > 1_000_000:
            raise ValueError(f"{rows[0][0].rpartition(',')[0]}: label {max(labels)}; labels count the classes from 0")
        return labels, [str(i) for i in range(max(labels, default=-1) + 1)], remark
    return [named.index(label) if label else -1 for label in given], named, remark


def _read_bad(root: str, file: str | Path) -> set[str]:
    """Paths named by a list of `check_videos`, by a run's bad_videos.log, or by a file of bare paths, one a line."""
    if not os.path.exists(file) and "," in str(file):
        return set().union(*(_read_bad(root, each) for each in str(file).split(",")))
    paths = set()
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        fields = line.split("\t")
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
        crops = [image[top : top + h, left : left + w] for image in images[i : i + 4]]
        crops = torch.from_numpy(np.stack(crops) if len(crops) > 1 else crops[0][None])
        if flip:
            crops = crops.flatten(0, 1).flip(1).view_as(crops)  # in 3-D: faster than in 4-D
        crops, resized = crops.permute(0, 3, 1, 2), clip[:, i : i + 4].transpose(0, 1)
        torch.ops.aten.upsample_bilinear2d.out(crops, (size, size), False, out=resized)  # F.interpolate has no `out`
    x0, x1 = (left + w, left) if flip else (left, left + w)
    return clip, torch.tensor([x0, top, x1, top + h], dtype=torch.float32)


def crop_frames(
    images: dict[int, np.ndarray], frames: Sequence[int], region: tuple[int, int, int, int], flip: bool, out: Tensor
) -> Tensor | None:
    """Put those of a clip's frames that are among the images of `Video.stream` in their places; the box, if any is.

    Args:
        frames: the frame that each of the T images of the clip shows.
        out: the clip, uint8 (3, T, size, size).
    """
    box, place = None, 0
    for there, part in itertools.groupby(frames, images.__contains__):
        part = [images[frame] for frame in part] if there else [*part]
        if there:
            _, box = crop_resize(part, region, flip, out.shape[-1], out[:, place : place + len(part)])
        place += len(part)
    return box


_killers: dict[Hashable, str] = {}  # in a process of `_in_processes`: what killed others before it, and how


def _tell(draw: Hashable) -> None:
    """In a process of `_in_processes`: tells the parent what is read next."""


def _begin(path: str, draw: Hashable) -> None:
    """Is told what is drawn from which video before this is read; raises BadVideo if processes have died of it."""
    if draw in _killers:
        raise BadVideo(path, _killers[draw])
    _tell(draw)


class Items(Dataset):
    """Items that are made in memory that is given, for `load_batches`.

    A subclass has `empty(*batch)`, which gives a dict of memory for an item or for a batch of them, and
    `write(key, memory)`, which makes an item there and returns (path, reason) of the videos that could not be read.
    """

    def __getitem__(self, key: Hashable) -> dict:
        item = self.empty()
        return {**item, "bad": self.write(key, item)}


class PretrainingViews(Items):
    """Two views of a video, source and target, from windows at two random times (FIMA, sections 3.1 and 4.1).

    A window spans `frames × frame_stride` frames and starts anywhere in the video with equal chance, no two at the same
    frame as far as the video has others; a shorter video is continued with its last frame. Crops take from `min_scale`
    to all of the frame's area; `color` holds settings of `draw_color`. With another number of `windows`, 1 to train a
    classifier, there are as many views instead of 2. An item is asked for by (epoch, index) and depends on nothing but
    these and the seed:

    - "clip": uint8 (2, 3, frames, crop, crop), every `frame_stride`-th frame of each window.
    - "sub_clips": uint8 (2, S, 3, window // S, crop, crop), each window cut in S parts at stride 1, each with a crop
      and a flip of its own; absent for S = 0.
    - "box": float32 (2, 4), where the clips lie in the frame, in its pixels (see `crop_resize`).
    - "color": float32 (2, 2 + S, P), colour parameters of the clip, its frame difference, and each sub-clip's.
    - "overlap": float32 (), the share of a window's frames that another one shows, too; absent for one window.
    - "index", "label": int64 (), the video's place in the list and its class (-1: unknown).
    - "bad": list of (path, reason) of the unreadable videos drawn before it.

    Raises OSError when `attempts` videos drawn for one item are all unreadable.
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
            "overlap": torch.empty(batch),
            "index": torch.empty(batch, dtype=torch.int64),
            "label": torch.empty(batch, dtype=torch.int64),
        }
        absent = {"sub_clips": not parts, "overlap": views < 2}
        return {name: tensor for name, tensor in memory.items() if not absent.get(name)}

    def write(self, key: tuple[int, int], item: dict[str, Tensor]) -> list[tuple[str, str]]:
        """Make an item in memory of `empty`; returns its "bad"."""
        epoch, index = key
        bad = []
        for attempt in range(self.attempts):
            rng = np.random.default_rng([self.seed, epoch, index, attempt])
            drawn = int(rng.integers(len(self.videos))) if attempt else index
            try:
                path = self.videos.paths[drawn]
                _begin(path, (epoch, index, attempt))
                starts = self._write_views(rng, path, item)
                if self.windows > 1:
                    apart = [abs(int(a - b)) for a, b in itertools.combinations(starts, 2)]
                    shares = [max(1 - frames / (self.frames * self.frame_stride), 0) for frames in apart]
                    item["overlap"].fill_(sum(shares) / len(shares))
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
            frames = np.minimum(starts[:, None] + np.arange(0, window, step), len(video) - 1).tolist()
            crops = []  # of a clip's frames, a crop, where it goes
            for images in video.stream(itertools.chain(*frames)):
                for view, start in enumerate(starts) if not crops else ():  # now that the frames' size is known
                    draw = functools.partial(self._draw_crop, rng, *next(iter(images.values())).shape[:2], start)
                    crops.append(
                        (frames[view][:: self.frame_stride // step], draw(), item["clip"][view], item["box"][view])
                    )
                    colors = [draw_color(rng, **self.color) for _ in range(2 + self.sub_clips)]
                    item["color"][view] = torch.from_numpy(np.stack(colors))
                    for i in range(self.sub_clips):
                        part = item["sub_clips"][view, i]
                        shown = frames[view][i * part.shape[1] : (i + 1) * part.shape[1]]
                        crops.append((shown, draw(), part, None))
                for shown, crop, out, box in crops:
                    applied = crop_frames(images, shown, *crop, out)
                    if box is not None and applied is not None:
                        box.copy_(applied)
        return starts

    def _draw_starts(self, rng: np.random.Generator, video: Video) -> np.ndarray:
        """First frames of the windows of a video, (windows,), all different where there are as many."""
        starts = self._possible_starts(video)
        return np.resize(rng.choice(starts, min(self.windows, len(starts)), replace=False), self.windows)

    def _possible_starts(self, video: Video) -> np.ndarray:
        """First frames that a window may have."""
        return np.arange(max(len(video) - self.frames * self.frame_stride, 0) + 1)

    def _draw_region(self, rng: np.random.Generator, height: int, width: int, start: int) -> tuple[int, int, int, int]:
        """Region of a crop of the window that starts at frame `start`, of the video whose windows were drawn last."""
        return draw_region(rng, height, width, scale=(self.min_scale, 1.0))

    def _draw_crop(
        self, rng: np.random.Generator, height: int, width: int, start: int
    ) -> tuple[tuple[int, int, int, int], bool]:
        return self._draw_region(rng, height, width, start), bool(rng.random() < self.flip_p)


class TestClips(Items):
    """Clips for evaluation, N of each video at uniformly spaced times; short videos are continued by their last frame.

    The crop is the central square of 7/8 of the shorter side: what resizing the shorter side to 8/7 of `crop` and then
    cropping the centre gives. An item is a dict: "clips" uint8 (N, 3, frames, crop, crop), "label" int64 ()
    (-1: unknown), "index" int64 (), and "bad", empty or [(path, reason)]: an unreadable video gives zeros and is never
    replaced, so that it can be counted as wrong.
    """

    __test__ = False  # not a test case, whatever its name makes pytest think

    def __init__(self, videos: VideoList, crop: int, frames: int = 16, frame_stride: int = 2, clips: int = 10):
        self.videos, self.crop, self.frames = videos, crop, frames
        self.frame_stride, self.clips = frame_stride, clips

    def __len__(self) -> int:
        return len(self.videos)

    def empty(self, *batch: int) -> dict[str, Tensor]:
        """Memory for an item, or for `batch` of them."""
        clips = empty_clips(*batch, self.clips, 3, self.frames, self.crop, self.crop)
        return {"clips": clips} | {name: torch.empty(batch, dtype=torch.int64) for name in ("label", "index")}

    def write(self, index: int, item: dict[str, Tensor]) -> list[tuple[str, str]]:
        """Make an item in memory of `empty`; returns its "bad"."""
        item["label"].fill_(self.videos.labels[index])
        item["index"].fill_(index)
        times = np.arange(self.frames) * self.frame_stride
        try:
            _begin(self.videos.paths[index], index)
            with Video(self.videos.paths[index]) as video:
                starts = np.linspace(0, max(len(video) - times[-1] - 1, 0), self.clips).round().astype(int)
                frames = np.minimum(starts[:, None] + times, len(video) - 1).ravel().tolist()
                for images in video.stream(frames):
                    height, width = next(iter(images.values())).shape[:2]
                    side = max(round(min(height, width) * 7 / 8), 1)
                    region = ((height - side) // 2, (width - side) // 2, side, side)
                    crop_frames(images, frames, region, False, item["clips"].transpose(0, 1).flatten(1, 2))
        except BadVideo as error:
            item["clips"].zero_()
            return [(error.path, error.reason)]
        return []


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
            raise ValueError(
                f"{length} videos, fewer than one batch of {batch_size} × {world_size} processes: lower --batch_size"
            )

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


CRASHES = (-4, -5, -6, -8, -9, -11)  # of a fault in FFmpeg: SIGILL, SIGTRAP, SIGABRT, SIGFPE, SIGKILL, SIGSEGV


def _serve(
    pipe: multiprocessing.connection.Connection, function: Callable, start: Callable | None, i: int, killers: dict
) -> None:
    """What process i of `_in_processes` does, until its parent ends it or is gone."""
    global _tell
    for name in ("SIGINT", "SIGHUP"):  # a Ctrl-C, or the terminal's end, reaches the parent, which decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    torch.set_num_threads(1)
    if sys.platform == "linux":  # glibc: keep freed memory, but give blocks of 8 MB and more, as of 4K frames, back
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries may lack it
        for parameter, value in ((-1, 2**28), (-4, 2**16), (-3, 2**23)):  # M_TRIM_THRESHOLD, M_MMAP_MAX, …_THRESHOLD
            mallopt(parameter, value)
    _killers.update(killers)

    def _tell(draw: Hashable) -> None:
        pipe.send(("reads", draw))

    if start:
        start(i)
    parent = multiprocessing.parent_process().sentinel
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        while parent not in multiprocessing.connection.wait([pipe, parent]):
            try:
                answer = "made", function(pipe.recv())
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = "error", error
            pipe.send(answer)


def _memory_kills() -> str:
    """Linux's count of the processes that it has killed for want of memory; "" elsewhere."""
    with contextlib.suppress(OSError):
        return "".join(re.findall(r"^oom_kill \d+", Path("/proc/vmstat").read_text(), re.MULTILINE))
    return ""


def _in_processes(functions: Sequence, tasks: Iterable, ahead: int, start: Callable | None = None) -> Iterator:
    """Yield what the functions, each in a process of its own, make of the tasks, in turn and in order.

    torch's DataLoader ends the run when a process of its own dies. Here another process goes on with its tasks. What
    killed two processes by a fault in FFmpeg (`CRASHES`), as the last thing that `_begin` was told, is a BadVideo in
    the next. Whatever else a process dies of, such as want of memory, is no video's fault.
    Each process has up to `ahead` tasks and calls `start`, given its number, at first.

    Raises what the functions raise, and OSError when a process can't be started, or when processes die more than ten
    times in a row of what is no video's fault.
    """
    tasks, deaths, kills, suspects, killers = iter(tasks), 0, _memory_kills(), set(), {}
    pending, processes, pipes = [deque() for _ in functions], [None] * len(functions), [None] * len(functions)
    reading = [None] * len(functions)

    def launch(i: int) -> None:
        try:
            pipes[i], end = multiprocessing.Pipe()
            given = (end, functions[i], start, i, killers)
            process = torch.multiprocessing.Process(target=_serve, args=given, daemon=True)
            process.start()
        except OSError as error:
            advice = WANTS.get(error.errno, "raise `ulimit -u`, or take fewer --workers (0: none)")
            advice = "set TMPDIR to a shorter path, or take --workers 0" if "AF_UNIX" in str(error) else advice
            raise OSError(f"a loader process can't be started: {error.strerror or error}: {advice}") from error
        processes[i], reading[i] = process, None
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
                kind, value = pipes[i].recv()
            except (EOFError, OSError):
                processes[i].join()
                code, draw, deaths = processes[i].exitcode, reading[i], deaths + 1
                how = f"the process that read it died (exit code {code})"
                kills, before = _memory_kills(), kills
                if draw is not None and code in CRASHES and kills == before and not _is_memory_short():
                    if draw in suspects:
                        killers[draw], deaths = how, 0
                    suspects.add(draw)
                if deaths > 10:
                    advice = "if memory is short, take fewer --workers (0: none) or smaller batches"
                    raise OSError(f"{deaths} times in a row, {how}: {advice}") from None
                launch(i)
                continue
            if kind == "reads":
                reading[i] = value
                continue
            if kind == "error":
                _blame_machine(value, getattr(value, "filename", None))
                raise value
            deaths, reading[i] = 0, None
            pending[i].popleft()
            hand_out(i)
            yield value
            i = next(turns)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            if process is not None:
                process.kill()
                process.join()
                pipe.close()


PREFETCH = 2  # batches that each worker makes ahead


class _Ring:
    """A ring of batches of `items`; called with (slot, keys), makes their batch there: (slot, its length, its "bad").

    If `shared`, processes may share it, however they are started. It is not in /dev/shm, which containers keep small
    and others fill: on Linux it is a file in memory alone, elsewhere one in TMPDIR.

    Raises OSError when there is too little memory.
    """

    def __init__(self, items: Items, slots: int, batch_size: int, shared: bool, fd: int | None = None):
        self.items, self.shape = items, (slots, batch_size)
        if not shared:
            self.memory = items.empty(slots, batch_size)
            return
        with torch.device("meta"):
            plan = items.empty(slots, batch_size)
        *starts, size = itertools.accumulate((-(-part.nbytes // 64) * 64 for part in plan.values()), initial=0)
        try:
            if fd is None and hasattr(os, "memfd_create"):
                fd = os.memfd_create("batches")
            self.file = tempfile.TemporaryFile() if fd is None else open(fd, "r+b")  # noqa: SIM115
            self.file.truncate(size)
            buffer = mmap.mmap(self.file.fileno(), size)
        except OSError as error:
            raise OSError(
                f"no {size / 2**30:.2g} GiB of shared memory for {slots} batches ({error.strerror}): "
                f"{WANTS.get(error.errno, WANTS[errno.ENOMEM])}"
            ) from error
        self.memory = {
            name: torch.frombuffer(buffer, dtype=part.dtype, count=part.numel(), offset=start).as_strided(
                part.shape, part.stride()
            )
            for (name, part), start in zip(plan.items(), starts, strict=True)
        }

    def __reduce__(self) -> tuple:
        """For processes that are not forked: they get the file, and map it again."""
        return _open_ring, (self.items, *self.shape, multiprocessing.reduction.DupFd(self.file.fileno()))

    def __call__(self, task: tuple[int, Sequence]) -> tuple[int, int, list[tuple[str, str]]]:
        slot, keys = task
        bad = []
        for place, key in enumerate(keys):
            bad += self.items.write(key, {name: memory[slot, place] for name, memory in self.memory.items()})
        return slot, len(keys), bad


def _open_ring(items: Items, slots: int, batch_size: int, fd: multiprocessing.reduction.DupFd) -> _Ring:
    return _Ring(items, slots, batch_size, True, fd.detach())


def load_batches(
    items: Items, batches: Sampler, workers: int = 0, worker_init_fn: Callable[[int], None] | None = None
) -> Iterator[dict]:
    """Yield batches: dicts of the items' entries, stacked, and the joined lists "bad".

    `batches` is a batch sampler, with a `batch_size` and a length. A batch is valid until the next one is asked for:
    `workers` processes (0: this one) write into a ring of batches in shared memory, which is made once. Sending each
    batch in new memory would cost as much as decoding it. A video that kills workers counts as unreadable.

    Raises OSError when there is too little shared memory, and what making the items raises.
    """
    workers = min(workers, len(batches))
    slots = min(PREFETCH * workers, len(batches)) + 1  # those the workers may have been asked for, and the one in use
    ring = _Ring(items, slots, batches.batch_size, workers > 0)
    tasks = ((step % slots, keys) for step, keys in enumerate(batches))
    made = _in_processes([ring] * workers, tasks, PREFETCH, worker_init_fn) if workers else map(ring, tasks)
    for slot, length, bad in made:
        yield {**{name: memory[slot][:length] for name, memory in ring.memory.items()}, "bad": bad}


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
    on_cpu = clips.device.type == "cpu" and not torch.compiler.is_compiling()  # compiled, it is one graph
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
    """(..., 3, T, H, W) in [0, 1] → the same less the mean, by the deviation, of Kinetics-400."""
    mean, std = (
        torch.tensor(values, dtype=clips.dtype).to(clips.device, non_blocking=True)[:, None, None, None]
        for values in (MEAN, STD)
    )
    return (clips - mean).div_(std)


# ---------------------------------------------------------------------------------------------------------------------
# Checking videos
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError of the system that has no name, as that of a full disk, the one of what was written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(text: str, stream: TextIO, end: str = "\n") -> None:
    """Prints a line; where nobody reads it, it is lost, and where the terminal is gone, this is a Ctrl-C."""
    try:
        print(shown(text), end=end, file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno == errno.EIO:
            raise KeyboardInterrupt from None


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
            _write(f"{what}: {done}/{total}, {left} left ", sys.stderr, end)


class VideoVisitor:
    """What is done to videos one by one, in processes: `visit` does it, and raises BadVideo for those it can't read."""

    def visit(self, path: str) -> None:
        raise NotImplementedError

    def __call__(self, path: str) -> tuple[str, str]:
        """Gives (path, why the video can't be read, or "")."""
        try:
            _begin(path, path)
            self.visit(path)
        except BadVideo as error:
            return path, error.reason
        return path, ""


class _Checker(VideoVisitor):
    """Reads the first, middle and last 32 frames of a video, or all."""

    def __init__(self, full: bool):
        self.full = full

    def visit(self, path: str) -> None:
        with Video(path) as video:
            last = max(len(video) - 32, 0)
            step = 32 if self.full else max(math.ceil(last / 2), 1)
            for start in (*range(0, last, step), last):
                for _ in video.stream(range(start, min(start + 32, len(video)))):
                    pass  # they are of no more use


def visit_videos(
    visitor: VideoVisitor, paths: Sequence[str], root: str, out: str | Path, workers: int, what: str, mode: str = "w"
) -> int:
    """Visits videos in processes, and says how far it is; returns how many are bad.

    Each bad video found is a line of the file `out`, which is written anew, or added to in `mode` "a": its path from
    `root` in quotes, a tab, the reason; `find_videos` takes it as `exclude`.

    Raises FileExistsError when `out` is a file of another kind.
    """
    if os.path.isfile(out):
        with open(out, "rb") as file:
            if file.read(1) not in (b"", b"'", b'"'):
                raise FileExistsError(f"{out} is no list of bad videos: name another file")
    bad = 0
    with _naming(out), open(out, mode, encoding="utf-8", buffering=1) as file:  # by lines: an interrupt loses none
        for path, reason in _progress(_in_processes([visitor] * workers, paths, ahead=8), len(paths), what):
            if reason:
                bad += 1
                file.write(f"{os.path.relpath(path, root)!a}\t{reason}\n")
    return bad


def check_videos(root: str | Path, out: str | Path, workers: int, full: bool = False) -> tuple[int, int]:
    """Reads frames of all videos below a folder, in processes; returns how many there are and how many are bad.

    Reads the first, middle and last 32 frames of each, or with `full` all, several times slower. The bad ones are
    listed in the file `out` (see `visit_videos`).

    Raises FileNotFoundError when there is no video, PermissionError when there is a folder that may not be listed.
    """
    root = os.path.abspath(root)
    paths, _, _, closed = _walk(root)
    paths = [*paths]
    if closed:
        raise PermissionError(f"{closed[0]}: no permission to list this folder, one of {len(closed)} such folders")
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
        exclude: the files of videos that are left out already.
    """

    def __init__(self, root: str | Path, folder: str | Path, recipe: str, command: str, exclude: str = ""):
        self.root, self.folder = os.path.abspath(root), Path(folder)
        self.recipe, self.command, self.exclude = recipe, command, exclude

    def compute(self, path: str) -> np.ndarray:
        """The maps of a video, floating point (N, h, w) ≥ 0; raises BadVideo."""
        raise NotImplementedError

    def file(self, path: str) -> Path:
        """Where the maps of a video lie."""
        return self.folder / (os.path.relpath(path, self.root) + ".npz")

    def visit(self, path: str) -> None:
        """Computes and writes the maps of a video; at every moment their file is whole, or as it was."""
        file, foreign = self.file(path), False
        with contextlib.suppress(Exception), np.load(file) as held:  # damaged files raise all kinds
            foreign = "recipe" not in held
        if foreign:
            raise FileExistsError(f"{file} holds something else than maps: name another folder for these")
        maps = self.compute(path)
        scale = max(float(maps.max()), 1e-12)
        levels = np.round(255 * np.sqrt(maps / scale)).astype(np.uint8)
        file.parent.mkdir(parents=True, exist_ok=True)
        memory, partial = io.BytesIO(), file.with_name(f"{file.name}.{os.urandom(4).hex()}.partial")
        np.savez_compressed(memory, levels=levels, scale=scale, size=os.path.getsize(path), recipe=self.recipe)
        try:
            with _naming(file):
                partial.write_bytes(memory.getbuffer())
                os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def is_made(self, path: str) -> bool:
        """Whether there are whole maps of this video as it is now, by this recipe."""
        try:
            self.read(path)
        except (ValueError, FileNotFoundError):  # the latter of a video that is gone, which making them will name
            return False
        return True

    def read(self, path: str, frames: int | None = None) -> np.ndarray:
        """The maps of a video, of so many frames if it is given: float32 (frames, h, w).

        Raises ValueError when they are missing, damaged, or those of another video or another recipe, and OSError when
        they can't be read for a reason that is not in the file.
        """
        file, size = self.file(path), os.path.getsize(path)
        try:
            with np.load(file) as held:  # reading an entry compares its check sum
                levels, scale, *made_from = (held[name] for name in ("levels", "scale", "size", "recipe"))
            wrong = (
                ""
                if (recipe := str(made_from[1])) == self.recipe
                else f"made by another recipe ({recipe}, not {self.recipe})"
            )
            if int(made_from[0]) != size or frames not in (None, len(levels)):
                wrong = "of another video of this name"
            maps = np.float32(scale) * np.square(levels / np.float32(255))
        except FileNotFoundError:
            wrong = "missing"
        except Exception as error:  # damaged files raise all kinds
            _blame_machine(error, str(file))
            if isinstance(error, OSError) and error.errno not in (
                None,
                errno.EINVAL,
            ):  # EINVAL: a place out of the file
                raise
            wrong = f"damaged ({error})"
        if wrong:
            raise ValueError(f"{file}: {wrong}; make it again with `{self.command}`")
        return maps

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
        exclude = shlex.quote(",".join(filter(None, [self.exclude, str(bad)])))
        advice = f", {count} videos can't be read: leave them out with --exclude {exclude}" if count else ""
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


def _synthetic_names(train: int, test: int, shots: int = 1, **_: object) -> dict[str, tuple[str, int]]:
    """The videos of a set, from its folder on, and which of which part each is."""
    names = {}
    for part, count in (("train", train), ("test", test), (UNLABELED, train if shots > 1 else 0)):
        for n in range(count):
            motion = MOTIONS[n % len(MOTIONS)]
            name = f"{motion}/{motion}_{n // len(MOTIONS) + 1:04}" if part != UNLABELED else f"{n + 1:04}"
            names[f"{part}/{name}.mp4"] = part, n
    return names


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes an empty folder for this process alone, for which others wait, and removes it at the end.

    One that a killed process left is emptied. Where files can't be locked, nobody waits.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):  # whoever had it has just removed it
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")  # noqa: SIM115, as it is to be held
            with contextlib.suppress(OSError, ImportError):
                import fcntl  # Windows has none

                fcntl.lockf(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                break
    with lock:
        for left in folder.iterdir():
            if left.name != "lock":
                shutil.rmtree(left)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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
    shake are drawn for each video from (seed, part, number), whatever its class. The set is made in a hidden folder
    beside `root` and moved at the end, so that `root` never holds half of it; what was left there by a kill is removed,
    and another process that makes it too is waited for. A complete set of the same arguments and version is kept as it
    is; another is replaced, if all files in it are those of the set that its marker describes.

    Args:
        train, test: number of videos.
        frames, size: length in frames (at 25 a second), height and width in pixels.
        shake: how far the camera moves at most, in sides of the frame; a quarter of it is the least.
        shots: from 2 on, there are as many videos again, root/unlabeled/0001.mp4, on which pretraining is done instead:
            of so many shots of the same objects before the same background, each in another motion.

    Raises:
        ValueError: a part without videos, fewer than two frames, no pixel, a negative or infinite number, or more
            shots than motions.
        FileExistsError: `root` holds other files than those of a synthetic set; it is left alone.
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
    recipe |= {"shake": shake, "shots": shots}
    marker, names = root / SYNTHETIC_MARKER, _synthetic_names(**recipe)
    hidden = root.with_name(f".{root.name}.partial")

    def stop(error: OSError) -> None:
        raise error  # what can't be listed may hold anything

    def is_complete() -> bool:
        """Whether the folder holds the set; raises FileExistsError where it holds another one's or anybody's files."""
        held, own = set(), set()
        for folder, folders, files in os.walk(root, onerror=stop if root.exists() else None):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            held |= {Path(folder, name).relative_to(root).as_posix() for name in (*files, *links)}
        text = marker.read_text() if SYNTHETIC_MARKER in held else "{}"
        if text == json.dumps(recipe) and {name for name in held if name.endswith(".mp4")} == names.keys():
            return True
        with contextlib.suppress(ValueError, TypeError):
            own = {SYNTHETIC_MARKER, *_synthetic_names(**json.loads(text))}
        if others := sorted(held - own):
            raise FileExistsError(
                f"{root} holds other files, such as {others[0]!r}: give the synthetic data set a folder of its own"
            )
        return False

    def make(job: tuple[str, tuple[str, int]]) -> None:
        name, (part, n) = job
        rng = np.random.default_rng([seed, ["train", "test", UNLABELED].index(part), n])
        motions = [MOTIONS[n % len(MOTIONS)]] if part != UNLABELED else rng.choice(MOTIONS, shots, replace=False)
        path = hidden / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _naming(path):
            _write_video(path, _draw_video(motions, rng, frames, *size, shake))

    if is_complete():
        return
    with _alone(hidden):
        if is_complete():  # by now
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy and FFmpeg run without the interpreter's lock
            what = f"making the synthetic data set in {root}"
            for _ in _progress(pool.map(make, names.items()), len(names), what):
                pass
        with _naming(marker):
            (hidden / "made" / SYNTHETIC_MARKER).write_text(json.dumps(recipe))
        is_complete()  # nobody has put files there meanwhile
        if root.exists():
            root.rename(hidden / "before")
        (hidden / "made").rename(root)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")

    def add_number(self, name: str, default: float, least: float, most: float, help: str = "") -> None:
        """A flag for a number of the default's kind, not below the least nor above the greatest."""

        def number(text: str) -> float:
            if not least <= (value := type(default)(text)) <= most:  # nan, too
                raise argparse.ArgumentTypeError(f"{text}: must be {least} to {most}")
            return value

        shown = f"{help} (default: {default}; {least} to {most})".strip()
        self.add_argument(f"--{name}", type=number, default=default, metavar=type(default).__name__.upper(), help=shown)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Check the videos below a folder, or make the synthetic data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="find videos that can't be read; exit code 1 if there are any")
    check.add_argument("root", help="the folder given as --data in training")
    check.add_argument("--out", default="bad_videos.txt", help="list to write, for --exclude (default: %(default)s)")
    check.add_number("workers", os.cpu_count() or 1, 1, 1024, "processes, one a core if not given")
    check.add_argument("--full", action="store_true", help="read all frames, not only 32 at three places: slower")
    synthetic = commands.add_parser("synthetic", help="make videos in which the class is the motion alone")
    synthetic.add_argument("root", help="folder to make")
    synthetic.add_number("train", 1500, 1, 10**6)
    synthetic.add_number("test", 500, 1, 10**6)
    synthetic.add_number("seed", 0, 0, 2**31 - 1)
    synthetic.add_number("frames", 48, 2, 10_000)
    synthetic.add_number("size", 40, 1, 2048)
    synthetic.add_number("shake", 0.008, 0, 1, "how far the camera moves at most, in sides of the frame")
    described = "from 2 on: as many videos again, unlabeled, of so many shots, each in another motion; pretraining is "
    synthetic.add_number("shots", 1, 1, len(MOTIONS), f"{described}done on these")
    return parser


def main() -> int:
    """Command line: `python data.py check ROOT`, `python data.py synthetic ROOT`; returns the exit code."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # what is closed of 0, 1, 2 is not to be a file's number
        pass
    os.close(number)
    sys.stdout, sys.stderr = (stream or os.fdopen(n, "w") for n, stream in ((1, sys.stdout), (2, sys.stderr)))
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        options = _parser().parse_args()
        if options.command == "synthetic":
            size = (options.size, options.size)
            given = options.train, options.test, options.seed, options.frames, size, options.shake, options.shots
            make_synthetic(options.root, *given)
            return 0
        count, bad = check_videos(options.root, options.out, options.workers, options.full)
        advice = f": leave them out with --exclude {shlex.quote(options.out)}" if bad else ""
        _write(f"{bad} of {count} videos can't be read{advice}", sys.stdout)
        return int(bad > 0)
    except (ValueError, OSError, MemoryError) as error:
        _write(f"error: {str(error) or 'out of memory: take fewer --workers'}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            _write("interrupted", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
