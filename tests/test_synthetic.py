"""The embedded data set: real files, the same from the same seed, made once, and no class without its motion."""

import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import FORK, one_line, touch, within
from tqdm import tqdm

import data
import find
import synthetic
from moco import MoCoConfig

SMALL = {"train": 20, "test": 10, "frames": 12, "size": (24, 32)}
motions = pytest.mark.parametrize("motion", synthetic.MOTIONS)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.mp4"))}


def draw(motion: str, seed: int, **options: float | str) -> np.ndarray:
    return synthetic._draw_video([motion], np.random.default_rng(seed), (64, 40, 40), **options)


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


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
    synthetic.make_synthetic(tmp_path / "same", **SMALL)
    synthetic.make_synthetic(tmp_path / "other", **SMALL, seed=1)
    same, other = tree(tmp_path / "same"), tree(tmp_path / "other")
    assert first == same and len({*first.values(), *other.values()}) == 60


def test_files_hold_what_was_drawn_in_order(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[:, None, None, None], (64, 40, 40, 3))
    for video in (draw("orbit", 1), ramp):
        synthetic._write_video(tmp_path / "a.mp4", video)
        frames = decoded(tmp_path / "a.mp4")
        assert np.abs(np.subtract(frames, video, dtype=float)).mean() < 8
    assert (np.diff(np.mean(frames, axis=(1, 2, 3))) > 0).all()
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert packets != sorted(packets), "no B-frames"


def test_a_set_is_kept_if_it_is_complete_and_of_this_version_and_else_made_anew(made, tmp_path, monkeypatch):
    root = tmp_path / "set"
    monkeypatch.setattr(synthetic, "SYNTHETIC_VERSION", 100)
    synthetic.make_synthetic(root, **SMALL | {"train": 10})
    video = root / "train" / "spin" / "spin_0001.mp4"
    for version, content in ((0, b""), (0, None), (1, b"of an older version")):
        video.write_bytes(content) if content else video.unlink(missing_ok=True)
        monkeypatch.setattr(synthetic, "SYNTHETIC_VERSION", 100 + version)
        synthetic.make_synthetic(root, **SMALL)
        assert tree(root) == tree(made)
    monkeypatch.delattr(synthetic, "_draw_video")
    synthetic.make_synthetic(root, **SMALL)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path: Path, _: np.ndarray) -> None:
        path.touch()
        if path.name == "sway_0002.mp4":
            raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make_synthetic(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train/mine.mp4", "train/spin/spin_0003.mp4", "test/spin/notes/a.txt", "train/link"])
@pytest.mark.parametrize("recipe", [SMALL, SMALL | {"seed": 1}, None])
def test_files_of_others_below_a_set_are_left_alone(made, tmp_path, name, recipe):
    """A set of the same recipe is kept, if all other videos are its own; None: there is no set."""
    root, mine = tmp_path / "set", tmp_path / "set" / name
    if recipe:
        shutil.copytree(made, root)
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.symlink_to(tmp_path) if name.endswith("link") else mine.write_text("years of work")
    before = tree(root)
    if recipe == SMALL and not name.endswith(".mp4"):
        synthetic.make_synthetic(root, **recipe)
    else:
        with pytest.raises(FileExistsError, match=rf"other files, such as '{name}'"):
            synthetic.make_synthetic(root, **recipe or SMALL)
    assert tree(root) == before and (mine.is_symlink() or mine.read_text() == "years of work")


@pytest.mark.slow
def test_what_a_kill_has_left_is_removed_and_two_at_once_take_turns(made, tmp_path, monkeypatch):
    here, log, write = tmp_path / "here", tmp_path / "log", synthetic._write_video
    waits = FORK.RawValue("b", 1)  # no lock, as a kill would leave it held

    def counted(path: Path, video: np.ndarray) -> None:
        write(path, video)
        with log.open("a") as file:
            file.write(".")
        while waits.value:  # the first process, for its end
            time.sleep(0.01)

    def make() -> None:
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with this process
        synthetic.make_synthetic(here / "set", **SMALL)

    monkeypatch.setattr(synthetic, "_write_video", counted)
    killed, *others = [FORK.Process(target=make) for _ in range(3)]
    killed.start()
    assert within(60, log.exists)
    killed.kill()
    killed.join()
    assert os.listdir(here) == [".set.partial"]
    log.write_text("")
    waits.value = 0
    for process in others:
        process.start()
    for process in others:
        process.join()
        assert process.exitcode == 0
    assert tree(here / "set") == tree(made) and os.listdir(here) == ["set"]
    assert len(log.read_text()) == 30  # by one of them


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["", "noise"])
def test_the_class_shows_in_no_single_frame_and_not_in_the_mean_frame(scene):
    """Nearest neighbour by what one frame or the average shows is right about as often as chance, 1 in 10."""
    videos = [draw(motion, 1000 * n + k, scene=scene) for k, motion in enumerate(synthetic.MOTIONS) for n in range(24)]
    labels = np.repeat(np.arange(10), 24)
    looks = {
        "mean colour": [video[0].mean((0, 1)) for video in videos],
        "first frame": [video[0, ::2, ::2].ravel() / 1.0 for video in videos],
        "middle frame": [video[32, ::2, ::2].ravel() / 1.0 for video in videos],
        "mean frame": [video.mean(0)[::2, ::2].ravel() for video in videos],
    }
    for name, features in looks.items():
        square = (np.square(features).sum(1) - 2 * np.dot(features, np.transpose(features))) + np.diag([np.inf] * 240)
        right = (labels[square.argmin(1)] == labels).mean()
        assert right < 0.18, f"{name}: {right:.2f} right"  # chance 0.1, four standard deviations 0.08


