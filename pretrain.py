"""What every method shares besides the loop: options, views, encoder and head, and the run from options to checkpoint.

A method of one's own is a config class, a subclass of `Method` with a `forward`, and a call of `main`: see
examples/simclr.py, and examples/tubelet_contrast.py, which builds on MoCo.
"""

import copy
import dataclasses
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import find
from augment import DIFFERENCES, encoder_input
from cli import loader_workers, parse, start_process
from models import ENCODERS, ProjectionHead, build_encoder
from runs import continued, fit_in_folder, unused_folder
from train import SWITCH, Options, TrainConfig, UserError, detail, method_name, option, program, user_errors

MEMORY_FORMATS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
PRESETS = {  # what is the same for every method
    "synthetic": dict(encoder="conv4", crop=32, epochs=12, batch_size=32, min_scale=0.5, jitter_p=0.2, blur_p=0.2),
    "ucf101": dict(encoder="i3d", crop=224, epochs=200, batch_size=8),
    "k400": dict(encoder="i3d", crop=224, epochs=100, batch_size=8),
}


@dataclasses.dataclass(frozen=True)
class VideosConfig(Options):
    """Options that say which videos to train on."""

    HEADING = "data"  # in --help
    dataset: str = option("synthetic", "what to train on; changes defaults: add it to --help", find.DATASETS)
    data: str = option("", "folder of the data set (default: datasets/DATASET)")
    list_file: str = option("", "with --dataset folder: a file of lines 'path label', label optional")
    exclude: str = option("", "files of videos to leave out, by commas: of data.py check, or a run's bad_videos.log")
    split: int = option(1, "official split of the data set", (1, 99))

    @property
    def root(self) -> str:
        """Folder of the data set."""
        return self.data or f"datasets/{self.dataset}"

    def find_videos(self) -> "data.VideoList":  # quoted, as data is an option here
        """`find.find_videos` by these options; of `synthetic`, the unlabeled videos if there are any."""
        with user_errors():
            return find.find_videos(self.dataset, self.root, True, self.split, self.list_file, self.exclude, True)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(TrainConfig, VideosConfig):
    """Options of every method; the defaults are FIMA's for UCF101 (Sec. 4.1, A.3)."""

    frames: int = option(16, "frames of a clip", (1, 4096))
    frame_stride: int = option(2, "a clip takes every Nth frame of the video", (1, 4096))
    crop: int = option(224, "height and width of a clip in pixels; the paper has 112 for r2plus1d_18", (1, 1024))
    encoder: str = option("i3d", "video encoder; on a CPU, conv4 with --crop 32", tuple(ENCODERS))
    width: float = detail(1.0, "factor on the encoder's numbers of channels", (0.01, 8))
    min_scale: float = detail(0.2, "least share of a frame's area that a random crop covers", (0.01, 1))
    jitter_p: float = detail(0.8, "probability of colour jitter (A.3 prints 0.2)", (0, 1))
    gray_p: float = detail(0.2, "probability of grayscale", (0, 1))
    blur_p: float = detail(0.5, "probability of Gaussian blur (A.3 prints 0.2)", (0, 1))
    difference: str = detail("adjacent", "frames compared by D, or brightness over spans (1, 4, 8)", tuple(DIFFERENCES))
    color_first: str = detail("off", "D of coloured frames, where brightness scales motion and shifts nothing", SWITCH)
    memory_format: str = detail("channels_last", "order in memory, a matter of speed alone", tuple(MEMORY_FORMATS))
    compile: str = detail("off", "torch.compile the encoders: minutes of waiting, then faster steps", SWITCH)
    activation_checkpointing: str = option("off", "compute the encoder again in the backward: less memory", SWITCH)

    HEADING = "model and clips"  # in --help
    FREE = TrainConfig.FREE | {"data", "list_file", "exclude", "memory_format", "compile", "activation_checkpointing"}


def pool(maps: Tensor) -> Tensor:
    """Global average over time and space: (..., C, T, H, W) → (..., C)."""
    return maps.mean((-3, -2, -1))


