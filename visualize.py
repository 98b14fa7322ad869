"""Pictures of what an encoder sees: one command a figure, on any checkpoint and any videos.

    python visualize.py sample --dataset ucf101 --data /data/ucf101         # boxes, clips, differences, sub-clips
    python visualize.py curves runs/moco runs/fima                          # training curves of one or several runs
    python visualize.py activations runs/moco runs/fima                     # activation maps, side by side (Fig. 3, 4)
    python visualize.py affinity runs/moco runs/fima                        # RGB against motion features (Fig. 5)
    python visualize.py attention runs/fima --video clip.mp4                # where the motion decoder looks (Fig. 7)
    python visualize.py masks runs/fima                                     # foreground of each modality (Fig. 8, 9)
    python visualize.py retrieval runs/fima                                 # queries and their nearest neighbours
    python visualize.py sample --out sample.gif                             # playing; so do others, as retrieval
    python visualize.py report runs/fima                                    # all of a run in one HTML file
    python visualize.py compare runs/moco runs/fima                         # results, options and curves of runs

Before the flags comes a checkpoint, or a run folder with a checkpoint.pt; `curves`, `activations`, `affinity` and
`compare` take several, and none (or `--checkpoint`) is as in evaluate.py. A figure is a PNG, or by the suffix of --out
a PDF or SVG, and of some a GIF or WebP that plays. It is made for the width of a page (7 inches), in colours that the
colour-blind can tell apart. `visualize.py FIGURE --help` explains each.
"""

import base64
import contextlib
import dataclasses
import functools
import html
import inspect
import io
import itertools
import math
import os
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image  # which matplotlib needs, too
from torch import Tensor, nn

import data
import fima
import find
from augment import DIFFERENCES, color_augment, encoder_input, frame_difference
from cli import command_line, dispatch, shown, start_process
from evaluate import PNG, plain
from features import EncoderConfig, checkpoint_path, load_encoder, nearest, subset, unit_features, video_outputs
from losses import activation_map, foreground_mask
from pretrain import PretrainConfig
from runs import check_replaceable, load_checkpoint, read_json, read_lines, read_starts, saved_options
from train import UserError, load_model, option, user_errors, write_file
from video import BadVideo, Video

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#555555"  # colour-blind safe (Okabe and Ito)
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {"font.size": 8, "axes.titlesize": 8, "figure.dpi": 200, "pdf.fonttype": 42, "savefig.pad_inches": 0.05}
PAGE = 7.0  # inches
PICTURES = {".png": PNG, ".pdf": b"%PDF", ".svg": b"<?xml"}  # how they begin
MOVIES = {".gif": b"GIF8", ".webp": b"RIFF"}
MOVING = ("sample", "curves", "retrieval", "activations", "masks")  # figures that play
MEASURES = ("feature_std", "pixels_with_positive", "contrast_accuracy/vv", "accuracy")  # drawn beside the losses


@dataclasses.dataclass(frozen=True)
class FigureConfig(EncoderConfig):
    """Options of the figures. What is left open is as in the first checkpoint's training."""

    video: str = option("", "a video file to draw, instead of test videos of the data set")
    count: int = option(0, "test videos, drawn by --seed; 0: 4, of affinity 50", (0, 10**6))
    foreground: float = option(0.5, "masks: portion of the pixels that is foreground, beta of Eq. 6", (0.01, 1))
    neighbours: int = option(5, "retrieval: neighbours of a query", (1, 100))
    gallery: int = option(1000, "retrieval: training videos to search, drawn by --seed; 0: all", (0, 10**7))
    out: str = option("", "file to write (default: FIGURE.png, compare.html, or report.html in the run folder)")

    moving = property(lambda self: Path(self.out).suffix in MOVIES)


class Model(NamedTuple):
    """An encoder on its device, in eval mode, its name for a figure, and the options filled in."""

    name: str
    encoder: nn.Module
    config: FigureConfig


def run_names(paths: list[str]) -> list[str]:
    """Names for checkpoints or logs: of the folders they lie in, with that above or the file's where two are alike."""
    places = [Path(path).resolve().with_suffix("").parts if path else ("untrained",) * 3 for path in paths]
    for part in (slice(-2, -1), slice(-3, -1), slice(-2, None), slice(-3, None)):
        names = ["/".join(place[part]) for place in places]
        if len({*names}) == len(names):
            break
    return [plain(name) if path else "untrained" for name, path in zip(names, paths, strict=True)]


def load_models(config: FigureConfig, inputs: list[str], key: bool = False) -> list[Model]:
    """The encoders of checkpoints or run folders, else of --checkpoint, by `features.load_encoder`; with `key` their
    key encoders where they have such: in pretraining, it is the one that meets frame differences."""
    process, wanted = start_process(config.device), inputs or [config.checkpoint]
    found = [load_encoder(dataclasses.replace(config, checkpoint=path), process.say, key) for path in wanted]
    names = run_names([filled.checkpoint for _, filled in found])
    return [
        Model(name, encoder.to(process.device), filled) for name, (encoder, filled) in zip(names, found, strict=True)
    ]


