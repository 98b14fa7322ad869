"""Pictures of what an encoder sees: one command a figure, on any checkpoint and any videos.

    python visualize.py sample --dataset ucf101 --data /data/ucf101         # boxes, clips, differences, sub-clips
    python visualize.py curves runs/moco runs/fima                          # training curves of one or several runs
    python visualize.py activations runs/moco runs/fima                     # activation maps, side by side (Fig. 3, 4)
    python visualize.py affinity runs/moco runs/fima                        # RGB against motion features (Fig. 5)
    python visualize.py attention runs/fima --video clip.mp4                # where the motion decoder looks (Fig. 7)
    python visualize.py masks runs/fima                                     # foreground of each modality (Fig. 8, 9)
    python visualize.py retrieval runs/fima                                 # queries and their nearest neighbours
    python visualize.py report runs/fima                                    # all of a run in one HTML file

Before the flags come checkpoints, or run folders with a checkpoint.pt; several are drawn side by side, and none (or
`--checkpoint`) is as in evaluate.py. A figure is a PNG, or by the suffix of --out a PDF or SVG, made for the width of
a page (7 inches), in colours that the colour-blind can tell apart. `visualize.py FIGURE --help` explains each.
"""

import base64
import dataclasses
import html
import inspect
import io
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import data
import fima
import find
from augment import DIFFERENCES, color_augment, encoder_input, frame_difference
from cli import command_line, dispatch, shown, start_process
from evaluate import PNG, plain
from features import EncoderConfig, load_encoder, nearest, subset, unit_features, video_outputs
from losses import activation_map, foreground_mask
from runs import check_replaceable, load_checkpoint, read_json, read_lines, read_starts, saved_options
from train import UserError, load_model, option, user_errors, write_file
from video import BadVideo, Video

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#555555"  # colour-blind safe (Okabe and Ito)
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {"font.size": 8, "axes.titlesize": 8, "figure.dpi": 200, "pdf.fonttype": 42, "savefig.pad_inches": 0.05}
PAGE = 7.0  # inches
PICTURES = {".png": PNG, ".pdf": b"%PDF", ".svg": b"<?xml"}  # how they begin
MEASURES = ("feature_std", "pixels_with_positive", "accuracy")  # of log.jsonl, drawn beside the losses


@dataclasses.dataclass(frozen=True)
class FigureConfig(EncoderConfig):
    """Options of the figures. What is left open is as in the first checkpoint's training."""

    video: str = option("", "a video file to draw, instead of test videos of the data set")
    count: int = option(0, "test videos, drawn by --seed; 0: 4, of affinity 50", (0, 10**6))
    foreground: float = option(0.5, "masks: portion of the pixels that is foreground, beta of Eq. 6", (0.01, 1))
    neighbours: int = option(5, "retrieval: neighbours of a query", (1, 100))
    gallery: int = option(1000, "retrieval: training videos to search, drawn by --seed; 0: all", (0, 10**7))
    out: str = option("", "file to write (default: FIGURE.png, of report report.html in the run folder)")


class Model(NamedTuple):
    """An encoder on its device, in eval mode, its name for a figure, and the options filled in."""

    name: str
    encoder: nn.Module
    config: FigureConfig


def run_name(path: str) -> str:
    """The name of the folder in which a checkpoint or a log lies."""
    return plain(Path(path).resolve().parent.name) if path else "untrained"


def load_models(config: FigureConfig, inputs: list[str], key: bool = False) -> list[Model]:
    """The encoders of checkpoints or run folders, else of --checkpoint, by `features.load_encoder`; with `key` their
    key encoders where they have such: in pretraining, it is the one that meets frame differences."""
    process, models = start_process(config.device), []
    for path in inputs or [config.checkpoint]:
        path = str(Path(path, "checkpoint.pt")) if path and Path(path).is_dir() else path
        encoder, filled = load_encoder(dataclasses.replace(config, checkpoint=path), process.say, key)
        models.append(Model(run_name(path), encoder.to(process.device).eval(), filled))
    return models


