"""MoCo-v2 for video: the baseline of FIMA, and the base that FIMA is built on.

L_VV, instance discrimination between two clips of a video (Eq. 1 of FIMA), and with `--losses vv,vd` also L_VD, which
aligns pooled RGB with pooled frame-difference features (Eq. 2). He et al., CVPR 2020; v2: Chen et al., 2020.

    python moco.py                                                          # small encoder, generated videos, on a CPU
    python moco.py --dataset ucf101 --data /data/ucf101                     # one GPU
    torchrun --nproc_per_node=8 moco.py --dataset k400 --data /data/k400    # eight GPUs
"""

import copy
import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pretrain
from cli import command_line
from losses import info_nce, similarity
from models import MomentumQueue, deal, momentum_update
from pretrain import Method, PretrainConfig, main, pool
from train import UserError, detail, option


@dataclasses.dataclass(frozen=True)
class MoCoConfig(PretrainConfig):
    """Options of MoCo; the defaults are those of FIMA's paper for UCF101 (Sec. 4.1, A.1)."""

    losses: str = option("vv", "losses to sum, of vv (Eq. 1) and vd (Eq. 2)")
    temperature: float = detail(0.1, "temperature of every contrast", (0.001, 1000))
    momentum: float = option(0.999, "momentum of the key encoder; small data sets want 0.99", (0, 1))
    queue: int = option(2048, "length of each queue of keys; keep it below the number of videos", (1, 2**24))
    bn: str = detail("shuffle", "batch norm of keys: shuffled over processes, or local", ("shuffle", "local"))

    KNOWN_LOSSES = ("vv", "vd")
    TUNED = PretrainConfig.TUNED | {"bn"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms or not set(self.terms) <= set(self.KNOWN_LOSSES):
            raise UserError(f"--losses {self.losses}: name some of {','.join(self.KNOWN_LOSSES)}")

    @property
    def terms(self) -> tuple[str, ...]:
        """The losses to sum."""
        return tuple(dict.fromkeys(name.strip() for name in self.losses.split(",") if name.strip()))


PRESETS = pretrain.PRESETS | {
    "synthetic": pretrain.PRESETS["synthetic"] | dict(momentum=0.99, queue=256, difference="spans", color_first="on"),
    "k400": pretrain.PRESETS["k400"] | dict(queue=65536),
}


@dataclasses.dataclass
class FeatureMaps:
    """Feature maps of both views, (2, B, C, T, H, W) each: index 0 is the first view, 1 the second."""

    query: Tensor  # F^q: RGB, query encoder
    key: Tensor  # F^k: RGB, key encoder, no gradient
    motion: Tensor | None  # M^k: frame difference, key encoder, no gradient


class MoCo(Method):
    """L = L_VV [+ L_VD]: query and key encoder, a projection head each, and a queue of keys for each loss.

    RGB clips V and frame differences D pass the same encoder in separate forwards, so that batch norm does not mix
    their statistics; the two views of a modality share a forward.
    """

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        names = [name for name in config.terms if name in MoCoConfig.KNOWN_LOSSES]
        self.queues = nn.ModuleDict({name: MomentumQueue(config.queue) for name in names})
        self.merge = None  # FAME's augmentation of V alone, not of D, for methods that take it
        self.step_keys: list[dict[str, Tensor]] = []  # those of each micro-batch of the step, by queue
        if config.compile == "on":
            self.key_encoder.compile(dynamic=False)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `data.PretrainingViews` makes them, batched → the named losses; enqueues the keys at the end."""
        maps = self.encode(views, motion="vd" in self.config.terms)
        losses, keys = self.instance_losses(maps)
        self.enqueue(keys)
        return losses

    def encode(self, views: dict[str, Tensor], motion: bool = False) -> FeatureMaps:
        """Clips → feature maps, with `motion` those of frame differences too; the key encoder follows first."""
        clips = self.both(views["clip"])  # (2B, 3, frames, crop, crop), uint8
        shown = self.both(self.merge(views["clip"])) if self.merge else clips
        color = self.both(views["color"])  # (2B, 2 + sub-clips, parameters)
        if self.training and self.part[0] == 0:
            momentum_update(self.encoder, self.key_encoder, self.config.momentum)
            momentum_update(self.head, self.key_head, self.config.momentum)
        rgb = self.encoder_input(shown, color[:, 0])
        with torch.no_grad():  # before the query pass, whose graph takes memory
            key = self.key_maps(shown, color[:, 0], made=rgb)
            difference = self.key_maps(clips, color[:, 1], difference=True) if motion else None
        halves = (None if x is None else x.unflatten(0, (2, -1)) for x in (self.encoder(rgb), key, difference))
        return FeatureMaps(*halves)

    def key_maps(self, clips: Tensor, color: Tensor, made: Tensor | None = None, difference: bool = False) -> Tensor:
        """The key encoder's maps of clips, whose input may be `made` already. With --bn shuffle and several processes,
        they are dealt out and back (`models.deal`), so that its batch norm sees other clips than the query's."""
        shuffle = deal if self.config.bn == "shuffle" else lambda rows, back=False: rows
        dealt = shuffle(clips)
        if made is None or dealt is not clips:
            made = self.encoder_input(dealt, shuffle(color), difference=difference)
        return shuffle(self.key_encoder(made), back=True)

    def instance_losses(self, maps: FeatureMaps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """L_VV (Eq. 1) and L_VD (Eq. 2), as far as asked for, in both directions, and their keys (2B, D)."""
        losses, keys = {}, {}
        query = self.project(self.head, pool(maps.query)).flatten(0, 1)  # (2B, D)
        self.metrics["feature_std"] = query.detach().std(0).mean()  # 1/√D in all directions, 0 for collapsed features
        for name, key_maps in (("vv", maps.key), ("vd", maps.motion)):
            if name not in self.config.terms:
                continue
            with torch.no_grad():
                k, negatives = self.project(self.key_head, pool(key_maps)), self.queues[name].keys
                positive = k.flip(0).flatten(0, 1)  # to each query, the key of the other view
                own, others = (query * positive).sum(1), similarity(query, negatives, 1.0)  # cosines
            losses[name] = info_nce(query, positive, negatives, self.config.temperature)
            self.metrics[f"chance/{name}"] = math.log(1 + self.config.queue)
            self.metrics[f"positive_similarity/{name}"] = own.mean()
            self.metrics[f"negative_similarity/{name}"] = others.mean()
            self.metrics[f"contrast_accuracy/{name}"] = (own > others.amax(1)).float().mean()
            keys[name] = k.flatten(0, 1)
        return losses, keys

    def enqueue(self, keys: dict[str, Tensor]) -> None:
        """Writes all queues, after all losses of the step have read them: no video meets its own fresh key as a
        negative. Keys come view by view, and are written so, whatever the number of micro-batches.

        "queue_age" is the age in steps at which keys leave the queue.
        """
        processes, (i, count) = dist.get_world_size() if dist.is_initialized() else 1, self.part
        self.step_keys = [*self.step_keys[:i], keys]  # of the step so far
        for name, queue in self.queues.items() if self.training and i + 1 == count else ():
            views = torch.cat([part[name].unflatten(0, (2, -1)) for part in self.step_keys], 1)
            queue.enqueue(views.flatten(0, 1))
            self.metrics[f"queue_age/{name}"] = len(queue.keys) / (processes * views[..., 0].numel())

    def warnings(self, line: dict[str, float]) -> list[str]:
        """Those of every method, and of a queue that holds keys of the batch's own videos."""
        ages = [age for name, age in line.items() if name in ("queue_age/vv", "queue_age/vd")]
        long = any(2 * age > line["step"] / line["epoch"] for age in ages)  # an epoch gives two keys of each video
        own = f"--queue {self.config.queue} exceeds the videos of an epoch, which then meet their own keys"
        return super().warnings(line) + [own] * long


if __name__ == "__main__":
    command_line(lambda: main(MoCo, MoCoConfig, PRESETS, __doc__))