def load_decoder(config: FigureConfig, inputs: list[str]) -> tuple[Model, nn.Module]:
    """The encoder and the motion decoder of a checkpoint of fima.py."""
    model = load_models(config, inputs)[0]
    path = model.config.checkpoint
    state = load_checkpoint(path, foreign=True) if path else {"method": ""}
    if state["method"] != "FIMA":
        raise UserError("attention needs a checkpoint of fima.py: visualize.py attention RUN")
    options = saved_options(path, state, fima.FIMAConfig, ["bn", "compile"])
    options |= {"bn": "local", "compile": "off"}  # the first may be of older code
    decoder = fima.FIMA(fima.FIMAConfig(**options)).decoder
    if decoder is None:
        raise UserError(f"{path} was trained without a motion decoder (--losses, --decoder)")
    load_model(path, decoder, {k[8:]: v.float() for k, v in state["model"].items() if k.startswith("decoder.")})
    return model, decoder.eval().to(next(model.encoder.parameters()).device)


def draw_videos(config: FigureConfig, count: int, train: bool = False) -> data.VideoList:
    """`count` videos of a part, drawn by --seed, or all for 0; the test part is the file of --video if there is one. Of
    the test part, those that can't be read are left out, and others drawn."""
    if config.video and not train:
        return data.VideoList([os.path.abspath(config.video)], [-1], [], config.video)
    list_file = config.list_file if train else config.test_list
    with user_errors():
        videos = find.find_videos(config.dataset, config.data, train, config.split, list_file)
    order = np.random.default_rng(config.seed).permutation(len(videos)).tolist()
    good = order if train else filter(lambda i: can_be_read(videos.paths[i]), order)
    if not (drawn := [*itertools.islice(good, count or None)]):
        raise UserError(f"none of the {len(videos)} test videos can be read")
    return subset(videos, drawn)


@functools.cache  # a report draws the same videos several times
def can_be_read(path: str) -> bool:
    """Whether a video can be, as `data.py check` finds it; says so if not."""
    try:
        find.check_video(False, path)
    except BadVideo as error:
        print(f"note: left out, {error}", flush=True)
        return False
    return True


def class_name(videos: data.VideoList, index: int) -> str:
    """A video's class, or its file's name where that is unknown."""
    label = videos.labels[index]
    return plain(Path(videos.paths[index]).stem if label < 0 else videos.classes[label])


def verdict(queries: data.VideoList, i: int, gallery: data.VideoList, j: int) -> str:
    """Whether neighbour j is of the class of query i, "✓ " or "✗ ", by name, as each list has its own numbers; "" where
    one of the two is unknown."""
    if min(queries.labels[i], gallery.labels[j]) < 0:
        return ""
    return "✓ " if gallery.classes[gallery.labels[j]] == queries.classes[queries.labels[i]] else "✗ "


def views_of(model: Model, videos: data.VideoList, parts: int, **more) -> data.PretrainingViews:
    """Views of so many sub-clips, drawn and coloured as in the checkpoint's training, or by default."""
    config, path = model.config, model.config.checkpoint
    trained = PretrainConfig(**saved_options(path, load_checkpoint(path, foreign=True), PretrainConfig) if path else {})
    color = dict(jitter_p=trained.jitter_p, gray_p=trained.gray_p, blur_p=trained.blur_p)
    more |= dict(min_scale=trained.min_scale, color=color)
    return data.PretrainingViews(videos, config.crop, config.frames, config.frame_stride, parts, **more)


def middle_clips(paths: list[str], config: FigureConfig) -> Tensor:
    """`data.read_clip` of each video, uint8 (N, 3, frames, crop, crop)."""
    return torch.stack([data.read_clip(path, config.frames, config.frame_stride, config.crop) for path in paths])


@torch.no_grad()
def feature_maps(encoder: nn.Module, clips: Tensor, spans: tuple[int, ...] = ()) -> Tensor:
    """uint8 clips (N, 3, frames, H, W) → maps (N, C, T, h, w) of the clips or of their frame differences."""
    clips = clips.to(next(encoder.parameters()).device)
    return encoder(encoder_input(clips, spans=spans)).float()


def both_modalities(encoder: nn.Module, clips: Tensor, difference: str = "adjacent") -> tuple[Tensor, Tensor]:
    """Feature maps of the clips and of their frame differences, each batch-normalised by its own statistics, as in
    pretraining: the running statistics of batch norm belong to no single modality, or to RGB alone."""
    encoder.train()
    return feature_maps(encoder, clips), feature_maps(encoder, clips, DIFFERENCES[difference])


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of each with each feature of a sample: (…, A, C), (…, B, C) → (…, A, B)."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def foreground_masks(rgb: Tensor, motion: Tensor, ratio: float) -> Tensor:
    """Foreground by RGB, by frame difference and by both (Fig. 8): maps (N, C, T, H, W) → (3, N, H, W) bool."""
    maps = activation_map(rgb), activation_map(motion)
    return torch.stack([foreground_mask(activation, ratio) for activation in (*maps, sum(maps))])


