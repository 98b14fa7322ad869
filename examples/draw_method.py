"""The picture of README: FIMA at a glance (Fig. 2), drawn on a generated video.

python examples/draw_method.py --out docs/method.png

Clips, the boxes of their crops, frame differences and positive pairs are made as in pretraining.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import matplotlib.path
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.transforms import Bbox
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
import data
from augment import frame_difference
from cli import command_line
from evaluate import PNG
from fima import FIMAConfig
from losses import bin_centers, positive_pairs
from runs import check_replaceable
from synthetic import make_synthetic
from train import user_errors, write_file
from video import Video
from visualize import BLUE, COLORS, GRAY, GREEN, ORANGE, draw_boxes, strip, written

SEED = 9  # of the video, its windows and its crops
GRID = 4  # rows and columns of a feature map
THRESHOLD = FIMAConfig.threshold  # of positive pairs, in bin diagonals
GAP = 0.1  # between an arrow and what it joins


def sample() -> tuple[Tensor, dict[str, Tensor]]:
    """The middle frame of a generated video, (3, H, W) in [0, 1], and its views by `data.PretrainingViews`."""
    with tempfile.TemporaryDirectory() as folder:
        make_synthetic(Path(folder, "videos"), train=1, test=1, seed=SEED, size=(160, 160))
        path = str(next(Path(folder).glob("videos/train/*/*.mp4")))
        with Video(path) as video:
            frame = torch.tensor(video.read([len(video) // 2])[0]).permute(2, 0, 1) / 255
        return frame, data.PretrainingViews(data.VideoList([path], [-1], [], ""), crop=112, seed=SEED)[0, 0]


def label(ax: Axes, text: str, x: float, y: float, color: str = "black", va: str = "center", size: float = 11) -> Bbox:
    """A text. Like each part of the picture, it says where it is."""
    text = ax.text(x, y, text, color=color, ha="center", va=va, size=size, zorder=9)
    return text.get_window_extent().transformed(ax.transData.inverted())


def box(ax: Axes, text: str, x: float, y: float, width: float, height: float, color: str = GRAY) -> Bbox:
    """A module or a loss, with its lower left corner at x, y."""
    style = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, fc="#F2F2F2", ec=color, lw=1.5))
    label(ax, text, x + width / 2, y + height / 2, color, size=13)
    return Bbox.from_bounds(x, y, width, height)


def picture(ax: Axes, text: str, x: float, y: float, size: float, image: Tensor, color: str, grid: int = 0) -> Bbox:
    """A picture (3, H, W) in [0, 1] of a height `size`, with its name above, and so many rows of feature pixels."""
    bounds, ends = (x, y, size * image.shape[2] / image.shape[1], size), [-0.5, image.shape[2] - 0.5]
    lines = dict.fromkeys(("xticks", "yticks"), np.linspace(*ends, grid + 1))
    inset = ax.inset_axes(bounds, transform=ax.transData, **lines)
    inset.imshow(image.permute(1, 2, 0).numpy())
    inset.set_title(text, color=color, size=11, pad=4)
    inset.tick_params(length=0, labelbottom=False, labelleft=False)
    inset.spines[:].set(color=color, lw=2)
    if grid:
        inset.grid(color="white", lw=1)
    return Bbox.from_bounds(*bounds)


def feature_map(ax: Axes, text: str, x: float, y: float, color: str) -> Bbox:
    pixels = torch.tensor(to_rgb(color)).lerp(torch.ones(3), 0.65)[:, None, None].expand(3, GRID, GRID)
    return picture(ax, text, x, y, 1.1, pixels, color, GRID)


def arrow(ax: Axes, color: str, *points: tuple[float, float], text: str = "") -> None:
    """An arrow along straight lines from point to point, with a text above the last one."""
    path = matplotlib.path.Path(points)
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=12, color=color, lw=1.5))
    label(ax, text, *(np.add(*points[-2:]) / 2 + (0, GAP)), color, "bottom")


def row(ax: Axes, color: str, y: float, *parts: Bbox, text: str = "") -> None:
    """Arrows from part to part at a height y, with a text above the last one."""
    for left, right in itertools.pairwise(parts):
        arrow(ax, color, (left.x1 + GAP, y), (right.x0 - GAP, y), text=text * (right is parts[-1]))


def draw_pairs(ax: Axes, boxes: Tensor, source: Bbox, target: Bbox) -> None:
    """Lines from three feature pixels of the source to their positives in the target, by the boxes (2, 4)."""
    pairs = positive_pairs(boxes[:1], boxes[1:], (GRID, GRID), THRESHOLD)[0]
    corners = torch.tensor([[part.x0, part.y1, part.x1, part.y0] for part in (source, target)])  # rows go down
    start, end = bin_centers(corners, GRID, GRID).numpy()
    having = pairs.any(1).nonzero()[:, 0]
    for pixel, color in zip(having[[0, len(having) // 2, -1]], COLORS[3:6], strict=True):
        for other in end[pairs[pixel].numpy()]:
            ax.plot(*zip(start[pixel], other, strict=True), "o-", color=color, mec="black", ms=5, mew=0.5, zorder=8)


def draw() -> Figure:
    frame, item = sample()
    clips, parts = item["clip"] / 255, item["sub_clips"][1] / 255
    source, target, motion = (x[:, x.shape[1] // 2] for x in (*clips, frame_difference(clips[1:])[0]))
    local = frame_difference(parts)[:, :, parts.shape[2] // 2].transpose(0, 1)
    fig = Figure(figsize=(11, 6.2), dpi=130)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-0.2, 18.6), ylim=(0.2, 10.68))
    ax.axis("off")

    video = picture(ax, "one video: two windows,\ntwo random crops", 0.1, 5.85, 2.8, frame, GRAY)
    draw_boxes(ax.child_axes[0], item["box"])
    v = picture(ax, "source clip $V$", 4.1, 7.6, 1.6, source, BLUE)
    v_target = picture(ax, r"target clip $\tilde{V}$", 4.1, 5.3, 1.6, target, ORANGE)
    d_target = picture(ax, r"frame difference $\tilde{D}$", 4.1, 3.0, 1.6, motion, GREEN)
    text = "differences of the target\nwindow's $T$ sub-clips"
    sub_clips = picture(ax, text, 3.7, 0.9, 1.2, strip(local, len(parts)), GREEN)
    query = box(ax, "query\nencoder", 6.9, 5.3, 1.6, 3.9)
    key = box(ax, "key\nencoder\n\nno\ngradient", 6.9, 0.5, 1.6, 4.1)
    f = feature_map(ax, "$F_i$", 9.6, 7.5, BLUE)
    f_target = feature_map(ax, r"$\tilde{F}_i$", 9.6, 5.6, ORANGE)
    m_target = feature_map(ax, r"$\tilde{M}_i$", 9.6, 2.9, GREEN)
    k_target, cls = label(ax, "$k^+$", 9.2, 4.3, ORANGE), label(ax, "[cls]", 11.4, 8.85, GRAY)
    decoder = box(ax, "motion\ndecoder", 12.3, 5.8, 1.6, 3.4)
    y_i, y_cls = feature_map(ax, "$y_i$", 15.15, 6.5, BLUE), label(ax, "$y_{cls}$", 17.7, 8.85, GRAY)
    l_vv = box(ax, r"$\mathcal{L}_{VV}$", 17.0, 9.65, 1.4, 0.9, BLUE)
    l_pix = box(ax, r"$\mathcal{L}_{Pix}$", 15.0, 4.6, 1.4, 0.9, GREEN)
    l_fra = box(ax, r"$\mathcal{L}_{Fra}$", 17.0, 0.5, 1.4, 0.9, GREEN)
    v_pixels = picture(ax, "", 11.6, 2.2, 1.8, source, BLUE, GRID)
    d_pixels = picture(ax, "", 14.8, 2.2, 1.8, motion, GREEN, GRID)
    draw_pairs(ax, item["box"], v_pixels, d_pixels)
    label(ax, "momentum", 8.7, 4.95, GRAY)
    label(ax, "feature frame $i$", 10.15, 2.75, GRAY, "top")
    text = f"positives of three pixels: under {THRESHOLD} bin diagonals\n"
    text += "apart in the video; the loss keeps foreground pairs"
    label(ax, text, 14.1, 2.1, va="top")
    label(ax, "in both directions: each\nview is once the source", 1.5, 5.6, va="top")

    row(ax, BLUE, 8.05, video, v, query, f, decoder, text="queries")
    row(ax, BLUE, 7.05, decoder, y_i)
    row(ax, ORANGE, 6.15, video, v_target, query, f_target, decoder, text="keys,\nvalues")
    row(ax, ORANGE, 4.3, key, k_target)
    row(ax, GREEN, 3.45, d_target, key, m_target)
    row(ax, GREEN, 1.5, sub_clips, key)
    row(ax, GREEN, 0.95, key, l_fra, text=r"local motion $\tilde{l}_i$ of sub-clip $i$, against that of all others")
    row(ax, GRAY, 8.85, cls, decoder, y_cls)
    arrow(ax, GRAY, (7.7, query.y0 - GAP), (7.7, key.y1 + GAP))
    arrow(ax, GRAY, (17.7, y_cls.y0 - GAP), (17.7, l_fra.y1 + GAP))
    arrow(ax, BLUE, (15.7, y_i.y0 - GAP), (15.7, l_pix.y1 + GAP))
    text = r"pooled: query $q$ of $V$ against key $k^+$ of $\tilde{V}$ and a queue, as in MoCo"
    arrow(ax, BLUE, (7.7, query.y1 + GAP), (7.7, 10.1), (l_vv.x0 - GAP, 10.1), text=text)
    arrow(ax, ORANGE, (v_target.x1 + GAP, 5.6), (6.4, 5.6), (6.4, 4.3), (key.x0 - GAP, 4.3))
    arrow(ax, GREEN, (v_target.x0 - GAP, 5.6), (3.4, 5.6), (3.4, 3.8), (d_target.x0 - GAP, 3.8))
    points = (m_target.x1 + GAP, 3.45), (11.2, 3.45), (11.2, 5.05), (l_pix.x0 - GAP, 5.05)
    arrow(ax, GREEN, *points, text="motion pixels")
    arrow(ax, GREEN, (15.7, d_pixels.y1 + GAP), (15.7, l_pix.y0 - GAP))
    return fig


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--out", default="method.png", help="PNG to write (default: %(default)s)")
    out = parser.parse_args().out
    check_replaceable(out, PNG)
    with user_errors((OSError,)):
        write_file(out, written(draw(), ".png"))
    print(f"written to {out}")


if __name__ == "__main__":
    command_line(main)
