"""FIMA: Fine-grained Spatiotemporal Motion Alignment for Contrastive Video Representation Learning (ACM MM 2023).

MoCo-v2, plus a pixel-level contrast between RGB features of one clip and frame-difference features of another clip of
the same video (Sec. 3.1, 3.2), plus a frame-level reconstruction of motion through a [cls] token (Sec. 3.3). The whole
method is `FIMA.forward`.

    python fima.py                                                          # small encoder, generated videos, on a CPU
    python fima.py --dataset ucf101 --data /data/ucf101                     # one GPU
    torchrun --nproc_per_node=8 fima.py --dataset k400 --data /data/k400    # eight GPUs, the paper's setting
"""

import dataclasses
import math

import torch
from torch import Tensor

import moco
from augment import ForegroundBackgroundMerging as Merging
from cli import command_line
from losses import FRAME_LOSSES, activation_map, foreground_mask, pixel_chance, pixel_contrast, positive_pairs, seen_box
from models import MomentumQueue, MotionDecoder
from pretrain import main, pool
from train import UserError, detail, option


@dataclasses.dataclass(frozen=True)
class FIMAConfig(moco.MoCoConfig):
    """Options of FIMA; the defaults are the paper's."""

    losses: str = option("vv,pix,fra", "losses to sum, of vv (Eq. 1), vd (Eq. 2), pix (Eq. 8) and fra (Eq. 10)")
    threshold: float = option(0.7, "distance below which pixels are positive, in bin diagonals (Table 3a)", (0.01, 100))
    centres: str = detail("nominal", "places of feature pixels, bin centres or by padding", ("nominal", "measured"))
    foreground: float = option(0.5, "portion of the pixels that is foreground, beta (Table 3d)", (0.01, 1))
    mask_source: str = detail("both", "maps that show the foreground (Table 3e)", ("rgb", "difference", "both"))
    mask_position: str = detail("both", "masked side of L_Pix (Table 3f)", ("none", "prediction", "target", "both"))
    decoder: str = detail("shared", "one for pix and fra, one each, none (Table 8)", ("shared", "separate", "none"))
    decoder_depth: int = detail(2, "blocks of the motion decoder (Table 3b)", (1, 64))
    decoder_width: int = detail(512, "channels of the motion decoder (Tables 3c, 7)", (1, 8192))
    decoder_heads: int = detail(4, "attention heads of the motion decoder (Table 3c)", (1, 1024))
    frame_loss: str = detail("infonce", "form of fra (Table 9)", tuple(FRAME_LOSSES))
    pixel_negatives: str = detail("batch", "whose pixels the denominator of pix has (Table 10)", ("video", "batch"))
    pixel_queue: int = detail(0, "motion pixels of earlier batches added to the denominator (Table 10)", (0, 2**24))
    fame: str = option("none", "views that FAME puts on another background", ("none", *Merging.BRANCHES))

    KNOWN_LOSSES = ("vv", "vd", "pix", "fra")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder == "none" and "fra" in self.terms:
            raise UserError("--decoder none leaves nothing to reconstruct with: take fra out of --losses")
        if self.decoder_width % self.decoder_heads:
            raise UserError(f"--decoder_heads {self.decoder_heads} do not divide --decoder_width {self.decoder_width}")
        if self.fame != "none" and self.batch_size < 2:
            raise UserError("--fame takes the background of another video of the batch: --batch_size 2 or more")


PRESETS = moco.PRESETS | {
    "synthetic": moco.PRESETS["synthetic"] | dict(decoder_width=128),
    "k400": moco.PRESETS["k400"] | dict(pixel_queue=31360),
}


def feature_pixels(maps: Tensor) -> Tensor:
    """Splits maps into feature frames of pixels: (2, B, C, T, H, W) → (2, B·T, HW, C)."""
    return maps.permute(0, 1, 3, 4, 5, 2).flatten(3, 4).flatten(1, 2)