def neighbours_of(queries: Tensor, paths: list[str], gallery: Tensor, gallery_paths: list[str], k: int) -> list:
    """(index, cosine) of the k nearest of a gallery (G, C) to each query (Q, C), other than the query's own file."""
    closeness, indices = (x.tolist() for x in nearest(queries, gallery, k + 1))
    return [
        [(i, c) for i, c in zip(*found, strict=True) if gallery_paths[i] != path][:k]
        for path, *found in zip(paths, indices, closeness, strict=True)
    ]


def read_log(run: str) -> list[dict[str, float]]:
    """The undamaged lines of a run's log.jsonl; raises OSError where there is none, UserError where it is empty."""
    path = Path(run, "log.jsonl")
    lines = read_lines(path)
    if not any(name.startswith("loss/") for line in lines[-1:] for name in line):
        raise UserError(f"{path} holds no line yet: wait for the first --log_every steps of the run")
    return lines


def video_features(model: Model, videos: data.VideoList, title: str, function=None) -> tuple[Tensor, data.VideoList]:
    """Means of the clips' L2-normalised pooled features (N, C), or what a function of clips gives for each of them
    (N, clips, D), and the N videos: those that can be read."""
    work, process = function or unit_features(model.encoder), start_process(model.config.device)
    found, good, _ = video_outputs(work, videos, model.config, process, f"{model.name}, {title}", not function)
    return found[good], subset(videos, good.nonzero()[:, 0].tolist())


def grid(rows: int, columns: int, cell: float, **options) -> tuple[plt.Figure, np.ndarray]:
    """A figure of the page's width or less, with square cells (rows, columns) that show pictures."""
    side = min(cell, PAGE / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows), squeeze=False, **options)
    plt.setp(axes, xticks=[], yticks=[])
    return fig, axes


def draw_rows(rows: list[list[tuple]]) -> plt.Figure:
    """A figure of rows of (title, picture or clip, …), as `show` takes them; all maps have one scale."""
    fig, axes = grid(len(rows), len(rows[0]), 1.5, layout="compressed")
    letters = max(int(13 * fig.get_figwidth() / len(rows[0])), 8)  # so that a title is no wider than its picture
    for ax, (title, picture, *more) in zip(axes.flat, itertools.chain(*rows), strict=True):
        show(ax, picture, title, *more)
        ax.set_title(textwrap.fill(ax.get_title(), letters))
    lines = sum(max(ax.get_title().count("\n") + 1 for ax in row) for row in axes)
    fig.set_figheight(fig.get_figheight() + 0.15 * lines)
    if maps := [image for ax in axes.flat for image in ax.images[1:]]:
        plt.setp(maps, clim=(0, max(image.norm.vmax for image in maps)))
        fig.colorbar(maps[0], ax=axes, label="× mean of the map", shrink=0.5)
    return fig


