"""An encoder from a checkpoint, or untrained, and what it gives for the clips of videos.

    encoder, config = load_encoder(EncoderConfig(checkpoint="runs/fima/checkpoint.pt", clips=2))
    features, readable, unreadable = video_outputs(unit_features(encoder), videos, config, start_process(), "videos")

Evaluation, figures and the end of a first run go this way; processes started by torchrun share the videos.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler

import data
import find
from augment import DIFFERENCES, encoder_input
from cli import loader_workers
from models import ENCODERS, build_encoder, encoder_weights, load_weights, recognize
from runs import load_checkpoint, saved_options
from train import Options, Process, UserError, option, progress, user_errors

Function = Callable[[Tensor], Tensor]
UNTRAINED = dict(dataset="synthetic", data="", split=1, encoder="i3d", width=1.0, frames=16, frame_stride=2, crop=224)
UNTRAINED |= dict(difference="adjacent")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Options):
    """Which encoder, and clips of which videos. What is left at "" or 0 is as in training, or as in UNTRAINED."""

    checkpoint: str = option("", "checkpoint.pt of a run, or another project's; without it, an untrained encoder")
    dataset: str = option("", "what to evaluate on", ("", *find.DATASETS))
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
    clips: int = option(10, "uniformly spaced clips of a test video", (1, 10_000))
    test_batch: int = option(4, "videos a forward in testing, in each process", (1, 65_536))
    workers: int = option(-1, "loader processes of each process; -1: its share of the CPU cores, at most 8", (-1, 1024))
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of everything random", (0, 2**31 - 1))


def load_encoder(config: EncoderConfig | str, say=print, key: bool = False) -> tuple[nn.Module, EncoderConfig]:
    """The encoder of a checkpoint, by options or by its path alone, or of the run to resume, in eval mode, its key
    encoder with `key` where there is one, and the options with those that were left open filled in; `say` is told what
    was taken from another project's checkpoint.

    Raises UserError: no such checkpoint, none of a known or one of another encoder; clips or a width not for it.
    """
    config = EncoderConfig(config) if isinstance(config, str) else config
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


def subset(videos: data.VideoList, indices: Sequence[int]) -> data.VideoList:
    """Some of the videos, in the order of the indices."""
    paths, labels = [videos.paths[i] for i in indices], [videos.labels[i] for i in indices]
    return data.VideoList(paths, labels, videos.classes, f"{len(indices)} of {len(videos)} videos")


def pooled_features(encoder: nn.Module, clips: Tensor, color: Tensor | None = None) -> Tensor:
    """uint8 clips (N, 3, frames, H, W), with `color` (N, P) augmented by it → features pooled over T, H, W: (N, C)."""
    return encoder(encoder_input(clips, color)).float().mean((2, 3, 4))


def unit_features(encoder: nn.Module) -> Function:
    """An encoder, set to eval mode, as a function: uint8 clips (N, 3, frames, H, W) → L2-normalised features (N, C)."""
    encoder.eval()
    return lambda clips: F.normalize(pooled_features(encoder, clips), dim=1)


@torch.no_grad()
def clip_outputs(
    function: Function, clips: data.Items, process: Process, workers: int, size: int, title: str, average: bool = False
) -> tuple[Tensor, Tensor, list]:
    """What a function gives for every clip of every video; the processes take turns in taking `size` videos.

    Args:
        function: uint8 clips (n, 3, frames, crop, crop) on the device → (n, D).
        clips: a data set like `data.TestClips`, with the list `videos`.

    Returns, the same on every process, (videos, clips, D) on the CPU, or with `average` the means over clips (videos,
    D); whether each video could be read (videos,); path and reason of those that could not. Raises UserError if none
    can, or if the outputs of one are not all finite.
    """
    batches = [range(i, min(i + size, len(clips))) for i in range(0, len(clips), size)]
    mine = batches[process.rank :: process.world_size]
    sampler = BatchSampler([i for batch in mine for i in batch], size, drop_last=False)
    loader, found, bad = data.load_batches(clips, sampler, workers), {}, []
    for videos in progress(process, mine, desc=title, unit="batch", leave=False):
        with user_errors((OSError,)):
            batch = next(loader)
        batch_clips = batch["clips"].to(process.device, non_blocking=True)  # (B, N, 3, frames, crop, crop)
        outputs = function(batch_clips.flatten(0, 1)).unflatten(0, batch_clips.shape[:2])
        found[videos.start] = (outputs.mean(1) if average else outputs).cpu()
        bad += batch["bad"]
    found = dict(process.gather([*found.items()]))
    reasons = dict(sorted(process.gather(bad)))
    for path, reason in reasons.items():
        process.say(f"{title}: {path!r} cannot be read: {reason}")
    good = torch.tensor([path not in reasons for path in clips.videos.paths])
    if not good.any():
        raise UserError(f"{title}: none of {len(good)} can be read")
    outputs = torch.cat([found[batch.start] for batch in batches])
    if broken := (good & ~outputs.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist():
        raise UserError(
            f"{title}: outputs are not finite for {len(broken)} of {len(good)}, as {clips.videos.paths[broken[0]]!r}: "
            "take a checkpoint from before (epoch_*.pt), or train with a lower --lr"
        )
    return outputs, good, [*reasons.items()]


def video_outputs(
    function: Function, videos: data.VideoList, config: EncoderConfig, process: Process, title: str, average=True
) -> tuple[Tensor, Tensor, list]:
    """`clip_outputs` for the uniformly spaced clips that the options ask for."""
    clips = data.TestClips(videos, config.crop, config.frames, config.frame_stride, config.clips)
    return clip_outputs(function, clips, process, loader_workers(config), config.test_batch, title, average)


def nearest(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices, (Q, min(k, G)), of the rows of a gallery (G, C) nearest to queries (Q, C), nearest first."""
    gallery = F.normalize(gallery, dim=1)
    chunks = [F.normalize(chunk, dim=1) @ gallery.T for chunk in queries.split(1024)]
    cosines, indices = zip(*(chunk.topk(min(k, len(gallery)), 1) for chunk in chunks), strict=True)
    return torch.cat(cosines), torch.cat(indices)