class Method(nn.Module):
    """Base of the methods: a video encoder f, a projection head g, and the views of videos that they are trained on.

    A subclass has a `forward`: batched views of `data.PretrainingViews` and "epoch", how many have passed → named
    losses. What else the loop asks of a method, and what `metrics` are, says train.py. A method that takes sub-clips
    says in `sub_clips` how many of each view.

    Raises UserError where width, crop or number of frames do not suit the encoder, or --compile on finds no compiler.
    """

    sub_clips = 0
    part = 0, 1  # until the loop says which micro-batch it is

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        with user_errors((ValueError,)):  # a width that the encoder does not come in
            self.encoder = build_encoder(config.encoder, config.width)
        steps, stride, _ = self.encoder.strides
        if config.crop < 2 * stride or config.frames % steps:
            need = f"{config.encoder} needs a crop of {2 * stride} or more, and a multiple of {steps} frames"
            raise UserError(f"--crop {config.crop} --frames {config.frames}: {need}")
        self.encoder.checkpointing = config.activation_checkpointing == "on"
        self.head = ProjectionHead(self.encoder.out_channels)
        self.metrics: dict[str, Tensor | float] = {}
        if config.compile == "on":
            if not shutil.which(compiler := os.environ.get("CXX", "g++")):
                raise UserError(f"--compile on needs a C++ compiler, there is no {compiler}: install one, or set CXX")
            self.encoder.compile(dynamic=False)  # there are no more than three batch sizes

    def make_views(self, videos: data.VideoList, kind: type = data.PretrainingViews, **more) -> data.PretrainingViews:
        """What to train on, by the method's options; the first process makes its own before the others do."""
        config = self.config
        color = dict(jitter_p=config.jitter_p, gray_p=config.gray_p, blur_p=config.blur_p)
        shape = config.crop, config.frames, config.frame_stride, self.sub_clips
        return kind(videos, *shape, config.seed, min_scale=config.min_scale, color=color, **more)

    @staticmethod
    def both(entry: Tensor) -> Tensor:
        """An entry of the views, (B, 2, ...) → (2B, ...), first all source views, then all target views."""
        return entry.transpose(0, 1).flatten(0, 1)

    def encoder_input(self, clips: Tensor, color: Tensor | None, difference: bool = False) -> Tensor:
        """uint8 clips (N, 3, frames, H, W) → V or D with colours, if any, normalised."""
        spans, config = DIFFERENCES[self.config.difference] if difference else (), self.config
        return encoder_input(clips, color, spans, MEMORY_FORMATS[config.memory_format], config.color_first == "on")

    @staticmethod
    def project(head: nn.Module, features: Tensor) -> Tensor:
        """g and the L2 norm of h in Eq. 1 of FIMA: (..., C) → (..., D), float32."""
        return F.normalize(head(features).float(), dim=-1)

    def warnings(self, line: dict[str, float]) -> list[str]:
        """What a line of the log shows to be wrong: windows of a video that hardly differ, and after the first epoch
        features that have collapsed, where the method logs "feature_std", the standard deviation of L2-normalised
        features of D channels (1/√D at best)."""
        found, least = [], 0.1 * self.head.net[-1].out_features ** -0.5
        if line.get("overlap", 0) > 0.8:
            found.append("the two windows of a video share more than 80 % of their frames: take a smaller --frames")
        if line["epoch"] > 1 and line.get("feature_std", 1) < least:
            found.append("the features of all clips are nearly the same (feature_std): try a lower --lr")
        return found


def pretrain(method_class: type[Method], config: PretrainConfig) -> None:
    """Trains a method, from options to checkpoint; on the generated videos, shows at the end what it has learnt."""
    process = start_process(config.device, config.timeout, config.deterministic == "on")
    torch.manual_seed(config.seed)
    method = method_class(config)
    untrained = copy.deepcopy(method.encoder) if config.dataset == "synthetic" else None
    videos = process.first(config.find_videos, lambda videos: videos.mark(config.root))
    process.say(videos.report)
    if process.device.type == "cpu" and config.encoder != "conv4":
        process.say(f"note: {config.encoder} takes many seconds a step without a GPU: try --encoder conv4 --crop 32")
    seen = {"videos": videos.seen(config.root)} if process.rank == 0 else {}
    config = continued(config, process, seen)
    views = process.first(lambda: method.make_views(videos))
    with user_errors((ValueError,)):  # fewer videos than in a batch of all processes
        place = config.seed, process.rank, process.world_size
        sampler = data.StepSampler(len(views), config.batch_size * config.accumulate, config.epochs, *place)

    def load(start: int) -> Iterator[dict]:
        return data.load_batches(views, dataclasses.replace(sampler, start_step=start), loader_workers(config))

    name, steps, paths = method_name(type(config)).lower(), sampler.steps_per_epoch, views.videos.paths
    unused = f"runs/{name}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    with user_errors((OSError,)):
        out = config.out or process.of_first(lambda: unused_folder(unused))
    checkpoint = fit_in_folder(method, config, process, load, steps, out, seen, paths=paths)
    if config.dataset == "synthetic":
        import evaluate  # here, as it is a command, not a part of any method

        shape = config.crop, config.frames, config.frame_stride
        encoders = {"untrained": untrained, name: method.encoder}
        evaluate.first_look(encoders, config.root, shape, process, loader_workers(config))
    here, tested = Path(__file__).resolve().parent, f"--checkpoint {shlex.quote(str(checkpoint))}"
    tested += " --data LABELLED_VIDEOS" * (config.dataset == "folder")
    scripts = [shlex.quote(str((Path() if here == Path.cwd() else here) / x)) for x in ("evaluate.py", "visualize.py")]
    process.say(
        f"\nnext:\n  python {scripts[0]} retrieve {tested}    # R@k, 10 clips a video\n"
        f"  python {scripts[0]} linear {tested} --cached 10    # accuracy of a linear classifier\n"
        f"  python {scripts[1]} report {shlex.quote(str(checkpoint.parent))}    # all figures of the run\n"
        f"  python {shlex.join(program())} --dataset folder --data YOUR_VIDEOS --encoder {config.encoder} "
        f"--width {config.width} --crop {config.crop}    # your own videos"
    )


def main(method_class: type[Method], config_class: type[PretrainConfig], presets: dict[str, dict], doc: str) -> None:
    """`pretrain` by the options of the command line."""
    pretrain(method_class, parse(config_class, doc, presets))
