"""An encoder from a checkpoint, or untrained, and what it gives for the clips of videos.

    encoder, config = load_encoder(EncoderConfig(checkpoint="runs/fima/checkpoint.pt", clips=2))
    features, readable, unreadable = video_outputs(unit_features(encoder), videos, config, start_process(), "videos")

Evaluation, figures and the end of a first run go this way; processes started by torchrun share the videos.
"""

import contextlib
import dataclasses
import functools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler

import data
import find
from augment import DIFFERENCES, encoder_input
from cli import loader_workers, start_process
from models import ENCODERS, build_encoder, encoder_weights, load_weights, recognize
from runs import check_replaceable, load_checkpoint, saved_options
from train import SWITCH, Options, Process, UserError, check_sums, option, progress, user_errors

PART = 256  # videos whose features are written together: memory stays small, and a stop costs no more
Function = Callable[[Tensor], Tensor]
UNTRAINED = dict(dataset="synthetic", data="", split=1, encoder="i3d", width=1.0, frames=16, frame_stride=2, crop=224)
UNTRAINED |= dict(difference="adjacent")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Options):
    """Which encoder, and clips of which videos. What is left at "" or 0 is as in training, or as in UNTRAINED; lists of
    videos are never taken from there."""

    checkpoint: str = option("", "a run's folder or checkpoint, or small, or another project's; none: untrained")
    dataset: str = option("", "what to evaluate on; as trained, or synthetic", ("", *find.DATASETS))
    data: str = option("", "folder of the data set (default: the checkpoint's, or datasets/DATASET)")
    split: int = option(0, "official split of the data set; 0: as trained, or 1", (0, 99))
    list_file: str = option("", "with --dataset folder: training videos, a file of lines 'path label'")
    test_list: str = option("", "with --dataset folder: test videos, a file of lines 'path label'")
    encoder: str = option("", "video encoder; as in the checkpoint, without one i3d", ("", *ENCODERS))
    width: float = option(0.0, "factor on the encoder's numbers of channels; 0: as trained, or 1", (0, 8))
    frames: int = option(0, "frames of a clip; 0: as trained, or 16", (0, 4096))
    difference: str = option("", "frames that differences compare; as trained, or adjacent", ("", *DIFFERENCES))
    frame_stride: int = option(0, "a clip takes every Nth frame; 0: as trained, or 2", (0, 4096))
    crop: int = option(0, "height and width of a clip in pixels; 0: as trained, or 224", (0, 1024))
    clips: int = option(10, "uniformly spaced clips of a test video; 1: its middle", (1, 10_000))
    test_batch: int = option(4, "videos a forward in testing, in each process", (1, 65_536))
    workers: int = option(-1, "loader processes of each process; -1: its share of the CPU cores, at most 8", (-1, 1024))
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of everything random", (0, 2**31 - 1))


def checkpoint_path(named: str) -> str:
    """The file that a --checkpoint names: of a run's folder, here or beside this file (small), its checkpoint.pt."""
    own = Path(__file__).resolve().parent / "runs" / named  # a run that comes with the project
    for folder in (named, own) if named and not Path(named).exists() else (named,):
        if folder and (path := Path(folder, "checkpoint.pt")).is_file():
            return str(path)
    return named


