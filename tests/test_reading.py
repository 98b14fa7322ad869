"""Frame-exact reading: any frames of any file equal those of a sequential decode in display order."""

import functools
import hashlib
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import encode, moving_texture, same
from hypothesis import given, settings
from hypothesis import strategies as st

import video as reader
from data import PretrainingViews, TestClips, VideoList
from video import BadVideo, Video

SHARED = Path(__file__).parents[2] / "shared"
CLIPS = sorted((SHARED / "clips").glob("*.[am][vpko]*[iv4]"))
CASES = sorted((SHARED / "cases").glob("*.npy"))
H264 = dict(crf="12", preset="fast")
FILES = {  # beside those of MATRIX below: odd sizes, uneven times, one group of pictures, no key frames
    "odd.avi": dict(codec="mpeg4", g="12", bf="2", b="4M"),
    "odd.webm": dict(codec="libvpx-vp9", g="16", deadline="realtime", cpu_used="8"),
    "uneven.mp4": dict(codec="libx264", times=np.cumsum(np.arange(60) % 4 + 1).tolist(), g="20", bf="2", **H264),
    "one_group.mp4": dict(codec="libx264", **H264),
    "intra_refresh.mkv": dict(codec="libx264", x264_params="intra-refresh=1:keyint=10", **H264),
    "raw.h264": dict(codec="libx264", g="15", bf="2", **H264),
}


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


