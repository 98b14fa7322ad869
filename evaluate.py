"""Evaluation of an encoder: `retrieve`, R@k by nearest neighbours (Sec. 4.1, Table 6).

    python evaluate.py retrieve --checkpoint runs/…/checkpoint.pt
    python evaluate.py retrieve --checkpoint runs/…/checkpoint.pt --dataset hmdb51 --data /data/hmdb51
    torchrun --nproc_per_node=8 evaluate.py retrieve --checkpoint runs/…/checkpoint.pt
    python evaluate.py retrieve --dataset ucf101 --data /data/ucf101 --encoder i3d    # an untrained encoder

Test videos are queries, training videos the gallery. A video's feature is the mean over 10 uniformly spaced clips
(shorter side resized to 8/7 of the crop, centre crop) of the L2-normalised pooled features, compared by cosine; a query
is a hit at k if any of its k nearest has its class. A test video that cannot be read counts as a miss.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data
from models import ENCODERS, build_encoder
from train import (
    Options,
    Process,
    UserError,
    command_line,
    leave_signals,
    load_checkpoint,
    loader_workers,
    option,
    parse,
    progress,
    start_process,
    user_errors,
    versions,
)

RECALLS = (1, 5, 10, 20, 50)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Options):
    """Options of evaluation. What is left at "" or 0 is as in the checkpoint's training."""

    checkpoint: str = option("", "checkpoint.pt of a run; without it, an untrained encoder")
    dataset: str = option("", "what to evaluate on", ("", *data.DATASETS))
    data: str = option("", "folder of the data set (default: the checkpoint's, or datasets/DATASET)")
    split: int = option(0, "official split of the data set", least=0)
    encoder: str = option("", "without a checkpoint: video encoder", ("", *ENCODERS))
    width: float = option(1.0, "without a checkpoint: factor on the encoder's numbers of channels", least=0.01, most=8)
    frames: int = option(0, "frames of a clip", least=0)
    frame_stride: int = option(0, "a clip takes every how-manieth frame of the video", least=0)
    crop: int = option(0, "height and width of a clip in pixels", least=0, most=1024)
    clips: int = option(10, "uniformly spaced clips of a video", least=1)
    batch_size: int = option(4, "videos a forward, in each process", least=1)
    workers: int = option(
        -1, "loader processes of each process; -1: as many as its share of CPU cores, at most 8", least=-1
    )
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of an untrained encoder", least=0)
    out: str = option("", "JSON file to write (default: retrieve_DATASET.json beside the checkpoint)")


def load_encoder(path: str) -> tuple[nn.Module, dict]:
    """The query encoder of a checkpoint of ours, and the options that it was trained with.

    Raises:
        UserError: no such file, no checkpoint of this project, or one whose weights do not fit its own options.
    """
    state = load_checkpoint(path)
    encoder = build_encoder(state["config"]["encoder"], state["config"]["width"])
    weights = {k.removeprefix("encoder."): v for k, v in state["model"].items() if k.startswith("encoder.")}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the encoder in {path} is not a {state['config']['encoder']}: {error}") from error
    return encoder, state["config"]