def on_clip(encoder: nn.Module, maps: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Maps of an encoder's feature pixels, (N, h, w), laid on what these look at: (N, size, size), on the CPU."""
    scale = size / (encoder.strides[1] * maps.shape[-1])
    shift = scale * (1 - 2 * encoder.offsets[1] / size) - 1
    corners = torch.tensor([[scale, 0, shift], [0, scale, shift]]).expand(len(maps), -1, -1)
    places = F.affine_grid(corners, [len(maps), 1, size, size], align_corners=False)
    return F.grid_sample(maps[:, None].cpu(), places, mode, "border", align_corners=False)[:, 0]


def play(artist: plt.Artist, name: str, values: np.ndarray) -> None:
    """Has `written` give a property of an artist one value after the other. A still figure has the middle one."""
    artist.frames = [{name: value} for value in values]
    artist.set(**artist.frames[len(values) // 2])


def show(ax: plt.Axes, picture: Tensor, title="", heat: Tensor | None = None, spot: Tensor | None = None) -> None:
    """Shows a picture (3, H, W) in [0, 1], or a clip (3, T, H, W) that can play; over it a map (h, w), or maps in time
    (T', h, w), as multiples of their mean, of which the title tells the range; a circle around x, y of a spot."""
    frames = picture.reshape(3, -1, *picture.shape[-2:]).permute(1, 2, 3, 0).numpy()
    image = ax.imshow(frames[0])
    play(image, "data", frames)
    if heat is not None:
        maps = (heat / heat.mean()).nan_to_num().cpu().reshape(-1, *heat.shape[-2:]).numpy()
        title += f": {maps.min():.2f}–{maps.max():.2f}"
        look = dict(interpolation="bicubic", cmap="viridis", alpha=0.6, vmin=0, vmax=max(maps.max(), 2))
        play(ax.imshow(maps[0], extent=image.get_extent(), **look), "data", maps)
    if spot is not None:
        ax.plot(*spot, "o", ms=9, mfc="none", mec=ORANGE, mew=2)
    ax.set_title(title)


def written(fig: plt.Figure, suffix: str) -> memoryview:
    """A figure as the bytes of a file of this kind, and closed; in a GIF or WebP, what `play` was given plays, ten
    values a second, the shorter ones as slowly as the longest."""
    memory = io.BytesIO()
    if suffix in PICTURES:
        fig.savefig(memory, format=suffix[1:], bbox_inches="tight")
    else:
        artists, images = fig.findobj(lambda artist: hasattr(artist, "frames")), []
        fig.set_dpi(150)
        plt.setp(artists, animated=True)  # all else is drawn once
        (canvas := fig.canvas).draw()
        still, edge = canvas.copy_from_bbox(fig.bbox), 150 * plt.rcParams["savefig.pad_inches"]
        box = fig.get_tightbbox(canvas.get_renderer()).transformed(fig.dpi_scale_trans).padded(edge)
        box, height = type(box).intersection(box, fig.bbox), canvas.get_width_height()[1]
        box = int(box.x0), int(height - box.y1), int(box.x1), int(height - box.y0)
        steps = max((len(artist.frames) for artist in artists), default=1)
        for step in range(steps):
            canvas.restore_region(still)
            for artist in artists:
                artist.set(**artist.frames[step * len(artist.frames) // steps])
            for ax in {artist.axes for artist in artists}:
                for part in (*ax.images, *ax.lines, *ax.patches, *ax.spines.values()):
                    ax.draw_artist(part)
            images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").crop(box))
        if suffix == ".gif":  # in one palette, as colours flicker otherwise
            palette = images[steps // 2].quantize()
            images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        images[0].save(memory, suffix[1:], save_all=True, append_images=images[1:], duration=100, loop=0)
    plt.close(fig)
    return memory.getbuffer()


def difference_of(clip: Tensor) -> Tensor:
    """The frame differences of a uint8 clip (3, frames, H, W), four times as strong as they are, in [0, 1]."""
    return (4 * frame_difference(clip[None] / 255)[0] - 1.5).clamp(0, 1)


def with_difference(clip: Tensor, title: str) -> list[tuple]:
    """The first two columns of `draw_rows` on a uint8 clip (3, frames, H, W): the clip, and what moves in it."""
    return [(title, clip / 255), ("difference × 4", difference_of(clip))]


def strip(clip: Tensor, count: int) -> Tensor:
    """`count` frames of a clip (3, frames, H, W) in [0, 1] side by side, with white lines: (3, H, count · (W + 2))."""
    frames = clip[:, np.linspace(0, clip.shape[1] - 1, count).round()].unbind(1)
    return torch.cat([F.pad(frame, (1, 1), value=1) for frame in frames], 2)


def draw_boxes(ax: plt.Axes, boxes: Tensor) -> None:
    """Boxes (2, 4) of source and target view, in pixels of the frame."""
    for (x0, y0, x1, y1), color in zip(boxes.tolist(), (BLUE, ORANGE), strict=True):
        ax.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=color, lw=2))


def draw_activations(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """Class-agnostic activation maps (Fig. 3, 4): where is each encoder active, on average over channels and time?

    A row for each video: the middle frame, its difference to the next frame, and the map of each encoder; where it
    plays, that of each feature frame. Look whether the map is bright on what moves, and goes with it, or on the scene.
    """
    models = load_models(config, inputs)
    videos = draw_videos(models[0].config, config.count or 4)
    rows = [[] for _ in videos.paths]
    for model in models:
        for i, (row, clip) in enumerate(zip(rows, middle_clips(videos.paths, model.config), strict=True)):
            row += [] if row else with_difference(clip, class_name(videos, i))
            maps = feature_maps(model.encoder, clip[None])
            maps = torch.cat([activation_map(part) for part in (maps.split(1, 2) if config.moving else [maps])])
            row.append((model.name, clip / 255, on_clip(model.encoder, maps, clip.shape[-1])))
    return draw_rows(rows)


def draw_affinity(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """How RGB and motion features of an encoder fit each other in space and in time (Fig. 5).

    (a) Cosine of each RGB with each motion feature pixel, mean over the clips: bright on the diagonal alone where a
    pixel tells the motion at its own place. (b) Cosine of the pooled RGB feature of each clip with the pooled motion
    feature of each clip of the same video: wide where features follow the motion through the video.
    """
    models = load_models(config, inputs, key=True)
    videos, pictures = draw_videos(models[0].config, config.count or 50), []
    fig, axes = plt.subplots(1, len(models) + 1, figsize=(PAGE, PAGE / (len(models) + 1)), layout="constrained")
    for place, (ax, model) in enumerate(zip(axes, models, strict=False), 1):

        def compared(clips: Tensor, model: Model = model) -> Tensor:
            both = both_modalities(model.encoder, clips, model.config.difference)
            rgb, motion = (maps.mean(2).flatten(2).mT for maps in both)  # (n, HW, C), too much to keep
            return torch.cat([rgb.mean(1), motion.mean(1), cosines(rgb, motion).flatten(1)], 1)

        found, _ = video_features(model, videos, "test videos", compared)
        channels = model.encoder.out_channels
        rgb, motion, affinity = found.tensor_split([channels, 2 * channels], 2)
        matrix = affinity.mean((0, 1)).unflatten(0, (round(affinity.shape[2] ** 0.5), -1)).numpy()
        pictures.append(ax.imshow(matrix, cmap="viridis"))
        ax.set(title=f"(a) {model.name}", xlabel="motion pixel", ylabel="RGB pixel")
        ax.locator_params(integer=True)
        axes[-1].violinplot(cosines(rgb, motion).flatten().numpy(), [place], showmeans=True, widths=0.8)
    for picture in pictures:  # in one scale
        picture.set_clim(min(p.norm.vmin for p in pictures), max(p.norm.vmax for p in pictures))
    fig.colorbar(pictures[0], ax=axes[:-1], label="cosine", shrink=0.6)
    axes[-1].set_xticks(range(1, len(models) + 1), [model.name for model in models])
    axes[-1].set(ylabel="cosine", title="(b) clips in time", box_aspect=1)
    return fig


def draw_attention(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """Where in the target the motion decoder looks for a point of the source (Fig. 7).

    The attention of the decoder's last block, averaged over its heads, for two pixels of the source view's feature map,
    circled, the most and the least active one; dark violet is none, and if it is uniform all is green. Views have no
    colours. Look whether the yellow lies on what the circle marks, wherever the target has it.
    """
    model, decoder = load_decoder(config, inputs)
    options, encoder = model.config, model.encoder
    videos, rows = draw_videos(options, config.count or 4), []
    views = views_of(model, videos, 0, seed=config.seed, attempts=1)
    for i in range(len(videos)):
        clips = views[0, i]["clip"]
        maps = feature_maps(encoder, clips)
        step, columns = maps.shape[2] // 2, maps.shape[4]  # one feature frame of the source asks the same of the target
        source, target = maps[:, :, step].flatten(2).mT.split(1)  # (1, HW, C)
        with torch.no_grad():
            weights = decoder(source, target, need_weights=True)[2][0].cpu()  # (HW, HW)
        source, target = clips[:, :, int(encoder.strides[0] * (step + 0.5))] / 255  # in the middle of that frame
        activity, row = activation_map(maps[:1])[0].flatten().cpu(), []
        for query, kind in ((activity.argmax(), "most"), (activity.argmin(), "least")):
            spot = encoder.strides[1] * (torch.stack([query % columns, query // columns]) + 0.5) + encoder.offsets[1]
            heat = on_clip(encoder, weights[query].view(1, *maps.shape[3:]), options.crop)[0]
            place = f"{class_name(videos, i)}: {kind} active"
            row += [(place, source, None, spot - 0.5), ("target", target, heat)]
        rows.append(row)
    return draw_rows(rows)


def draw_masks(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """Foreground masks (Fig. 8; failures, Fig. 9): what is kept by the activation of RGB, of frame difference, of both.

    Made by the key encoder, with batch norm by the statistics of the videos drawn, as in pretraining; background is
    darkened. Look whether the bright part holds what moves, and little else; percents are of the frame differences, of
    which a random mask holds what --foreground says.
    """
    model = load_models(config, inputs, key=True)[0]
    videos = draw_videos(model.config, config.count or 4)
    clips = middle_clips(videos.paths, model.config)
    masks = foreground_masks(*both_modalities(model.encoder, clips, model.config.difference), config.foreground).float()
    masks = on_clip(model.encoder, masks.flatten(0, 1), model.config.crop, "nearest").unflatten(0, (3, -1))
    rows, titles = [], ("by RGB", "by difference", "by both")
    for i, clip in enumerate(clips):
        darkened = clip / 255 * (0.15 + 0.85 * masks[:, i, None, None])
        moved = (clip[:, 1:].float() - clip[:, :-1].float()).abs().mean((0, 1)).cpu()
        shares = (masks[:, i].cpu() * moved).mean((1, 2)) / moved.mean()
        named = [f"{title}: {share:.0%} of motion" for title, share in zip(titles, shares, strict=True)]
        rows.append([*with_difference(clip, class_name(videos, i)), *zip(named, darkened, strict=True)])
    return draw_rows(rows)


def draw_retrieval(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """Test videos and, below each, the training videos nearest to it, as strips of frames; playing, they are beside it.

    A neighbour of the query's class is a hit, ✓, of another one a miss, ✗; the number is the cosine of their features.
    Look what a miss has in common with the query: the way it moves, or the scene.
    """
    model = load_models(config, inputs)[0]
    features, queries = video_features(model, draw_videos(model.config, config.count or 4), "queries")
    gallery = draw_videos(model.config, config.gallery, train=True)
    keys, gallery = video_features(model, gallery, "training videos")
    if both := find.same_files(queries.paths, gallery.paths):
        which = f"{len(both)} of the {len(queries)} queries are training videos, too"
        print(f"note: {which}; if there are lists, give --list_file and --test_list", flush=True)
    columns = []
    for i, found in enumerate(neighbours_of(features, queries.paths, keys, gallery.paths, config.neighbours)):
        titles = [f"query: {class_name(queries, i)}"]
        titles += [f"{verdict(queries, i, gallery, j)}{class_name(gallery, j)} {cosine:.2f}" for j, cosine in found]
        clips = middle_clips([queries.paths[i], *(gallery.paths[j] for j, _ in found)], model.config) / 255
        columns.append([*zip(titles, clips if config.moving else [strip(clip, 4) for clip in clips], strict=True)])
    rows = [*zip(*columns, strict=False)]  # a query that is in the gallery may have one neighbour fewer
    return draw_rows([*zip(*rows, strict=True)] if config.moving else rows)


def draw_sample(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """The views of one training sample: the crops' boxes in the frame, clips, colours, differences, sub-clips.

    Drawn by --seed from the test videos or --video, and augmented as in pretraining: source (blue) and target (orange).
    Each sub-clip is cropped and flipped on its own. Where it plays, a box and what moves beside it are of one time, and
    a box is gone, and its clip still, outside its window. Look whether both views show what moves.
    """
    model = load_models(config, inputs)[0]
    options, videos = model.config, draw_videos(model.config, 1)
    parts, window = max(options.frames // model.encoder.strides[0], 1), options.frames * options.frame_stride
    views = views_of(model, videos, parts)
    item = views.empty()
    starts = views.write_views(np.random.default_rng(config.seed), videos.paths[0], item)[:, None]
    with Video(videos.paths[0]) as video:
        times = np.arange(0, window, options.frame_stride) + starts if config.moving else len(video) // 2
        times = np.unique(np.minimum(times, len(video) - 1))  # in no, one or both windows
        frames = torch.from_numpy(np.stack(video.read(times.tolist())))
    smaller = max(frames.shape[1] // 480, 1)
    rows, columns = (2, 5) if config.moving else (5, 2)
    fig, axes = grid(rows, columns, PAGE / 2, layout="compressed")
    axes = axes.T if config.moving else axes
    title = class_name(videos, 0) + ", middle frame" * (not config.moving)
    show(axes[0, 0], frames[:, ::smaller, ::smaller].permute(3, 0, 1, 2) / 255, title)
    draw_boxes(axes[0, 0], item["box"] / smaller)
    axes[0, 1].axis("off")
    for view, (name, start) in enumerate(zip(("source", "target"), starts, strict=True)):
        clip, (left, _, right, _) = item["clip"][view], item["box"][view]
        rows = {
            "clip" + ", flipped" * bool(left > right): clip / 255,
            "colours": color_augment(clip[None] / 255, item["color"][view, :1])[0],
            "difference × 4": difference_of(clip),
            f"{parts} sub-clip{'s' * (parts > 1)}": item["sub_clips"][view].transpose(0, 1).flatten(1, 2) / 255,
        }
        if config.moving:
            play(axes[0, 0].patches[view], "visible", (times >= start) & (times < start + window))
        for ax, (title, clip) in zip(axes[1:, view], rows.items(), strict=True):
            places = ((times - start) * clip.shape[1] // window).clip(0, clip.shape[1] - 1)
            show(ax, clip[:, places] if config.moving else strip(clip, 6), f"{name}: {title}")
    return fig


def draw_curves(config: FigureConfig, inputs: list[str]) -> plt.Figure:
    """Training curves of runs (log.jsonl): losses and their values at chance (dashed), spread of the features, pixels
    with a positive, share of clips nearer to their own key than to all of the queue, accuracy of a classifier; of one
    run the last value. Look for losses below chance, and a spread away from 0. Where they play, the epochs pass."""
    logs = [read_log(run) for run in inputs]
    names = {key for log in logs for key in log[-1] if key.startswith("loss/") or key in MEASURES}
    names = sorted(names, key=lambda name: (not name.startswith("loss/"), name))
    fig, rows = plt.figure(layout="constrained"), math.ceil(len(names) / 3)
    fig.set_size_inches(PAGE, 1.9 * rows)
    runs = run_names([str(Path(run, "log.jsonl")) for run in inputs])
    for place, key in enumerate(names, 1):
        ax, chance = fig.add_subplot(rows, 3, place), f"chance/{key.removeprefix('loss/')}"
        for name, log, color in zip(runs, logs, itertools.cycle(COLORS), strict=False):
            for part, line, label in ((key, "-", name), (chance, "--", None)):
                points = np.array([(entry["epoch"], entry[part]) for entry in log if part in entry]).reshape(-1, 2)
                alone = {"-": "o", "--": "_"}[line] if len(points) == 1 else None  # a line of one point is none
                (curve,) = ax.plot(*points.T, line, color=color, lw=1, ms=3, marker=alone, label=label)
                if config.moving:
                    play(curve, "data", [points[:n].T for n in np.linspace(1, len(points), 40).astype(int)])
        if key == "feature_std":
            ax.axhline(128**-0.5, ls=":", lw=1, color=GRAY)
        title = f"{key} {logs[0][-1][key]:.3g}" if len(logs) == 1 else key
        title += " (dotted: 1/√128)" * (key == "feature_std")
        ax.set(title=title + " (dashed: chance)" * any(chance in log[-1] for log in logs), xlabel="epoch")
        ax.grid(alpha=0.3)
    if len(inputs) > 1:
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


SECTIONS = ("curves", "retrieval", "activations", "masks", "attention", "sample")  # figures of a report
# Options without which results do not compare, and those of an encoder, for which runs may be compared.
SAME = ("dataset", "data", "split", "list_file", "test_list", "exclude", "fraction", "clips")
SAME += ("k", "temperature", "cost", "epochs", "batch_size", "accumulate", "lr")
SAME += ("weight_decay", "dropout", "min_scale", "jitter_p", "gray_p")
ENCODER = ("encoder", "width", "frames", "frame_stride", "crop")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><style>
html { color-scheme: light dark; font-family: sans-serif; max-width: 60rem; margin: auto; overflow-wrap: anywhere }
img, table, pre { display: block; max-width: 100%; overflow-x: auto }
td { padding: 0.2rem 0.3rem; border-bottom: 1px solid gray; overflow-wrap: normal }
</style>
"""


def escaped(text: str) -> str:
    """A text for HTML."""
    return html.escape(shown(text, "\n"))


def table(head: tuple, cells: dict[tuple, dict[str, str]]) -> str:
    """A table in HTML: `cells` has the texts by row and column, `head` tells what the names of a row are."""
    columns = dict.fromkeys(itertools.chain(*cells.values()))
    rows = [(*head, *columns), *((*names, *(row.get(name, "–") for name in columns)) for names, row in cells.items())]
    texts = [[escaped(text).replace("_", "_<wbr>").replace("/", "/<wbr>") for text in row] for row in rows]  # may break
    return "<table>" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>\n" for row in texts) + "</table>\n"


def results(runs: list[str]) -> dict[tuple, dict[str, str]]:
    """Cells of a table: what evaluate.py has measured of runs, of untrained encoders in the same way, and chance. What
    was measured with other options of `SAME` has a row of its own, which names them."""
    cells, tested, first = {}, [], {}
    folders = [*runs, *map(str, sorted(Path("runs").glob("untrained_*")))]
    for folder, path in ((x, path) for x in folders for path in sorted(Path(x).rglob("*.json")) if path.is_file()):
        record, name = read_json(path), path.relative_to(folder).with_suffix("").as_posix().removesuffix("/result")
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # of other files
            percents = {key[:-8]: value for key, value in record["result"].items() if key.endswith("_percent")}
            options = {option: record["config"].get(option) for option in (*SAME, *ENCODER)}
            if folder in runs or options in tested:
                tested.append(options)
                usual = first.setdefault(name, options)
                name += "".join(f" --{x} {options[x] or 'none'}" for x in SAME if options[x] != usual[x])
                columns = {folder: percents.get("recall", percents), "chance": percents.get("chance", {})}
                for column, values in columns.items():
                    for measure, value in values.items():
                        if isinstance(value, float):
                            cells.setdefault((name, measure), dict.fromkeys(runs, "–"))[column] = f"{value:.2f}"
    return cells


def settings(runs: list[str]) -> dict[tuple, dict[str, str]]:
    """Cells of a table: what run.json says of the last starts of runs, of several what differs."""
    flat = {}
    for run in runs:
        start = read_starts(Path(run, "run.json"))[-1]
        flat[run] = start["config"] | start["versions"] | {k: v for k, v in start.items() if not isinstance(v, dict)}
    names = dict.fromkeys(itertools.chain(*flat.values()))
    cells = {(name,): {run: str(flat[run].get(name, "–")) for run in runs} for name in names}
    return {name: row for name, row in cells.items() if len(runs) == 1 or len({*row.values()}) > 1}


def write_report(config: FigureConfig, inputs: list[str]) -> str:
    """One HTML file that opens offline in any browser: results of evaluate.py beside chance and an untrained encoder,
    figures, how to repeat the run, options. Of several runs it has the curves and the options that differ: look whether
    these are what you compare."""
    runs, pictures = [str(Path(run)) for run in inputs], []
    states = [load_checkpoint(Path(run, "checkpoint.pt")) for run in runs]
    title, cells = escaped(", ".join(runs)), results(runs)
    checkpoint = shlex.quote(str(Path(runs[0], "checkpoint.pt")))
    none = f"No protocol was run yet. This runs one: python evaluate.py retrieve --checkpoint {checkpoint}"
    note = "Untrained: evaluate.py with the same options, without --checkpoint." if cells else none
    config = dataclasses.replace(config, gallery=min(config.gallery or 200, 200))  # a report is not to take long
    for name in SECTIONS if len(runs) == 1 else SECTIONS[:1]:
        if name != "attention" or any(key.startswith("decoder.") for key in states[0]["model"]):
            draw = FIGURES[name][0]
            out = name + (".png" if name == "curves" else ".webp")  # curves that play can't be read
            figure = draw(dataclasses.replace(config, out=out), inputs)
            pictures.append((name, "webp", written(figure, ".webp"), inspect.getdoc(draw)))
    for path in itertools.chain(*(sorted(Path(run).rglob("*_confusion.png")) for run in runs)):
        pictures.append((str(path), "png", path.read_bytes(), "Rows are true classes. Look off the diagonal."))
    parts = [HEAD, f"<title>{title}</title></head>\n<body><h1>{title}</h1>\n<h2>results</h2>"]
    parts.append(f"{table(('protocol', '%'), cells)}<p>{escaped(note)}</p>\n")
    for name, kind, picture, caption in pictures:
        source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        parts.append(f'<h2>{escaped(name)}</h2><img alt="{escaped(name)}" src="{source}"><p>{escaped(caption)}</p>\n')
    parts.append("<h2>options</h2>")
    for run, state in zip(runs, states, strict=True):
        starts, last = read_starts(Path(run, "run.json")), read_log(run)[-1]
        where = f"{state['method']} on {state['config'].get('dataset', 'videos')}"
        note = f"{run}: {where}, {last['step']} steps, {last['epoch']:g} epochs. To repeat it, take the code of commit "
        note += f"{starts[-1].get('git_commit') or 'unknown'}, and another --out in the command:"
        commands = "\n".join(str(start.get("command")) for start in starts)
        parts.append(f"<p>{escaped(note)}</p><pre>{escaped(commands)}</pre>\n")
    return "".join(parts) + f"{table(('option',), settings(runs))}</body></html>\n"


DRAWN = draw_sample, draw_curves, draw_activations, draw_affinity, draw_attention, draw_masks, draw_retrieval
FIGURES = {draw.__name__.removeprefix("draw_"): (draw, FigureConfig) for draw in DRAWN}
FIGURES |= dict.fromkeys(("report", "compare"), (write_report, FigureConfig))


def main() -> None:
    """`visualize.py FIGURE [CHECKPOINT or RUN …] --flag value …`"""
    name, draw, config, inputs = dispatch(FIGURES, __doc__, words="[RUN …]")
    needed = {"curves": 1, "report": 1, "compare": 2}.get(name, 0)
    if needed:
        inputs = [x if checkpoint_path(x) == x else str(Path(checkpoint_path(x)).parent) for x in inputs]
    if len(inputs) < needed:
        raise UserError(f"{name} needs a run folder for each RUN: visualize.py {name}{' RUN' * needed}")
    if len(inputs) > 1 and name not in ("curves", "activations", "affinity", "compare"):
        raise UserError(f"{name} takes one checkpoint or run folder")
    suffixes = PICTURES | (MOVIES if name in MOVING else {})
    suffixes = {".html": HEAD.encode()[:15]} if draw is write_report else suffixes
    out = Path(config.out or (Path(inputs[0], "report.html") if name == "report" else name + next(iter(suffixes))))
    if out.suffix not in suffixes:
        still = f"{name} does not move: " * (out.suffix in MOVIES)
        raise UserError(f"--out {out}: {still}end it in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        missing = f"--out {out}: no such folder as {out.parent}" if config.out else f"{inputs[0]}: no such run folder"
        raise UserError(missing)
    check_replaceable(out, suffixes[out.suffix])
    plt.switch_backend("agg")
    plt.rcParams.update(STYLE)
    with user_errors((OSError, BadVideo)):
        drawn = draw(config, inputs)
        write_file(out, written(drawn, out.suffix) if isinstance(drawn, plt.Figure) else drawn)
    print(f"written to {out}")


if __name__ == "__main__":
    command_line(main)