@functools.cache
def sequential(path: Path) -> list[str]:
    """Digests of all frames in the order the decoder gives them out, which is that of display."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
        decoded = container.decode(stream)
        return [digest(np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90 % 4)) for f in decoded]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@functools.cache
def made(folder: Path, name: str) -> Path:
    size = dict(height=49, width=65) if "odd" in name else {}
    return encode(folder / name, moving_texture(60, **size), **FILES[name])


@pytest.mark.parametrize("name", [*FILES, *(pytest.param(path, marks=pytest.mark.slow) for path in CLIPS)], ids=str)
@settings(max_examples=10)
@given(choice=st.data())
def test_chosen_frames_equal_a_sequential_decode(folder, name, choice):
    path = made(folder, name) if name in FILES else name
    expected = sequential(path)
    assert len(set(expected)) == len(expected) or name not in FILES  # else a wrong frame could pass
    with Video(path) as video:
        assert len(video) == len(expected)
        for _ in range(2):  # the second read starts from whatever state the first one left
            starts = choice.draw(st.lists(st.integers(0, len(video) - 1), min_size=1, max_size=3))
            length, step = choice.draw(st.integers(1, 12)), choice.draw(st.integers(1, 3))
            frames = [min(start + k * step, len(video) - 1) for start in starts for k in range(length)]
            frames = choice.draw(st.permutations(frames))
            images = video.read(frames)
            assert all(image.dtype == np.uint8 and image.shape == images[0].shape for image in images)
            assert [digest(image) for image in images] == [expected[k] for k in frames]


@pytest.mark.parametrize("name", [name for name in FILES if name != "intra_refresh.mkv"])
def test_one_pass_is_enough_for_any_frame(folder, name, monkeypatch):
    """The second pass, from the first packet on, is for streams without real key frames only."""
    passes, decode = [], Video._decode
    monkeypatch.setattr(Video, "_decode", lambda video, *given: passes.append(given) or decode(video, *given))
    with Video(made(folder, name)) as video:
        for k in range(len(video)):
            video.read([k])
        assert len(passes) == len(video)


NEEDED = [  # codec, format, wanted frames, packets that are decoded: of ten in a group of H.264
    ("libx264", "yuv420p", (13, 14, 47), [(10, 14), (40, 47)]),
    ("libx264", "yuv420p", (9, 10), [(0, 10)]),  # on across a key frame
    ("mjpeg", "yuvj420p", range(22, 30), [(22, 29)]),
    ("huffyuv", "yuv422p", range(22, 30), [(22, 29)]),
    ("rawvideo", "bgr24", range(22, 30), [(22, 29)]),
]


@pytest.mark.parametrize(("codec", "pix_fmt", "frames", "runs"), NEEDED)
def test_only_what_is_needed_is_decoded(folder, codec, pix_fmt, frames, runs):
    h264 = dict(g="10", bf="0", sc_threshold="0", **H264) if codec == "libx264" else {}
    # A file of its own for each case: `sequential` goes by the name, and x264 does not always give the same bytes.
    path = folder / f"needed_{codec}_{frames[0]}.{'mp4' if h264 else 'avi'}"
    encode(path, moving_texture(60), codec, pix_fmt=pix_fmt, **h264)
    with Video(path) as video:
        assert video._runs({video._order[k]: k for k in frames}) == runs
        assert [digest(image) for image in video.read([29, 3])] == [sequential(path)[k] for k in (29, 3)]
        with pytest.raises(IndexError):
            video.read([60])


TURNED = {  # a, b, c, d of a display matrix, as signs, and what is shown
    (1, 0, 0, 1): lambda image: image,
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, -1, 1, 0): lambda image: np.rot90(image, 1),
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", TURNED)
def test_a_turned_or_mirrored_video_is_shown_upright(folder, matrix):
    path = encode(folder / "turned.mp4", moving_texture(4), "libx264", **H264)
    with Video(path) as video:
        as_stored = video.read([2])[0]
    content = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    a, b, c, d = (sign << 16 for sign in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    with Video(path) as video:
        np.testing.assert_array_equal(video.read([2])[0], TURNED[matrix](as_stored))


def test_a_damaged_frame_is_replaced_by_its_neighbour_unless_too_many_are(folder):
    path = encode(folder / "damaged.mp4", moving_texture(12), "libx264", g="1", bf="0", **H264)
    with Video(path) as video:
        position, size = video._packets[5].pos, video._packets[5].size
    content = path.read_bytes()
    path.write_bytes(content[:position] + bytes(size) + content[position + size :])
    with Video(path) as video:
        images = video.read([3, 5, 6, 8, 10])
        assert digest(images[1]) == digest(images[2]) != digest(images[0])
        with pytest.raises(BadVideo, match="1 of 2 frames"):
            video.read([5, 8])


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts", "cut.avi"])
@given(share=st.floats(0, 1))
def test_a_cut_file_is_bad_or_begins_like_the_whole(folder, name, share):
    """Whatever is left of it: no crash, no wrong frames but the last one, which may be half there."""
    whole, path = folder / f"whole_{name}", folder / name
    if not whole.exists():
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        encode(whole, moving_texture(30), codec, g="10", bf="0", index_first=name.endswith("mp4"))
    content = whole.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    try:
        with Video(path) as video:
            images = video.read(range(len(video)))
    except BadVideo as error:
        assert error.reason and share < 1
    else:
        assert [digest(image) for image in images[:-1]] == sequential(whole)[: len(images) - 1]


# Every way in which a packet, or its stamp, may not be what it seems. Each stream is encoded once and packed anew.

X265 = "keyint=12:min-keyint=12:scenecut=0:crf=12:pools=1:log-level=none:"
VPX = dict(g="16", deadline="realtime", cpu_used="8", b="4M")
STREAMS = {
    "h264": dict(codec="libx264", g="12", bf="3", **H264),
    "h264_without_b": dict(codec="libx264", g="12", bf="0", **H264),
    "h264_open": dict(codec="libx264", x264_params="open-gop=1:keyint=12:min-keyint=12:bframes=3", **H264),
    "h264_refresh": dict(codec="libx264", x264_params="intra-refresh=1:keyint=12", **H264),
    "h264_interlaced": dict(codec="libx264", x264_params="interlaced=1:keyint=12", **H264),
    "hevc": dict(codec="libx265", x265_params=X265 + "open-gop=0:bframes=3"),
    "hevc_open": dict(codec="libx265", x265_params=X265 + "open-gop=1:bframes=3"),
    "mpeg4": dict(codec="mpeg4", g="12", bf="2", b="4M"),
    "mpeg4_many_b": dict(codec="mpeg4", g="24", bf="8", b="4M"),
    "mpeg4_without_b": dict(codec="mpeg4", g="12", bf="0", b="4M"),
    "mpeg2": dict(codec="mpeg2video", g="12", bf="2", b="4M"),
    "mpeg2_without_b": dict(codec="mpeg2video", g="12", bf="0", b="4M"),
    "vp8": dict(codec="libvpx", **VPX),
    "vp9": dict(codec="libvpx-vp9", **VPX),
    "av1": dict(codec="libsvtav1", g="15", preset="10", crf="20"),
    "mjpeg": dict(codec="mjpeg", pix_fmt="yuvj420p", q="3"),
}
CONTAINERS = {
    "h264": "mp4 mov mkv avi ts flv h264",
    "hevc": "mp4 mov mkv ts hevc",
    "mpeg4": "mp4 mov mkv avi ts m4v",
    "mpeg2": "mp4 mov mkv avi ts mpg",
    "vp8": "webm mkv avi",
    "vp9": "webm mp4 avi",
    "av1": "webm mp4",
    "mjpeg": "mp4 mov mkv avi",
}
STAMPED = ("mp4", "mov", "mkv", "webm", "ts")  # containers that hold the stamps they are given
MATRIX = [
    pytest.param(stream, container, stamps, marks=[pytest.mark.slow] * (stamps in ("shifted", "edit")))
    for stream in STREAMS
    for container in CONTAINERS[stream.partition("_")[0]].split()
    for stamps in ("right", "shifted", "decoding", "edit", "leftovers")
    if stamps == "right" or (container in STAMPED and stream != "av1")
    if (stamps != "edit" or container in ("mp4", "mov")) and (stamps != "leftovers" or container == "ts")
]


def repack(source: Path, path: Path, stamps: str) -> Path:
    """The same packets with other stamps, or without the first ones, or with pictures that are never shown."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        rising = sorted(packet.pts for packet in packets)
        for i, packet in enumerate(packets):
            if stamps == "never shown" and i in (5, 9, 20):  # clears a bit of VP8 (RFC 6386, 9.1)
                content = bytes(packet)
                shown, packet = packet, av.Packet(bytes([content[0] & 0xEF]) + content[1:])
                packet.pts, packet.dts, packet.time_base = shown.pts, shown.dts, shown.time_base
            if stamps == "decoding":
                packet.pts = packet.dts = rising[i]
            else:
                step = 1 / 25 / packet.time_base
                later = round({"shifted": 1000, "edit": -5}.get(stamps, 0) * step)
                early = rising[i] - round(3 * step)  # Matroska's first packets have no other
                packet.pts, packet.dts = packet.pts + later, (early if packet.dts is None else packet.dts) + later
            if stamps != "leftovers" or i > 4:
                packet.stream = stream
                container.mux(packet)
    return path


