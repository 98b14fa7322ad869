"""The embedded data set: real files, the same from the same seed, made once, and no class without its motion."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import one_line
from tqdm import tqdm

import cli
import find
import synthetic
from moco import MoCoConfig
from video import Video

SMALL = {"train": 20, "test": 10, "frames": 12, "size": (24, 32)}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.mp4"))}


def draw(motion: str, seed: int, **options: float) -> np.ndarray:
    return synthetic._draw_video([motion], np.random.default_rng(seed), frames=64, height=40, width=40, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "synthetic"
    synthetic.make_synthetic(root, **SMALL)
    return root


def test_files_decode_to_the_asked_length_and_size_and_classes_are_balanced(made):
    for part, count in (("train", 2), ("test", 1)):
        names = [f"{part}/{motion}/{motion}_{n + 1:04}.mp4" for motion in synthetic.MOTIONS for n in range(count)]
        assert sorted(name for name in tree(made) if name.startswith(part)) == sorted(names)
        for name in names:
            with av.open(str(made / name)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert np.shape(frames) == (12, 24, 32, 3)
    assert os.listdir(made.parent) == ["synthetic"], "something was left beside the set"


def test_files_hold_what_was_drawn_in_order(tmp_path):
    drawn = draw("orbit", 1)
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[:, None, None, None], drawn.shape)
    for name, video in (("drawn.mp4", drawn), ("ramp.mp4", ramp)):
        synthetic._write_video(tmp_path / name, video)
        with av.open(str(tmp_path / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.abs(np.subtract(frames, video, dtype=float)).mean() < 8
    assert (np.diff(np.mean(frames, axis=(1, 2, 3))) > 0).all()
    with av.open(str(tmp_path / "drawn.mp4")) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert packets != sorted(packets), "no B-frames"


def test_the_seed_makes_the_set_and_no_two_videos_are_equal(made, tmp_path):
    synthetic.make_synthetic(tmp_path / "same", **SMALL)
    synthetic.make_synthetic(tmp_path / "other", **SMALL, seed=1)
    first, same, other = (tree(root) for root in (made, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == 30


def test_a_complete_set_is_kept_without_drawing_anything(made, monkeypatch):
    monkeypatch.delattr(synthetic, "_draw_video")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    synthetic.make_synthetic(made, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


def test_a_set_that_is_outdated_or_lacks_a_file_is_made_anew(made, tmp_path, monkeypatch):
    root = tmp_path / "set"
    monkeypatch.setattr(synthetic, "SYNTHETIC_VERSION", 100)
    synthetic.make_synthetic(root, **SMALL | {"train": 10})
    video = root / "train" / "spin" / "spin_0001.mp4"
    for version, content in ((0, b""), (0, None), (1, b"of an older version")):
        video.write_bytes(content) if content else video.unlink(missing_ok=True)
        monkeypatch.setattr(synthetic, "SYNTHETIC_VERSION", 100 + version)
        synthetic.make_synthetic(root, **SMALL)
        assert tree(root) == tree(made)


def test_an_interruption_leaves_nothing_and_the_next_call_makes_the_set(made, tmp_path, monkeypatch):
    write = synthetic._write_video

    def interrupted(path: Path, video: np.ndarray) -> None:
        if path.name == "sway_0002.mp4":
            raise KeyboardInterrupt
        write(path, video)

    monkeypatch.setattr(synthetic, "_write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make_synthetic(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    synthetic.make_synthetic(tmp_path / "set", **SMALL)
    assert tree(tmp_path / "set") == tree(made)


def test_another_folder_with_a_train_folder_is_not_taken_for_the_set(tmp_path):
    synthetic.make_synthetic(tmp_path, **SMALL)
    assert len(find.find_videos("synthetic", tmp_path, train=True)) == SMALL["train"]
    (tmp_path / synthetic.SYNTHETIC_MARKER).unlink()
    with pytest.raises(ValueError, match="--dataset folder"):
        find.find_videos("synthetic", tmp_path, train=True)


@pytest.mark.parametrize("name", ["train/mine.mp4", "train/spin/spin_0003.mp4", "test/spin/notes/a.txt", "train/link"])
@pytest.mark.parametrize("recipe", [SMALL, SMALL | {"seed": 1}, None])
def test_files_of_others_below_a_set_are_left_alone(made, tmp_path, name, recipe):
    """A set of the same recipe is kept, if all other videos are its own; None: there is no set."""
    root, mine = tmp_path / "set", tmp_path / "set" / name
    if recipe:
        shutil.copytree(made, root)
    mine.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("link"):
        mine.symlink_to(tmp_path)
    else:
        mine.write_text("years of work")
    before = tree(root)
    if recipe == SMALL and not name.endswith(".mp4"):
        synthetic.make_synthetic(root, **recipe)
    else:
        with pytest.raises(FileExistsError, match=rf"holds other files, such as '{name}'"):
            synthetic.make_synthetic(root, **recipe or SMALL)
    assert tree(root) == before and (mine.is_symlink() or mine.read_text() == "years of work")


def test_what_a_kill_has_left_is_removed_and_two_at_once_take_turns(made, tmp_path, monkeypatch):
    """Another process makes the set, is killed, and so on: that which waited for it begins when it is gone."""
    here, log, fork = tmp_path / "here", tmp_path / "log", multiprocessing.get_context("fork")
    root, write, go_on = (
        here / "set",
        synthetic._write_video,
        fork.RawValue("b"),
    )  # no lock, as a kill would leave it held

    def slow(path: Path, video: np.ndarray) -> None:
        write(path, video)
        with log.open("a") as file:
            file.write(".")
        while not go_on.value:
            time.sleep(0.01)

    def make() -> None:
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with this process
        synthetic.make_synthetic(root, **SMALL)

    monkeypatch.setattr(synthetic, "_write_video", slow)
    processes = [fork.Process(target=make) for _ in range(3)]
    processes[0].start()
    while not log.exists():
        time.sleep(0.01)
    processes[0].kill()
    processes[0].join()
    assert os.listdir(here) == [".set.partial"]
    log.write_text("")
    go_on.value = 1
    for process in processes[1:]:
        process.start()
    for process in processes[1:]:
        process.join()
        assert process.exitcode == 0
    assert tree(root) == tree(made) and os.listdir(here) == ["set"] and len(log.read_text()) == 30  # by one of them


@pytest.mark.slow
def test_the_class_shows_in_no_single_frame_and_not_in_the_mean_frame():
    """Nearest neighbour by what one frame or the average shows is right about as often as chance, 1 in 10."""
    videos = [draw(motion, 1000 * n + k) for k, motion in enumerate(synthetic.MOTIONS) for n in range(24)]
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


@pytest.mark.parametrize("motion", synthetic.MOTIONS)
def test_every_window_of_32_frames_shows_the_motion(motion):
    for seed in range(40):
        course = np.stack(synthetic._motion(motion, np.random.default_rng(seed), 64))
        for start in range(0, 33, 4):
            window = course[:, start : start + 32]
            extent = dict(zip(("right", "down", "size", "turns"), np.ptp(window, axis=1), strict=True))
            steps = dict(zip(extent, np.sign(np.diff(window)), strict=True))
            both = (steps["right"] != 0) & (steps["down"] != 0)  # the step between the stages may be
            moving = {name for name in extent if extent[name] > 1e-9}
            shown = {
                "rise": moving == {"down"} and (steps["down"] < 0).all() and extent["down"] > 0.15,
                "fall": moving == {"down"} and (steps["down"] > 0).all() and extent["down"] > 0.15,
                "sway": moving == {"right"} and len(set(steps["right"])) > 1 and extent["right"] > 0.2,
                "bounce": moving == {"down"} and len(set(steps["down"])) > 1 and extent["down"] > 0.2,
                "orbit": both.sum() > 25 and min(extent["right"], extent["down"]) > 0.2,
                "sway_then_bounce": both.sum() < 5 and extent["right"] > 0.2 and extent["down"] > 0.2,
                "grow": moving == {"size"} and (steps["size"] > 0).all() and extent["size"] > 0.5,
                "shrink": moving == {"size"} and (steps["size"] < 0).all() and extent["size"] > 0.5,
                "pulse": moving == {"size"} and len(set(steps["size"])) > 1 and extent["size"] > 1,
                "spin": moving == {"turns"} and len(set(steps["turns"])) == 1 and extent["turns"] > 0.7,
            }
            assert shown[motion], f"seed {seed}, frames from {start}: {extent}"


def test_shake_sets_how_far_the_camera_moves(monkeypatch):
    """A white background with a black column: where the camera goes, the column goes the other way."""
    background = np.ones((200, 200, 3), np.float32)
    background[:, 60] = 0
    monkeypatch.setattr(synthetic, "OBJECTS", 0)
    monkeypatch.setattr(synthetic, "_texture", lambda rng, height, width: background[:height, :width])
    for shake in (0.008, 0.06):
        for seed in range(20):
            still = np.random.default_rng(seed)
            video = synthetic._draw_video(["spin"], np.random.default_rng(seed), 48, 100, 100, shake)[..., 0]
            video = video.astype(float)
            dark = np.abs(video - np.median(video)).mean(1)  # (frames, width), inverted or not
            course = (dark * np.arange(100)).sum(1) / dark.sum(1)
            cycles, phases = still.uniform(1, 4, 2), still.random(2)
            reach = still.uniform(shake / 4, shake, 2)
            moved = 100 * reach[0] * np.sin(2 * np.pi * (np.arange(48) / 48 * cycles[0] + phases[0]))
            assert np.allclose(course - course.mean(), moved.mean() - moved, atol=0.05)


def test_a_camera_that_moves_too_far_to_keep_objects_inside_still_draws():
    for motion in synthetic.MOTIONS:
        assert draw(motion, 0, shake=0.5).shape == (64, 40, 40, 3)


def test_unlabeled_videos_are_for_pretraining_and_leave_the_others_as_they_are(made, tmp_path, monkeypatch):
    root = tmp_path / "shots"
    synthetic.make_synthetic(root, **SMALL, shots=3)
    monkeypatch.delattr(synthetic, "_draw_video")
    synthetic.make_synthetic(root, **SMALL, shots=3)  # complete
    files = tree(root)
    assert {name: content for name, content in files.items() if not name.startswith("unlabeled")} == tree(made)
    found = MoCoConfig(data=str(root)).find_videos()
    assert [os.path.relpath(path, root) for path in found.paths] == [f"unlabeled/{n:04}.mp4" for n in range(1, 21)]
    assert found.report == "synthetic unlabeled: 20 videos, no labels" and len(set(files.values())) == 50
    with Video(found.paths[0]) as video:
        assert len(video) == 3 * SMALL["frames"]
    for train, count in ((True, 20), (False, 10)):
        labelled = find.find_videos("synthetic", root, train)
        assert len(labelled) == count and labelled.classes == list(synthetic.MOTIONS)
    (tmp_path / "bad").write_text("unlabeled/0007.mp4\n")
    assert len(MoCoConfig(data=str(root), exclude=str(tmp_path / "bad")).find_videos()) == 19
    assert len(MoCoConfig(data=str(made)).find_videos()) == 20


def test_each_shot_shows_its_own_motion_of_the_same_object(monkeypatch):
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    monkeypatch.setattr(synthetic, "_texture", lambda rng, height, width: np.zeros((height, width, 3), np.float32))
    rows = np.arange(40)[:, None, None]
    for seed in range(10):
        motions = ["rise", "sway", "fall"]
        video = synthetic._draw_video(motions, np.random.default_rng(seed), 48, 40, 40, shake=0).astype(float)
        assert video.shape == (144, 40, 40, 3)
        seen = np.abs(video - np.median(video))
        heights = ((seen * rows).sum((1, 2, 3)) / seen.sum((1, 2, 3))).reshape(3, 48)
        assert (np.diff(heights[0][::8]) < 0).all() and (np.diff(heights[2][::8]) > 0).all()
        assert np.ptp(heights[1]) < 1 < np.ptp(heights[0])
        colours = [(shot.sum((0, 1, 2)) / shot.sum()).round(2).tolist() for shot in np.split(seen, 3)]
        assert np.ptp(colours, axis=0).max() <= 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        *({"train": 0}, {"test": 0}, {"seed": -1}, {"shake": -0.1}, {"frames": 0}, {"size": (0, 32)}),
        *({"shots": 0}, {"shots": 11}),
    ],
)
def test_numbers_that_make_no_set_are_named(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"not .*{name} {re.escape(str(value))}"):
        synthetic.make_synthetic(tmp_path / "set", **SMALL | wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_both_commands_make_the_same_set(tmp_path):
    flags = ["--train", "3", "--test", "2", "--seed", "1", "--frames", "8", "--size", "32", "--shots", "2"]
    for n, command in enumerate((["synthetic.py"], ["data.py", "synthetic"])):
        script = Path(synthetic.__file__).with_name(command[0])
        words = [sys.executable, str(script), *command[1:], str(tmp_path / str(n)), *flags]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "8/8" in done.stderr, done.stderr
    synthetic.make_synthetic(tmp_path / "other", train=3, test=2, seed=1, frames=8, size=(32, 32), shots=2)
    assert len(tree(tmp_path / "0")) == 8 and tree(tmp_path / "0") == tree(tmp_path / "1") == tree(tmp_path / "other")


@pytest.mark.parametrize("words", [[], ["one", "two"], ["one", "--shake=2"], ["one", "--size=0"], ["mine"]])
def test_what_the_command_cannot_do_is_one_line(tmp_path, words, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthetic.py", *words])
    with pytest.raises(SystemExit) as stop:
        cli.command_line(synthetic.main)
    one_line(capsys.readouterr().err)
    assert stop.value.code == 2 and os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("motion", synthetic.MOTIONS)
def test_an_object_stays_in_the_frame(motion, monkeypatch):
    monkeypatch.setattr(synthetic, "OBJECTS", 1)
    monkeypatch.setattr(synthetic, "_texture", lambda rng, height, width: np.zeros((height, width, 3), np.float32))
    for seed in range(20):
        video = draw(motion, seed).astype(int)
        drawn = (np.abs(video - np.median(video)) > 128).all(3)  # the median is the plain background
        border = drawn[:, [0, -1]].sum((1, 2)) + drawn[:, :, [0, -1]].sum((1, 2))
        assert drawn.any((1, 2)).all() and border.max() <= 3  # a tip may touch the border


@pytest.mark.parametrize("motion", synthetic.MOTIONS)
def test_the_motion_changes_frames_beyond_the_shaking_camera(motion, monkeypatch):
    def change() -> float:
        return np.mean([np.abs(np.diff(draw(motion, seed)[::2].astype(float), axis=0)).mean() for seed in range(10)])

    moving, course = change(), synthetic._motion
    monkeypatch.setattr(synthetic, "_motion", lambda *args: [np.full_like(path, path[32]) for path in course(*args)])
    assert moving > 1.05 * change()
