"""A figure of one's own, here Fig. 5 of FIMA: how do the RGB and the motion features of an encoder fit each other?

python examples/affinity.py runs/moco runs/fima
python examples/affinity.py runs/fima --count 20 --out affinity.pdf

(a) Cosine of each RGB with each motion feature pixel, mean over the clips: bright on the diagonal alone where a pixel
tells the motion at its own place. (b) Cosine of the pooled RGB feature of each clip with the pooled motion feature of
each clip of the same video: wide where features follow the motion through the video.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
import visualize
from cli import command_line


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of each with each feature of a sample: (N, A, C), (N, B, C) → (N, A, B)."""
    return F.normalize(x, dim=2) @ F.normalize(y, dim=2).mT


def draw_affinity(config: visualize.FigureConfig, inputs: list[str]) -> Figure:
    """How RGB and motion features fit each other in space, pixel by pixel, and in time, clip by clip (Fig. 5)."""
    models = visualize.load_models(config, inputs, key=True)
    videos, pictures = visualize.draw_videos(models[0].config, config.count or 50), []
    fig, axes = plt.subplots(
        1, len(models) + 1, figsize=(visualize.PAGE, visualize.PAGE / (len(models) + 1)), layout="constrained"
    )
    for place, (ax, model) in enumerate(zip(axes, models, strict=False), 1):

        def compared(clips: Tensor, model: visualize.Model = model) -> Tensor:
            both = visualize.both_modalities(model.encoder, clips, model.config.difference)
            rgb, motion = (maps.mean(2).flatten(2).mT for maps in both)  # (n, HW, C)
            return torch.cat([rgb.mean(1), motion.mean(1), cosines(rgb, motion).flatten(1)], 1)

        found, _ = visualize.video_features(model, videos, "test videos", compared)
        channels = model.encoder.out_channels
        rgb, motion, affinity = found.tensor_split([channels, 2 * channels], 2)
        matrix = affinity.mean((0, 1)).unflatten(0, (round(affinity.shape[2] ** 0.5), -1)).numpy()
        pictures.append(ax.imshow(matrix, cmap="viridis"))
        ax.set(title=model.name, xlabel="motion pixel", ylabel="RGB pixel")
        axes[-1].violinplot(cosines(rgb, motion).flatten().numpy(), [place], showmeans=True, widths=0.8)
    for picture in pictures:  # in one scale
        picture.set_clim(min(p.norm.vmin for p in pictures), max(p.norm.vmax for p in pictures))
    fig.colorbar(pictures[0], ax=axes[:-1], label="cosine", shrink=0.6)
    axes[-1].set_xticks(range(1, len(models) + 1), [model.name for model in models])
    axes[-1].set(ylabel="cosine", title="clips in time", box_aspect=1)
    return fig


def main() -> None:
    """`affinity.py [CHECKPOINT or RUN …] --flag value …`: visualize.py's main reads the flags and writes the figure."""
    visualize.FIGURES["affinity"] = draw_affinity, visualize.FigureConfig
    sys.argv.insert(1, "affinity")
    visualize.main()


if __name__ == "__main__":
    command_line(main)
