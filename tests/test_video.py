"""Frame-exact reading: any frames of any file equal those of a sequential decode; folders of pictures as videos."""

import functools
import hashlib
import os
import struct
from fractions import Fraction
from itertools import product
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import pytest
import shrink
import torch
import torch.nn.functional as F
from av.packet import PacketSideData, packet_sidedata_type_from_literal
from helpers import encode, moving_texture, same, touch, write
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import data
import mcl
import video as reader
from data import PretrainingViews, TestClips, VideoList
from find import find_videos
from video import BadVideo, Video, frames_of

SHARED = Path(__file__).parents[2] / "shared"
CLIPS = sorted((SHARED / "clips").glob("*.[am][vpko]*[iv4]"))
CASES = sorted((SHARED / "cases").glob("*.npy"))
H264 = dict(codec="libx264", crf="12", preset="fast")
X265 = "keyint=12:min-keyint=12:scenecut=0:crf=12:pools=1:log-level=none:"
VPX = dict(g="16", deadline="realtime", cpu_used="8", b="4M")
ODD, IMAGES = moving_texture(40, height=49, width=65), moving_texture(12)
IN_H264, IN_HEVC = "mp4 mkv avi ts flv h264", "mp4 mkv ts hevc"  # containers
IN_MPEG4, IN_MPEG2 = "mp4 mkv avi ts m4v", "mp4 mkv avi ts mpg"
STREAMS = {  # every way in which a packet, or its stamp, may not be what it seems, and what it is kept in
    "h264": (IN_H264, H264 | dict(g="12", bf="3", times=np.cumsum(np.arange(40) % 4 + 1).tolist())),
    "h264_no_b": (IN_H264, H264 | dict(g="12", bf="0", sc_threshold="0", index_first=True)),
    "h264_open": (IN_H264, H264 | dict(x264_params="open-gop=1:keyint=12:min-keyint=12:bframes=3")),
    "h264_refresh": (IN_H264, H264 | dict(x264_params="intra-refresh=1:keyint=12")),
    "h264_interlaced": (IN_H264, H264 | dict(x264_params="interlaced=1:keyint=12")),
    "hevc": (IN_HEVC, dict(codec="libx265", x265_params=X265 + "open-gop=0:bframes=3")),
    "hevc_open": (IN_HEVC, dict(codec="libx265", x265_params=X265 + "open-gop=1:bframes=3")),
    "mpeg4": (IN_MPEG4, dict(codec="mpeg4", g="12", bf="2", b="4M", images=ODD)),
    "mpeg4_many_b": (IN_MPEG4, dict(codec="mpeg4", g="24", bf="8", b="4M")),
    "mpeg4_no_b": (IN_MPEG4, dict(codec="mpeg4", g="12", bf="0", b="4M")),
    "mpeg2": (IN_MPEG2, dict(codec="mpeg2video", g="12", bf="2", b="4M")),
    "mpeg2_no_b": (IN_MPEG2, dict(codec="mpeg2video", g="12", bf="0", b="4M")),
    "vp8": ("webm mkv avi", dict(codec="libvpx") | VPX),
    "vp9": ("webm mp4 avi", dict(codec="libvpx-vp9", images=ODD) | VPX),
    "av1": ("webm mp4", dict(codec="libsvtav1", g="15", preset="10", crf="20")),
    "mjpeg": ("mp4 mkv avi", dict(codec="mjpeg", pix_fmt="yuvj420p", q="3")),
    "rawvideo": ("avi", dict(codec="rawvideo", pix_fmt="bgr24")),
}
MATRIX = [
    pytest.param(f"{stream}.{container}", stamps, marks=[pytest.mark.slow] * (stamps in ("shifted", "edit")))
    for stream, (containers, _) in STREAMS.items()
    for container in containers.split()
    for stamps in ("right", "shifted", "decoding", "edit", "leftovers")
    if stamps == "right" or (container in ("mp4", "mkv", "webm", "ts") and stream != "av1")  # which hold stamps
    if (stamps != "edit" or container == "mp4") and (stamps != "leftovers" or container == "ts")
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@functools.cache  # as x264 does not always give the same bytes
def made(folder: Path, name: str) -> Path:
    """A stream in a container, by the file's name."""
    return encode(folder / name, **dict(images=moving_texture(40)) | STREAMS[name.partition(".")[0]][1])


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


@pytest.mark.parametrize(("name", "stamps"), MATRIX, ids=lambda value: value)
def test_frame_k_is_the_kth_picture_shown_whatever_packets_and_stamps_say(folder, name, stamps):
    path = made(folder, name)
    if stamps != "right":
        path = repack(path, folder / f"{stamps}_{name}", stamps)
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


@pytest.mark.parametrize("container", ["flv", "mp4"])
def test_joined_clips_with_other_parameters_look_the_same_from_any_frame_on(tmp_path, container):
    sizes, path = ((48, 64), (96, 128)), tmp_path / f"joined.{container}"
    parts = [encode(tmp_path / f"{h}.flv", moving_texture(20, h, w), **H264, g="5", bf="0") for h, w in sizes]
    with av.open(str(path), "w") as joined:
        for number, part in enumerate(parts):
            with av.open(str(part)) as opened:
                stream = opened.streams.video[0]
                out = joined.streams.video[0] if number else joined.add_stream_from_template(stream)
                packets = [packet for packet in opened.demux(stream) if packet.size]
                new = stream.codec_context.extradata
                header = PacketSideData(packet_sidedata_type_from_literal("new_extradata"), len(new))
                header.update(new)
                packets[0].set_sidedata(header)
                for packet in packets:
                    packet.pts, packet.dts, packet.stream = packet.pts + 800 * number, packet.dts + 800 * number, out
                    joined.mux(packet)
    with Video(path) as video, av.open(str(path)) as opened:
        height, width = video.read([0])[0].shape[:2]
        shown = [image.to_ndarray(format="rgb24", width=width, height=height) for image in opened.decode(video=0)]
        assert len(shown) == 40 and np.abs(shown[19].mean() - shown[39].mean()) < 20  # both parts grow as light
        for frames in (range(40), [30], [2], [24], [39], [0]):
            for k, image in zip(frames, video.read(frames), strict=True):
                assert np.abs(image - shown[k].astype(int)).mean() < 2, k


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264"])
def test_times_have_the_gaps_of_an_avi(folder, codec):
    times, kind = [0, *np.cumsum(np.arange(11) % 4 + 1).tolist()], "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode(folder / f"gaps_{codec}.avi", IMAGES, codec, times=times, pix_fmt=kind, bf="0")
    with Video(path) as video:
        assert len(video) == 12 and video.times() == [Fraction(time, 25) for time in times]


@pytest.mark.parametrize("a, b, c, d", [*product([1, -1], [0], [0], [1, -1]), *product([0], [1, -1], [1, -1], [0])])
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


def write_frames(folder: Path, name: str = "img_{:05}.png", numbers=range(1, 13)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(numbers, IMAGES, strict=True):
        Image.fromarray(image).save(folder / name.format(number))
    return folder


def shown(folder: Path, frames) -> list[int]:
    """Which of `IMAGES` each of these frames is."""
    with Video(folder) as opened:
        return [[*map(digest, IMAGES)].index(digest(image)) for image in opened.read([*frames])]


@pytest.mark.parametrize("name", ["img_{:05}.png", "{}.png", "v_1_g02_frame{}_x.png", "{:03}.bmp", "Image {}.bmp"])
def test_frames_are_the_pictures_in_order_of_their_numbers_and_only_wanted_ones_are_read(tmp_path, name):
    numbers = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 100]  # which do not sort as text, and of which one is missing
    folder = write_frames(tmp_path / "a [1]*?%d {x}" / "v.avi", name, numbers=numbers)
    touch(folder, "._img_00001.png", "cover.png", "notes.txt", *[f"flow_{c}_{k:04}.png" for c in "xy" for k in numbers])
    with Video(folder) as opened:
        assert len(opened) == 12 and opened.times() == [Fraction(k, 25) for k in range(12)]
        for out_of_range in (12, -13):
            with pytest.raises(IndexError):
                opened.read([out_of_range])
        assert [digest(image) for image in opened.read([-1, 11, -12])] == [digest(IMAGES[k]) for k in (11, 11, 0)]
    with Video(folder, rate=30000 / 1001) as opened:
        assert opened.times()[11] == Fraction(11 * 1001, 30000)
    assert shown(folder, range(12)) == [*range(12)]
    with patch.object(Video, "_packet", autospec=True, side_effect=Video._packet) as read:
        assert shown(str(folder), [9, 2, 3, 2, 11, 5]) == [9, 2, 3, 2, 11, 5]
    assert [call.args[1] for call in read.mock_calls] == [0, 2, 3, 5, 9, 11]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg_is_decoded_as_ffmpeg_does_and_scaled_to_the_first_size(tmp_path, suffix):
    folder = write_frames(tmp_path / "v", "{:05}." + suffix)
    with Video(folder) as opened:
        assert [[digest(image)] for image in opened.read(range(12))] == [*map(sequential, sorted(folder.iterdir()))]
    Image.fromarray(IMAGES[5]).resize((128, 96)).save(folder / f"00006.{suffix}")
    with Video(folder) as opened:
        assert np.abs(np.stack(opened.read([4, 5, 6])) - IMAGES[4:7].astype(int)).mean((1, 2, 3)).max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_cameras_are_upright(tmp_path, orientation):
    """FFmpeg 8 hands on their Exif, of which PyAV 18 does not know the kind."""
    folder, shown = write_frames(tmp_path / "v", "{:05}.jpg"), []
    for path in sorted(folder.iterdir()):
        picture = Image.open(path)
        exif = picture.getexif()
        exif[0x010F], exif[0x0112] = "a camera", orientation
        picture.save(path, exif=exif, quality=95)
        shown.append(np.asarray(ImageOps.exif_transpose(Image.open(path))))
    with Video(folder) as opened:
        images = opened.read(range(12))
    assert np.abs(np.stack(images) - np.stack(shown).astype(int)).mean() < 3


SERIES = {  # names of files, and of these the frames
    "one picture": (["img_1.jpg", "img_a.jpg"], []),
    "two series": (["a_1.jpg", "a_2.jpg", "b_1.jpg", "b_2.jpg"], []),
    "two kinds": (["img_1.jpg", "img_2.jpg", "img_1.png", "img_2.png"], []),
    "named": (["img_1.jpg", "img_2.jpg", "depth_1.jpg", "depth_2.jpg"], ["img_1.jpg", "img_2.jpg"]),
    "flows": (["FLOWX1.jpg", "FLOWX2.jpg", "tv_flow-1.jpg", "tv_flow-2.jpg", "img_flow_1.jpg", "img_flow_2.jpg"], []),
    "a flower": (["flower_10.webp", "flower_9.webp"], ["flower_9.webp", "flower_10.webp"]),
    "a cover": (["a_2.jpg", "cover_1.jpg", "a_1.jpg", "b.jpg"], ["a_1.jpg", "a_2.jpg"]),
    "other files": (["a_1.mp4", "a_2.mp4", "a_1.json", "a_2.json", "a1.jpg.txt", "a2.jpg.txt"], []),
    "hidden": ([".1.jpg", ".2.jpg"], []),
}


@pytest.mark.parametrize("case", SERIES)
def test_what_a_folder_of_frames_is(tmp_path, case):
    names, frames = SERIES[case]
    touch(tmp_path, *names)
    assert frames_of(str(tmp_path)) == frames_of(str(tmp_path), names) == [f"{tmp_path}/{name}" for name in frames]


def test_classes_and_extracted_frames_stay_what_they_are(tmp_path):
    pictures = ["img_1.jpg", "img_2.jpg"]
    with_pictures = ["", "jump/", "run/", "run/b/", "run/b.old/", "run/@eaDir/", "walk/c/", "walk/c/flow_y_/", "crawl/"]
    touch(tmp_path, *[folder + name for folder in with_pictures for name in pictures], "walk/c/flow_x_1.jpg")
    touch(tmp_path, "jump/a.mp4", "run/b.avi", "walk/d/1.png", "walk/d/2.png", "walk/d/.x/1.mp4", "crawl/e/img_1.jpg")
    videos = find_videos("folder", tmp_path, train=True)
    names = ["jump/a.mp4", "run/b.avi", "run/b.old", "walk/c/flow_y_", "walk/d"]
    assert [os.path.relpath(path, tmp_path) for path in videos.paths] == names
    assert videos.classes == ["jump", "run", "walk", "walk/c"]
    assert "; 14 other files passed over (14 .jpg)" in videos.report


def test_a_tree_is_listed_once_and_no_picture_is_looked_at(tmp_path):
    touch(tmp_path, *[f"c{v % 3}/v{v}/{k}.jpg" for v in range(20) for k in range(1, 12)])
    with patch.object(os, "scandir", wraps=os.scandir) as scan, patch.object(os, "stat", wraps=os.stat) as look:
        assert len(find_videos("folder", tmp_path, train=True)) == 20
    listed, seen = ([str(call.args[0]) for call in calls.mock_calls] for calls in (scan, look))
    assert len({*listed}) == len(listed) == 24 and not any(path.endswith(".jpg") for path in listed + seen)


@pytest.mark.parametrize("line", ["{} {}", "{} 120 {}", "{},{}"])
def test_lists_name_folders_or_their_video_files(tmp_path, line):
    touch(tmp_path, *[f"c/{name}/img_{k}.jpg" for name in ("v_1", "w.2", "w", "d") for k in (1, 2)], "c/d.mp4")
    names = ["c/v_1", "c/v_1/", "c\\v_1", "c/v_1.avi", "c/w.2", "c/w.2/", "c/w.2.avi", "c/d", "c", "gone"]
    write(tmp_path / "list.txt", *[line.format(name, label) for label, name in enumerate(names)])
    videos = find_videos("folder", tmp_path, train=True, list_file="list.txt")
    found = [os.path.relpath(path, tmp_path) for path in videos.paths]
    assert found == ["c/v_1"] * 4 + ["c/w.2"] * 3 + ["c/d.mp4"] and videos.labels == [*range(8)]
    assert "2 of 10 listed videos are not on disk: c" in videos.report


def damage(folder: Path, *numbers: int) -> Path:
    """Makes pictures in turn empty, other files, links to nothing, pipes, links to what has no end, and folders."""
    for i, number in enumerate(numbers):
        path = folder / f"img_{number + 1:05}.png"
        path.unlink()
        makers = [path.touch, lambda p=path: p.write_bytes(b"junk"), lambda p=path: p.symlink_to("nowhere")]
        [*makers, lambda p=path: os.mkfifo(p), lambda p=path: p.symlink_to("/proc/kmsg"), path.mkdir][i % 6]()
    return folder


def test_damaged_pictures_are_replaced_by_neighbours_and_more_make_a_bad_video(tmp_path):
    folder = damage(write_frames(tmp_path / "few"), 3, 4, 9)
    assert shown(folder, range(12)) == [0, 1, 2, 2, 5, 5, 6, 7, 8, 8, 10, 11]
    many = damage(write_frames(tmp_path / "many"), 2, 4, 6, 8)
    with pytest.raises(BadVideo, match="many: 4 of 12 frames could not be decoded"):
        shown(many, range(12))
    for kind in range(6):
        first = damage(write_frames(tmp_path / f"first{kind}"), *[0] * (kind + 1))
        with pytest.raises(BadVideo, match=f"{first}: Invalid data"):
            Video(first)
    touch(tmp_path, "none/1.png")
    with pytest.raises(BadVideo, match="none: not a file"):
        Video(tmp_path / "none")


def test_a_run_sees_the_number_of_frames_wherever_they_lie(tmp_path):
    old, root = tmp_path / "old", tmp_path / "new"
    for place in (old, root):
        touch(place / "c/v", *[f"img_{k}.png" for k in range(12)])
    touch(root / "c/v", *[f"flow_x_{k}.jpg" for k in range(500)])  # which the folder's own size shows
    before, videos = (find_videos("folder", place, train=True) for place in (old, root))
    assert videos.seen(root) == before.seen(old) == [["c/v", 0, "c", 12]] and videos.mark(root) == before.mark(old)
    (root / "c/v/img_7.png").unlink()
    assert videos.seen(root) == [["c/v", 0, "c", 11]]
    assert data.size_of(str(tmp_path / "gone")) == -1
    maps = mcl.MotionMaps(mcl.MapsConfig(dataset="folder", data=str(root)))
    assert maps.file(videos.paths[0]).name == "v.11.npz"


def test_a_clip_of_a_folder_equals_that_of_a_video_of_its_frames(tmp_path):
    paths = write_frames(tmp_path / "v"), encode(tmp_path / "v.avi", IMAGES, "rawvideo", pix_fmt="bgr24")
    assert torch.equal(*[data.read_clip(path, 4, 2, 32) for path in paths])


def test_shrinking_makes_files_of_folders(tmp_path, in_process):
    root, out = tmp_path / "root", tmp_path / "out"
    write_frames(root / "c/v", "img_{}.jpg")
    write_frames(root / "c/w.avi", "img_{}.jpg")
    (root / "c/link").symlink_to("v")
    damage(write_frames(root / "c/bad"), *range(4))
    touch(root, "c/v/flow_x_1.jpg", "c/w.avi/flows_1.jpg", "c/w.avi/flows_2.jpg")  # the last two have no place
    write(root / "list.txt", "c/v 0", "c/w.avi 1", "c/link.avi 0")
    code, said, err = in_process(shrink, root, out, "--side=24", "--workers=1", "--frame_rate=10")
    assert code == 1 and said.startswith("2 videos, 0.0 → 0.0 MB;") and "1 of 3 videos" in said, err
    held = {"c/link/flow_x_1.jpg", "c/v/flow_x_1.jpg", "c/link.mp4", "c/v.mp4", "c/w.avi", "failed.txt", "list.txt"}
    assert {str(path.relative_to(out)) for path in out.rglob("[!.]*") if path.is_file()} == held
    assert all((out / name).is_symlink() == name.startswith("c/v") for name in held)  # of two names of a file, one is
    assert (out / "failed.txt").read_text() == "'c/bad'\tInvalid data found when processing input\n"
    assert len(find_videos("folder", root, train=True, exclude=out / "failed.txt")) == 3
    listed = [find_videos("folder", place, train=True, list_file="list.txt") for place in (root, out)]
    assert listed[0].labels == [0, 1, 0] and listed[1].labels == [0, 1]
    with Video(root / "c/v", 10) as old, Video(out / "c/v.mp4") as new:
        assert new.times() == old.times() and new.read([3])[0].shape == (24, 32, 3)
