"""Pictures of the method and of what it sees.

python visualize.py method --out method.png    # FIMA at a glance, on a generated video (the picture in README)
"""

import dataclasses
import sys

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

import data
from losses import bin_centers, frame_difference, positive_pairs
from train import Options, UserError, command_line, option, parse, user_errors

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#555555"  # colour-blind safe (Okabe and Ito)


@dataclasses.dataclass(frozen=True)
class FigureConfig(Options):
    """Options of the figures."""

    data: str = option("datasets/synthetic", "folder of the generated videos, made there if need be")
    video: int = option(2, "which video of the training set, from 0", least=0)
    seed: int = option(3, "seed of the views", least=0, most=2**31 - 1)
    out: str = option("method.png", "picture to write; .pdf and .svg are vector graphics")


def image(ax: Axes, picture: Tensor, x: float, y: float, size: float, color: str) -> None:
    """Puts a picture (3, H, W) in [0, 1] with its lower left corner at (x, y), framed in a colour."""
    ax.imshow(picture.permute(1, 2, 0), extent=(x, x + size, y, y + size), zorder=2, interpolation="bilinear")
    ax.add_patch(Rectangle((x, y), size, size, fill=False, color=color, lw=2, zorder=3))


def module(ax: Axes, text: str, x: float, y: float, width: float, height: float, color: str = GRAY) -> None:
    """A named box."""
    ax.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.05", fc="#F2F2F2", ec=color, lw=1.5, zorder=2))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11, color=color, zorder=3)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = GRAY, curve: float = 0.0
) -> None:
    """An arrow, straight or bent to one side."""
    bend = f"arc3,rad={curve}"
    patch = FancyArrowPatch(start, end, connectionstyle=bend, arrowstyle="-|>", mutation_scale=13, color=color, lw=1.5)
    ax.add_patch(patch)


def feature_map(ax: Axes, x: float, y: float, color: str, name: str, grid: int = 4, size: float = 1.0) -> None:
    """A feature frame: a grid of feature pixels, its name beside it."""
    for row in range(grid):
        for column in range(grid):
            corner = x + column * size / grid, y + row * size / grid
            ax.add_patch(Rectangle(corner, size / grid, size / grid, fc=color, alpha=0.35, ec="white", lw=1, zorder=2))
    ax.text(x + size / 2, y + size + 0.08, name, ha="center", va="bottom", fontsize=12, color=color)


