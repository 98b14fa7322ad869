"""Frame-exact reading: any frames of any file equal those of a sequential decode in display order."""

import functools
import hashlib
import itertools
import struct
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import encode, moving_texture, same
from hypothesis import given
from hypothesis import strategies as st

import video as reader
from data import PretrainingViews, TestClips, VideoList
from video import BadVideo, Video

SHARED = Path(__file__).parents[2] / "shared"
CLIPS = sorted((SHARED / "clips").glob("*.[am][vpko]*[iv4]"))
CASES = sorted((SHARED / "cases").glob("*.npy"))
H264 = dict(codec="libx264", crf="12", preset="fast")
X265 = "keyint=12:min-keyint=12:scenecut=0:crf=12:pools=1:log-level=none:"
VPX = dict(g="16", deadline="realtime", cpu_used="8", b="4M")
ODD = moving_texture(40, height=49, width=65)
STREAMS = {  # every way in which a packet, or its stamp, may not be what it seems
    "h264": H264 | dict(g="12", bf="3", times=np.cumsum(np.arange(40) % 4 + 1).tolist()),
    "h264_no_b": H264 | dict(g="12", bf="0", sc_threshold="0", index_first=True),
    "h264_open": H264 | dict(x264_params="open-gop=1:keyint=12:min-keyint=12:bframes=3"),
    "h264_refresh": H264 | dict(x264_params="intra-refresh=1:keyint=12"),
    "h264_interlaced": H264 | dict(x264_params="interlaced=1:keyint=12"),
    "hevc": dict(codec="libx265", x265_params=X265 + "open-gop=0:bframes=3"),
    "hevc_open": dict(codec="libx265", x265_params=X265 + "open-gop=1:bframes=3"),
    "mpeg4": dict(codec="mpeg4", g="12", bf="2", b="4M", images=ODD),
    "mpeg4_many_b": dict(codec="mpeg4", g="24", bf="8", b="4M"),
    "mpeg4_no_b": dict(codec="mpeg4", g="12", bf="0", b="4M"),
    "mpeg2": dict(codec="mpeg2video", g="12", bf="2", b="4M"),
    "mpeg2_no_b": dict(codec="mpeg2video", g="12", bf="0", b="4M"),
    "vp8": dict(codec="libvpx") | VPX,
    "vp9": dict(codec="libvpx-vp9", images=ODD) | VPX,
    "av1": dict(codec="libsvtav1", g="15", preset="10", crf="20"),
    "mjpeg": dict(codec="mjpeg", pix_fmt="yuvj420p", q="3"),
    "rawvideo": dict(codec="rawvideo", pix_fmt="bgr24"),
}
CONTAINERS = {
    "h264": "mp4 mkv avi ts flv h264",
    "hevc": "mp4 mkv ts hevc",
    "mpeg4": "mp4 mkv avi ts m4v",
    "mpeg2": "mp4 mkv avi ts mpg",
    "vp8": "webm mkv avi",
    "vp9": "webm mp4 avi",
    "av1": "webm mp4",
    "mjpeg": "mp4 mkv avi",
    "rawvideo": "avi",
}
STAMPED = ("mp4", "mkv", "webm", "ts")  # containers that hold the stamps they are given
MATRIX = [
    pytest.param(stream, container, stamps, marks=[pytest.mark.slow] * (stamps in ("shifted", "edit")))
    for stream in STREAMS
    for container in CONTAINERS[stream.partition("_")[0]].split()
    for stamps in ("right", "shifted", "decoding", "edit", "leftovers")
    if stamps == "right" or (container in STAMPED and stream != "av1")
    if (stamps != "edit" or container == "mp4") and (stamps != "leftovers" or container == "ts")
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@functools.cache  # as x264 does not always give the same bytes
def made(folder: Path, name: str) -> Path:
    """A stream in a container, by the file's name."""
    return encode(folder / name, **dict(images=moving_texture(40)) | STREAMS[name.partition(".")[0]])


def repack(source: Path, path: Path, stamps: str) -> Path:
    """The same packets with other stamps, or without the first ones."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        rising, step = sorted(packet.pts for packet in packets), round(1 / 25 / packets[0].time_base)
        later = {"shifted": 1000, "edit": -5}.get(stamps, 0) * step
        for packet, stamp in zip(packets, rising, strict=True):
            if packet.dts is None:  # as of Matroska's first
                packet.dts = stamp - 3 * step
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
            if stamps == "decoding":
                packet.pts = packet.dts = stamp
            packet.stream = stream
        for packet in packets[5 if stamps == "leftovers" else 0 :]:
            container.mux(packet)
    return path


def digest(image: np.ndarray) -> str:
    return f"{image.shape} {image.dtype} {hashlib.sha256(image.tobytes()).hexdigest()}"


@functools.cache
def sequential(path: Path) -> list[str]:
    """Digests of all frames in the order the decoder gives them out, which is that of display."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
        decoded = container.decode(stream)
        return [digest(np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90 % 4)) for f in decoded]


