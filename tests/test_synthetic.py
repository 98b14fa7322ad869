"""The embedded data set: real files, the same from the same seed, made once, and no class without its motion."""

import contextlib
import itertools
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
from helpers import FORK, one_line, touch
from tqdm import tqdm

import data
import find
import synthetic
from moco import MoCoConfig

SMALL = {"train": 20, "test": 10, "frames": 12, "size": (24, 32)}
motions = pytest.mark.parametrize("motion", synthetic.MOTIONS)
SHOWN = {  # of 32 frames: what changes, by how much at least, and in which directions (None: one, whichever)
    "rise": ({"down"}, 0.15, {-1}),
    "fall": ({"down"}, 0.15, {1}),
    "sway": ({"right"}, 0.2, {-1, 1}),
    "bounce": ({"down"}, 0.2, {-1, 1}),
    "grow": ({"size"}, 0.5, {1}),
    "shrink": ({"size"}, 0.5, {-1}),
    "pulse": ({"size"}, 1, {-1, 1}),
    "spin": ({"turns"}, 0.7, None),
    "orbit": ({"right", "down"}, 0.2, {-1, 1}),
    "sway_then_bounce": ({"right", "down"}, 0.2, {-1, 1}),
}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.mp4"))}


def draw(shots: str, seed: int, **options: float | str) -> np.ndarray:
    return synthetic._draw_video(shots.split(), np.random.default_rng(seed), (64, 40, 40), **options)


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def listed(root: Path) -> tuple[int, int, int]:
    """How many videos are for pretraining, and how many labelled ones for training and for tests."""
    labelled = [find.find_videos("synthetic", root, train) for train in (True, False)]
    assert all(videos.classes == [*synthetic.MOTIONS] for videos in labelled)
    return len(MoCoConfig(data=str(root)).find_videos()), *map(len, labelled)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "synthetic"
    synthetic.make_synthetic(root, **SMALL)
    return root


def test_files_have_the_asked_length_and_size_classes_are_balanced_and_the_seed_makes_the_set(made, tmp_path):
    parts = [(part, n) for part, count in (("train", 2), ("test", 1)) for n in range(1, count + 1)]
    names = {f"{part}/{motion}/{motion}_{n:04}.mp4" for part, n in parts for motion in synthetic.MOTIONS}
    first = tree(made)
    assert first.keys() == names and {decoded(made / name).shape for name in names} == {(12, 24, 32, 3)}
    assert os.listdir(made.parent) == ["synthetic"], "something was left beside the set"
    synthetic.make_synthetic(tmp_path, **SMALL, seed=1)
    assert len({*first.values(), *tree(tmp_path).values()}) == 60


def test_files_hold_what_was_drawn_in_order_with_b_frames(tmp_path):
    lighter = np.arange(0, 128, 2, dtype=np.uint8)[:, None, None, None]  # from frame to frame
    video = draw("orbit", 1) // 2 + lighter
    synthetic._write_video(tmp_path / "a.mp4", video)
    frames = decoded(tmp_path / "a.mp4")
    assert np.abs(np.subtract(frames, video, dtype=float)).mean() < 8
    assert (np.diff(frames.mean((1, 2, 3))) > 0).all()
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert packets != sorted(packets)


def test_a_set_is_kept_if_it_is_complete_and_of_this_version_and_else_made_anew(made, tmp_path, monkeypatch):
    root = shutil.copytree(made, tmp_path / "set")
    video = root / "train" / "spin" / "spin_0001.mp4"
    video.unlink()
    synthetic.make_synthetic(root, **SMALL)
    assert tree(root) == tree(made)
    video.write_bytes(b"of an older version")
    monkeypatch.setattr(synthetic, "SYNTHETIC_VERSION", 100)
    synthetic.make_synthetic(root, **SMALL)
    assert tree(root) == tree(made)
    synthetic.make_synthetic(root, **SMALL | {"train": 10})
    assert len(tree(root)) == 20
    monkeypatch.delattr(synthetic, "_draw_video")
    synthetic.make_synthetic(root, **SMALL | {"train": 10})