def load_decoder(config: FigureConfig, inputs: list[str]) -> tuple[Model, nn.Module]:
    """The encoder and the motion decoder of a checkpoint of fima.py."""
    model = load_models(config, inputs)[0]
    path = model.config.checkpoint
    state = load_checkpoint(path, foreign=True) if path else {"method": ""}
    if state["method"] != "FIMA":
        raise UserError("attention needs a checkpoint of fima.py: visualize.py attention RUN")
    options = saved_options(path, state, fima.FIMAConfig, ["bn"]) | {"bn": "local"}  # older ones may say "sync"
    decoder = fima.FIMA(fima.FIMAConfig(**options)).decoder
    if decoder is None:
        raise UserError(f"{path} was trained without a motion decoder (--losses, --decoder)")
    load_model(path, decoder, {k[8:]: v.float() for k, v in state["model"].items() if k.startswith("decoder.")})
    return model, decoder.eval().to(next(model.encoder.parameters()).device)


def find_part(config: FigureConfig, train: bool) -> data.VideoList:
    """`find.find_videos` by the options."""
    list_file = config.list_file if train else config.test_list
    with user_errors():
        return find.find_videos(config.dataset, config.data, train, config.split, list_file)


def draw_videos(config: FigureConfig, count: int) -> data.VideoList:
    """The file of --video, or `count` test videos drawn by --seed."""
    if config.video:
        return data.VideoList([config.video], [-1], [], config.video)
    videos = find_part(config, train=False)
    return subset(videos, np.random.default_rng(config.seed).permutation(len(videos))[:count].tolist())


def class_name(videos: data.VideoList, index: int) -> str:
    """A video's class, or its file's name where that is unknown."""
    label = videos.labels[index]
    return plain(Path(videos.paths[index]).stem if label < 0 else videos.classes[label])


def middle_clips(videos: data.VideoList, config: FigureConfig) -> Tensor:
    """`data.read_clip` of each video, uint8 (N, 3, frames, crop, crop); a UserError names one that cannot be read."""
    with user_errors((BadVideo,)):
        clips = [data.read_clip(path, config.frames, config.frame_stride, config.crop) for path in videos.paths]
    return torch.stack(clips)


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
    """Cosines of each with each feature of a sample: (N, A, C), (N, B, C) → (N, A, B)."""
    return F.normalize(x, dim=2) @ F.normalize(y, dim=2).mT


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
    """The undamaged lines of a run's log.jsonl; raises UserError where there is no such file, or nothing in it."""
    path = Path(run, "log.jsonl")
    with user_errors():
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


def grid(rows: int, columns: int, cell: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure of the page's width or less, with square cells (rows, columns) that show pictures."""
    side = min(cell, PAGE / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows), squeeze=False, **options)
    plt.setp(axes, xticks=[], yticks=[])
    return fig, axes


def draw_rows(rows: list[list[tuple]]) -> Figure:
    """A figure of rows of (title, picture, …), as `show` takes them."""
    fig, axes = grid(len(rows), len(rows[0]), 1.5, layout="compressed")
    for ax, (title, picture, *more) in zip(axes.flat, itertools.chain(*rows), strict=True):
        show(ax, picture, title, *more)
    return fig


