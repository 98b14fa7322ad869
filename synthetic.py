"""The embedded data set: real video files in which the class is the motion, which a single frame hardly shows.

    python data.py synthetic ROOT --shots 4

Can be copied alone into another project, for `make_synthetic`: it imports av (PyAV), numpy and tqdm only.
"""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

MOTIONS = ("bounce", "fall", "grow", "orbit", "pulse", "rise", "shrink", "spin", "sway", "sway_then_bounce")
SYNTHETIC_VERSION = 2  # to be raised with every change of what is drawn, so that older copies are made anew
SYNTHETIC_MARKER = "synthetic.json"  # says how the set was made
UNLABELED = "unlabeled"  # folder of videos for pretraining alone, in each of which the motion changes
SCENE_PARTS = ("unseen", "other", "noise")  # folders of further test videos in a set whose scenes are biased
PARTS = ("train", "test", UNLABELED, *SCENE_PARTS)
OBJECTS = 3  # in a video, all in the same motion, so that crops hold one
SPRITE = 64  # pixels of an object's picture, in each direction; objects are drawn smaller than this


def _motion(name: str, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, ...]:
    """One course of a motion: moves to the right and down (in sides of the frame), size (log2), turns; each (frames,).
    Any half of the video shows the motion, and a horizontal flip leaves it what it is."""
    low, high = (0.5, 0.17, 1.2, 11, 0, -1, -0.5, 0), (0.6, 0.28, 1.6, 17, 2, 1, 0.5, 1)
    travel, amplitude, doublings, period, phase, direction, size, turns = rng.uniform(low, high)
    if name == "sway_then_bounce":
        period = 6 + period / 4  # at most 16, so that 32 frames hold both
    progress = np.arange(frames) / frames - 0.5
    cycle = np.arange(frames) / period + phase
    wave = np.sin(2 * np.pi * cycle)
    bounce = 1 - 8 * (cycle % 1) * (1 - cycle % 1)  # parabolas, in [-1, 1]
    still, turn, swaying = np.zeros(frames), np.sign(direction), cycle % 2 < 1
    right = {"sway": wave, "sway_then_bounce": np.where(swaying, wave, 0), "orbit": wave}
    down = {"rise": -travel * progress, "fall": travel * progress, "bounce": amplitude * bounce}
    down["orbit"] = amplitude * np.cos(2 * np.pi * cycle) * turn
    down["sway_then_bounce"] = np.where(swaying, amplitude, amplitude * bounce)
    sizes = {"grow": doublings * progress, "shrink": -doublings * progress, "pulse": doublings / 2 * wave}
    turns = turns + (turn * cycle / 1.5 if name == "spin" else still)
    return amplitude * right.get(name, still), down.get(name, still), sizes.get(name, still + size * doublings), turns


def _choose(rng: np.random.Generator, options: Sequence[str], scene: str) -> str:
    """One of the options: in a motion's scenes always the same, else any."""
    return options[MOTIONS.index(scene) % len(options)] if scene in MOTIONS else rng.choice(options)


def _texture(rng: np.random.Generator, height: int, width: int, scene: str) -> np.ndarray:
    """A gradient, stripes, checks or smooth noise between two unlike colours: float32 (height, width, 3) in [0, 1]."""
    y, x = (axis.astype(np.float32) / min(height, width) - 0.5 for axis in np.ogrid[:height, :width])
    kind = _choose(rng, ["gradient", "stripes", "checks", "noise"], scene)
    count = {"checks": 2, "noise": 10}.get(kind, 1)
    low, high = {"gradient": (0.3, 0.5), "stripes": (2, 5), "checks": (1, 3), "noise": (0.7, 8)}[kind]
    cycles = np.exp(rng.uniform(np.log(low), np.log(high), count))
    angles = rng.uniform(0, 2 * np.pi, count)
    if kind == "checks":
        angles[1] = angles[0] + np.pi / 2
    phases = rng.random(count) * (kind != "gradient")  # a gradient changes in the middle, so that it shows
    along = x[..., None] * np.cos(angles) + y[..., None] * np.sin(angles)
    waves = np.sin(2 * np.pi * (along * cycles + phases))
    field = waves.prod(-1) if kind == "checks" else waves.sum(-1)
    field = 0.5 + 0.5 * np.tanh(rng.uniform(1, 4) * field)
    first = rng.random(3)
    second = (first + rng.uniform(0.35, 0.65, 3)) % 1
    if scene in MOTIONS:  # dark and bright, of one hue
        turns = MOTIONS.index(scene) / len(MOTIONS) + rng.uniform(-0.02, 0.02) + np.arange(3) / 3
        first, second = rng.uniform((0, 0.7), (0.3, 1))[:, None] * (0.5 + 0.5 * np.cos(2 * np.pi * turns))
    return (first + (second - first) * field[..., None]).astype(np.float32)