@pytest.mark.parametrize("name", ["train/mine.mp4", "train/spin/spin_0003.mp4", "test/spin/notes/a.txt", "train/link"])
@pytest.mark.parametrize("seed", [0, 1])
def test_files_of_others_below_a_set_are_left_alone(made, tmp_path, name, seed):
    """A set of the same recipe is kept, if all other videos are its own."""
    root, mine = shutil.copytree(made, tmp_path / "set"), tmp_path / "set" / name
    mine.parent.mkdir(exist_ok=True)
    mine.symlink_to(tmp_path) if name.endswith("link") else mine.write_text("years of work")
    before, kept = tree(root), seed == 0 and not name.endswith(".mp4")
    refusal = pytest.raises(FileExistsError, match=rf"other files, such as '{name}'")
    with contextlib.nullcontext() if kept else refusal:
        synthetic.make_synthetic(root, **SMALL, seed=seed)
    assert tree(root) == before and (mine.is_symlink() or mine.read_text() == "years of work")


def test_shots_are_of_the_same_object_before_the_same_background(monkeypatch):
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    for seed in range(1, 6):
        video, mask = (draw("rise sway fall", seed, shake=0, masked=masked) for masked in (False, True))
        shots = zip(np.split(video, 3), np.split(mask, 3), strict=True)
        assert np.ptp([shot[where[..., 0] == 255].mean(0) for shot, where in shots], axis=0).max() < 5
        assert np.ma.ptp(np.ma.array(video, mask=mask > 0), axis=0).max() <= 1  # an edge of 1 % rounds to 0 in a mask


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that takes no other")
def test_a_folder_that_cannot_be_made_is_an_error_at_once():
    with pytest.raises(FileNotFoundError, match="/proc/"):
        synthetic.make_synthetic("/proc/set", **SMALL)


@pytest.mark.slow
def test_an_interruption_leaves_nothing_what_a_kill_has_left_is_removed_and_two_at_once_take_turns(made, tmp_path):
    here, log, write = tmp_path / "here", tmp_path / "log", synthetic._write_video

    def make(then):
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with this process
        synthetic._write_video = lambda *video: (write(*video), then())
        synthetic.make_synthetic(here / "set", **SMALL)

    def end_of(*actions):
        """The exit codes of processes that make the set at once and do these after each video, and what they leave."""
        processes = [FORK.Process(target=make, args=(action,)) for action in actions]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes], os.listdir(here)

    assert end_of(mock.Mock(side_effect=KeyboardInterrupt)) == ([1], [])
    assert end_of(lambda: signal.raise_signal(signal.SIGKILL)) == ([-signal.SIGKILL], [".set.partial"])
    with log.open("ab", buffering=0) as file:
        assert end_of(*[lambda: file.write(b".")] * 2) == ([0, 0], ["set"])
    assert tree(here / "set") == tree(made) and len(log.read_bytes()) == 30  # by one of them


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["", "noise"])
def test_the_class_shows_in_no_single_frame_and_not_in_the_mean_frame(scene):
    """Nearest neighbour by what one frame or the average shows is right about as often as chance, 1 in 10."""
    videos = [draw(motion, 1000 * n + k, scene=scene) for k, motion in enumerate(synthetic.MOTIONS) for n in range(24)]
    labels = np.repeat(np.arange(10), 24)
    looks = [(video[0].mean((0, 1)), video[0], video[32], video.mean(0)) for video in videos]
    for features in zip(*looks, strict=True):
        rows = torch.tensor(np.array(features, np.float64)).flatten(1)
        nearest = torch.cdist(rows, rows).fill_diagonal_(torch.inf).argmin(1)
        assert (labels[nearest] == labels).mean() < 0.18  # chance 0.1, four standard deviations 0.08


@motions
def test_every_window_of_32_frames_shows_the_motion(motion):
    names, extent, directions = SHOWN[motion]
    for seed, start in itertools.product(range(40), range(0, 33, 4)):
        paths = np.stack(synthetic._motion(motion, np.random.default_rng(seed), 64))[:, start : start + 32]
        window = dict(zip(("right", "down", "size", "turns"), paths, strict=True))
        assert {name for name, path in window.items() if np.ptp(path) > 1e-9} == names
        for name in names:
            steps = set(np.sign(np.diff(window[name])).astype(int)) - {0}
            assert np.ptp(window[name]) > extent and (steps == directions or (not directions and len(steps) == 1))
        both = (np.diff(window["right"]) != 0) & (np.diff(window["down"]) != 0)
        assert both.sum() > 25 if motion == "orbit" else both.sum() < 5  # the step between the stages may be