def read_exactly(path: Path) -> list[np.ndarray]:
    """All frames. They, and windows at steps of 1 to 3, mixed, are compared with those of a sequential decode."""
    expected, rng = sequential(path), np.random.default_rng(0)
    with Video(path) as video, patch.object(Video, "_decode", autospec=True, side_effect=Video._decode) as passes:
        images = video.read(range(len(video)))
        assert [digest(image) for image in images] == expected
        for windows, length in ((1, 1), (1, 1), (1, 1), (7, 1), (3, 12)):  # from whatever state the last one left
            starts, steps = rng.integers(len(video), size=(windows, 1)), rng.integers(1, 4, (windows, 1))
            frames = np.minimum(starts + steps * np.arange(length), len(video) - 1)
            frames = rng.permutation(frames.ravel()).tolist()
            assert [digest(image) for image in video.read(frames)] == [expected[k] for k in frames]
    assert passes.call_count == 6 or "refresh" in path.name  # which has no real key frames
    return images


@pytest.mark.parametrize(("stream", "container", "stamps"), MATRIX, ids=lambda value: value)
def test_frame_k_is_the_kth_picture_shown_whatever_packets_and_stamps_say(folder, stream, container, stamps):
    path = made(folder, f"{stream}.{container}")
    if stamps != "right":
        path = repack(path, folder / f"{stream}_{stamps}.{container}", stamps)
    for _ in range(2):  # the second opening may know the order from the first
        images = read_exactly(path)
    lightness = np.diff([image.mean() for image in images[10 if stamps == "leftovers" else 0 :]])
    assert (lightness > 0).all() and len(images) > 16
    assert len(images) == 40 or stamps in ("decoding", "edit", "leftovers")


@pytest.mark.slow
@pytest.mark.parametrize("path", CLIPS, ids=str)
def test_frames_of_real_videos_equal_a_sequential_decode(path):
    read_exactly(path)


@pytest.mark.parametrize("name", ["vp8.webm", "vp8.avi"])
def test_pictures_that_are_never_shown_do_not_count(folder, name):
    source, path = made(folder, name), folder / f"hidden_{name}"
    content = source.read_bytes()
    with Video(source) as video:
        for packet in (bytes(video._packets[i]) for i in (5, 9, 20)):
            content = content.replace(packet, bytes([packet[0] & 0xEF]) + packet[1:])  # RFC 6386, 9.1
    path.write_bytes(content)
    assert len(read_exactly(path)) == 37 and sequential(source)[6] == sequential(path)[5]


@pytest.mark.parametrize("file", CASES, ids=[file.stem for file in CASES])
def test_odd_files_look_as_the_ffmpeg_program_shows_them(file):
    """Each picture, area-averaged and gray, is nearer to the right one than to its neighbours."""
    shown = torch.from_numpy(np.load(file)).float()
    with Video(file.with_suffix("")) as video:
        images = torch.from_numpy(np.stack(video.read(range(len(video))))).float()
    gray = images @ torch.tensor([0.299, 0.587, 0.114])
    small = F.interpolate(gray[:, None], (32, 32), mode="area")
    distances = (small - shown).abs().mean((2, 3))
    assert distances.argmin(1).tolist() == list(range(len(shown))) and distances.diagonal().max() < 2


MATRICES = [m for x, y in itertools.product((1, -1), repeat=2) for m in ((x, 0, 0, y), (0, x, y, 0))]