def _sprite(rng: np.random.Generator, scene: str) -> np.ndarray:
    """A textured shape with a soft edge: float32 (SPRITE, SPRITE, 4), colour and opacity, transparent at the border."""
    y, x = np.ogrid[-1 : 1 : SPRITE * 1j, -1 : 1 : SPRITE * 1j]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    depths = {
        "disc": 0.85 - radius,
        "ring": 0.25 - np.abs(radius - 0.62),
        "square": 0.7 - far,
        "triangle": 0.4 - np.max([radius * np.cos(angle - 2 * np.pi * k / 3) for k in range(3)], axis=0),
        "star": 0.65 + 0.25 * np.cos(5 * angle) - radius,
        "cross": np.minimum(0.8 - far, 0.28 - near),
    }
    depth = depths[_choose(rng, [*depths], scene)]
    opacity = np.clip(0.5 + depth / rng.uniform(0.1, 0.2), 0, 1)
    return np.concatenate([_texture(rng, SPRITE, SPRITE, scene), opacity[..., None]], axis=2, dtype=np.float32)


def _shot(rng: np.random.Generator, motion: str, camera: np.ndarray, height: int, width: int) -> tuple[np.ndarray, ...]:
    """One object's course while the camera moves by (frames, 2): center x and y, radius, angle; each (frames,)."""
    side = min(height, width)
    right, down, size, turns = _motion(motion, rng, len(camera))
    radius = rng.uniform(0.092, 0.108) * side * 2**size
    centers = []
    for path, length in ((right * side - camera[:, 0], width), (down * side - camera[:, 1], height)):
        inside = (radius - path).max(), (length - radius - path).min()  # where it may start so as never to leave
        centers.append(path + rng.uniform(*sorted(inside)))  # or, if that can't be, to leave on both sides
    return *centers, radius, 2 * np.pi * turns