@motions
def test_an_object_is_drawn_where_its_shots_motion_takes_it_and_stays_in_the_frame(motion, monkeypatch):
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    names, _, directions = SHOWN[motion]
    for seed in range(8):
        drawn = draw(f"rise {motion}", seed, masked=True)[..., 0] > 128
        border = drawn[:, [0, -1]].sum((1, 2)) + drawn[:, :, [0, -1]].sum((1, 2))
        assert drawn.any((1, 2)).all() and border.max() <= 3  # a tip may touch the border
        places = [np.nonzero(frame) for frame in drawn[64:]]
        paths = {name: [place[axis].mean() / 40 for place in places] for axis, name in enumerate(("down", "right"))}
        paths["size"] = [np.log2(len(place[0])) / 8 for place in places]
        assert {name for name, path in paths.items() if np.ptp(path) > 0.125} == names - {"turns"}
        for name in names if directions and len(directions) == 1 else ():
            assert {np.sign(paths[name][-1] - paths[name][0])} == directions


def test_shake_sets_how_far_the_camera_moves(monkeypatch):
    assert draw("rise", 0, shake=0.5).shape == (64, 40, 40, 3)  # too far to keep objects inside
    monkeypatch.setattr(synthetic, "OBJECTS", 0)
    for seed in range(10):
        videos = [draw("spin", seed, shake=shake).astype(float) for shake in (0, 0.008, 0.06)]
        still, little, much = (np.abs(np.diff(video, axis=0)).mean() for video in videos)
        assert still == 0 < little < much


def test_unlabeled_videos_are_for_pretraining_and_leave_the_others_as_they_are(made, tmp_path):
    root = tmp_path / "shots"
    synthetic.make_synthetic(root, **SMALL, shots=3)
    files = tree(root)
    assert len({*files.values()}) == 50 and tree(made).items() < files.items() and listed(root) == (20, 20, 10)
    found = MoCoConfig(data=str(root)).find_videos()
    assert found.paths == [f"{root}/unlabeled/{n:04}.mp4" for n in range(1, 21)] and not found.classes
    assert len(decoded(Path(found.paths[0]))) == 3 * SMALL["frames"]
    (tmp_path / "bad").write_text("unlabeled/0007.mp4\n")
    assert len(MoCoConfig(data=str(root), exclude=str(tmp_path / "bad")).find_videos()) == 19
    (root / synthetic.SYNTHETIC_MARKER).unlink()
    with pytest.raises(ValueError, match="--dataset folder"):  # it may be anybody's
        find.find_videos("synthetic", root, train=True)


def test_numbers_that_make_no_set_are_refused(tmp_path, monkeypatch):
    wrong = dict(train=0, test=0, seed=-1, shake=-0.1, frames=1, size=(0, 32), shots=11, scene_bias=1.5)
    biased = [dict(scene_bias=0.5, shots=2), dict(scene_bias=0.5, test=9), dict(scene_bias=-0.5)]
    for options in [*({name: value} for name, value in wrong.items()), *biased]:
        with pytest.raises(ValueError, match="no set of"):
            synthetic.make_synthetic(tmp_path / "set", **SMALL | options)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a mounted folder: name a folder in it"):
        synthetic.make_synthetic(tmp_path, **SMALL)


def test_the_command_makes_a_set_and_says_in_one_line_what_it_cannot(tmp_path, monkeypatch, in_process):
    monkeypatch.chdir(tmp_path)
    flags = ["--train=3", "--test=2", "--seed=1", "--frames=8", "--size=32", "--shots=2"]
    assert in_process(data, "synthetic", "set", *flags)[0] == 0
    synthetic.make_synthetic("other", train=3, test=2, seed=1, frames=8, size=(32, 32), shots=2)
    assert len(tree(Path("set"))) == 8 and tree(Path("set")) == tree(Path("other"))
    touch(tmp_path, "mine/thesis.txt")
    for words in ([], ["one", "two"], ["one", "--shake=2"], ["mine"], ["one", "--scene_bias=1", "--shots=2"]):
        code, _, err = in_process(data, "synthetic", *words)
        one_line(err)
        assert code == 2 and sorted(os.listdir()) == ["mine", "other", "set"]


