"""MoCo-v2 for video: the baseline of FIMA, and the frame that FIMA is built on.

L_VV, instance discrimination between two clips of a video (Eq. 1 of FIMA), and with `--losses vv,vd` also L_VD, which
aligns pooled RGB features with pooled frame-difference features (Eq. 2). MoCo: He et al., CVPR 2020; v2: Chen et al.,
2020.

    python moco.py                                                          # small encoder, generated videos, on a CPU
    python moco.py --dataset ucf101 --data /data/ucf101                     # one GPU
    torchrun --nproc_per_node=8 moco.py --dataset k400 --data /data/k400    # eight GPUs
"""

import copy
import dataclasses
import math
import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data
from augment import encoder_input
from cli import command_line
from losses import info_nce, similarity
from models import ENCODERS, MomentumQueue, ProjectionHead, build_encoder, deal, momentum_update
from pretrain import VideosConfig, main
from train import TrainConfig, UserError, option

MEMORY_FORMATS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}


@dataclasses.dataclass(frozen=True)
class MoCoConfig(TrainConfig, VideosConfig):
    """Options of MoCo; the defaults are the paper's for UCF101 (Sec. 4.1, A.1, A.3)."""

    frames: int = option(16, "frames of a clip", (1, 4096))
    frame_stride: int = option(2, "a clip takes every Nth frame of the video", (1, 4096))
    crop: int = option(224, "height and width of a clip in pixels; the paper has 112 for r2plus1d_18", (1, 1024))
    encoder: str = option("i3d", "video encoder", tuple(ENCODERS))
    width: float = option(1.0, "factor on the encoder's numbers of channels", (0.01, 8))
    losses: str = option("vv", "losses to sum, of vv (Eq. 1) and vd (Eq. 2)")
    temperature: float = option(0.1, "temperature of every contrast", (0.001, 1000))
    momentum: float = option(0.999, "momentum of the key encoder; small data sets want 0.99", (0, 1))
    queue: int = option(2048, "length of each queue of keys; keep it below the number of videos", (1, 2**24))
    min_scale: float = option(0.2, "least share of a frame's area that a random crop covers", (0.01, 1))
    jitter_p: float = option(0.8, "probability of colour jitter (A.3 prints 0.2)", (0, 1))
    gray_p: float = option(0.2, "probability of grayscale", (0, 1))
    blur_p: float = option(0.5, "probability of Gaussian blur (A.3 prints 0.2)", (0, 1))
    bn: str = option(
        "shuffle",
        "batch norm with several processes. shuffle: keys are made of clips dealt out over the processes, as in MoCo; "
        "local: of each process's own clips",
        ("shuffle", "local"),
    )
    memory_format: str = option(
        "channels_last", "order of the encoder's input in memory, a matter of speed alone", tuple(MEMORY_FORMATS)
    )
    compile: str = option(
        "off", "torch.compile encoders and augmentation: minutes of waiting, then faster steps", ("off", "on")
    )

    KNOWN_LOSSES = ("vv", "vd")
    FREE = TrainConfig.FREE | {"data", "list_file", "exclude", "memory_format", "compile"}
    TUNED = TrainConfig.TUNED | {"bn"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms or not set(self.terms) <= set(self.KNOWN_LOSSES):
            raise UserError(f"--losses {self.losses}: name some of {','.join(self.KNOWN_LOSSES)}, separated by commas")

    @property
    def terms(self) -> tuple[str, ...]:
        """The losses to sum."""
        return tuple(dict.fromkeys(name.strip() for name in self.losses.split(",") if name.strip()))


PRESETS = {
    "synthetic": dict(
        encoder="conv4",
        crop=32,
        epochs=12,
        batch_size=32,
        momentum=0.99,
        queue=256,
        min_scale=0.5,
        jitter_p=0.2,
        blur_p=0.2,
    ),
    "ucf101": dict(encoder="i3d", crop=224, epochs=200, batch_size=8, lr=0.04, momentum=0.999, queue=2048),
    "k400": dict(encoder="i3d", crop=224, epochs=100, batch_size=8, lr=0.04, momentum=0.999, queue=65536),
}


@dataclasses.dataclass
class FeatureMaps:
    """Feature maps of both views, (2, B, C, T, H, W) each: index 0 is the source view, 1 the target view."""

    query: Tensor  # F^q: RGB, query encoder
    key: Tensor  # F^k: RGB, key encoder, no gradient
    motion: Tensor | None  # M^k: frame difference, key encoder, no gradient


def pool(maps: Tensor) -> Tensor:
    """Global average over time and space: (..., C, T, H, W) → (..., C)."""
    return maps.mean((-3, -2, -1))


@torch.no_grad()
def contrast_metrics(query: Tensor, positive: Tensor, negatives: Tensor) -> dict[str, Tensor]:
    """How well queries (B, D) tell their positives (B, D) from negatives (N, D): mean cosines of both in [-1, 1], and
    the share of queries that are nearer to their positive than to any negative. Costs little beside an encoder pass.
    """
    own, others = (query * positive).sum(1), similarity(query, negatives, 1.0)
    return {
        "positive_similarity": own.mean(),
        "negative_similarity": others.mean(),
        "contrast_accuracy": (own > others.amax(1)).float().mean(),
    }


class MoCo(nn.Module):
    """L = L_VV [+ L_VD]: query and key encoder, a projection head each, and a queue of keys for each loss.

    RGB clips V and frame differences D pass the same encoder in separate forwards, so that batch norm does not mix
    their statistics; the two views of a modality share a forward. The data set has to make `sub_clips` of each view.

    Raises:
        ValueError: the crop or number of frames does not suit the encoder's strides; no compiler for --compile on.
    """

    sub_clips = 0

    def __init__(self, config: MoCoConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder, config.width)
        steps, stride, _ = self.encoder.strides
        if config.crop < 2 * stride:
            raise ValueError(
                f"--crop {config.crop} is too small: {config.encoder} has stride {stride}, take {2 * stride} or more"
            )
        if config.frames % steps or config.frames < steps:
            raise ValueError(
                f"--frames {config.frames} is no multiple of {steps}, the stride of {config.encoder} in time"
            )
        self.head = ProjectionHead(self.encoder.out_channels)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        instance_losses = [name for name in config.terms if name in MoCoConfig.KNOWN_LOSSES]
        self.queues = nn.ModuleDict({name: MomentumQueue(config.queue) for name in instance_losses})
        self.metrics: dict[str, Tensor | float] = {}
        if config.compile == "on":
            compiler = os.environ.get("CXX", "g++")
            if not shutil.which(compiler):
                raise ValueError(f"--compile on needs a C++ compiler, there is no {compiler}: install one, or set CXX")
            for part in (self.encoder, self.key_encoder):
                part.compile(dynamic=False)  # there are no more than three batch sizes
            if torch.cuda.is_available():  # on a CPU the augmentation goes by its parameters, clip by clip
                self.encoder_input = torch.compile(self.encoder_input, dynamic=False)

    def make_views(
        self, videos: data.VideoList, kind: type[data.PretrainingViews] = data.PretrainingViews, **more: Any
    ) -> data.PretrainingViews:
        """What to train on, by the method's options; the first process makes its own before the others do."""
        config = self.config
        color = dict(jitter_p=config.jitter_p, gray_p=config.gray_p, blur_p=config.blur_p)
        shape = config.crop, config.frames, config.frame_stride, self.sub_clips
        return kind(videos, *shape, config.seed, min_scale=config.min_scale, color=color, **more)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `data.PretrainingViews` makes them, batched → the named losses; enqueues the keys at the end."""
        maps = self.encode(views, motion="vd" in self.config.terms)
        losses, keys = self.instance_losses(maps)
        self.enqueue(keys)
        return losses

    def encode(self, views: dict[str, Tensor], motion: bool) -> FeatureMaps:
        """Clips → feature maps. The key encoder first follows the query encoder by one momentum step."""
        clips = views["clip"].transpose(0, 1).flatten(0, 1)  # (2B, 3, frames, crop, crop), uint8
        color = views["color"].transpose(0, 1).flatten(0, 1)  # (2B, 2 + sub-clips, parameters)
        if self.training:
            momentum_update(self.encoder, self.key_encoder, self.config.momentum)
            momentum_update(self.head, self.key_head, self.config.momentum)
        rgb = self.encoder_input(clips, color[:, 0])
        query = self.encoder(rgb)
        dealt, dealt_color = self.deal(clips), self.deal(color)
        with torch.no_grad():
            key = self.key_encoder(rgb if dealt is clips else self.encoder_input(dealt, dealt_color[:, 0]))
            key, difference = self.deal(key, back=True), None
            if motion:
                if "original" in views:  # V is merged by FAME; its motion stays that of the video itself
                    dealt = self.deal(views["original"].transpose(0, 1).flatten(0, 1))
                difference = self.key_encoder(self.encoder_input(dealt, dealt_color[:, 1], difference=True))
                difference = self.deal(difference, back=True)
        halves = (None if x is None else x.unflatten(0, (2, -1)) for x in (query, key, difference))
        return FeatureMaps(*halves)

    def deal(self, rows: Tensor, back: bool = False) -> Tensor:
        """With --bn shuffle, `models.deal`: no key's batch norm sees the same clips as its query's; else `rows`."""
        return deal(rows, back) if self.config.bn == "shuffle" else rows

    def encoder_input(self, clips: Tensor, color: Tensor | None, difference: bool = False) -> Tensor:
        """uint8 clips (N, 3, frames, H, W) → V or, taken before the colours, D; then colours, if any, normalised."""
        return encoder_input(clips, color, difference, MEMORY_FORMATS[self.config.memory_format])

    @staticmethod
    def project(head: ProjectionHead, features: Tensor) -> Tensor:
        """g and the L2 norm of h in Eq. 1: (..., C) → (..., D), float32."""
        return F.normalize(head(features).float(), dim=-1)

    def instance_losses(self, maps: FeatureMaps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """L_VV (Eq. 1) and L_VD (Eq. 2), as far as asked for, in both directions, and their keys (2B, D)."""
        losses, keys = {}, {}
        v = self.project(self.head, pool(maps.query))  # (2, B, D)
        spread = v.detach().flatten(0, 1).std(0).mean()  # 1/√D for features in all directions, 0 for collapsed ones
        self.metrics = {"feature_std": spread}
        for name, key_maps in (("vv", maps.key), ("vd", maps.motion)):
            if name in self.config.terms:
                with torch.no_grad():
                    k = self.project(self.key_head, pool(key_maps))  # (2, B, D)
                other = k.flip(0).flatten(0, 1)  # to each query, the key of the other view
                losses[name] = info_nce(v.flatten(0, 1), other, self.queues[name].keys, self.config.temperature)
                self.metrics[f"chance/{name}"] = math.log(1 + self.config.queue)
                shown = contrast_metrics(v.flatten(0, 1), other, self.queues[name].keys)
                self.metrics |= {f"{metric}/{name}": value for metric, value in shown.items()}
                keys[name] = k.flatten(0, 1)
        return losses, keys

    def enqueue(self, keys: dict[str, Tensor]) -> None:
        """Writes all queues, after all losses have read them: no video meets its own fresh key as a negative.

        "queue_age" is the age in steps at which keys leave the queue.
        """
        processes = dist.get_world_size() if dist.is_initialized() else 1
        for name, queue in self.queues.items() if self.training else ():
            queue.enqueue(keys[name])
            self.metrics[f"queue_age/{name}"] = len(queue.keys) / (processes * len(keys[name]))

    def warnings(self, line: dict[str, float]) -> list[str]:
        """What a line of the log, after the first epoch, shows to be wrong."""
        collapsed = line["epoch"] > 1 and line["feature_std"] < 0.1 * self.head.net[-1].out_features ** -0.5
        return ["the features of all clips are nearly the same (feature_std): try a lower --lr"] * collapsed


if __name__ == "__main__":
    command_line(lambda: main(MoCo, MoCoConfig, PRESETS, __doc__))