@torch.no_grad()
def clip_features(
    encoder: nn.Module,
    clips: data.TestClips,
    process: Process,
    workers: int,
    batch_size: int,
    title: str,
    average: bool = False,
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """L2-normalised pooled features of every clip by an encoder in eval mode; each process takes a share of the videos.

    Returns:
        Features (videos, clips, C) on the CPU, or with `average` their means (videos, 1, C); whether each video could
        be read (videos,); (path, reason) of those that could not.
    """
    encoder = encoder.to(process.device).eval()
    mine = torch.utils.data.Subset(clips, range(process.rank, len(clips), process.world_size))
    loader = torch.utils.data.DataLoader(
        mine,
        batch_size,
        num_workers=workers,
        collate_fn=data.collate,
        worker_init_fn=leave_signals,
        pin_memory=process.device.type == "cuda",
    )
    found, bad = [], []
    for batch in progress(process, loader, desc=title, unit="batch", leave=False):
        batch_clips = batch["clips"].to(process.device, non_blocking=True)  # (B, N, 3, frames, crop, crop)
        batch_clips = data.normalize(batch_clips.flatten(0, 1).contiguous() / 255)
        maps = encoder(batch_clips.contiguous(memory_format=torch.channels_last_3d))  # up to twice as fast
        features = F.normalize(maps.mean((2, 3, 4)), dim=1).unflatten(0, batch["clips"].shape[:2])
        found.append((features.mean(1, keepdim=True) if average else features).cpu())
        bad += batch["bad"]
    shares = [(torch.cat(found) if found else None, bad)]
    if process.world_size > 1:
        shares = shares * process.world_size
        dist.all_gather_object(shares, shares[0])
    features = torch.empty(len(clips), *shares[0][0].shape[1:])
    for rank, (share, _) in enumerate(shares):
        if share is not None:  # more processes than videos
            features[rank :: process.world_size] = share
    bad = [entry for _, entries in shares for entry in entries]
    unreadable = {path for path, _ in bad}
    return features, torch.tensor([path not in unreadable for path in clips.videos.paths]), bad


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """The k rows of a gallery (G, C) nearest to each query (Q, C) by cosine: indices (Q, min(k, G)), nearest first."""
    gallery = F.normalize(gallery, dim=1)
    chunks = [F.normalize(chunk, dim=1) @ gallery.T for chunk in queries.split(1024)]
    return torch.cat([similarity.topk(min(k, len(gallery)), 1).indices for similarity in chunks])


def recall_at_k(
    queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, ks: tuple[int, ...] = RECALLS
) -> dict[int, Tensor]:
    """Whether any of the k nearest gallery videos has the query's label (R@k of Table 6 is the mean).

    Args:
        queries (Q, C), labels (Q,), gallery (G, C), gallery_labels (G,).

    Returns:
        For each k, (Q,) bool; a k above G counts the whole gallery.
    """
    same = gallery_labels[nearest(queries, gallery, max(ks))] == labels[:, None]
    return {k: same[:, :k].any(1) for k in ks}


def find_labelled(dataset: str, root: str, train: bool, split: int) -> data.VideoList:
    """`data.find_videos`, for protocols that need to know the classes.

    Raises:
        ValueError: a video without a label.
    """
    videos = data.find_videos(dataset, root, train, split)
    if -1 in videos.labels:
        raise ValueError(
            f"{root}: {videos.labels.count(-1)} videos have no label, which R@k needs: put each class in a folder"
        )
    return videos


def retrieve(config: EvaluateConfig) -> None:
    """R@k of a checkpoint's encoder: prints a table and writes a JSON file."""
    process = start_process(config.device)
    with user_errors():
        trained = dict(encoder=config.encoder or "i3d", width=config.width, frames=16, frame_stride=2, crop=224)
        trained |= dict(dataset="synthetic", data="", split=1)
        if config.checkpoint:
            encoder, trained = load_encoder(config.checkpoint)
        else:
            torch.manual_seed(config.seed)
            encoder = build_encoder(trained["encoder"], trained["width"])
        dataset = config.dataset or trained["dataset"]
        root = config.data or (trained["data"] if dataset == trained["dataset"] else "") or f"datasets/{dataset}"
        shape = [getattr(config, name) or trained[name] for name in ("crop", "frames", "frame_stride")]
        split = config.split or trained["split"]
        with process.first():
            parts = [find_labelled(dataset, root, train, split) for train in (True, False)]
        if set(parts[0].paths) & set(parts[1].paths):
            raise ValueError(
                f"{root}: a test video must not be in the gallery: divide it into train/ and test/ folders"
            )
    sets = {}
    for name, videos in zip(("gallery", "queries"), parts, strict=True):
        process.say(videos.report)
        clips = data.TestClips(videos, *shape, config.clips)
        workers = loader_workers(config, process)
        features, good, bad = clip_features(encoder, clips, process, workers, config.batch_size, name, average=True)
        sets[name] = features.mean(1), torch.tensor(videos.labels), good, bad
        for path, reason in bad:
            process.say(f"unreadable: {path!r}: {reason}" + (" (counts as a miss)" if name == "queries" else ""))
    if process.rank > 0:
        return
    gallery, gallery_labels, known, _ = sets["gallery"]
    queries, labels, good, bad = sets["queries"]
    if not known.any():
        raise UserError(f"none of the training videos in {root} could be read")
    hits = recall_at_k(queries, labels, gallery[known], gallery_labels[known])
    recalls = {f"R@{k}": round(100 * (hit & good).float().mean().item(), 2) for k, hit in hits.items()}
    of = config.checkpoint or f"untrained {trained['encoder']}"
    print(f"{of} on {dataset}, {len(queries)} queries, {int(known.sum())} in the gallery, {config.clips} clips a video")
    print("  ".join(f"{name} {value:.1f} %" for name, value in recalls.items()))
    result = {
        "protocol": "retrieve",
        "checkpoint": config.checkpoint,
        "dataset": dataset,
        "split": split,
        "clips": config.clips,
        "crop_frames_stride": shape,
        "queries": len(queries),
        "gallery": int(known.sum()),
        "recall_percent": recalls,
        "unreadable": [list(entry) for entry in bad],
        "versions": versions(),
    }
    beside = Path(config.checkpoint).parent if config.checkpoint else Path()
    out = Path(config.out) if config.out else beside / f"retrieve_{dataset}.json"
    with user_errors():
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


class CroppedHalves(data.TestClips):
    """Two clips of a video, from its first and its last frames, each in a random crop and flip of its own."""

    def __getitem__(self, index: int) -> dict:
        item, rng = super().__getitem__(index), np.random.default_rng(index)
        for n, clip in enumerate(item["clips"]):
            region = data.draw_region(rng, self.crop, self.crop, (0.2, 1.0), (3 / 4, 4 / 3))
            images = clip.permute(1, 2, 3, 0).numpy()  # (frames, crop, crop, 3)
            item["clips"][n] = data.crop_resize(images, region, bool(rng.random() < 0.5), self.crop)[0]
        return item


def first_look(
    encoders: dict[str, nn.Module], root: str, shape: tuple[int, int, int], process: Process, workers: int
) -> None:
    """Prints what encoders know of the held-out videos of `synthetic`, beside chance.

    "same motion": R@1 of the class among the training videos, two clips a video. "own other half": R@1 of the same
    video among the held-out ones, from one half to the other, under another crop and flip: what L_VV teaches.

    Args:
        encoders: name → encoder.
        shape: crop, frames, frame stride.
    """
    train, test = (find_labelled("synthetic", root, part, 1) for part in (True, False))
    labels, gallery_labels = torch.tensor(test.labels), torch.tensor(train.labels)
    own = torch.arange(len(test))
    rows = [("chance", 1 / len(test.classes), 1 / len(test))]
    for name, encoder in encoders.items():
        gallery, queries, halves = (
            clip_features(encoder, clips, process, workers, 8, f"{name}, {part}")[0]
            for part, clips in (
                ("training videos", data.TestClips(train, *shape, 2)),
                ("held-out videos", data.TestClips(test, *shape, 2)),
                ("their halves", CroppedHalves(test, *shape, 2)),
            )
        )
        motion = recall_at_k(queries.mean(1), labels, gallery.mean(1), gallery_labels, (1,))[1]
        half = [recall_at_k(halves[:, i], own, halves[:, 1 - i], own, (1,))[1] for i in (0, 1)]
        rows.append((name, motion.float().mean().item(), torch.cat(half).float().mean().item()))
    process.say(f"\n{len(test)} held-out videos    same motion R@1    own other half R@1")
    for name, motion, half in rows:
        process.say(f"  {name:<20}{motion:>15.1%}{half:>22.1%}")


PROTOCOLS = {"retrieve": retrieve}


def main() -> None:
    """`evaluate.py PROTOCOL --flag value …`"""
    if len(sys.argv) < 2 or sys.argv[1] not in (*PROTOCOLS, "-h", "--help"):
        raise UserError(f"name what to evaluate: {', '.join(PROTOCOLS)} (--help lists the flags)")
    protocol = sys.argv[1]
    config = parse(EvaluateConfig, __doc__, argv=sys.argv[1:] if protocol.startswith("-") else sys.argv[2:])
    PROTOCOLS[protocol](config)


if __name__ == "__main__":
    command_line(main)
