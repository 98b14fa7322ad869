"""examples/shrink.py: the copy has all frames at their times and reads as the original does; rerun, killed, refused."""

import os
import signal
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import shrink
import torch
from helpers import FORK, encode, moving_texture, one_line, write, write_sound
from torch.nn.functional import interpolate

import cli
import video
from find import find_videos
from video import Video

CASES = [path.with_suffix("") for path in (Path(__file__).parents[2] / "shared" / "cases").glob("*.npy")]
FILES = {
    "train/a/packed.avi": dict(codec="mpeg4", bf="2", g="40"),
    "train/a/wide.mp4": dict(codec="libx264", bf="2"),
    "train/b/uneven.mkv": dict(codec="libx264", bf="2", times=np.cumsum(np.arange(40) % 4 + 1).tolist()),
    "train/b/small.webm": dict(codec="libvpx-vp9", images=moving_texture(40, 17, 35)),
    "test/a/turned.mov": dict(codec="libx264"),
    "test/b/raw.h264": dict(codec="libx264", bf="2"),
    "test/b/damaged.mp4": dict(codec="libx264", bf="0", g="1"),  # in the middle
}
OWN = {shrink.FAILED, shrink.RECIPE}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Videos of 40 frames, 72 × 96, in folders, with a link, a list, a sound, and one that is broken."""
    root = tmp_path_factory.mktemp("tree")
    for name, options in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        encode(root / name, **dict(images=moving_texture(40, 72, 96)) | options)
    turned, damaged = root / "test/a/turned.mov", root / "test/b/damaged.mp4"
    upright, left = (struct.pack(">5i", cos, sin, 0, -sin, cos) for cos, sin in ((1 << 16, 0), (0, 1 << 16)))
    before, _, after = turned.read_bytes().rpartition(upright)
    turned.write_bytes(before + left + after)
    with Video(damaged) as opened:
        packet, content = opened._packets[20], bytearray(damaged.read_bytes())
    content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    damaged.write_bytes(content)
    (root / "test/b/broken.mp4").write_bytes((root / "train/a/wide.mp4").read_bytes()[:3000])
    (root / "train/b/same.h264").hardlink_to(root / "test/b/raw.h264")
    write_sound(root / "sound.wav")
    write(root / "lists/train.txt", *(f"{name} {name.split('/')[1]}" for name in FILES))
    for path in CASES:
        (root / path.name).symlink_to(path)
    return root


def listed(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells files below a folder from others in their place: number, size and time."""
    states = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in states.items()}


def test_a_copy_has_all_frames_at_their_times_and_stands_in_for_the_original(tree, tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(video, "CHUNK", 100_000)  # a few frames, of which the damaged one comes last
    before, out, videos = listed(tree), tmp_path / "out", [*FILES, *(path.name for path in CASES)]
    flags = [tree, out, "--side=36", "--keyframes=8", "--crf=10", "--workers=2"]
    code, said, err = in_process(shrink, *flags)
    assert code == 1 and "error" not in err and listed(tree) == before
    assert said.startswith(f"{len(videos)} videos, ") and f"\n1 of {len(videos) + 1} " in said
    assert (out / shrink.FAILED).read_text().startswith("'test/b/broken.mp4'\t")
    assert listed(out).keys() == before.keys() - {"test/b/broken.mp4"} | OWN
    for name in ("sound.wav", "lists/train.txt"):
        assert (out / name).read_bytes() == (tree / name).read_bytes()
    uneven = [25 * time for time in Video(out / "train/b/uneven.mkv").times()]
    assert uneven == [time - 1 for time in FILES["train/b/uneven.mkv"]["times"]]
    for name in videos:
        with Video(tree / name) as old, Video(out / name) as new, av.open(str(out / name)) as container:
            packets = [packet for packet in container.demux() if packet.size]
            assert old.times() == new.times() == [packet.pts * packet.time_base for packet in packets]
            assert len(container.streams) == 1 and (len(packets) == 40 or name not in FILES)
            keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
            assert keys[0] == 0 and max(np.diff([*keys, len(packets)])) <= 8
            frames = [torch.from_numpy(np.stack(part.read(range(len(part))))).float() for part in (old, new)]
        luminance = torch.tensor([0.299, 0.587, 0.114])  # colours are at half the size
        was, now = ((part @ luminance)[:, None] for part in frames)
        assert min(now.shape[2:]) == min(36, min(was.shape[2:]) // 2 * 2)
        shown = interpolate(was, now.shape[2:], mode="bilinear", antialias=True)
        assert 10 * torch.log10(255**2 / (shown - now).square().mean()) > 36, name
    assert Video(out / "test/a/turned.mov").read([0])[0].shape == (48, 36, 3)
    for options in ({}, {"list_file": "lists/train.txt"}):
        old, new = (find_videos("folder", root, True, exclude=out / shrink.FAILED, **options) for root in (tree, out))
        assert [row[:3] for row in old.seen(tree)] == [row[:3] for row in new.seen(out)]
        assert len(old.shared) == len(new.shared) == (0 if options else 1)
    made = listed(out)
    assert in_process(shrink, *flags)[0] == 1 and {name for name, _ in made.items() ^ listed(out).items()} <= OWN
    refused = {"holds {": [*flags, "--side=20"], "is in": [tree, tree / "a"], "two": [tree]}
    for says, words in (refused | {"other files": [tree, tmp_path]}).items():
        code, _, err = in_process(shrink, *words)
        assert code == 2
        one_line(err, says)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_stopped_copy_goes_on_and_nothing_is_ever_half(tree, tmp_path, monkeypatch, in_process, number, code):
    out, whole = tmp_path / "out", shrink._encode

    def stopped(opened, config):
        content = whole(opened, config)
        if opened.path.endswith("uneven.mkv"):
            os.kill(os.getppid(), number)
        return content

    words = [str(tree), str(out), "--workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "_encode", stopped)
        patch.setattr(sys, "argv", ["shrink.py", *words])
        process = FORK.Process(target=cli.command_line, args=(shrink.main,))
        process.start()
        process.join(120)
    before = {name: state for name, state in listed(out).items() if not name.startswith(shrink.HIDDEN)}
    assert process.exitcode == code and {"test/b/raw.h264"} | OWN < before.keys() < listed(tree).keys() | OWN
    assert (out / shrink.HIDDEN).exists() == (number == signal.SIGKILL)
    assert in_process(shrink, *words)[0] == 1 and not (out / shrink.HIDDEN).exists()
    assert {name for name, _ in before.items() - listed(out).items()} == OWN
    assert all(Video(tree / name).times() == Video(out / name).times() for name in FILES)