@functools.cache
def stream_in(folder: Path, stream: str, container: str) -> Path:
    return encode(folder / f"{stream}.{container}", moving_texture(40), **STREAMS[stream])


@pytest.mark.parametrize(("stream", "container", "stamps"), MATRIX, ids=lambda value: value)
def test_frame_k_is_the_kth_picture_shown_whatever_packets_and_stamps_say(folder, stream, container, stamps):
    path = stream_in(folder, stream, container)
    if stamps != "right":
        path = repack(path, folder / f"{stream}_{stamps}.{container}", stamps)
    expected, rng = sequential(path), np.random.default_rng(0)
    for _ in range(2):  # the second opening may know the order from the first
        with Video(path) as video:
            images = video.read(range(len(video)))
            assert [digest(image) for image in images] == expected
            for count in (1, 1, 1, 2, 7):
                frames = rng.integers(len(video), size=count).tolist()
                assert [digest(image) for image in video.read(frames)] == [expected[k] for k in frames]
    lightness = np.diff([image.mean() for image in images[10 if stamps == "leftovers" else 0 :]])
    assert (lightness > 0).all() and len(images) > 16
    assert len(images) == 40 or stamps in ("decoding", "edit", "leftovers")


@pytest.mark.parametrize("name", ["vp8.webm", "vp8.avi"])
def test_pictures_that_are_never_shown_do_not_count(folder, name):
    source = stream_in(folder, "vp8", "webm")
    path = repack(source, folder / f"hidden_{name}", "never shown")
    expected = sequential(path)
    assert len(expected) == 37 and sequential(source)[6] == expected[5]
    with Video(path) as video:
        assert [digest(image) for image in video.read(range(len(video)))] == expected
        assert digest(video.read([30])[0]) == expected[30]