SHOWN = {  # of 32 frames: what changes, by how much at least, and in which directions
    "rise": ("down", 0.15, {-1}),
    "fall": ("down", 0.15, {1}),
    "sway": ("right", 0.2, {-1, 1}),
    "bounce": ("down", 0.2, {-1, 1}),
    "grow": ("size", 0.5, {1}),
    "shrink": ("size", 0.5, {-1}),
    "pulse": ("size", 1, {-1, 1}),
    "spin": ("turns", 0.7, None),
}


@motions
def test_every_window_of_32_frames_shows_the_motion(motion):
    for seed, start in itertools.product(range(40), range(0, 33, 4)):
        paths = synthetic._motion(motion, np.random.default_rng(seed), 64)
        names = ("right", "down", "size", "turns")
        window = {name: path[start : start + 32] for name, path in zip(names, paths, strict=True)}
        moving = {name for name, path in window.items() if np.ptp(path) > 1e-9}
        if motion in SHOWN:
            name, extent, directions = SHOWN[motion]
            steps = set(np.sign(np.diff(window[name])).astype(int))
            assert moving == {name} and np.ptp(window[name]) > extent
            assert steps - {0} == directions or (directions is None and len(steps) == 1)
        else:
            both = (np.diff(window["right"]) != 0) & (np.diff(window["down"]) != 0)
            assert moving == {"right", "down"} and min(np.ptp(window[name]) for name in moving) > 0.2
            assert both.sum() > 25 if motion == "orbit" else both.sum() < 5  # the step between the stages may be


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
    assert {name: content for name, content in files.items() if not name.startswith("unlabeled")} == tree(made)
    found = MoCoConfig(data=str(root)).find_videos()
    assert found.paths == [f"{root}/unlabeled/{n:04}.mp4" for n in range(1, 21)]
    assert not found.classes and len(set(files.values())) == 50
    assert len(decoded(Path(found.paths[0]))) == 3 * SMALL["frames"]
    for train in (True, False):
        labelled = find.find_videos("synthetic", root, train)
        assert len(labelled) == (20 if train else 10) and labelled.classes == list(synthetic.MOTIONS)
    (tmp_path / "bad").write_text("unlabeled/0007.mp4\n")
    assert len(MoCoConfig(data=str(root), exclude=str(tmp_path / "bad")).find_videos()) == 19
    (root / synthetic.SYNTHETIC_MARKER).unlink()
    with pytest.raises(ValueError, match="--dataset folder"):  # it may be anybody's
        find.find_videos("synthetic", root, train=True)


@pytest.fixture
def one_object(monkeypatch):
    """Videos have one object before a plain background."""
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    monkeypatch.setattr(
        synthetic, "_texture", lambda rng, height, width, scene: np.zeros((height, width, 3), np.float32)
    )


def test_each_shot_shows_its_own_motion_of_the_same_object(one_object):
    rows = np.arange(40)[:, None, None]
    for seed in range(10):
        shots = ["rise", "sway", "fall"]
        video = synthetic._draw_video(shots, np.random.default_rng(seed), (48, 40, 40), shake=0).astype(float)
        assert video.shape == (144, 40, 40, 3)
        seen = np.abs(video - np.median(video))
        heights = ((seen * rows).sum((1, 2, 3)) / seen.sum((1, 2, 3))).reshape(3, 48)
        assert (np.diff(heights[0][::8]) < 0).all() and (np.diff(heights[2][::8]) > 0).all()
        assert np.ptp(heights[1]) < 1 < np.ptp(heights[0])
        colours = [(shot.sum((0, 1, 2)) / shot.sum()).round(2).tolist() for shot in np.split(seen, 3)]
        assert np.ptp(colours, axis=0).max() <= 0.02


@motions
def test_an_object_moves_and_stays_in_the_frame(motion, one_object):
    for seed in range(8):
        video = draw(motion, seed).astype(int)
        drawn = (np.abs(video - np.median(video)) > 128).all(3)  # the median is the plain background
        border = drawn[:, [0, -1]].sum((1, 2)) + drawn[:, :, [0, -1]].sum((1, 2))
        assert drawn.any((1, 2)).all() and border.max() <= 3  # a tip may touch the border
    assert np.diff(draw(motion, 0, shake=0).astype(int), axis=0).any((1, 2, 3)).mean() > 0.9  # it moves