def load_encoder(config: EncoderConfig | str, say=print, key: bool = False) -> tuple[nn.Module, EncoderConfig]:
    """The encoder of a checkpoint, by options or by its path alone, or of the run to resume, in eval mode, its key
    encoder with `key` where there is one, and the options with those that were left open filled in; `say` is told what
    was taken from another project's checkpoint.

    Raises UserError: no such checkpoint, none of a known or one of another encoder; clips or a width not for it.
    """
    config = EncoderConfig(config) if isinstance(config, str) else config
    config = dataclasses.replace(config, checkpoint=checkpoint_path(config.checkpoint))
    resume = getattr(config, "resume", "")
    path = config.checkpoint if resume in ("", "auto") else resume
    state = load_checkpoint(path, foreign=True) if path else {"method": "none", "config": {}, "model": {}}
    weights, trained = encoder_weights(state["model"], key), UNTRAINED | saved_options(path, state, EncoderConfig)
    held = (trained["encoder"],) if state["method"] else recognize(weights)
    if not held:
        raise UserError(f"{path} holds no encoder known here; its first tensors: {', '.join([*weights][:3]) or 'none'}")
    if path and config.encoder not in ("", *held):
        raise UserError(f"{path} holds {held[0]}, not {config.encoder}: give --encoder {held[0]}, or none")
    trained["encoder"] = held[0]
    if config.dataset not in ("", trained["dataset"]):
        trained |= dict(data="", split=1)
    filled = {name: getattr(config, name) or trained[name] for name in UNTRAINED}
    config = dataclasses.replace(config, **filled | {"data": filled["data"] or f"datasets/{filled['dataset']}"})
    torch.manual_seed(config.seed)
    with user_errors((ValueError,)):  # a width that the encoder does not come in
        encoder = build_encoder(config.encoder, config.width)
    frames, size, _ = encoder.strides
    if config.frames < frames or config.crop < size:
        given = f"--frames {config.frames} --crop {config.crop}"
        raise UserError(f"{given}: {config.encoder} needs {frames} and {size} or more")
    if path:
        try:
            report = load_weights(encoder, weights)
        except ValueError as error:
            raise UserError(f"{path} holds no {config.encoder} of --width {config.width:g}: {error}") from error
        if not state["method"]:
            say(f"{path}: {config.encoder}, {report}")
    return encoder.eval(), config


def load_stored(config: EncoderConfig, _say=print) -> tuple[nn.Module, EncoderConfig]:
    """What takes an encoder's place where --features names a file of `write_features`: its training and test videos as
    `parts`; and the options, now those of the file.

    Raises UserError where it is no such file, or does not serve to evaluate, or where another option is given.
    """
    torch.manual_seed(config.seed)  # for the classifier that is to come, in all processes
    path, encoder = config.features, nn.Identity()
    config = dataclasses.replace(config, checkpoint=checkpoint_path(config.checkpoint))
    try:
        with np.load(path) as file:
            features, paths, labels = (file[name] for name in ("features", "paths", "labels"))
            test, classes, options = file["test"], file["classes"].tolist(), json.loads(str(file["options"]))
    except (AttributeError, EOFError, LookupError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} can't be read as a file of `evaluate.py features`: {e}") from e
    if features.ndim != 3 or (labels < 0).any() or not test.any():
        raise UserError(f"{path} has feature maps, or videos without labels, or no test videos: nothing to evaluate")
    options = {name: value for name, value in options.items() if hasattr(config, name)}
    for name, value in options.items():
        if getattr(config, name) not in (getattr(type(config), name), value):
            raise UserError(f"--{name} {getattr(config, name)}: {path} was made with {value or 'none'}")
    encoder.out_channels, encoder.parts = features.shape[2], []
    encoder.register_buffer("sum", torch.tensor(zlib.crc32(features)))  # what a run to resume goes by
    for own, name in ((~test, "training"), (test, "test")):
        held = dict(zip(paths[own].tolist(), torch.from_numpy(features[own]), strict=True))
        if len(held) < own.sum():
            raise UserError(f"{path} holds a {name} video twice: nothing to evaluate")
        report = f"{path}: {len(held)} {name} videos"
        encoder.parts.append(data.VideoList([*held], labels[own].tolist(), classes, report, features=held))
    return encoder, dataclasses.replace(config, **options)


def subset(videos: data.VideoList, indices: Sequence[int]) -> data.VideoList:
    """Some of the videos, in the order of the indices."""
    paths, labels = [videos.paths[i] for i in indices], [videos.labels[i] for i in indices]
    return data.VideoList(paths, labels, videos.classes, f"{len(indices)} of {len(videos)} videos")


def pooled_features(encoder: nn.Module, clips: Tensor, color: Tensor | None = None) -> Tensor:
    """uint8 clips (N, 3, frames, H, W), with `color` (N, P) augmented by it → features pooled over T, H, W: (N, C), as
    which those of a file are given."""
    return clips if clips.ndim == 2 else encoder(encoder_input(clips, color)).float().mean((2, 3, 4))


def unit_features(encoder: nn.Module) -> Function:
    """An encoder, set to eval mode, as a function: uint8 clips (N, 3, frames, H, W) → L2-normalised features (N, C)."""
    encoder.eval()
    return lambda clips: F.normalize(pooled_features(encoder, clips), dim=1)


