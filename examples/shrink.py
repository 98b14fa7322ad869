"""Copies a tree of videos, smaller and quicker to read, for use in its place.

    python examples/shrink.py /data/k400 /data/k400_256                     # then train with --data /data/k400_256

Videos become H.264 with smaller frames, each at its time, and lose their sound; other files stay as they are. What is
in OUT is kept, so that the same command goes on where it was stopped. The exit code is 1 if there are videos that can't
be read: they are not in OUT, and OUT/failed.txt says why.
"""

import functools
import io
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
from cli import command_line, parse
from data import visit_videos
from find import identity, is_video, walk_whole
from synthetic import alone
from train import Options, UserError, option, program, user_errors, write_file
from video import BadVideo, Video, frames_of

FAILED, RECIPE, HIDDEN = "failed.txt", ".shrink.json", ".partial"  # in OUT


@dataclass(frozen=True)
class ShrinkConfig(Options):
    """Options of the copy."""

    side: int = option(256, "shorter side in pixels at most; no frame is enlarged", (2, 4320))
    keyframes: int = option(32, "frames from one keyframe to the next at most", (1, 1000))
    frame_rate: float = option(25.0, "frames a second of videos that are folders of frames", (0.01, 1000))
    crf: int = option(23, "constant rate factor of x264: the lower, the better and larger", (1, 51))
    workers: int = option(os.cpu_count() or 1, "processes, one a core if not given", (1, 1024))


def _encode(video: Video, config: ShrinkConfig) -> bytes:
    """All frames of a video, upright, each at its time from the first on: MP4 without B-frames, which cost time."""
    times, ready, done, content, scaler = video.times(), {}, 0, io.BytesIO(), VideoReformatter()
    base = Fraction(1, math.lcm(*(moment.denominator for moment in times)))
    options = {"preset": "faster", "tune": "fastdecode", "bf": "0", "crf": str(config.crf), "g": str(config.keyframes)}
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", round((len(times) - 1) / times[-1]) or 1, options)
        stream.pix_fmt, stream.codec_context.time_base, stream.codec_context.thread_count = "yuv420p", base, 1
        for images in video.stream(range(len(video))):
            shape = next(iter(images.values())).shape[:2]
            height, width = (max(n * min(config.side, *shape) // min(shape) // 2 * 2, 2) for n in shape)
            if not done:
                stream.height, stream.width = height, width
            for k, image in images.items():  # of damaged videos, some come late
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
                ready[k] = scaler.reformat(frame, width, height, "yuv420p", interpolation="BICUBIC", threads=1)
            while frame := ready.pop(done, None):
                frame.pts, frame.time_base, done = int(times[done] / base), base, done + 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


def _shrink_file(targets: dict[str, Path], out: Path, config: ShrinkConfig, path: str) -> None:
    """Makes the copy of a file. That of a video is MP4 under the old name, suffix and all, so that lists still hold:
    `Video` goes by the content, as all that use FFmpeg do, and neither AVI nor Matroska can hold every time exactly."""
    made, target = out / HIDDEN / "made" / os.urandom(8).hex(), targets[path]
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_video(path) or os.path.isdir(path):
        with Video(path, config.frame_rate) as video, video.bad_video():
            write_file(made, _encode(video, config))
            with Video(made) as copy:
                if copy.times() != video.times():
                    raise BadVideo(path, "its frames and times can't be kept")
    else:
        shutil.copy(path, made)
    made.rename(target)


def _reading_time(path: str | Path) -> float:
    """Milliseconds of computing that two windows of 32 frames take, at a third and two thirds of a video."""
    begun = time.process_time()
    with Video(path) as video:
        starts = [third * max(len(video) - 32, 0) // 3 for third in (1, 2)]
        deque(video.stream({min(start + k, len(video) - 1) for start in starts for k in range(32)}), maxlen=0)
    return 1000 * (time.process_time() - begun)


def shrink(config: ShrinkConfig, data: str, folder: str) -> None:
    """Copies the tree `data` to `folder`, and prints what that saves; exit code 1 if videos can't be read.

    Raises ValueError where the copy would lie in the tree, FileExistsError where the folder holds anything else."""
    root, out = os.path.abspath(data), Path(folder)
    recipe = {"root": root, "side": config.side, "keyframes": config.keyframes, "crf": config.crf}
    recipe |= {"frame_rate": config.frame_rate} if config.frame_rate != ShrinkConfig.frame_rate else {}
    recipe = json.dumps(recipe)
    if Path(root).resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is in {root}: name another folder")
    videos, others = walk_whole(root)
    held = (out / RECIPE).read_text() if (out / RECIPE).exists() else "other files" * any(out.glob("*"))
    if held not in ("", recipe):
        raise FileExistsError(f"{out} holds {held}, not what comes of {recipe}: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / RECIPE, recipe)
    targets = {path: out / (os.path.relpath(path, root) + ".mp4" * (not is_video(path))) for path in videos}
    kept = {path: out / os.path.relpath(path, root) for path in filter(os.path.isfile, others)}
    files = {*targets.values()}  # where the others of a folder of frames called x.avi have no place
    targets |= {path: target for path, target in kept.items() if target.parent not in files}
    first = {identity(path): path for path in reversed(targets) if targets[path] != out / FAILED}
    with alone(out / HIDDEN), user_errors(path=out / FAILED):
        (out / HIDDEN / "made").mkdir()
        todo = [path for path in first.values() if not targets[path].exists()]
        visit = functools.partial(_shrink_file, targets, out, config)
        bad = visit_videos(visit, todo[::-1], root, out / FAILED, config.workers, f"shrinking {root}")
    for path, target in targets.items():
        if not target.exists() and (made := targets[first[identity(path)]]).exists():  # a file of more paths is one
            target.parent.mkdir(parents=True, exist_ok=True)  # there, too: training leaves out what tests have
            target.symlink_to(os.path.relpath(made, target.parent))
    done = [path for path in sorted({*videos} & {*first.values()}) if targets[path].exists()]
    files = [file for path in done for file in frames_of(path) or [path] if os.path.exists(file)]
    before, after = (sum(map(os.path.getsize, part)) / 1e6 for part in (files, map(targets.get, done)))
    sample = [done[k] for k in np.random.default_rng(0).permutation(len(done))[:20]]
    times = [[_reading_time(at) for at in (path, targets[path])] for path in sample]
    if done:
        slow, fast = np.mean(times, 0)
        print(f"{len(done)} videos, {before:,.1f} → {after:,.1f} MB; reading 64 frames {slow:.1f} → {fast:.1f} ms")
    print(f"{bad} of {len(done) + bad} videos can't be read" + f": {out / FAILED} says why" * (bad > 0), flush=True)
    if bad:
        raise SystemExit(1)


def main() -> None:
    """`shrink.py ROOT OUT --flag value …`"""
    folders = program()[1:]
    config = parse(ShrinkConfig, __doc__, argv=sys.argv[1 + len(folders) :], before="ROOT OUT")
    if len(folders) != 2:
        raise UserError("name two folders before all flags, the videos' and that of the copy: shrink.py ROOT OUT")
    with user_errors():
        shrink(config, *folders)


if __name__ == "__main__":
    command_line(main)