def test_numbers_that_make_no_set_are_refused(tmp_path):
    wrong = dict(train=0, test=0, seed=-1, shake=-0.1, frames=1, size=(0, 32), shots=11, scene_bias=1.5)
    biased = [dict(scene_bias=0.5, shots=2), dict(scene_bias=0.5, test=9), dict(scene_bias=-0.5)]
    for options in [*({name: value} for name, value in wrong.items()), *biased]:
        with pytest.raises(ValueError, match="no set of"):
            synthetic.make_synthetic(tmp_path / "set", **SMALL | options)


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
        masks = synthetic.object_masks(path)
        frames = decoded(path).astype(float)
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
        places = [synthetic.MOTIONS.index(synthetic.scene_of(path)) for path in paths]
        own = [synthetic.MOTIONS.index(path.parent.name) for path in paths]
        found = np.bincount(np.subtract(places, own) % 10, minlength=10) / len(paths)
        expected = np.array([chance, *[(1 - chance) / 9] * 9])
        assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / len(paths))).all()
    assert {synthetic.scene_of(name) for name in names if name.startswith(("unseen", "noise"))} == {"free", "noise"}


def test_a_biased_set_has_three_parts_more_that_training_does_not_see(tmp_path):
    root, options = tmp_path / "set", SMALL | {"size": (81, 90), "scene_bias": 1}
    synthetic.make_synthetic(root, **options)
    files = tree(root)
    counts = {part: sum(name.startswith(part) for name in files) for part in synthetic.PARTS}
    assert counts == {"train": 20, "test": 10, "unlabeled": 0, "unseen": 10, "other": 10, "noise": 10}
    assert {"test/rise/rise_0001_rise.mp4", "unseen/spin/spin_0001_free.mp4"} < files.keys()
    for train in (True, False):
        found = find.find_videos("synthetic", root, train)
        assert len(found) == (20 if train else 10) and found.classes == list(synthetic.MOTIONS)
    assert len(MoCoConfig(data=str(root)).find_videos()) == 20
    noise = decoded(root / "noise/rise/rise_0001_noise.mp4")[..., 0].astype(int)
    within, between = (np.abs(np.diff(noise, axis=2))[..., k::2].mean() for k in (0, 1))
    assert noise.shape == (12, 81, 90) and within < 20 < 60 < between  # grains of 2 pixels


def test_a_frame_tells_scenes_of_motions_apart_by_its_mean_colour():
    scenes = np.repeat(synthetic.MOTIONS, 6)
    colours = [draw(synthetic.MOTIONS[n % 7], n, scene=scene)[2].mean((0, 1)) for n, scene in enumerate(scenes)]
    apart = np.square(np.subtract(colours, np.array(colours)[:, None])).sum(2) + np.diag([np.inf] * 60)
    assert (scenes[apart.argmin(1)] == scenes).all()


@motions
def test_an_object_of_noise_shows_its_motion_over_time(motion, monkeypatch):
    """What differs from the median over time is the object."""
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    monkeypatch.setattr(synthetic, "_choose", lambda rng, options, scene: options[0])  # a disc
    video = draw(motion, 3, shake=0, scene="noise")[..., 0]
    places = [np.nonzero(frame) for frame in video != np.median(video, axis=0)]
    grains = np.concatenate([frame[place] for frame, place in zip(video, places, strict=True)])
    assert abs(grains.mean() - 127.5) < 30 and 60 < grains.std() < 90
    paths = {name: [place[axis].mean() for place in places] for axis, name in enumerate(("down", "right"))}
    moving = {name for name, path in paths.items() if np.ptp(path) > 5}
    paths["size"] = [len(place[0]) for place in places]
    moving |= {"size"} if max(paths["size"]) > 2 * min(paths["size"]) else set()
    name, _, directions = SHOWN.get(motion, ("", 0, None))
    assert moving == ({name} - {"turns"} if name else {"down", "right"})
    if directions and len(directions) == 1:
        assert {np.sign(paths[name][-1] - paths[name][0])} == directions
    if motion in ("rise", "fall"):  # by whole grains: 15 pixels a frame would change if these were turned
        assert (video[1:] != video[:-1]).sum((1, 2)).mean() < 13.5


def test_grains_move_whole_and_none_shows_twice_in_a_frame():
    rng, places = np.random.default_rng(0), np.mgrid[:30, :30]
    pattern = rng.random((synthetic.SPRITE, synthetic.SPRITE))
    assert np.array_equal(synthetic._grains(rng, places + 7.4, pattern), pattern[7:37, 7:37])
    grown = synthetic._grains(rng, places * 0.7, pattern)
    assert len(np.unique(grown)) == 900 and np.isin(grown, pattern).sum() == 21**2
