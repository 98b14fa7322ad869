"""Writes the features of all videos of a data set, labelled or not, to a file for NumPy.

python examples/write_features.py --checkpoint runs/fima/checkpoint.pt --dataset folder --data /videos
torchrun --nproc_per_node=8 examples/write_features.py --checkpoint runs/fima/checkpoint.pt --out ucf101.npz

The file has "features", float32 (videos, clips, C), L2-normalised, nan for a video that cannot be read; and of each
video "paths", "labels" (-1: unknown, else a place in "classes") and "test": is it of the test part? What is done is
kept in the folder OUT.parts: after a stop, the same command goes on.
"""

import contextlib
import dataclasses
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
from cli import command_line, parse, start_process
from data import VideoList
from features import EncoderConfig, load_encoder, pooled_features, subset, unit_features, video_outputs
from find import find_videos
from train import SWITCH, UserError, check_sums, option, user_errors, write_file

PART = 256  # videos that are written together: memory stays small, and a stop costs no more


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(EncoderConfig):
    """Options of the file."""

    normalise: str = option("on", "L2-normalise the feature of each clip, as all protocols do", SWITCH)
    out: str = option("features.npz", "file to write")


def both_parts(config: FeaturesConfig) -> tuple[VideoList, np.ndarray]:
    """The videos of the training part and of the test part, if there is one, and which are of the test part."""
    parts = [find_videos(config.dataset, config.data, True, config.split, config.list_file)]
    if config.test_list or not config.list_file:
        with contextlib.suppress(*[FileNotFoundError] * (not config.test_list)):
            test = find_videos(config.dataset, config.data, False, config.split, config.test_list)
            parts += [test] * (not {*test.paths} <= {*parts[0].paths})  # else one list is for both
    classes = list(dict.fromkeys(name for part in parts for name in part.classes))
    labels = [classes.index(part.classes[i]) if i >= 0 else -1 for part in parts for i in part.labels]
    paths, report = [path for part in parts for path in part.paths], "\n".join(part.report for part in parts)
    return VideoList(paths, labels, classes, report), np.arange(len(paths)) >= len(parts[0])


def begin(out: Path, parts: Path, recipe: dict) -> None:
    """Raises UserError where the file is there already, or the parts are of other features."""
    if out.exists():
        raise UserError(f"{out} is there already: name another --out")
    with user_errors((OSError,)):
        parts.mkdir(parents=True, exist_ok=True)
        made, file = json.dumps(recipe), parts / "recipe.json"
        if file.exists() and file.read_text() != made:
            raise UserError(f"{parts} holds features of other videos, weights or options: remove it")
        write_file(file, made)


def join(out: Path, parts: Path, files: list[Path], others: dict) -> None:
    """Makes one file of the parts without holding them all in memory."""
    first = np.load(files[0], "r")
    count = sum(len(np.load(file, "r")) for file in files)
    whole = np.lib.format.open_memmap(parts / "whole.npy", "w+", np.float32, (count, *first.shape[1:]))
    row = 0
    for file in files:
        part = np.load(file)
        whole[row : row + len(part)] = part
        row += len(part)
    with open(parts / "file.npz", "wb") as file:
        np.savez(file, features=whole, **others)
    (parts / "file.npz").replace(out)
    shutil.rmtree(parts)


def main() -> None:
    config = parse(FeaturesConfig, __doc__)
    process = start_process(config.device)
    encoder, config = load_encoder(config, process.say)
    encoder = encoder.to(process.device)
    out, parts = Path(config.out), Path(f"{config.out}.parts")
    with user_errors():
        videos, test = process.first(lambda: both_parts(config), lambda found: found[0].mark(config.data))
    process.say(videos.report)
    shape = [getattr(config, name) for name in ("clips", "frames", "frame_stride", "crop", "normalise")]
    process.of_first(lambda: begin(out, parts, {"made": shape, "paths": videos.paths, "weights": check_sums(encoder)}))
    function = unit_features(encoder) if config.normalise == "on" else lambda clips: pooled_features(encoder, clips)
    files = []
    for i in range(0, len(videos), PART):
        files.append(parts / f"{i:09}.npy")
        if process.of_first(files[-1].exists):
            continue
        few = subset(videos, range(i, min(i + PART, len(videos))))
        title = f"videos {i + 1} to {i + len(few)} of {len(videos)}"
        try:
            features, good, _ = video_outputs(function, few, config, process, title, average=False)
        except UserError as error:
            if not str(error).endswith("can be read") or len(few) == len(videos):
                raise
            features = torch.empty(len(few), config.clips, encoder.out_channels)  # a part without a readable video
            good = torch.zeros(len(few), dtype=torch.bool)
        features[~good] = math.nan
        if process.rank == 0:
            memory = io.BytesIO()
            np.save(memory, features.numpy())
            with user_errors((OSError,)):
                write_file(files[-1], memory.getbuffer())
    if process.rank == 0:
        others = dict(paths=videos.paths, labels=videos.labels, classes=np.array(videos.classes, str), test=test)
        with user_errors((OSError,)):
            join(out, parts, files, others)
        process.say(f"written to {out}; to read it:\n  import numpy\n  features = numpy.load({str(out)!r})['features']")


if __name__ == "__main__":
    command_line(main)
