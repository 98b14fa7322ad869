"""Frame-exact reading: any frames of any file equal those of a sequential decode in display order."""

import functools
import hashlib
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from encoding import encode, moving_texture, write_sound
from hypothesis import given, settings
from hypothesis import strategies as st

from data import BadVideo, Video

CLIPS = sorted((Path(__file__).parents[2] / "shared" / "clips").glob("*.[am][vpko]*[iv4]"))
H264 = dict(crf="12", preset="fast")


def cut_by_edit_list(path: Path) -> Path:
    """An MP4 whose edit list hides its first 5 frames, which the others are decoded from."""
    source = encode(path.with_suffix(".whole.mp4"), moving_texture(40), "libx264", g="20", bf="2", **H264)
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                shift = round(5 / 25 / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                container.mux(packet)
    return path


FILES = {
    "b_frames.avi": functools.partial(encode, codec="mpeg4", g="12", bf="2", b="4M"),
    "odd_no_b_frames.avi": functools.partial(encode, codec="mpeg4", g="12", bf="0", b="4M"),
    "b_frames.mp4": functools.partial(encode, codec="libx264", g="20", bf="3", **H264),
    "open_gop.mp4": functools.partial(encode, codec="libx264", x264_params="open-gop=1:keyint=10:bframes=3", **H264),
    "intra_refresh.mkv": functools.partial(encode, codec="libx264", x264_params="intra-refresh=1:keyint=10", **H264),
    "h264.mkv": functools.partial(encode, codec="libx264", g="15", bf="2", **H264),
    "h264.avi": functools.partial(encode, codec="libx264", g="15", bf="2", **H264),
    "raw.h264": functools.partial(encode, codec="libx264", g="15", bf="2", **H264),
    "stream.ts": functools.partial(encode, codec="libx264", g="15", bf="2", **H264),
    "open_gop_hevc.mp4": functools.partial(
        encode, codec="libx265", x265_params="open-gop=1:keyint=10:bframes=3:crf=12:pools=1:log-level=none"
    ),
    "av1.mkv": functools.partial(encode, codec="libsvtav1", g="15", preset="10", crf="20"),
    "mpeg2.mpg": functools.partial(encode, codec="mpeg2video", g="12", bf="2"),
    "odd.webm": functools.partial(encode, codec="libvpx-vp9", g="16", deadline="realtime", cpu_used="8"),
    "uneven_times.mp4": functools.partial(
        encode, codec="libx264", times=np.cumsum(np.arange(60) % 4 + 1).tolist(), g="20", bf="2", **H264
    ),
    "short.mp4": functools.partial(encode, codec="libx264", **H264),
}
FRAMES = {"short.mp4": 20, "odd.webm": 40}


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def sequential(path: Path) -> list[str]:
    """Digests of all frames in the order the decoder gives them out, which is that of display."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
        decoded = container.decode(stream)
        return [digest(np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90 % 4)) for f in decoded]


@functools.cache
def truth(path: Path) -> list[str]:
    return sequential(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session", params=[*FILES, "edit_list.mp4"])
def file(request, folder):
    path = folder / request.param
    if request.param == "edit_list.mp4":
        return cut_by_edit_list(path)
    size = dict(height=49, width=65) if "odd" in request.param else {}
    FILES[request.param](path, moving_texture(FRAMES.get(request.param, 60), **size))
    return path


def check_frames(path: Path, choice: st.DataObject) -> None:
    expected = truth(path)
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


@given(choice=st.data())
def test_chosen_frames_equal_a_sequential_decode(file, choice):
    assert len(set(truth(file))) == len(truth(file))  # else a wrong frame could pass
    check_frames(file, choice)


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
@settings(max_examples=6)
@given(choice=st.data())
def test_chosen_frames_of_real_clips_equal_a_sequential_decode(path, choice):
    check_frames(path, choice)


def test_frames_come_in_the_order_they_were_shown(file):
    """An oracle that needs no decoder: the encoded frames grow lighter."""
    with Video(file) as video:
        lightness = [image.mean() for image in video.read(range(len(video)))]
    assert (np.diff(lightness) > 0).all()
    shown = len(lightness)
    first = 5 * 180 // 40 if file.name == "edit_list.mp4" else 0
    assert lightness[-1] - lightness[0] == pytest.approx((shown - 1) / shown * 180 - first, abs=6)


def test_one_pass_is_enough_for_any_frame(file, monkeypatch):
    """The second pass, from the first packet on, is for streams without real key frames only."""
    passes, decode = [], Video._decode

    def record(video, wanted, runs, skip):
        passes.append(runs)
        return decode(video, wanted, runs, skip)

    monkeypatch.setattr(Video, "_decode", record)
    with Video(file) as video:
        for k in range(len(video)):
            video.read([k])
        one_each = len(passes) == len(video)
    assert one_each or file.name == "intra_refresh.mkv"


def test_only_what_is_needed_is_decoded(folder):
    path = encode(folder / "key_frames.mp4", moving_texture(60), "libx264", g="10", bf="0", sc_threshold="0", **H264)
    with Video(path) as video:
        stamps = [video._order[k] for k in (13, 14, 47)]
        assert video._runs(set(stamps)) == [(10, 14), (40, 47)]
        assert video._runs({video._order[9], video._order[10]}) == [(0, 10)]  # on across a key frame


def test_a_rotated_video_is_turned_upright(folder):
    path = encode(folder / "turned.mp4", moving_texture(4), "libx264", **H264)
    with Video(path) as video:
        upright = video.read([2])[0]
    content = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # 90° clockwise
    path.write_bytes(content)
    with Video(path) as video:
        turned = video.read([2])[0]
    assert turned.shape == (64, 48, 3)
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))


def test_a_damaged_frame_is_replaced_by_its_neighbour_unless_too_many_are(folder):
    path = encode(folder / "damaged.mp4", moving_texture(12), "libx264", g="1", bf="0", **H264)
    with Video(path) as video:
        places = [(packet.pos, packet.size) for packet in video._packets]
    content = bytearray(path.read_bytes())
    position, size = places[5]
    content[position : position + size] = bytes(size)
    path.write_bytes(content)
    with Video(path) as video:
        images = video.read([3, 5, 6, 8, 10])
        assert images[1] is images[2] or digest(images[1]) == digest(video.read([4])[0])
        with pytest.raises(BadVideo, match="1 of 2 frames could not be decoded"):
            video.read([5, 8])


def test_an_index_out_of_range_is_an_error(folder):
    path = encode(folder / "five.mp4", moving_texture(5), "libx264", **H264)
    with Video(path) as video, pytest.raises(IndexError):
        video.read([5])


def bad_file(kind: str, folder: Path) -> Path:
    """A file that can't be read as a video."""
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "random":
        path.write_bytes(np.random.default_rng(0).bytes(10_000))
    elif kind == "cut":
        whole = encode(folder / "uncut.mp4", moving_texture(30), "libx264", **H264).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "sound":
        path = write_sound(path.with_suffix(".mkv"))
    elif kind == "picture":
        encode(path, moving_texture(1), "libx264", **H264)
    return path


REASONS = {
    "empty": "Invalid data",
    "random": "Invalid data",
    "cut": "Invalid data",
    "sound": "no video stream",
    "picture": "1 frames, where a video has at least 2",
    "absent": "No such file",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_file_says_why(kind, tmp_path):
    path = bad_file(kind, tmp_path)
    with pytest.raises(BadVideo, match=REASONS[kind]) as caught:
        Video(path)
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts", "cut.avi"])
@given(share=st.floats(0, 1))
def test_a_cut_file_is_bad_or_begins_like_the_whole(folder, name, share):
    """Whatever is left of it: no crash, no wrong frames but the last one, which may be half there."""
    whole = folder / f"whole_{name}"
    if not whole.exists():
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        encode(whole, moving_texture(30), codec, g="10", bf="0", index_first=name.endswith("mp4"))
    content = whole.read_bytes()
    path = folder / name
    path.write_bytes(content[: round(share * len(content))])
    try:
        with Video(path) as video:
            images = video.read(range(len(video)))
    except BadVideo as error:
        assert error.reason and share < 1
    else:
        assert [digest(image) for image in images[:-1]] == truth(whole)[: len(images) - 1]


def test_a_bad_file_is_closed_again(tmp_path):
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("counts descriptors in /proc")
    path = bad_file("picture", tmp_path)
    before = len(list(open_files.iterdir()))
    caught = []
    for _ in range(5):
        try:
            Video(path)
        except BadVideo as error:
            caught.append(error)  # keeps the traceback, and with it the reader, alive
    assert len(list(open_files.iterdir())) == before
