"""Folders of pictures as videos: what is one, exact frames, damaged pictures, and all places that take a video."""

import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import shrink
import torch
from helpers import encode, moving_texture, touch, write
from PIL import Image

import data
import mcl
from find import find_videos
from video import BadVideo, Video, frames_of

IMAGES = moving_texture(12)


def write_frames(folder: Path, name: str = "img_{:05}.png", numbers=range(1, 13)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(numbers, IMAGES, strict=True):
        Image.fromarray(image).save(folder / name.format(number))
    return folder


def shown(folder: Path, frames) -> list[int | None]:
    """Which of `IMAGES` each of these frames is."""
    with Video(folder) as opened:
        read = opened.read([*frames])
    return [next((k for k, image in enumerate(IMAGES) if np.array_equal(image, found)), None) for found in read]


@pytest.mark.parametrize("name", ["img_{:05}.png", "{}.png", "v_1_g02_frame{}_x.png", "{:03}.bmp", "Image {}.bmp"])
def test_frames_equal_the_pictures_in_order_of_their_numbers(tmp_path, name):
    numbers = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 100]  # which do not sort as text, and of which one is missing
    folder = write_frames(tmp_path / "a [1]*?%d {x}" / "v.avi", name, numbers=numbers)
    touch(folder, "._img_00001.png", "cover.png", "notes.txt", *[f"flow_{c}_{k:04}.png" for c in "xy" for k in numbers])
    with Video(folder) as opened:
        assert len(opened) == 12 and opened.times() == [Fraction(k, 25) for k in range(12)]
        with pytest.raises(IndexError):
            opened.read([12])
    with Video(folder, rate=30000 / 1001) as opened:
        assert opened.times()[11] == Fraction(11 * 1001, 30000)
    assert shown(folder, range(12)) == [*range(12)]
    assert shown(str(folder), [9, 2, 3, 2, 11, 0]) == [9, 2, 3, 2, 11, 0]


def test_only_the_wanted_pictures_are_read(tmp_path, monkeypatch):
    folder, read, packet = write_frames(tmp_path / "v"), [], Video._packet
    monkeypatch.setattr(Video, "_packet", lambda opened, i: read.append(i) or packet(opened, i))
    assert shown(folder, [5, 7, 8]) == [5, 7, 8] and read == [0, 5, 7, 8]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg_is_decoded_as_ffmpeg_does_and_scaled_to_the_first_size(tmp_path, suffix):
    folder = write_frames(tmp_path / "v", "%{:05}." + suffix)
    with Video(folder) as opened:
        read = opened.read(range(12))
    for path, image in zip(sorted(folder.iterdir()), read, strict=True):
        with av.open(f"file:{path}", format="jpeg_pipe") as container:
            assert np.array_equal(next(container.decode(video=0)).to_ndarray(format="rgb24"), image)
    Image.fromarray(moving_texture(1, 100, 80)[0]).save(folder / f"%00006.{suffix}")
    with Video(folder) as opened:
        assert [image.shape for image in opened.read([4, 5, 6])] == [(48, 64, 3)] * 3


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


def test_a_tree_is_listed_once_and_no_picture_is_looked_at(tmp_path, monkeypatch):
    touch(tmp_path, *[f"c{v % 3}/v{v}/{k}.jpg" for v in range(20) for k in range(1, 12)])
    calls, scan, look = Counter(), os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: calls.update([path]) or scan(path))
    monkeypatch.setattr(os, "stat", lambda path, **options: calls.update([f"stat {path}"]) or look(path, **options))
    assert len(find_videos("folder", tmp_path, train=True)) == 20
    assert max(calls[path] for path in calls if f"{tmp_path}/" in path and not path.startswith("stat")) == 1
    assert not any(path.endswith(".jpg") for path in calls)


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
    many = damage(write_frames(tmp_path / "many"), 2, 4, 6, 8, 10, 11)
    with pytest.raises(BadVideo, match=r"many: 6 of 12 frames could not be decoded"):
        shown(many, range(12))
    for kind in range(6):
        first = damage(write_frames(tmp_path / f"first{kind}"), *[0] * (kind + 1))
        with pytest.raises(BadVideo, match=f"{first}: Invalid data"):
            Video(first)
    touch(tmp_path, "none/1.png")
    with pytest.raises(BadVideo, match="none: not a file"):
        Video(tmp_path / "none")


def test_a_run_sees_the_number_of_frames_wherever_they_lie(tmp_path):
    write_frames(tmp_path / "old" / "c" / "v")
    before = find_videos("folder", tmp_path / "old", train=True)
    was = before.seen(tmp_path / "old"), before.mark(tmp_path / "old")
    root = (tmp_path / "old").rename(tmp_path / "new")
    touch(root / "c/v", *[f"flow_x_{k}.jpg" for k in range(500)])  # which the folder's own size shows
    videos = find_videos("folder", root, train=True)
    assert (videos.seen(root), videos.mark(root)) == was and was[0] == [["c/v", 0, "c", 12]]
    (root / "c/v/img_00012.png").unlink()
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
    touch(root, "c/v/flow_x_1.jpg", "c/v/flow_x_2.jpg")
    write(root / "list.txt", "c/v 0", "c/w.avi 1", "c/link.avi 0")
    code, said, err = in_process(shrink, root, out, "--side=24", "--workers=1", "--frame_rate=10")
    assert code == 1 and said.startswith("2 videos, 0.0 → 0.0 MB;") and "1 of 3 videos" in said, err
    flow = [f"c/{folder}/flow_x_{k}.jpg" for folder in ("link", "v") for k in (1, 2)]
    held = {*flow, "c/link.mp4", "c/v.mp4", "c/w.avi", "failed.txt", "list.txt"}
    assert {str(path.relative_to(out)) for path in out.rglob("[!.]*") if path.is_file()} == held
    assert all((out / name).is_symlink() == name.startswith("c/v") for name in held)  # of two names of a file, one is
    assert (out / "failed.txt").read_text() == "'c/bad'\tInvalid data found when processing input\n"
    kept = find_videos("folder", root, train=True, exclude=out / "failed.txt")
    assert kept.paths == [f"{root}/c/{name}" for name in ("link", "v", "w.avi")] and kept.classes == ["c"]
    listed = [find_videos("folder", place, train=True, list_file="list.txt") for place in (root, out)]
    assert listed[0].labels == [0, 1, 0] and listed[1].labels == [0, 1]
    with Video(root / "c/v", 10) as old, Video(out / "c/v.mp4") as new:
        assert new.times() == old.times() and new.read([3])[0].shape == (24, 32, 3)