def _grains(rng: np.random.Generator, places: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """White noise (H, W) that goes along with an object: the grains of its pattern at the pixels' places (2, H, W). A
    grain at several pixels, of what turns or grows, shows once: no frame tells what moves (Ilic et al., ECCV 2022)."""
    rows, columns = np.floor(places).astype(int) % SPRITE
    shown, first = np.unique(rows * SPRITE + columns, return_index=True)
    drawn = rng.random(rows.shape)
    drawn.flat[first] = pattern.flat[shown]
    return drawn


def _draw_video(
    motions: Sequence[str], rng: np.random.Generator, shape: tuple[int, int, int], shake=0.008, scene="", masked=False
) -> np.ndarray:
    """Draws one video: objects before a background, a shaky camera; uint8 (shots · T, H, W, 3) for a shape (T, H, W).
    Each motion is a shot of so many frames. From shot to shot, objects keep their looks and take another place. In a
    motion's `scene`, kind of texture, hue and shape are this motion's; in that of "noise", all is `_grains`. `masked`
    draws where the objects are instead, 255 on them and 0 beside."""
    frames, height, width = shape
    time = np.arange(len(motions) * frames)[:, None] / frames
    camera = np.sin(2 * np.pi * (time * rng.uniform(1, 4, 2) + rng.random(2)))
    camera = camera * rng.uniform(shake / 4, shake, 2) * min(height, width)  # to the right and down, pixels
    margin = math.ceil(np.abs(camera).max())
    background = 0.6 * _texture(rng, height + 2 * margin + 1, width + 2 * margin + 1, scene)
    parts, objects = [*zip(motions, np.split(camera, len(motions)), strict=True)], []
    for _ in range(OBJECTS):
        shots = [_shot(rng, motion, moved, height, width) for motion, moved in parts]
        sprite = _sprite(rng, scene)
        sprite[..., :3] = 1 if masked else 1 - 0.6 * sprite[..., :3]  # lighter than most of the background
        objects.append((*np.concatenate(shots, axis=1), sprite))
    inverted = MOTIONS.index(scene) % 2 if scene in MOTIONS else rng.random() < 0.5
    if masked:
        background, inverted, scene = np.zeros_like(background), False, ""
    if scene == "noise":  # grains, which stay whole, and upright where nothing turns
        camera, background = camera.round(), rng.random((*background.shape[:2], 1))
        for *_, angle, sprite in objects:
            angle -= angle[0]
            sprite[..., 0] = rng.random((SPRITE, SPRITE))
    rows, columns = np.ogrid[:height, :width]
    video = np.empty((len(camera), height, width, 3), np.uint8)
    for t, (dx, dy) in enumerate(camera):
        left, top = margin + math.floor(dx), margin + math.floor(dy)
        view = background[top : top + height + 1, left : left + width + 1]
        view = view[:-1] + np.float32(dy % 1) * (view[1:] - view[:-1])
        view = view[:, :-1] + np.float32(dx % 1) * (view[:, 1:] - view[:, :-1])
        for center_x, center_y, radius, angle, sprite in objects:
            x, y = (columns - center_x[t]) / radius[t], (rows - center_y[t]) / radius[t]
            cos, sin = np.cos(angle[t]), np.sin(angle[t])
            turned = np.stack([cos * y - sin * x, cos * x + sin * y])  # rows, columns
            drawn = sprite[tuple(((turned + 1) * (SPRITE / 2)).clip(0, SPRITE - 1).astype(int))]
            if scene == "noise":
                drawn = np.dstack([_grains(rng, turned * radius.mean(), sprite[..., 0]), drawn[..., 3] > 0.5])
            view += drawn[..., -1:] * (drawn[..., :-1] - view)
        video[t] = 255 * (1 - view if inverted else view) + 0.5
    return video


def _draw(recipe: dict, name: str, place: tuple[str, int], masked: bool = False) -> np.ndarray:
    """Draws a video of a set, of this name, part and number, or where its objects are."""
    (part, n), (height, width), scene = place, recipe["size"], scene_of(name)
    rng, motions = np.random.default_rng([recipe["seed"], PARTS.index(part), n]), [MOTIONS[n % len(MOTIONS)]]
    if part == UNLABELED:
        motions = rng.choice(MOTIONS, recipe["shots"], replace=False)
    grain = max(min(height, width) // 40, 1) if scene == "noise" else 1  # pixels; beside objects always as large
    shape = recipe["frames"], math.ceil(height / grain), math.ceil(width / grain)
    video = _draw_video(motions, rng, shape, recipe["shake"], scene, masked)
    return video.repeat(grain, 1).repeat(grain, 2)[:, :height, :width]


def object_masks(path: str | Path) -> np.ndarray:
    """Where the objects of a video of a set are, in each frame: uint8 (T, H, W, 3), 255 on them, 0 beside."""
    path = Path(path).resolve()
    root = next(folder for folder in path.parents if (folder / SYNTHETIC_MARKER).exists())
    recipe, name = json.loads((root / SYNTHETIC_MARKER).read_text()), path.relative_to(root).as_posix()
    return _draw(recipe, name, _synthetic_names(**recipe)[name], masked=True)


def _write_video(path: Path, video: np.ndarray) -> None:
    """Encodes uint8 (T, H, W, 3) as MPEG-4 with B-frames in MP4: FFmpeg's own encoder, so every build has it."""
    reformatter = VideoReformatter()
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        options = {"qmin": "3", "qmax": "3", "g": "32", "bf": "2", "threads": "1", "flags": "+bitexact"}
        stream = container.add_stream("mpeg4", 25, options, width=video.shape[2], height=video.shape[1])
        for pts, picture in enumerate(video):
            frame = reformatter.reformat(av.VideoFrame.from_ndarray(picture), format="yuv420p", threads=1)
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _draw_scene(part: str, n: int, seed: int, scene_bias: float) -> str:
    """Whose scene a video has: a motion's, or "free" or "noise" for none's."""
    rng = np.random.default_rng([seed, PARTS.index(part), n, 1])  # other numbers than those that draw the video
    own, other = part != "other" and rng.random() < scene_bias, rng.integers(1, len(MOTIONS))
    return {"unseen": "free", "noise": "noise"}.get(part, MOTIONS[(n + (0 if own else other)) % len(MOTIONS)])


def scene_of(path: str) -> str:
    """Whose scene a video of `make_synthetic` has, by its name: a motion's, "free" or "noise"; "" without a bias."""
    return re.split(r"_\d+_?", Path(path).stem)[-1]


def _synthetic_names(train: int, test: int, seed=0, shots=1, scene_bias=0.0, **_: object) -> dict[str, tuple[str, int]]:
    """The videos of a set, from its folder on, and which of which part each is."""
    names, counts = {}, {"train": train, "test": test, UNLABELED: train if shots > 1 else 0}
    for part, count in (counts | dict.fromkeys(SCENE_PARTS, test if scene_bias else 0)).items():
        for n in range(count):
            motion = MOTIONS[n % len(MOTIONS)]
            name = f"{motion}/{motion}_{n // len(MOTIONS) + 1:04}" if part != UNLABELED else f"{n + 1:04}"
            name += f"_{_draw_scene(part, n, seed, scene_bias)}" if scene_bias else ""
            names[f"{part}/{name}.mp4"] = part, n
    return names


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes an empty folder for this process alone, for which others wait, where files can be locked, and removes it at
    the end. One that a killed process left is emptied."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # whoever had it has just removed it
            lock = open(folder / "lock", "w")  # noqa: SIM115, as it is to be held
            with contextlib.suppress(OSError, ImportError):
                import fcntl  # Windows has none

                fcntl.lockf(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                break
    with lock:
        for left in folder.glob("*/"):
            shutil.rmtree(left)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_complete(root: Path, recipe: dict) -> bool:
    """Whether a folder holds the set; raises FileExistsError where it holds files that are of no set."""
    held, own, errors = set(), set(), []
    for folder, folders, files in os.walk(root, onerror=errors.append):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        held |= {Path(folder, name).relative_to(root).as_posix() for name in (*files, *links)}
    if errors and root.exists():  # what can't be listed may hold anything
        raise errors[0]
    text = (root / SYNTHETIC_MARKER).read_text() if SYNTHETIC_MARKER in held else "{}"
    videos = {name for name in held if name.endswith(".mp4")}
    if text == json.dumps(recipe) and videos == _synthetic_names(**recipe).keys():
        return True
    with contextlib.suppress(ValueError, TypeError):
        own = {SYNTHETIC_MARKER, *_synthetic_names(**json.loads(text))}
    if others := sorted(held - own):
        advice = "give the set a folder of its own, or with videos of your own --dataset folder"
        raise FileExistsError(f"{root} holds other files, such as {others[0]!r}: {advice}")
    return False


def make_synthetic(
    root: str | Path, train=1500, test=500, seed=0, frames=48, size=(40, 40), shake=0.008, shots=1, scene_bias=0.0
) -> None:
    """Writes the embedded data set once: root/{train,test}/<motion>/<motion>_0001.mp4, classes `MOTIONS` in turn.

    Everything but the motion is drawn for each video from (seed, part, number), whatever its class. The set is made in
    a hidden folder beside `root` and moved at the end, so that `root` never holds half of it; what a kill left there is
    removed, and another process that makes it is waited for. A complete set of the same arguments and version is kept;
    another is replaced, if it holds no other files.

    Args:
        train, test: number of videos.
        frames, size: length in frames (at 25 a second), height and width in pixels.
        shake: how far the camera moves at most, in sides of the frame; a quarter of it is the least.
        shots: from 2 on, there are as many videos again, root/unlabeled/0001.mp4, on which pretraining is done instead:
            of so many shots of the same objects before the same background, each in another motion.
        scene_bias: if not 0, each motion has scenes of its own, in which this share of its training and test videos
            are; the others are in any of the other nine's. Of `test` videos more each, root/unseen is drawn as without
            a bias, root/other in another motion's scenes, root/noise in white noise. Names say so (`scene_of`).

    Raises ValueError for a part without videos, fewer than two frames, no pixel, a negative number, more shots than
    motions, or a bias beyond 1, of several shots, or of fewer than ten videos; FileExistsError where `root` holds other
    files than those of a synthetic set, and leaves it alone.
    """
    recipe = {"version": SYNTHETIC_VERSION, "train": train, "test": test, "seed": seed, "frames": frames, "size": size}
    recipe |= {"shake": shake, "shots": shots} | ({"scene_bias": float(scene_bias)} if scene_bias else {})
    if scene_bias and (not 0 < scene_bias <= 1 or shots > 1 or min(train, test) < len(MOTIONS)):
        raise ValueError(f"no set of {recipe}: scene_bias is at most 1, and goes with one shot and ten or more videos")
    if min(seed, shake) < 0 or min(train, test, *size) < 1 or frames < 2 or not 1 <= shots <= len(MOTIONS):
        raise ValueError(f"no set of {recipe}: frames are 2 or more, shots 1 to {len(MOTIONS)}, other numbers positive")
    root = Path(root).resolve()
    if _is_complete(root, recipe):
        return
    if os.path.ismount(root):  # which can't be replaced
        raise ValueError(f"{root} is a mounted folder: name a folder in it")
    names, hidden = _synthetic_names(**recipe), root.with_name(f".{root.name}.partial")
    with alone(hidden):
        if _is_complete(root, recipe):  # by now
            return
        made = hidden / "made"
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
        pause = 0.5 if sys.stderr.isatty() else 30  # seconds, as in training
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy and FFmpeg run without the interpreter's lock
            jobs = pool.map(lambda job: _write_video(made / job[0], _draw(recipe, *job)), names.items())
            [*tqdm(jobs, f"making {root}", len(names), dynamic_ncols=True, mininterval=pause)]
        try:
            (made / SYNTHETIC_MARKER).write_text(json.dumps(recipe))
        except OSError as error:  # a full disk's has no name
            raise OSError(error.errno, error.strerror, str(root / SYNTHETIC_MARKER)) from error
        _is_complete(root, recipe)  # nobody has put files there meanwhile
        if root.exists():
            root.rename(hidden / "before")
        made.rename(root)