@torch.no_grad()
def clip_outputs(
    function: Function, clips: data.Items, process: Process, workers: int, size: int, title: str, average=False, least=1
) -> tuple[Tensor, Tensor, list, Tensor]:
    """What a function gives for every clip of every video; the processes take turns in taking `size` videos.

    Args:
        function: uint8 clips (n, 3, frames, crop, crop) on the device → (n, …).
        clips: a data set like `data.TestClips`, with the list `videos`.
        least: 0 for a part of the videos, of which perhaps none can be read, and whose caller says how far it is.

    Returns, the same on every process, (videos, clips, …) on the CPU, or with `average` the means over clips (videos,
    …); whether each video could be read (videos,); path and reason of those that could not; when the clips begin, in
    seconds (videos, clips). Raises UserError if none can be read, or if the outputs of one are not all finite.
    """
    batches = [range(i, min(i + size, len(clips))) for i in range(0, len(clips), size)]
    mine = batches[process.rank :: process.world_size]
    sampler = BatchSampler([i for batch in mine for i in batch], size, drop_last=False)
    loader, found, bad = data.load_batches(clips, sampler, workers), {}, []
    for videos in progress(process, mine, desc=title, unit="batch", leave=False) if least else mine:
        with user_errors((OSError,)):
            batch = next(loader)
        batch_clips = batch["clips"].to(process.device, non_blocking=True)  # (B, N, 3, frames, crop, crop)
        outputs = function(batch_clips.flatten(0, 1)).unflatten(0, batch_clips.shape[:2])
        starts = batch.get("start", torch.empty(0)).clone()
        found[videos.start] = (outputs.mean(1) if average else outputs).cpu(), starts
        bad += batch["bad"]
    found = dict(process.gather([*found.items()]))
    reasons = dict(sorted(process.gather(bad)))
    for path, reason in reasons.items():
        process.say(f"{title}: {path!r} cannot be read: {reason}")
    good = torch.tensor([path not in reasons for path in clips.videos.paths])
    if good.sum() < least:
        raise UserError(f"{title}: none of {len(good)} can be read")
    outputs, starts = (torch.cat([found[batch.start][i] for batch in batches]) for i in range(2))
    if broken := (good & ~outputs.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist():
        raise UserError(
            f"{title}: outputs are not finite for {len(broken)} of {len(good)}, as {clips.videos.paths[broken[0]]!r}: "
            "take a checkpoint from before (epoch_*.pt), or train with a lower --lr"
        )
    return outputs, good, [*reasons.items()], starts


def video_outputs(
    function: Function, videos: data.VideoList, config: EncoderConfig, process: Process, title: str, average=True
) -> tuple[Tensor, Tensor, list]:
    """The first three of `clip_outputs` for the uniformly spaced clips that the options ask for, or, of a file of
    features, for those of its clips, (n, C)."""
    if videos.features:
        features = torch.stack([videos.features[path] for path in videos.paths])
        good = features.isfinite().flatten(1).all(1)
        if not good.any():
            raise UserError(f"{title}: none of {len(good)} could be read for {config.features}")
        parts = [function(part.nan_to_num().to(process.device)).cpu() for part in features.flatten(0, 1).split(65536)]
        outputs = torch.cat(parts).unflatten(0, features.shape[:2])
        bad = [(path, "not read for the file") for path, read in zip(videos.paths, good, strict=True) if not read]
        return outputs.mean(1) if average else outputs, good, bad
    clips = data.TestClips(videos, config.crop, config.frames, config.frame_stride, config.clips)
    return clip_outputs(function, clips, process, loader_workers(config), config.test_batch, title, average)[:3]


def nearest(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices, (Q, min(k, G)), of the rows of a gallery (G, C) nearest to queries (Q, C), nearest first."""
    gallery = F.normalize(gallery, dim=1)
    chunks = [F.normalize(chunk, dim=1) @ gallery.T for chunk in queries.split(1024)]
    cosines, indices = zip(*(chunk.topk(min(k, len(gallery)), 1) for chunk in chunks), strict=True)
    return torch.cat(cosines), torch.cat(indices)


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(EncoderConfig):
    """Options of a file of features."""

    exclude: str = option("", "file of training videos to leave out, as in pretraining")
    normalise: str = option("on", "L2-normalise the feature of each clip, as all protocols do", SWITCH)
    map: str = option("off", "feature maps (C, T, H, W) instead of their means (C)", SWITCH)
    frame_rate: float = option(25.0, "frames a second of videos that are folders of frames", (0.01, 1000))
    out: str = option("features.npz", "file to write")


def all_videos(config: FeaturesConfig) -> tuple[data.VideoList, np.ndarray]:
    """The videos of the training part and of the test part, if there is one, and which are of the test part."""
    parts = [find.find_videos(config.dataset, config.data, True, config.split, config.list_file, config.exclude)]
    if config.test_list or not config.list_file:
        with contextlib.suppress(*[FileNotFoundError] * (not config.test_list)):
            test = find.find_videos(config.dataset, config.data, False, config.split, config.test_list)
            if config.test_list or not {*test.paths} & {*parts[0].paths}:  # else one list is for both
                parts.append(test)
    classes = list(dict.fromkeys(name for part in parts for name in part.classes))
    labels = [classes.index(part.classes[i]) if i >= 0 else -1 for part in parts for i in part.labels]
    paths, report = [path for part in parts for path in part.paths], "\n".join(part.report for part in parts)
    return data.VideoList(paths, labels, classes, report), np.arange(len(paths)) >= len(parts[0])


def write_features(config: FeaturesConfig) -> None:
    """Writes the features of all videos of a data set, labelled or not, to a file for NumPy.

    "features", float32 (videos, clips, C), nan for a video that cannot be read, are those of uniformly spaced clips,
    and "starts" (videos, clips) says when these begin, in seconds. Of each video there are "paths", "labels" (-1:
    unknown, else a place in "classes") and "test": is it of the test part? What is done is kept in OUT.….partial: after
    a stop, the same command goes on.
    """
    process, out = start_process(config.device), Path(config.out)
    process.of_first(lambda: check_replaceable(out))
    encoder, config = load_encoder(config, process.say)
    encoder = encoder.to(process.device)
    with user_errors():
        videos, test = process.first(lambda: all_videos(config), lambda found: found[0].mark(config.data))
    process.say(videos.report)

    def function(clips: Tensor) -> Tensor:
        maps = encoder(encoder_input(clips)).float()
        outputs = maps if config.map == "on" else maps.mean((2, 3, 4))
        return F.normalize(outputs, dim=1) if config.normalise == "on" else outputs

    clips = data.TestClips(videos, config.crop, config.frames, config.frame_stride, config.clips)
    clips.open = functools.partial(data.Video, rate=config.frame_rate)
    with torch.no_grad():
        shape = function(clips.empty()["clips"][:1].to(process.device)).shape[1:]
    row = np.dtype([("features", "f4", (config.clips, *shape)), ("starts", "f4", config.clips)])
    free = {"device", "workers", "test_batch", "seed", "out"}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    recipe = repr([options, videos.seen(config.data), check_sums(encoder)]).encode()
    partial = Path(f"{out}.{zlib.crc32(recipe):08x}.partial")

    def begin() -> int:
        with open(partial, "ab") as file:  # fails now, not after the work
            return file.tell() // row.itemsize

    with user_errors((OSError,)):
        done = process.of_first(begin)
    for first in progress(process, range(done, len(videos), PART), desc=f"each {PART} videos", unit="part"):
        clips.videos = subset(videos, range(first, min(first + PART, len(videos))))
        rows, title = np.empty(len(clips), row), f"videos from {first + 1} on"
        work = process, loader_workers(config), config.test_batch, title
        rows["features"], good, _, rows["starts"] = clip_outputs(function, clips, *work, least=0)
        rows["features"][~good] = math.nan
        if process.rank == 0:
            with user_errors((OSError,), partial), open(partial, "r+b") as file:
                file.seek(first * row.itemsize)  # a kill may have left a part of a row
                file.write(rows.tobytes())
    if process.rank == 0:
        rows, whole = np.memmap(partial, row, "r"), Path(f"{partial}.npz")  # not all in memory
        held = dict(paths=videos.paths, labels=videos.labels, classes=np.array(videos.classes, str), test=test)
        with user_errors((OSError,), whole):
            try:
                np.savez(whole, **held, options=json.dumps(options), **{name: rows[name] for name in row.names})
            except OSError:
                whole.unlink(missing_ok=True)  # as of a full disk
                raise
            whole.replace(out)
            partial.unlink()
        process.say(f"written to {out}; to read it:\n  import numpy\n  features = numpy.load({str(out)!r})['features']")