def on_clip(encoder: nn.Module, maps: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Maps of an encoder's feature pixels, (N, h, w), laid on what these look at: (N, size, size), on the CPU."""
    scale = size / (encoder.strides[1] * maps.shape[-1])
    shift = scale * (1 - 2 * encoder.offsets[1] / size) - 1
    corners = torch.tensor([[scale, 0, shift], [0, scale, shift]]).expand(len(maps), -1, -1)
    places = F.affine_grid(corners, [len(maps), 1, size, size], align_corners=False)
    return F.grid_sample(maps[:, None].cpu(), places, mode, "border", align_corners=False)[:, 0]


def show(ax: Axes, picture: Tensor, title: str = "", heat: Tensor | None = None, spot: Tensor | None = None) -> None:
    """Shows a picture (3, H, W) in [0, 1]; over it a map (h, w) in colours, from its least to its greatest value, and a
    circle around x, y of a spot, in pixels."""
    image = ax.imshow(picture.permute(1, 2, 0).numpy())
    ax.set_title(title)
    if heat is not None:
        ax.imshow(heat.cpu().numpy(), extent=image.get_extent(), interpolation="bicubic", cmap="viridis", alpha=0.6)
    if spot is not None:
        ax.plot(*spot, "o", ms=9, mfc="none", mec=ORANGE, mew=2)


def middle(clip: Tensor) -> Tensor:
    """The middle frame of a uint8 clip (3, frames, H, W): float (3, H, W) in [0, 1]."""
    return clip[:, clip.shape[1] // 2] / 255


def difference_of(clip: Tensor) -> Tensor:
    """The frame differences of a uint8 clip (3, frames, H, W), four times as strong as they are, in [0, 1]."""
    return (4 * frame_difference(clip[None] / 255)[0] - 1.5).clamp(0, 1)


def with_difference(clip: Tensor, title: str) -> list[tuple]:
    """The first two columns of `draw_rows` on a clip (3, frames, H, W): the middle frame, and what moves in it."""
    return [(title, middle(clip)), ("frame difference × 4", middle(255 * difference_of(clip)))]


def strip(clip: Tensor, count: int) -> Tensor:
    """`count` frames of a clip (3, frames, H, W) in [0, 1] side by side, with white lines: (3, H, count · (W + 2))."""
    frames = clip[:, np.linspace(0, clip.shape[1] - 1, count).round()].unbind(1)
    return torch.cat([F.pad(frame, (1, 1), value=1) for frame in frames], 2)


def draw_boxes(ax: Axes, boxes: Tensor) -> None:
    """Boxes (2, 4) of source and target view, in pixels of the frame."""
    for (x0, y0, x1, y1), color in zip(boxes.tolist(), (BLUE, ORANGE), strict=True):
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=color, lw=2))


def draw_activations(config: FigureConfig, inputs: list[str]) -> Figure:
    """Class-agnostic activation maps (Fig. 3, 4): where is each encoder active, summed over channels and time?

    A row for each video: the middle frame, its difference to the next frame (what moves), and the map of each encoder.
    """
    models = load_models(config, inputs)
    videos = draw_videos(models[0].config, config.count or 4)
    rows = [[] for _ in videos.paths]
    for model in models:
        for i, (row, clip) in enumerate(zip(rows, middle_clips(videos, model.config), strict=True)):
            row += [] if row else with_difference(clip, class_name(videos, i))
            heat = on_clip(model.encoder, activation_map(feature_maps(model.encoder, clip[None])), clip.shape[-1])[0]
            row.append((model.name, middle(clip), heat))
    return draw_rows(rows)


def draw_affinity(config: FigureConfig, inputs: list[str]) -> Figure:
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
            rgb, motion = (maps.mean(2).flatten(2).mT for maps in both)  # (n, HW, C)
            return torch.cat([rgb.mean(1), motion.mean(1), cosines(rgb, motion).flatten(1)], 1)

        found, _ = video_features(model, videos, "test videos", compared)
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


def draw_attention(config: FigureConfig, inputs: list[str]) -> Figure:
    """Where in the target the motion decoder looks for a point of the source (Fig. 7).

    The attention of the decoder's last block, averaged over its heads, for two pixels of the source view's feature map,
    circled, the most and the least active one; blue is its least share, yellow its greatest. Views have no colours.
    """
    model, decoder = load_decoder(config, inputs)
    options, encoder = model.config, model.encoder
    videos, shape = draw_videos(options, config.count or 4), (options.crop, options.frames, options.frame_stride)
    views, rows = data.PretrainingViews(videos, *shape, sub_clips=0, seed=config.seed, attempts=1), []
    for i in range(len(videos)):
        with user_errors():
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
            title = f"attention {weights[query].min():.1%} to {weights[query].max():.1%}"
            row += [(f"source, {kind} active", source, None, spot - 0.5), (title, target, heat)]
        rows.append(row)
    return draw_rows(rows)


def draw_masks(config: FigureConfig, inputs: list[str]) -> Figure:
    """Foreground masks (Fig. 8; failures, Fig. 9): what is kept by the activation of RGB, of frame difference, of both.

    Made by the key encoder, with batch norm by the statistics of the videos drawn, as in pretraining; background is
    darkened.
    """
    model = load_models(config, inputs, key=True)[0]
    videos = draw_videos(model.config, config.count or 4)
    clips = middle_clips(videos, model.config)
    masks = foreground_masks(*both_modalities(model.encoder, clips, model.config.difference), config.foreground).float()
    masks = on_clip(model.encoder, masks.flatten(0, 1), model.config.crop, "nearest").unflatten(0, (3, -1))
    rows, titles = [], ("by RGB", "by frame difference", "by both")
    for i, clip in enumerate(clips):
        darkened = middle(clip) * (0.15 + 0.85 * masks[:, i, None])
        rows.append([*with_difference(clip, class_name(videos, i)), *zip(titles, darkened, strict=True)])
    return draw_rows(rows)