def test_masks_of_objects_are_where_what_moves_is_drawn(videos):
    for path in (videos / "test" / "rise" / "rise_0001.mp4", videos / "test" / "spin" / "spin_0001.mp4"):
        masks, frames = synthetic.object_masks(path), decoded(path).astype(float)
        assert masks.shape == frames.shape and masks.min() == 0 and masks.max() == 255
        change, apart = np.abs(np.diff(frames, axis=0)).mean(3), np.maximum(masks[1:], masks[:-1])[..., 0]
        assert change[apart > 128].mean() > 3 * change[apart == 0].mean()  # the camera hardly moves


def test_without_a_bias_all_is_as_before_there_was_one(made):
    """Marker, and means of drawn pixels, of commit 866340b."""
    before = [82.6026, 156.9973, 167.484, 92.6858, 111.8618, 157.6039, 167.8644, 86.2906, 160.9702, 180.1851]
    found = [draw(motion, n).mean() for n, motion in enumerate(synthetic.MOTIONS)]
    assert found == pytest.approx(before, abs=2e-4)
    marker = (made / synthetic.SYNTHETIC_MARKER).read_text()
    assert marker.endswith('"seed": 0, "frames": 12, "size": [24, 32], "shake": 0.008, "shots": 1}')


@pytest.mark.parametrize("share", [0.1, 0.7, 1])
def test_the_asked_share_of_videos_is_in_the_scenes_of_its_motion_the_rest_evenly_in_others(share):
    names = synthetic._synthetic_names(4000, 1000, seed=3, scene_bias=share)
    assert len(names) == 8000 and synthetic._synthetic_names(50, 10, seed=3, scene_bias=share).keys() < names.keys()
    for part, chance in {"train": share, "test": share, "other": 0}.items():
        paths = [Path(name) for name in names if name.startswith(part)]
        scenes = ((synthetic.scene_of(path), path.parent.name) for path in paths)
        away = [(synthetic.MOTIONS.index(scene) - synthetic.MOTIONS.index(own)) % 10 for scene, own in scenes]
        found = np.bincount(away, minlength=10) / len(paths)
        expected = np.array([chance, *[(1 - chance) / 9] * 9])
        assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / len(paths))).all()
    assert {synthetic.scene_of(name) for name in names if name.startswith(("unseen", "noise"))} == {"free", "noise"}


def test_a_biased_set_has_three_parts_more_that_training_does_not_see(tmp_path):
    root = tmp_path / "set"
    synthetic.make_synthetic(root, **SMALL | {"size": (81, 90), "scene_bias": 1})
    files = tree(root)
    assert Counter(Path(name).parts[0] for name in files) == dict(train=20, test=10, unseen=10, other=10, noise=10)
    assert {"test/rise/rise_0001_rise.mp4", "unseen/spin/spin_0001_free.mp4"} < files.keys()
    assert listed(root) == (20, 20, 10)
    noise = decoded(root / "noise/rise/rise_0001_noise.mp4")[..., 0].astype(int)
    within, between = (np.abs(np.diff(noise, axis=2))[..., k::2].mean() for k in (0, 1))
    assert noise.shape == (12, 81, 90) and within < 20 < 60 < between  # grains of 2 pixels


def test_an_object_of_noise_shows_over_time_alone(monkeypatch):
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    monkeypatch.setattr(synthetic, "_choose", lambda rng, options, scene: options[0])  # a disc
    for motion in ("rise", "orbit", "grow", "spin"):
        video = draw(motion, 3, shake=0, scene="noise")[..., 0].astype(int)
        mask = draw(motion, 3, shake=0, masked=True)[..., 0]
        beside, drawn = np.ma.array(video, mask=mask > 0), mask == 255
        assert np.ma.ptp(beside, axis=0).max() == 0
        assert (video != beside.mean(0).filled(-1))[drawn].mean() > 0.9
        assert abs(video[drawn].mean() - 127.5) < 30 and 60 < video[drawn].std() < 90
        if motion == "rise":  # by whole grains: 15 pixels a frame would change if these were turned
            assert (np.diff(video, axis=0) != 0).sum((1, 2)).mean() < 13.5


def test_grains_move_whole_and_none_shows_twice_in_a_frame():
    rng, places = np.random.default_rng(0), np.mgrid[:30, :30]
    pattern = rng.random((synthetic.SPRITE, synthetic.SPRITE))
    assert np.array_equal(synthetic._grains(rng, places + 7.4, pattern), pattern[7:37, 7:37])
    grown = synthetic._grains(rng, places * 0.7, pattern)
    assert len(np.unique(grown)) == 900 and np.isin(grown, pattern).sum() == 21**2