@pytest.mark.parametrize(("a", "b", "c", "d"), MATRICES)
def test_a_turned_or_mirrored_video_is_shown_upright(folder, a, b, c, d):
    """By a display matrix, pixel (x, y) is shown at (ax + cy, bx + dy), moved into the picture."""
    path = encode(folder / "turned.mp4", moving_texture(4), **H264)
    with Video(path) as video:
        stored = video.read([2])[0]
    before, _, after = path.read_bytes().rpartition(struct.pack(">5i", 1 << 16, 0, 0, 0, 1 << 16))
    path.write_bytes(before + struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16) + after)
    y, x = np.indices(stored.shape[:2])
    row, column = b * x + d * y, a * x + c * y
    expected = np.zeros((np.ptp(row) + 1, np.ptp(column) + 1, 3), np.uint8)
    expected[row - row.min(), column - column.min()] = stored
    with Video(path) as video:
        np.testing.assert_array_equal(video.read([2])[0], expected)


NEEDED = [  # frames, and from which to which packet is decoded: of twelve in a group of H.264
    ("h264_no_b.mp4", (13, 14, 38), [(12, 14), (36, 38)]),
    ("h264_no_b.mp4", (11, 12), [(0, 12)]),  # on across a key frame
    ("mjpeg.avi", range(22, 30), [(22, 29)]),
    ("rawvideo.avi", range(22, 30), [(22, 29)]),
]


@pytest.mark.parametrize(("name", "frames", "runs"), NEEDED)
def test_only_what_is_needed_is_decoded(folder, name, frames, runs):
    with Video(made(folder, name)) as video:
        assert video._runs({video._order[k]: k for k in frames}) == runs


@pytest.mark.parametrize("name", ["fields.mp4", "fields.ts"])
@pytest.mark.parametrize("params", ["interlaced=0", "interlaced=1", "fake-interlaced=1"])
def test_h264_that_may_hold_fields_is_decoded_once_until_the_file_changes(folder, name, params):
    """Of which the first pictures may be frames: fake-interlaced ones are no fields, but later ones may be."""
    path = folder / name
    with patch.object(Video, "_pictures", autospec=True, side_effect=Video._pictures) as decoded:
        for frames, pix_fmt in enumerate(("yuv420p", "yuv420p10le", "yuv422p", "yuv444p"), 4):
            encode(path, moving_texture(frames), "libx264", pix_fmt=pix_fmt, x264_params=f"bframes=0:{params}")
            for _ in range(2):
                with Video(path) as video:
                    assert len(video) == frames
    runs = [call.args[1:3] for call in decoded.call_args_list]
    assert runs == [(0, last) for last in range(3, 7) if params != "interlaced=0"]


@pytest.mark.parametrize("chunk", [1, 4 * 48 * 64 * 3])
def test_samples_are_the_same_in_however_small_parts_frames_come(folder, monkeypatch, chunk):
    videos = VideoList([str(made(folder, name)) for name in ("h264.mp4", "mpeg4.mp4")], [0, 0], ["a"], "")
    views, clips = PretrainingViews(videos, 24), TestClips(videos, 24, 4, 2, 3)
    samples = [(views[3, i], clips[i]) for i in range(2)]
    monkeypatch.setattr(reader, "CHUNK", chunk)
    with Video(videos.paths[0]) as opened:
        assert max(len(images) for images in map(dict, opened.stream(range(40)))) == max(chunk // (48 * 64 * 3), 1)
    assert same([(views[3, i], clips[i]) for i in range(2)], samples)


def test_a_damaged_frame_is_replaced_by_its_neighbour_and_no_other_moves(folder):
    path = encode(folder / "damaged.mp4", moving_texture(12), g="1", bf="0", **H264)
    expected, content = sequential(path), path.read_bytes()
    with Video(path) as video:
        packet = bytes(video._packets[5])
    path.write_bytes(content.replace(packet, bytes(len(packet))))
    with Video(path) as video:
        assert [*map(digest, video.read(range(12)))] == [*expected[:5], expected[4], *expected[6:]]
        with pytest.raises(BadVideo, match="1 of 2 frames"):
            video.read([5, 8])


@pytest.mark.parametrize("name", ["h264_no_b.mp4", "h264_no_b.mkv", "h264_no_b.ts", "mpeg4_no_b.avi"])
@given(share=st.floats(0, 1))
def test_a_cut_file_is_bad_or_begins_like_the_whole(folder, name, share):
    """Whatever is left of it: no crash, no wrong frames but the last one, which may be half there."""
    whole, path = made(folder, name), folder / f"cut_{name}"
    content = whole.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    try:
        with Video(path) as video:
            images = video.read(range(len(video)))
    except BadVideo as error:
        assert error.reason and share < 1
    else:
        assert [digest(image) for image in images[:-1]] == sequential(whole)[: len(images) - 1]