class FIMA(moco.MoCo):
    """L = L_VV + L_Pix + L_Fra (Eq. 11, Fig. 2), in both directions: each view is once the source, once the target.

    Tensors of both directions are stacked, (2, …): entry 0 predicts the second view from the first, entry 1 the first
    from the second, so that `x.flip(0)` holds, for each source, what belongs to its target.
    """

    def __init__(self, config: FIMAConfig):
        super().__init__(config)
        if config.fame != "none":
            self.merge = Merging(branches=config.fame)
        self.decoder = self.cls_decoder = None
        wanted = {"pix", "fra"} & set(config.terms)
        size = self.encoder.out_channels, config.decoder_width, config.decoder_depth, config.decoder_heads
        if wanted and config.decoder != "none":
            self.decoder = MotionDecoder(*size)
        if len(wanted) == 2 and config.decoder == "separate":
            self.cls_decoder = MotionDecoder(*size)
        if "fra" in wanted:
            self.sub_clips = config.frames // self.encoder.strides[0]  # T, one for each feature frame
            self.queues["fra"] = MomentumQueue(config.queue)
        if "pix" in wanted and config.pixel_queue:
            self.queues["pix"] = MomentumQueue(config.pixel_queue)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `data.PretrainingViews` makes them, batched → the named losses; enqueues the keys at the end."""
        terms = self.config.terms
        maps = self.encode(views, motion=bool({"vd", "pix"} & set(terms)))  # F^q, F^k, M^k of V and Ṽ
        losses, keys = self.instance_losses(maps)  # Eq. 1, Eq. 2
        y, y_cls = self.decode(maps.query)  # Eq. 7, Eq. 9
        if "pix" in terms:
            positives = self.positive_pixels(views["box"], maps)  # φ_p ∩ foreground
            losses["pix"], keys["pix"] = self.pixel_loss(y, positives, maps.motion)  # Eq. 8
        if "fra" in terms:
            losses["fra"], keys["fra"] = self.frame_loss(y_cls, self.sub_clip_features(views))  # Eq. 10
        self.enqueue(keys)
        return losses

    def decode(self, maps: Tensor) -> tuple[Tensor, Tensor | None]:
        """F^q → y (2, B·T, HW, C) of Eq. 7 and y_cls (2, B·T, C) of Eq. 9, feature frame by feature frame.

        Source F_i asks target F̃_i, both of the query encoder. Without a decoder, y is F_i itself, as in Eq. 3.
        """
        source, target = (feature_pixels(x).flatten(0, 1) for x in (maps, maps.flip(0)))  # F_i, F̃_i
        y, y_cls = (source, None) if self.decoder is None else self.decoder(source, target)
        if self.cls_decoder is not None:
            y_cls = self.cls_decoder(source, target)[1]
        return y.unflatten(0, (2, -1)), None if y_cls is None else y_cls.unflatten(0, (2, -1))

    @torch.no_grad()
    def positive_pixels(self, boxes: Tensor, maps: moco.FeatureMaps) -> Tensor:
        """φ_p of Eq. 3 from the boxes (B, 2, 4), less the background by Eq. 6: (2, B, HW, HW) bool, source × target."""
        config, grid, boxes = self.config, maps.key.shape[-2:], boxes.transpose(0, 1)
        if config.centres == "measured":
            boxes = seen_box(boxes, config.crop, grid[1], self.encoder.strides[1], self.encoder.offsets[1])
        pairs = positive_pairs(boxes.flatten(0, 1), boxes.flip(0).flatten(0, 1), grid, config.threshold)
        pairs = pairs.unflatten(0, (2, -1))
        if config.mask_position != "none":
            sources = {"rgb": [maps.key], "difference": [maps.motion], "both": [maps.key, maps.motion]}
            fused = sum(activation_map(features.flatten(0, 1)) for features in sources[config.mask_source])
            mask = foreground_mask(fused, config.foreground).flatten(1).unflatten(0, (2, -1))  # (2, B, HW)
            self.metrics["foreground_share"] = mask.float().mean()
            if config.mask_position in ("prediction", "both"):
                pairs = pairs & mask[..., :, None]
            if config.mask_position in ("target", "both"):
                pairs = pairs & mask.flip(0)[..., None, :]
        self.metrics["pixels_with_positive"] = pairs.any(3).float().mean()
        return pairs

    def pixel_loss(self, y: Tensor, positives: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        """L_Pix of Eq. 8, mean of both directions and all feature frames, and the keys (2·B·T·HW, D)."""
        steps = motion.shape[3]  # T
        y = self.project(self.head, y)  # (2, B·T, HW, D)
        with torch.no_grad():
            m = self.project(self.key_head, feature_pixels(motion))  # (2, B·T, HW, D)
        positives = positives.repeat_interleave(steps, 1)  # (2, B·T, HW, HW)
        losses = []
        for prediction, target, pairs in zip(y, m.flip(0), positives, strict=True):
            if self.config.pixel_negatives == "video":
                keys = target.unflatten(0, (-1, steps)).flatten(1, 2).repeat_interleave(steps, 0)  # (B·T, T·HW, D)
            else:
                keys = target.flatten(0, 1)
            if "pix" in self.queues:
                old = self.queues["pix"].keys
                keys = torch.cat([keys, old.expand(*keys.shape[:-2], *old.shape)], -2)
            losses.append(pixel_contrast(prediction, target, pairs, keys, self.config.temperature))
        self.metrics["chance/pix"] = sum(pixel_chance(pairs, keys.shape[-2]) for pairs in positives) / 2
        return sum(losses) / 2, m.flatten(0, 2)

    @torch.no_grad()
    def sub_clip_features(self, views: dict[str, Tensor]) -> Tensor:
        """l of Eq. 10, projected motion features of the sub-clips, by the key encoder: (2, B, T, D)."""
        clips, color = views["sub_clips"].transpose(0, 1), views["color"].transpose(0, 1)[:, :, 2:]
        shape = clips.shape[:3]  # 2, B, T
        features = pool(self.key_maps(clips.flatten(0, 2), color.flatten(0, 2), difference=True))
        return self.project(self.key_head, features).unflatten(0, shape)

    def frame_loss(self, y_cls: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """L_Fra of Eq. 10 or a form of Table 9, mean of both directions and all sub-clips, and the keys (2·B·T, D)."""
        prediction = self.project(self.head, y_cls).flatten(0, 1)  # (2·B·T, D)
        target, queue = local.flip(0).flatten(0, 2), self.queues["fra"].keys
        at_chance = {"infonce": math.log(len(target) + len(queue)), "triplet": 1.0, "mse": 2.0}
        self.metrics["chance/fra"] = at_chance[self.config.frame_loss]
        options = {"temperature": self.config.temperature} if self.config.frame_loss == "infonce" else {}
        loss = FRAME_LOSSES[self.config.frame_loss](prediction, target, queue, **options)
        return loss, local.flatten(0, 2)

    def warnings(self, line: dict[str, float]) -> list[str]:
        """Those of MoCo, and of L_Pix where it has little to go by."""
        found = super().warnings(line)
        if line["epoch"] > 1 and line.get("pixels_with_positive", 1) < 0.01:
            found.append("hardly any pixel has a positive (pixels_with_positive): try a larger --threshold")
        if line["epoch"] > 1 and line.get("foreground_share", 1) < 0.5 * self.config.foreground:
            found.append("activation maps are flat (foreground_share), so that nothing stands out as foreground")
        return found


if __name__ == "__main__":
    command_line(lambda: main(FIMA, FIMAConfig, PRESETS, __doc__))
