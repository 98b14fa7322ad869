"""Frame-exact reading of videos, which are files or folders of frames.

Can be copied alone into another project: it imports av (PyAV) and numpy only.
"""

import contextlib
import errno
import io
import mmap
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from time import thread_time

import av
import numpy as np
from av.packet import PacketSideData, packet_sidedata_type_from_literal
from av.stream import Discard
from av.video.reformatter import VideoReformatter

SKIPPING_CODECS = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")  # others lose frames when told to skip some
ONE_BY_ONE = {"mpeg4": b"\0\0\1\xb6", "mpeg1video": b"\0\0\1\0", "mpeg2video": b"\0\0\1\0"}  # and their pictures' mark
CODE = "(?:" + "|".join("0" * n + "1" + "." * n for n in range(20)) + ")"  # Exp-Golomb (ISO/IEC 14496-10, 9.1)
LOW = "(?:01000010|01001101|01011000)"  # profiles without chroma format and depths
WHOLE = re.compile(  # bits of a parameter set that allows whole frames only (7.3.2.1.1); rare ones are not known to
    f".{{8}}(?:{LOW}.{{16}}{CODE}|(?!{LOW}).{{24}}{CODE}(?:00100.|(?!00100){CODE}){CODE}{CODE}.0)"
    f"{CODE}(?:1{CODE}|011){CODE}.{CODE}{CODE}1"
)
TINY = 19  # bytes of a packet of MPEG-4 that may stand for a picture which came in a packet before
# No playlists: they open other files.
CONTAINERS = "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,asf,ogg,mxf,dv,ivf,mjpeg,jpeg_pipe"
PICTURES = "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"  # formats of a folder's frames
FLOW = r".*flow(?:s|im(?:g|age)s?|frames?|net\w*)?(?![a-wz])"  # in names of pictures and folders
FRAME = re.compile(rf"(?i)(?!\.|{FLOW})(.*?)(\d+)(\D*\.(?:jpe?g|png|webp|bmp))")  # a name, by its last number
DEADLINE = 60.0  # seconds that opening a video may take, and each part of the frames that are read
MAX_FRAMES = 1_000_000  # of a video
MAX_PIXELS = 8192 * 4320  # of a frame
MAX_BYTES = 4 * 2**30  # of a video's packets, and of the frames of one reading
CHUNK = 32 * 2**20  # bytes of RGB that are held while frames are streamed
_watched: dict[tuple, tuple] = {}  # what `Video._watch` found, by file


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
    errno.ENOMEM: "take fewer --workers or smaller batches",
    errno.ENOSPC: "make room on the disk",
} | dict.fromkeys((errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN), "mount the disk again")


def is_memory_short() -> bool:
    """Whether the system refuses 256 MiB, more than a video whose frames have `MAX_PIXELS` needs to ask for at once."""
    with contextlib.suppress(OSError):
        mmap.mmap(-1, 2**28).close()
        return False
    return True


def blame_machine(error: Exception, path: str | None) -> None:
    """Raises OSError where an error in reading a video comes of what the machine lacks, not of the video's bytes:
    decoders that get no memory call a video damaged. One that asks for too much gets none on any machine."""
    short, number = is_memory_short(), getattr(error, "errno", None)
    if short or (number in WANTS and number != errno.ENOMEM):
        number = errno.ENOMEM if short else number
        raise OSError(number, f"{os.strerror(number)}: {WANTS[number]}", path) from error


def frames_of(folder: str, names: Iterable[str] | None = None) -> list[str]:
    """Paths of the frames in a folder, in order; none where it is no video. `names` are its files, if known. Frames are
    two pictures or more, neither hidden nor of optical flow, whose names differ in their last number only; of several
    such series, the one called img, image or frame."""
    if names is None:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    series = {}
    for name in names:
        if match := FRAME.fullmatch(name):
            series.setdefault(f"{match[1]}/{match[3]}", []).append((int(match[2]), os.path.join(folder, name)))
    kinds = [kind for kind, frames in series.items() if len(frames) > 1]
    if len(kinds) > 1:
        kinds = [kind for kind in kinds if re.search("(?i)img|image|frame", kind)]
    return [path for _, path in sorted(series[kinds[0]])] if len(kinds) == 1 else []