@pytest.mark.parametrize("file", CASES, ids=[file.stem for file in CASES])
def test_odd_files_look_as_the_ffmpeg_program_shows_them(file):
    """Each picture, area-averaged and gray, is nearer to the right one than to its neighbours."""
    shown = torch.from_numpy(np.load(file)).double()
    with Video(file.with_suffix("")) as video:
        images = [torch.from_numpy(image.copy()).double() for image in video.read(range(len(video)))]
    gray = [image @ image.new_tensor([0.299, 0.587, 0.114]) for image in images]
    small = torch.cat([F.interpolate(image[None, None], (32, 32), mode="area")[0] for image in gray])
    distances = (small[:, None] - shown).abs().mean((2, 3))
    assert distances.argmin(1).tolist() == list(range(len(shown))) and distances.diagonal().max() < 2


def test_what_had_to_be_decoded_once_is_remembered_until_the_file_changes(folder, monkeypatch):
    path, runs, pictures = folder / "remembered.h264", [], Video._pictures
    monkeypatch.setattr(Video, "_pictures", lambda video, *run: runs.append(run[:2]) or pictures(video, *run))
    for frames in (30, 20):
        encode(path, moving_texture(frames), "libx264", g="10", bf="2", **H264)
        for _ in range(2):
            with Video(path) as video:
                assert len(video) == frames
    assert runs == [(0, 29), (0, 19)]


@pytest.mark.parametrize("chunk", [1, 4 * 48 * 64 * 3])
def test_samples_are_the_same_in_however_small_parts_frames_come(folder, monkeypatch, chunk):
    paths = [str(stream_in(folder, name, "mp4")) for name in ("h264", "mpeg4")]
    videos = VideoList(paths, [0, 0], ["a"], "")
    views, clips = PretrainingViews(videos, 24), TestClips(videos, 24, 4, 2, 3)
    samples = [(views[3, i], clips[i]) for i in range(2)]
    monkeypatch.setattr(reader, "CHUNK", chunk)
    with Video(paths[0]) as opened:
        assert max(len(images) for images in map(dict, opened.stream(range(40)))) == max(chunk // (48 * 64 * 3), 1)
    assert same([(views[3, i], clips[i]) for i in range(2)], samples)


@pytest.mark.parametrize("name", ["fields.mp4", "fields.ts"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p", "yuv444p"])
@pytest.mark.parametrize("params", ["interlaced=0", "interlaced=1", "fake-interlaced=1"])
def test_h264_that_may_hold_fields_is_decoded_once(folder, monkeypatch, name, pix_fmt, params):
    """Of which the first pictures may be frames: fake-interlaced ones are no fields, but later ones may be."""
    path, runs, pictures = folder / name, [], Video._pictures
    encode(path, moving_texture(4), "libx264", pix_fmt=pix_fmt, x264_params=f"bframes=0:{params}")
    monkeypatch.setattr(reader, "_watched", {})
    monkeypatch.setattr(Video, "_pictures", lambda video, *run: runs.append(run[:2]) or pictures(video, *run))
    with Video(path) as video:
        assert len(video) == 4 and runs == [(0, 3)] * (params != "interlaced=0")
