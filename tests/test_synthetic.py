"""The embedded data set: real files, the same from the same seed, made once, and no class without its motion."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest

import data
from moco import MoCoConfig

SMALL = {"train": 20, "test": 10, "frames": 12, "size": (24, 32)}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.mp4"))}


def draw(motion: str, seed: int, **options: float) -> np.ndarray:
    return data._draw_video([motion], np.random.default_rng(seed), frames=64, height=40, width=40, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "synthetic"
    data.make_synthetic(root, **SMALL)
    return root


def test_files_decode_to_the_asked_length_and_size_and_classes_are_balanced(made):
    for part, count in (("train", 2), ("test", 1)):
        assert sorted(path.name for path in (made / part).iterdir()) == sorted(data.MOTIONS)
        for motion in data.MOTIONS:
            paths = sorted((made / part / motion).iterdir())
            assert [path.name for path in paths] == [f"{motion}_{n:04}.mp4" for n in range(1, count + 1)]
            for path in paths:
                with av.open(str(path)) as container:
                    frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
                assert np.shape(frames) == (12, 24, 32, 3)
    assert [path.name for path in made.parent.iterdir()] == ["synthetic"], "something was left beside the set"


def test_files_hold_what_was_drawn_in_order(tmp_path):
    drawn = draw("orbit", 1)
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[:, None, None, None], drawn.shape)
    for name, video in (("drawn.mp4", drawn), ("ramp.mp4", ramp)):
        data._write_video(tmp_path / name, video)
        with av.open(str(tmp_path / name)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.abs(np.subtract(frames, video, dtype=float)).mean() < 8
    assert (np.diff(np.mean(frames, axis=(1, 2, 3))) > 0).all()
    with av.open(str(tmp_path / "drawn.mp4")) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert packets != sorted(packets), "no B-frames"


def test_the_seed_makes_the_set_and_no_two_videos_are_equal(made, tmp_path):
    data.make_synthetic(tmp_path / "same", **SMALL)
    data.make_synthetic(tmp_path / "other", **SMALL, seed=1)
    first, same, other = (tree(root) for root in (made, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == 30


def test_a_complete_set_is_kept_without_drawing_anything(made, monkeypatch):
    monkeypatch.delattr(data, "_draw_video")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    data.make_synthetic(made, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


def test_a_set_that_is_outdated_or_lacks_a_file_is_made_anew(made, tmp_path, monkeypatch):
    root = tmp_path / "set"
    data.make_synthetic(root, **SMALL | {"train": 10})
    data.make_synthetic(root, **SMALL)
    assert tree(root) == tree(made)
    (root / "train" / "spin" / "spin_0001.mp4").unlink()
    data.make_synthetic(root, **SMALL)
    assert tree(root) == tree(made)
    stale = root / "train" / "spin" / "spin_0001.mp4"
    stale.write_bytes(b"of an older version")
    monkeypatch.setattr(data, "SYNTHETIC_VERSION", data.SYNTHETIC_VERSION + 1)
    data.make_synthetic(root, **SMALL)
    assert tree(root) == tree(made)


def test_an_interruption_leaves_nothing_and_the_next_call_makes_the_set(made, tmp_path, monkeypatch):
    write = data._write_video

    def interrupted(path: Path, video: np.ndarray) -> None:
        if path.name == "sway_0002.mp4":
            raise KeyboardInterrupt
        write(path, video)

    monkeypatch.setattr(data, "_write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.make_synthetic(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    data.make_synthetic(tmp_path / "set", **SMALL)
    assert tree(tmp_path / "set") == tree(made)


def test_another_folder_with_a_train_folder_is_not_taken_for_the_set(tmp_path):
    data.make_synthetic(tmp_path, **SMALL)
    assert len(data.find_videos("synthetic", tmp_path, train=True)) == SMALL["train"]
    (tmp_path / data.SYNTHETIC_MARKER).unlink()
    with pytest.raises(ValueError, match="--dataset folder"):
        data.find_videos("synthetic", tmp_path, train=True)


@pytest.mark.parametrize("name", ["train/mine.mp4", "train/spin/spin_0003.mp4", "test/spin/notes/a.txt", "train/link"])
@pytest.mark.parametrize("recipe", [SMALL, SMALL | {"seed": 1}])
def test_files_of_others_below_a_set_are_left_alone(made, tmp_path, name, recipe):
    """A set of the same recipe is kept, if all other videos are its own."""
    root, mine = tmp_path / "set", tmp_path / "set" / name
    shutil.copytree(made, root)
    mine.parent.mkdir(exist_ok=True)
    if name.endswith("link"):
        mine.symlink_to(tmp_path)
    else:
        mine.write_text("years of work")
    before = tree(root)
    if recipe == SMALL and not name.endswith(".mp4"):
        data.make_synthetic(root, **recipe)
    else:
        with pytest.raises(FileExistsError, match=rf"holds other files, such as '{name}'"):
            data.make_synthetic(root, **recipe)
    assert tree(root) == before and (mine.is_symlink() or mine.read_text() == "years of work")


def test_what_a_kill_has_left_is_removed_and_two_at_once_take_turns(made, tmp_path, monkeypatch):
    """Another process makes the set, is killed, and so on: that which waited for it begins when it is gone."""
    here, log, fork = tmp_path / "here", tmp_path / "log", multiprocessing.get_context("fork")
    root, write, go_on = here / "set", data._write_video, fork.RawValue("b")  # no lock, as a kill would leave it held

    def slow(path: Path, video: np.ndarray) -> None:
        write(path, video)
        with log.open("a") as file:
            file.write(".")
        while not go_on.value:
            time.sleep(0.01)

    monkeypatch.setattr(data, "_write_video", slow)
    processes = [fork.Process(target=data.make_synthetic, args=(root,), kwargs=SMALL) for _ in range(3)]
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


@pytest.mark.parametrize("marked", [False, True])
def test_a_folder_with_other_files_is_left_alone(tmp_path, marked):
    if marked:
        data.make_synthetic(tmp_path, **SMALL | {"train": 10})
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        data.make_synthetic(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_class_shows_in_no_single_frame_and_not_in_the_mean_frame():
    """Nearest neighbour by what one frame or the average shows is right about as often as chance, 1 in 10."""
    videos = [draw(motion, 1000 * n + k) for k, motion in enumerate(data.MOTIONS) for n in range(24)]
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


@pytest.mark.parametrize("motion", data.MOTIONS)
def test_every_window_of_32_frames_shows_the_motion(motion):
    for seed in range(40):
        course = np.stack(data._motion(motion, np.random.default_rng(seed), 64))
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
    monkeypatch.setattr(data, "OBJECTS", 0)
    monkeypatch.setattr(data, "_texture", lambda rng, height, width: background[:height, :width])
    for shake in (0.008, 0.06):
        for seed in range(20):
            still = np.random.default_rng(seed)
            video = data._draw_video(["spin"], np.random.default_rng(seed), 48, 100, 100, shake)[..., 0].astype(float)
            dark = np.abs(video - np.median(video)).mean(1)  # (frames, width), inverted or not
            course = (dark * np.arange(100)).sum(1) / dark.sum(1)
            cycles, phases = still.uniform(1, 4, 2), still.random(2)
            reach = still.uniform(shake / 4, shake, 2)
            moved = 100 * reach[0] * np.sin(2 * np.pi * (np.arange(48) / 48 * cycles[0] + phases[0]))
            assert np.allclose(course - course.mean(), moved.mean() - moved, atol=0.05)


def test_a_camera_that_moves_too_far_to_keep_objects_inside_still_draws():
    for motion in data.MOTIONS:
        assert draw(motion, 0, shake=0.5).shape == (64, 40, 40, 3)


def test_unlabeled_videos_are_for_pretraining_and_leave_the_others_as_they_are(made, tmp_path, monkeypatch):
    root = tmp_path / "shots"
    data.make_synthetic(root, **SMALL, shots=3)
    monkeypatch.delattr(data, "_draw_video")
    data.make_synthetic(root, **SMALL, shots=3)  # complete
    files = tree(root)
    assert {name: content for name, content in files.items() if not name.startswith("unlabeled")} == tree(made)
    found = MoCoConfig(data=str(root)).find_videos()
    assert [os.path.relpath(path, root) for path in found.paths] == [f"unlabeled/{n:04}.mp4" for n in range(1, 21)]
    assert found.report == "synthetic unlabeled: 20 videos, no labels" and len(set(files.values())) == 50
    with data.Video(found.paths[0]) as video:
        assert len(video) == 3 * SMALL["frames"]
    for train, count in ((True, 20), (False, 10)):
        labelled = data.find_videos("synthetic", root, train)
        assert len(labelled) == count and labelled.classes == list(data.MOTIONS)
    (tmp_path / "bad").write_text("unlabeled/0007.mp4\n")
    assert len(MoCoConfig(data=str(root), exclude=str(tmp_path / "bad")).find_videos()) == 19
    assert len(MoCoConfig(data=str(made)).find_videos()) == 20


def test_each_shot_shows_its_own_motion_of_the_same_object(monkeypatch):
    monkeypatch.setattr(data, "OBJECTS", 1)
    monkeypatch.setattr(data, "_texture", lambda rng, height, width: np.zeros((height, width, 3), np.float32))
    rows = np.arange(40)[:, None, None]
    for seed in range(10):
        motions = ["rise", "sway", "fall"]
        video = data._draw_video(motions, np.random.default_rng(seed), 48, 40, 40, shake=0).astype(float)
        assert video.shape == (144, 40, 40, 3)
        seen = np.abs(video - np.median(video))
        heights = ((seen * rows).sum((1, 2, 3)) / seen.sum((1, 2, 3))).reshape(3, 48)
        assert (np.diff(heights[0][::8]) < 0).all() and (np.diff(heights[2][::8]) > 0).all()
        assert np.ptp(heights[1]) < 1 < np.ptp(heights[0])
        colours = [(shot.sum((0, 1, 2)) / shot.sum()).round(2).tolist() for shot in np.split(seen, 3)]
        assert np.ptp(colours, axis=0).max() <= 0.02


@pytest.mark.parametrize("shots", [0, 11])
def test_a_number_of_shots_that_makes_no_set_is_named(tmp_path, shots):
    with pytest.raises(ValueError, match=f"not shots {shots}"):
        data.make_synthetic(tmp_path / "set", **SMALL, shots=shots)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"test": 0}, {"seed": -1}, {"shake": -0.1}, {"frames": 0}, {"size": (0, 32)}]
)
def test_numbers_that_make_no_set_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"not .*{next(iter(wrong))} "):
        data.make_synthetic(tmp_path / "set", **SMALL | wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("motion", data.MOTIONS)
def test_an_object_stays_in_the_frame(motion, monkeypatch):
    monkeypatch.setattr(data, "OBJECTS", 1)
    monkeypatch.setattr(data, "_texture", lambda rng, height, width: np.zeros((height, width, 3), np.float32))
    for seed in range(20):
        video = draw(motion, seed).astype(int)
        drawn = (np.abs(video - np.median(video)) > 128).all(3)  # the median is the plain background
        border = drawn[:, [0, -1]].sum((1, 2)) + drawn[:, :, [0, -1]].sum((1, 2))
        assert drawn.any((1, 2)).all() and border.max() <= 3  # a tip may touch the border


@pytest.mark.parametrize("motion", data.MOTIONS)
def test_the_motion_changes_frames_beyond_the_shaking_camera(motion, monkeypatch):
    def change() -> float:
        return np.mean([np.abs(np.diff(draw(motion, seed)[::2].astype(float), axis=0)).mean() for seed in range(10)])

    moving, course = change(), data._motion
    monkeypatch.setattr(data, "_motion", lambda *args: [np.full_like(path, path[32]) for path in course(*args)])
    assert moving > 1.05 * change()