def draw_method(config: FigureConfig) -> None:
    """Fig. 2 of the paper on a real sample: two views, their boxes, frame difference, decoder, and the three losses."""
    with user_errors():
        videos = data.find_videos("synthetic", config.data, train=True)
        if not 0 <= config.video < len(videos.paths):
            raise ValueError(f"--video {config.video}: there are {len(videos.paths)}, counted from 0")
    views = data.PretrainingViews(videos, 64, seed=config.seed)[0, config.video]
    with data.Video(videos.paths[config.video]) as video:
        frame = torch.from_numpy(video.read([len(video) // 2])[0].copy()).permute(2, 0, 1) / 255
    clips = views["clip"] / 255
    moving = frame_difference(clips)
    local = frame_difference(views["sub_clips"][1] / 255)
    middle = clips.shape[2] // 2

    fig, ax = plt.subplots(figsize=(13.5, 7.8))
    ax.set(xlim=(0, 18), ylim=(0.6, 10.9), aspect="equal")
    ax.axis("off")

    image(ax, frame, 0.2, 6.0, 2.6, GRAY)
    ax.text(1.5, 8.7, "one video, two windows,\ntwo random crops", ha="center", va="bottom", fontsize=11)
    for box, color in zip(views["box"].tolist(), (BLUE, ORANGE), strict=True):
        x0, y0, x1, y1 = box
        corner = 0.2 + 2.6 * min(x0, x1), 6.0 + 2.6 * (1 - y1)
        ax.add_patch(Rectangle(corner, 2.6 * abs(x1 - x0), 2.6 * (y1 - y0), fill=False, color=color, lw=2.5, zorder=4))
    for picture, y, color, caption in (
        (clips[0, :, middle], 7.7, BLUE, "source clip $V$"),
        (clips[1, :, middle], 5.5, ORANGE, r"target clip $\tilde{V}$"),
        (moving[1, :, middle], 3.3, GREEN, r"its frame difference $\tilde{D}$"),
    ):
        image(ax, picture, 3.8, y, 1.5, color)
        ax.text(4.55, y - 0.08, caption, ha="center", va="top", fontsize=10.5, color=color)
        arrow(ax, (5.4, y + 0.75), (6.2, y + 0.75), color)
    for i, picture in enumerate(local[:, :, local.shape[2] // 2]):
        image(ax, picture, 3.4 + 1.2 * i, 1.3, 1.1, GREEN)
    ax.text(4.55, 1.22, "differences of its $T$ sub-clips", ha="center", va="top", fontsize=10.5, color=GREEN)
    arrow(ax, (5.8, 1.85), (6.2, 1.85), GREEN)
    arrow(ax, (2.9, 8.0), (3.7, 8.4), BLUE)
    arrow(ax, (2.9, 6.8), (3.7, 6.3), ORANGE)
    arrow(ax, (3.72, 5.9), (3.72, 4.3), GREEN, curve=0.4)

    module(ax, "query\nencoder", 6.3, 5.7, 1.35, 3.4)
    module(ax, "key\nencoder\n\nno\ngradient", 6.3, 1.3, 1.35, 3.5)
    arrow(ax, (6.97, 5.6), (6.97, 4.9))
    ax.text(7.1, 5.22, "momentum", ha="left", va="center", fontsize=10, color=GRAY)

    feature_map(ax, 8.5, 7.6, BLUE, "$F_i$")
    feature_map(ax, 8.5, 5.7, ORANGE, r"$\tilde{F}_i$")
    feature_map(ax, 8.5, 3.5, GREEN, r"$\tilde{M}_i$")
    for y, color in ((8.1, BLUE), (6.2, ORANGE), (4.0, GREEN)):
        arrow(ax, (7.75, y), (8.4, y), color)
    module(ax, "motion\ndecoder", 10.9, 5.9, 1.3, 3.2)
    arrow(ax, (9.6, 8.1), (10.8, 8.1), BLUE)
    ax.text(10.2, 8.15, "queries", ha="center", va="bottom", fontsize=10, color=BLUE)
    arrow(ax, (9.6, 6.4), (10.8, 6.4), ORANGE)
    ax.text(10.2, 6.32, "keys,\nvalues", ha="center", va="top", fontsize=10, color=ORANGE)
    arrow(ax, (10.35, 8.8), (10.8, 8.8))
    ax.text(10.3, 8.8, "[cls]", ha="right", va="center", fontsize=11, color=GRAY)
    arrow(ax, (12.3, 8.8), (16.6, 8.8))
    ax.text(16.7, 8.8, "$y_{cls}$", ha="left", va="center", fontsize=13, color=GRAY)
    feature_map(ax, 13.0, 6.5, BLUE, "$y_i$")
    arrow(ax, (12.3, 7.0), (12.9, 7.0), BLUE)

    module(ax, r"$\mathcal{L}_{VV}$", 16.4, 9.8, 1.1, 0.8, BLUE)
    module(ax, r"$\mathcal{L}_{Pix}$", 15.0, 5.2, 1.1, 0.8, GREEN)
    module(ax, r"$\mathcal{L}_{Fra}$", 16.4, 1.45, 1.1, 0.8, GREEN)
    arrow(ax, (6.97, 10.2), (16.3, 10.2), BLUE)
    ax.plot([6.97, 6.97], [9.2, 10.2], color=BLUE, lw=1.5)
    text = r"pooled features of $V$ (query) and $\tilde{V}$ (key), instance against instance, as in MoCo"
    ax.text(11.3, 10.28, text, ha="center", va="bottom", fontsize=10.5, color=BLUE)
    arrow(ax, (14.1, 6.7), (14.95, 5.9), BLUE)
    arrow(ax, (16.95, 8.5), (16.95, 2.35))
    arrow(ax, (7.75, 1.85), (16.3, 1.85), GREEN)
    text = r"local motion $\tilde{l}_i$ of sub-clip $i$, against the other sub-clips and videos"
    ax.text(12.0, 1.93, text, ha="center", va="bottom", fontsize=10.5, color=GREEN)
    draw_pairs(ax, views["box"], clips[0, :, middle], moving[1, :, middle])
    arrow(ax, (14.7, 4.5), (15.2, 5.1), GREEN)
    with user_errors():
        fig.savefig(config.out, dpi=110, bbox_inches="tight", pad_inches=0.05)
    print(f"written to {config.out}")


def draw_pairs(ax: Axes, boxes: Tensor, source: Tensor, target: Tensor, grid: int = 4) -> None:
    """Lines from three pixels of the source clip to their positives in the target's frame difference.

    By location alone: the foreground would take a trained encoder.
    """
    size, x_source, x_target, y = 1.7, 10.2, 12.9, 3.3
    image(ax, source, x_source, y, size, BLUE)
    image(ax, target, x_target, y, size, GREEN)
    spots = bin_centers(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), grid, grid)[0] * size  # y upwards, as the axes have it
    pairs = positive_pairs(boxes[:1], boxes[1:], (grid, grid))[0]
    having = pairs.any(1).nonzero()[:, 0].tolist()
    shown = sorted({having[0], having[len(having) // 2], having[-1]}) if having else []
    for s, color in zip(shown, ("#F0E442", "#56B4E9", "#CC79A7"), strict=False):
        for t in pairs[s].nonzero()[:, 0].tolist():
            ends = [(x + spots[p, 0], y + spots[p, 1]) for x, p in ((x_source, s), (x_target, t))]
            ax.plot(*zip(*ends, strict=True), color=color, lw=1.8, marker="o", ms=4, mec="black", mew=0.5, zorder=5)
    text = "positives of three pixels: less than 0.7 bins apart in the\n"
    text += "original frame (the loss keeps foreground pairs only)"
    ax.text((x_source + x_target + size) / 2, y - 0.08, text, ha="center", va="top", fontsize=10.5)


FIGURES = {"method": draw_method}


def main() -> None:
    """`visualize.py FIGURE --flag value …`"""
    if len(sys.argv) < 2 or sys.argv[1] not in (*FIGURES, "-h", "--help"):
        raise UserError(f"name a figure: {', '.join(FIGURES)} (--help lists the flags)")
    config = parse(FigureConfig, __doc__, argv=sys.argv[1 + (sys.argv[1] in FIGURES) :])
    matplotlib.use("agg")
    FIGURES[sys.argv[1]](config)


if __name__ == "__main__":
    command_line(main)
