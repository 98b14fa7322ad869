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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import pretrain
from cli import command_line
from losses import info_nce, similarity
from models import MomentumQueue, deal, momentum_update
from pretrain import Method, PretrainConfig, main, pool
from train import UserError, option


@dataclasses.dataclass(frozen=True)
class MoCoConfig(PretrainConfig):
    """Options of MoCo; the defaults are those of FIMA's paper for UCF101 (Sec. 4.1, A.1)."""

    losses: str = option("vv", "losses to sum, of vv (Eq. 1) and vd (Eq. 2)")
    temperature: float = option(0.1, "temperature of every contrast", (0.001, 1000))
    momentum: float = option(0.999, "momentum of the key encoder; small data sets want 0.99", (0, 1))
    queue: int = option(2048, "length of each queue of keys; keep it below the number of videos", (1, 2**24))
    bn: str = option(
        "shuffle",
        "batch norm with several processes. shuffle: keys are made of clips dealt out over the processes, as in MoCo; "
        "local: of each process's own clips",
        ("shuffle", "local"),
    )

    KNOWN_LOSSES = ("vv", "vd")
    TUNED = PretrainConfig.TUNED | {"bn"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms or not set(self.terms) <= set(self.KNOWN_LOSSES):
            raise UserError(f"--losses {self.losses}: name some of {','.join(self.KNOWN_LOSSES)}, separated by commas")

    @property
    def terms(self) -> tuple[str, ...]:
        """The losses to sum."""
        return tuple(dict.fromkeys(name.strip() for name in self.losses.split(",") if name.strip()))


PRESETS = {
    "synthetic": pretrain.PRESETS["synthetic"] | dict(momentum=0.99, queue=256),
    "ucf101": pretrain.PRESETS["ucf101"] | dict(momentum=0.999, queue=2048),
    "k400": pretrain.PRESETS["k400"] | dict(momentum=0.999, queue=65536),
}


@dataclasses.dataclass
class FeatureMaps:
    """Feature maps of both views, (2, B, C, T, H, W) each: index 0 is the source view, 1 the target view."""

    query: Tensor  # F^q: RGB, query encoder
    key: Tensor  # F^k: RGB, key encoder, no gradient
    motion: Tensor | None  # M^k: frame difference, key encoder, no gradient


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


class MoCo(Method):
    """L = L_VV [+ L_VD]: query and key encoder, a projection head each, and a queue of keys for each loss.

    RGB clips V and frame differences D pass the same encoder in separate forwards, so that batch norm does not mix
    their statistics; the two views of a modality share a forward.
    """

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        instance_losses = [name for name in config.terms if name in MoCoConfig.KNOWN_LOSSES]
        self.queues = nn.ModuleDict({name: MomentumQueue(config.queue) for name in instance_losses})
        self.videos: float = math.inf  # number of them, as far as known
        if config.compile == "on":
            self.key_encoder.compile(dynamic=False)

    def make_views(self, videos: data.VideoList, *arguments: Any, **options: Any) -> data.PretrainingViews:
        """As of every method."""
        self.videos = len(videos)
        return super().make_views(videos, *arguments, **options)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `data.PretrainingViews` makes them, batched → the named losses; enqueues the keys at the end."""
        maps = self.encode(views, views["clip"] if "vd" in self.config.terms else None)
        losses, keys = self.instance_losses(maps)
        self.enqueue(keys)
        return losses

    def encode(self, views: dict[str, Tensor], moving: Tensor | None) -> FeatureMaps:
        """Clips → feature maps, and of those in `moving` (B, 2, ...) the maps of frame differences.

        The key encoder first follows the query encoder by one momentum step.
        """
        clips = self.both(views["clip"])  # (2B, 3, frames, crop, crop), uint8
        color = self.both(views["color"])  # (2B, 2 + sub-clips, parameters)
        if self.training:
            momentum_update(self.encoder, self.key_encoder, self.config.momentum)
            momentum_update(self.head, self.key_head, self.config.momentum)
        rgb, dealt, dealt_color = self.encoder_input(clips, color[:, 0]), self.deal(clips), self.deal(color)
        with torch.no_grad():  # before the query pass, whose graph takes memory
            key = self.key_encoder(rgb if dealt is clips else self.encoder_input(dealt, dealt_color[:, 0]))
            key, difference = self.deal(key, back=True), None
            if moving is not None:
                dealt = dealt if moving is views["clip"] else self.deal(self.both(moving))
                difference = self.key_encoder(self.encoder_input(dealt, dealt_color[:, 1], difference=True))
                difference = self.deal(difference, back=True)
        halves = (None if x is None else x.unflatten(0, (2, -1)) for x in (self.encoder(rgb), key, difference))
        return FeatureMaps(*halves)

    def deal(self, rows: Tensor, back: bool = False) -> Tensor:
        """With --bn shuffle, `models.deal`: no key's batch norm sees the same clips as its query's; else `rows`."""
        return deal(rows, back) if self.config.bn == "shuffle" else rows

    def instance_losses(self, maps: FeatureMaps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """L_VV (Eq. 1) and L_VD (Eq. 2), as far as asked for, in both directions, and their keys (2B, D)."""
        losses, keys = {}, {}
        v = self.project(self.head, pool(maps.query))  # (2, B, D)
        spread = v.detach().flatten(0, 1).std(0).mean()  # 1/√D for features in all directions, 0 for collapsed ones
        self.metrics["feature_std"] = spread
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
        """Those of every method, and of a queue that holds keys of the batch's own videos."""
        own = f"--queue {self.config.queue} exceeds the {self.videos} videos, which then meet their own keys"
        return super().warnings(line) + [own] * (self.config.queue > self.videos)


if __name__ == "__main__":
    command_line(lambda: main(MoCo, MoCoConfig, PRESETS, __doc__))