def draw_retrieval(config: FigureConfig, inputs: list[str]) -> Figure:
    """Test videos and, below each, the training videos nearest to it, as strips of frames.

    A neighbour of the query's class is a hit, ✓; else a miss, ✗; the number is the cosine of their features.
    """
    model = load_models(config, inputs)[0]
    queries, gallery = draw_videos(model.config, config.count or 4), find_part(model.config, train=True)
    order = np.random.default_rng(config.seed).permutation(len(gallery))
    gallery = subset(gallery, order[: config.gallery or None].tolist())
    features, queries = video_features(model, queries, "queries")
    keys, gallery = video_features(model, gallery, "training videos")
    neighbours = neighbours_of(features, queries.paths, keys, gallery.paths, config.neighbours)
    columns = []
    for i, (clip, found) in enumerate(zip(middle_clips(queries, model.config), neighbours, strict=True)):
        column = [(f"query: {class_name(queries, i)}", strip(clip / 255, 4))]
        for j, cosine in found:
            sign = "" if queries.labels[i] < 0 else "✓ " if gallery.labels[j] == queries.labels[i] else "✗ "
            picture = strip(middle_clips(subset(gallery, [j]), model.config)[0] / 255, 4)
            column.append((f"{sign}{class_name(gallery, j)}  {cosine:.2f}", picture))
        columns.append(column)
    return draw_rows([*zip(*columns, strict=False)])  # a query that is in the gallery may have one neighbour fewer