def _side_data(image: av.VideoFrame) -> Mapping:
    """What goes with a picture, without the kinds that PyAV doesn't know and fails at, as FFmpeg 8's EXIF."""
    while True:
        try:
            return image.side_data
        except ValueError as error:  # "31 is not a valid Type"
            graph, form = av.filter.Graph(), (image.width, image.height, image.format)
            source = graph.add_buffer(None, *form, time_base=Fraction(1))
            drop = graph.add("sidedata", f"mode=delete:type={int(str(error).split()[0])}")
            graph.link_nodes(source, drop, graph.add("buffersink")).configure()
            graph.push(image)
            image = graph.pull()


class Video(contextlib.ExitStack):
    """Frame-exact reader of a video's frames in display order, which decodes only what the chosen frames need.

    with Video(path) as video:
        images = video.read(range(0, len(video), 2))

    Frame k is the k-th picture that a player shows. The packets are read once (the compressed file is held in memory);
    a picture of a folder (`frames_of`) is read when it is wanted, and scaled to the size of the first. `rate`,
    frames a second, holds where file or folder do not say theirs.
    Decoding starts at the last key frame before each group of wanted frames. Which packet shows frame k follows

    - from the time stamps, where they reorder pictures as far as the decoder says that it does;
    - from the packets' order, where each is a picture (as of MJPEG), or makes one come out (MPEG-1, 2, 4): in AVI
      (UCF101, HMDB51) there are no stamps, and those that others make up for packed B-frames are 1, 2, 4, 3, 5, …;
    - else (as of raw or interlaced H.264, or where something is lost) from decoding the whole video when it is opened,
      once in a process.

    Raises BadVideo when the file can't be opened, is none of `CONTAINERS`, holds fewer than two frames of video, or
    more than `MAX_FRAMES`, `MAX_PIXELS` or `MAX_BYTES`, or when that is not known after `DEADLINE` seconds.
    """

    def __init__(self, path: str | Path, rate: float = 25):
        super().__init__()
        self.path, self._container, self._rate = str(path), None, Fraction(rate).limit_denominator(1001)
        try:
            self._state, self._frames = os.stat(self.path), frames_of(self.path)
            source = io.BytesIO(self._packet(0)) if self._frames else f"file:{self.path}"
            self._known = PICTURES if self._frames else CONTAINERS  # formats
        except OSError as error:
            blame_machine(error, self.path)
            raise BadVideo(self.path, error.strerror) from error
        is_file = os.path.isfile(self.path)  # others may have no end
        if not self._frames and not (is_file and self._state.st_size):
            raise BadVideo(self.path, "empty" if is_file else "not a file")
        try:
            with self.bad_video():
                options = {"format_whitelist": self._known, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
                tags = {"metadata_errors": "ignore"} if av.__version__.startswith("18.") else {}  # 19 takes any bytes
                opened = av.open(source, options=options, timeout=DEADLINE, **tags)
                self._container = self.enter_context(opened)  # for `close`, which gives file and memory back
                self._read_packets()
                self._find_order()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def bad_video(self) -> Iterator[None]:
        """Starts the clock for a block whose failures are a BadVideo, or an OSError where the machine is to blame. The
        clock counts this thread's computing only, as others may make it wait."""
        self._deadline = thread_time() + DEADLINE
        try:
            yield
        except (av.error.FFmpegError, MemoryError, BadVideo) as error:
            idle = isinstance(error, av.error.ExitError) and thread_time() < self._deadline - DEADLINE / 2
            blame_machine(TimeoutError(errno.ETIMEDOUT, "") if idle else error, self.path)
            if isinstance(error, BadVideo):
                raise
            reasons = {av.error.ExitError: f"not read within {DEADLINE:g} s", MemoryError: "not enough memory"}
            if self._container is None:
                reasons[av.error.ArgumentError] = f"in none of the formats {self._known.replace(',', ', ')}"
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
                most = f"{MAX_FRAMES} frames or {MAX_BYTES / 2**30:g} GiB of video"
                raise BadVideo(self.path, f"more than {most}: cut it into clips")

    def _find_order(self) -> None:
        """Fill `_order`, each frame's ticket, and `_starts`, pairs of a frame and the packet to decode it from. By the
        `_clock`, a picture's ticket is the "index" of its packet, that of the packet which was "fed" when it came
        out, or its "count". `_near`: which packets hold a frame, from its ticket on, at most."""
        packets, codec = self._packets, self._codec
        self._clock, self._near, self._skip = "index", (0, 0), codec.name in SKIPPING_CODECS
        if self._frames:  # each is a packet, as `_packet` makes it
            self._packets, self._order = self._frames, range(len(self._frames))
            self._starts, self._stamps, self._times = [(k, k) for k in self._order], [None] * len(self._frames), ()
            return
        self._repeat_headers()
        avi = "avi" in self._container.format.name.split(",")  # whose pts are made up
        stamps = [packet.dts if avi else packet.pts for packet in packets]
        for i, packet in enumerate(packets):
            packet.pts, packet.dts = i, None  # which decoders hand on to the picture
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        shown = [i for i, packet in enumerate(packets) if not packet.is_discard]
        if codec.name in ("vp8", "vp9"):
            shown = [i for i in shown if self._is_shown(packets[i])]
        times = {stamps[i] for i in shown}
        timed = len(times) == len(shown) and None not in times
        self._times, stamped = sorted(times) if timed else (), timed and not avi
        self._order = sorted(shown, key=stamps.__getitem__) if stamped else shown
        self._stamps = stamps if stamped else [None] * len(stamps)
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
            keys = [i for i in keys if packets[i].size > 32 and self._type(packets[i]) == 0]  # no empty pictures
            self._starts = [(bisect_left(self._order, max(i + 4 + lag, self._next_anchor(i))), i) for i in keys]
        else:
            keys = set(keys)
            self._starts = [(frame, i) for frame, i in enumerate(self._order) if i in keys]
        if len(self._order) < 2:
            raise BadVideo(self.path, f"{len(self._order)} frames, where a video has at least 2")

    def _repeat_headers(self) -> None:
        """Gives the parameters of a stream in which they change (as of joined clips) to each key packet, not only to
        the first that has new ones: decoding may start at any."""
        kind, held, header = "new_extradata", None, self._codec.extradata
        if any(packet.has_sidedata(kind) for packet in self._packets):
            if header:
                held = PacketSideData(packet_sidedata_type_from_literal(kind), len(header))
                held.update(header)
            for packet in self._packets:
                if packet.has_sidedata(kind):
                    held = packet.get_sidedata(kind)
                elif held and packet.is_keyframe:
                    packet.set_sidedata(held)

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
        return self._codec.name != "h264" or (self._is_progressive() and self._starts_anew())

    def _is_progressive(self) -> bool:
        """Whether the parameter set of H.264 allows no fields; the first pictures may be frames, and later ones not."""
        held = self._codec.extradata or b""
        found = re.match(rb"\x01.{7}", held, re.DOTALL) or re.search(rb"\0\0\x01(?=[\x07'Gg])", held)
        content = held[found.end() : found.end() + 256].replace(b"\0\0\3", b"\0\0") if found else b""
        return WHOLE.match("".join(f"{byte:08b}" for byte in content)) is not None

    def _starts_anew(self) -> bool:
        """Whether the first packet of H.264 holds an IDR picture (NAL unit type 5; ISO/IEC 14496-10, 7.4.1.2.4)."""
        packet, header = bytes(self._packets[0]), self._codec.extradata or b""
        if len(header) < 5 or header[0] != 1:
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

    def _next_anchor(self, i: int) -> int:
        """The packet with the next picture after packet i that later ones refer to: then those before i are through."""
        packets = self._packets  # by index: a part of a list is a copy
        later = (j for j in range(i + 1, len(packets)) if packets[j].size > 32 and self._type(packets[j]) != 2)
        return next(later, len(packets))

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

    def times(self) -> list[Fraction]:
        """Seconds from the first frame to each; by the mean frame rate where time stamps do not say it."""
        stream = self._container.streams.best("video")
        stamps, unit = [self._stamps[i] for i in self._order] if self._clock == "index" else [None], stream.time_base
        if None in stamps or any(b <= a for a, b in pairwise(stamps)):
            stamps = self._times
        if len(stamps) != len(self):
            stamps, unit = range(len(self)), 1 / ((not self._frames and stream.average_rate) or self._rate)
        return [(stamp - stamps[0]) * unit for stamp in stamps]

    def read(self, frames: Sequence[int]) -> list[np.ndarray]:
        """Decode frames, given by their index in display order (any order, repeats allowed, −1 the last), in one pass.

        Returns one uint8 array (H, W, 3) of RGB for each index, turned upright; repeats share one array. A frame that
        can't be decoded is replaced by its nearest neighbour in time. Raises BadVideo when that befalls more than a
        quarter of them, when they take more than `MAX_BYTES`, or after `DEADLINE` seconds; IndexError for an index out
        of range.
        """
        frames = [range(len(self))[k] for k in frames]
        count, (width, height) = len(set(frames)), self._size
        if 3 * width * height * count > MAX_BYTES:
            asked = f"{count} frames of {width} × {height} pixels"
            raise BadVideo(self.path, f"{asked} take more than {MAX_BYTES / 2**30:g} GiB")
        found = {}
        for images in self.stream(frames):
            found |= images
        return [found[k] for k in frames]

    def stream(self, frames: Iterable[int]) -> Iterator[dict[int, np.ndarray]]:
        """As `read`, but gives the different frames as they come out, index → image, in parts of at most `CHUNK` bytes,
        which are emptied when the next one is asked for."""
        wanted = {self._order[k]: k for k in frames}
        missing, images, size = set(wanted), {}, 3 * self._size[0] * self._size[1]
        last = max(wanted, default=0) + self._near[1]
        with self.bad_video():
            # Streams refreshed bit by bit need more than their last "key" frame: what is missing is tried from 0 on.
            for runs, skip in ((self._runs(wanted), self._skip), ([(0, last)], False)):
                for ticket, image in self._decode(missing, runs, skip) if missing else ():
                    images[wanted[ticket]] = image
                    del image  # of 8K, it is 100 MB
                    if (len(images) + 1) * size > CHUNK:
                        yield images
                        images.clear()
                        self._deadline = thread_time() + DEADLINE
            if missing:
                blame_machine(MemoryError(), self.path)
                if 4 * len(missing) > len(wanted):
                    raise BadVideo(self.path, f"{len(missing)} of {len(wanted)} frames could not be decoded")
                found = sorted(wanted[ticket] for ticket in wanted.keys() - missing)
                nearest = {k: min(found, key=lambda other: abs(other - k)) for k in (wanted[t] for t in missing)}
                again = {self._order[k] for k in nearest.values()}
                held = {wanted[t]: image for t, image in self._decode(again, [(0, last)], False)}
                images |= {k: held[near] for k, near in nearest.items()}
        if images:
            yield images

    def _runs(self, wanted: dict[int, int]) -> list[tuple[int, int]]:
        """The stretches of packets (first, last) to decode for the wanted tickets and frames, in order and apart."""
        runs = []
        for frame, ticket in sorted((frame, ticket) for ticket, frame in wanted.items()):
            place = bisect_right(self._starts, (frame, len(self._packets)))
            first, last = self._starts[place - 1][1] if place else 0, ticket + self._near[1]
            if runs and first <= runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
            else:
                runs.append((first, last))
        return runs

    def _decode(self, missing: set[int], runs: list[tuple[int, int]], skip: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Decode runs of packets for the missing tickets, and take out of these what comes, as (ticket, image); `skip`
        leaves out pictures that are neither wanted nor referred to by others."""
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
        last = min(last, len(self._packets) - 1)
        for i in range(first, last + 2):  # one past the last: take what the decoder still holds
            self._check_time()
            self._codec.skip_frame = "DEFAULT" if needed is None or i in needed else "NONREF"
            try:
                images = self._codec.decode(self._packet(i) if i <= last else None)
            except (av.error.FFmpegError, OSError, ValueError) as error:  # ValueError: av 19, without its decoder
                blame_machine(error, self.path)
                continue  # damaged here; the caller counts what stays missing
            for image in images:
                yield i, image

    def _packet(self, i: int) -> av.Packet:
        """Packet i. Of a folder, it holds the picture of frame i, or a byte that is none: no byte would be the end."""
        if not self._frames:
            return self._packets[i]
        file = Path(self._frames[i])
        packet = av.Packet(file.read_bytes() if file.is_file() and file.stat().st_size else b"\0")  # some have no end
        packet.pts, packet.is_keyframe = i, True  # PNG adds other packets to the picture before
        return packet

    def _pixels(self, image: av.VideoFrame) -> np.ndarray:
        rgb = self._to_rgb.reformat(image, *self._size, "rgb24", threads=1)  # unscaled: several times faster
        plane, (width, height) = rgb.planes[0], self._size
        pixels = np.ndarray((height, width, 3), np.uint8, buffer=plane, strides=(plane.line_size, 3, 1))  # no copy
        if self._matrix is None:
            held = _side_data(image).get("DISPLAYMATRIX")
            self._matrix = np.frombuffer(held, np.int32)[[0, 1, 3, 4]].tolist() if held else [1, 0, 0, 1]
        a, b, c, d = self._matrix  # (x, y) is shown at (ax + cy, bx + dy)
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        if a < 0 or d < 0:
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1].copy()
        return pixels