def draw_sample(config: FigureConfig, inputs: list[str]) -> Figure:
    """The views of one training sample: the crops' boxes in the frame, clips, colours, differences, sub-clips.

    Drawn by --seed from the test videos or --video, and augmented as in pretraining. Each sub-clip is cropped and
    flipped on its own.
    """
    model = load_models(config, inputs)[0]
    options, videos = model.config, draw_videos(model.config, 1)
    parts = max(options.frames // model.encoder.strides[0], 1)
    shape = options.crop, options.frames, options.frame_stride
    with user_errors():
        views = data.PretrainingViews(videos, *shape, parts, config.seed, attempts=1)[0, 0]
        with Video(videos.paths[0]) as video:
            frame = torch.from_numpy(video.read([len(video) // 2])[0].copy()).permute(2, 0, 1) / 255
    fig, axes = grid(5, 2, PAGE / 2, layout="compressed")
    show(axes[0, 0], frame, f"{class_name(videos, 0)}: a frame, boxes of source (blue) and target (orange)")
    draw_boxes(axes[0, 0], views["box"])
    axes[0, 1].axis("off")
    for view, name in enumerate(("source", "target")):
        clip, (left, _, right, _) = views["clip"][view], views["box"][view]
        rows = {
            "clip" + ", flipped" * bool(left > right): clip / 255,
            "clip in the colours drawn for it": color_augment(clip[None] / 255, views["color"][view, :1])[0],
            "frame difference × 4": difference_of(clip),
            f"{parts} sub-clips, one after the other": views["sub_clips"][view].transpose(0, 1).flatten(1, 2) / 255,
        }
        for ax, (title, frames) in zip(axes[1:, view], rows.items(), strict=True):
            show(ax, strip(frames, 6), f"{name}: {title}")
    return fig


def draw_curves(config: FigureConfig, inputs: list[str]) -> Figure:
    """Training curves of runs from their log.jsonl: each loss beside its value at chance (dashed), and what else tells
    how training goes: spread of the features, pixels with a positive, accuracy of a classifier."""
    logs = [read_log(run) for run in inputs]
    names = {key for log in logs for key in log[-1] if key.startswith("loss/") or key in MEASURES}
    names = sorted(names, key=lambda name: (name in MEASURES, name))
    fig, rows = plt.figure(layout="constrained"), math.ceil(len(names) / 3)
    fig.set_size_inches(PAGE, 1.9 * rows)
    for place, key in enumerate(names, 1):
        ax, chance = fig.add_subplot(rows, 3, place), f"chance/{key.removeprefix('loss/')}"
        for run, log, color in zip(inputs, logs, itertools.cycle(COLORS), strict=False):
            for part, line, label in ((key, "-", run_name(str(Path(run, "log.jsonl")))), (chance, "--", None)):
                points = np.array([(entry["epoch"], entry[part]) for entry in log if part in entry]).reshape(-1, 2)
                alone = "o" if len(points) == 1 else None  # a line of one point is none
                ax.plot(*points.T, line, color=color, lw=1, ms=3, marker=alone, label=label)
        ax.set(title=key + " (dashed: chance)" * any(chance in log[-1] for log in logs), xlabel="epoch")
        ax.grid(alpha=0.3)
    if len(inputs) > 1:
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


SECTIONS = ("curves", "sample", "masks", "activations", "attention", "retrieval")  # figures of a report
CSS = "body { max-width: 60rem; margin: auto; font-family: sans-serif } img { width: 100% } pre { text-wrap: wrap }"


def write_report(config: FigureConfig, inputs: list[str]) -> str:
    """One HTML file on a run, which opens offline in any browser: curves, a sample, foreground masks, activation maps,
    attention of the decoder, neighbours, results of evaluate.py beside the checkpoint, options and environment."""
    run = Path(inputs[0])
    start, last = read_starts(run / "run.json")[-1], read_log(inputs[0])[-1]
    state = load_checkpoint(run / "checkpoint.pt")
    config = dataclasses.replace(config, gallery=min(config.gallery or 200, 200))  # a report is not to take long
    title, body = html.escape(f"{state['method']} on {state['config'].get('dataset', 'videos')}"), []
    for name in SECTIONS:
        if name != "attention" or any(key.startswith("decoder.") for key in state["model"]):
            draw, memory = FIGURES[name][0], io.BytesIO()
            figure = draw(config, inputs)
            figure.savefig(memory, bbox_inches="tight", dpi=150)
            plt.close(figure)
            picture = f'src="data:image/png;base64,{base64.b64encode(memory.getvalue()).decode()}"'
            body.append(f'<h2>{name}</h2><img alt="{name}" {picture}><p>{html.escape(inspect.getdoc(draw))}</p>')
    for path in filter(Path.is_file, sorted(run.rglob("*.json"))):
        record = {"result": start} if path == run / "run.json" else read_json(path)
        if isinstance(record, dict) and "result" in record:  # of evaluate.py
            text = html.escape(json.dumps(record["result"], indent=1))
            body.append(f"<h2>{html.escape(shown(str(path.relative_to(run))))}</h2><pre>{text}</pre>")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>
<body><h1>{title}</h1><p>{html.escape(shown(inputs[0]))}: {last["step"]} steps, {last["epoch"]:g} epochs</p>
{"".join(body)}
</body></html>
"""


DRAWN = draw_sample, draw_curves, draw_activations, draw_affinity, draw_attention, draw_masks, draw_retrieval
FIGURES = {draw.__name__.removeprefix("draw_"): (draw, FigureConfig) for draw in DRAWN}
FIGURES["report"] = write_report, FigureConfig


def main() -> None:
    """`visualize.py FIGURE [CHECKPOINT or RUN …] --flag value …`"""
    name, draw, config, inputs = dispatch(FIGURES, __doc__, words=True)
    if not inputs and name in ("curves", "report"):
        raise UserError(f"{name} needs a run folder: visualize.py {name} RUN")
    if len(inputs) > 1 and name not in ("curves", "activations", "affinity"):
        raise UserError(f"{name} takes one checkpoint or run folder")
    suffixes = {".html": b"<!doctype html>"} if name == "report" else PICTURES
    out = Path(config.out or (Path(inputs[0], "report.html") if name == "report" else f"{name}.png"))
    if out.suffix not in suffixes:
        raise UserError(f"--out {out}: end it in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such folder as {out.parent}")
    check_replaceable(out, suffixes[out.suffix])
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    drawn = draw(config, inputs)
    if isinstance(drawn, Figure):
        memory = io.BytesIO()
        drawn.savefig(memory, format=out.suffix[1:], bbox_inches="tight")
        drawn = memory.getbuffer()
    with user_errors((OSError,)):
        write_file(out, drawn)
    print(f"written to {out}")


if __name__ == "__main__":
    command_line(main)
