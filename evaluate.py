"""Evaluation of an encoder, from a checkpoint or untrained, by five protocols (FIMA Sec. 4.1, A.4; MCL Sec. 4.2).

    linear      a linear classifier on the frozen encoder: top-1, top-5, per class
    finetune    encoder and classifier trained together: top-1, top-5, per class
    retrieve    R@k: is one of the k nearest training videos of the test video's class?
    knn         the k nearest training videos vote, nothing is trained: top-1, top-5, per class
    svm         a linear SVM on the videos' features: top-1, top-5, per class
    features    writes the features of all videos, labelled or not, to a file for NumPy, evaluates nothing
    export      writes the encoder for other code or for ONNX, evaluates nothing

    python fima.py --dataset ucf101 --data /data/ucf101 --out runs/fima
    python evaluate.py linear --checkpoint runs/fima/checkpoint.pt          # --cached 10: nearly the same, much faster
    python evaluate.py finetune --checkpoint runs/fima/checkpoint.pt
    python evaluate.py knn --checkpoint runs/fima/checkpoint.pt --dataset hmdb51 --data /data/hmdb51
    python evaluate.py retrieve --dataset ucf101 --data /data/ucf101 --encoder i3d      # an untrained encoder
    torchrun --nproc_per_node=8 evaluate.py linear --checkpoint runs/fima/checkpoint.pt --batch_size 2

linear, retrieve, knn and svm take the file that `features` writes by --features, and then need neither videos nor GPU.
Results lie beside the checkpoint. Every test video counts: one that cannot be read counts as wrong and is named.
Processes share the videos batch by batch, so that the same batches are computed whatever their number.
"""

import dataclasses
import importlib.util
import io
import json
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import features
import find
from cli import command_line, dispatch, loader_workers, shown, start_process
from features import EncoderConfig, clip_outputs, load_encoder, nearest, pooled_features, unit_features, video_outputs
from models import ENCODERS, export_weights
from runs import check_replaceable, claim_folder, continued, fit_in_folder, load_checkpoint, made_by, read_json
from train import Options, Process, TrainConfig, UserError, check_sums, option, progress, user_errors, write_file

RECALLS = (1, 5, 10, 20, 50)
PNG = b"\x89PNG"  # how pictures begin
FREE = {"device", "workers", "test_batch", "out"}  # options that change no result


@dataclasses.dataclass(frozen=True)
class RetrieveConfig(EncoderConfig):  # base of every protocol's options; the docstring is the help of this one
    """Retrieval: R@k, is any of the k training videos nearest to a test video, by cosine, of its class? (Table 6)"""

    protocol = property(lambda self: type(self).__name__.removesuffix("Config").lower())

    exclude: str = option("", "file of training videos to leave out, as in pretraining; no test video is left out")
    features: str = option("", "linear, retrieve, knn, svm: file of `features`, instead of videos and encoder")
    out: str = option("", "JSON file to write (default: PROTOCOL_DATASET….json beside the checkpoint)")


@dataclasses.dataclass(frozen=True)
class KnnConfig(RetrieveConfig):
    """k nearest neighbours (Wu et al., CVPR 2018): which class do the training videos near to a test video vote for?"""

    k: int = option(20, "neighbours that vote", (1, 10**6))
    temperature: float = option(0.07, "a neighbour's vote weighs exp(cosine / temperature)", (0.001, 1000))


@dataclasses.dataclass(frozen=True)
class SvmConfig(RetrieveConfig):
    """Linear SVM, scikit-learn's LinearSVC: how well do planes, one a class, tell classes apart? (MCL, Sec. 4.2)"""

    clips: int = option(20, "uniformly spaced clips of a video", (1, 10_000))
    cost: float = option(1.0, "cost of a training video on the wrong side, C", (1e-6, 1e6))


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(TrainConfig, RetrieveConfig):
    """Options of the protocols that train a classifier."""

    batch_size: int = option(16, "videos of a micro-batch; total batch: times --accumulate and processes", (1, 65_536))
    fraction: float = option(1.0, "share of each class's training videos to train on, at least one", (0, 1))
    min_scale: float = option(0.2, "least share of a frame's area that a random crop covers", (0.01, 1), detail=True)
    out: str = option("", "run folder (default: PROTOCOL_DATASET… beside the checkpoint, or the folder of --resume)")

    FREE = TrainConfig.FREE | {"data", "list_file", "test_list", "exclude", "features", "clips", "test_batch"}
    LR_BATCH = 16
    DROPS = ()  # epochs at which the rate is divided by 10, of the default number of epochs

    def learning_rate(self, total_batch: int, epoch: float) -> float:
        """The linearly scaled rate, divided by 10 at each drop; these stay at the same parts of other --epochs."""
        drops = sum(epoch * type(self).epochs >= drop * self.epochs for drop in self.DROPS)
        return self.lr * total_batch / self.LR_BATCH / 10**drops


@dataclasses.dataclass(frozen=True)
class LinearConfig(ClassifyConfig):
    """Linear probe: how well do a frozen encoder's features tell the classes apart by a linear layer?

    The encoder stays in eval mode; L2-normalised pooled feature → linear layer, without dropout or weight decay.
    Training clips are cropped and flipped at random, without colour augmentation. SGD; the last checkpoint is tested,
    by the mean class probability of a video's clips.

    --cached N computes the features of N such clips of each video once and trains on them: with N = --epochs the
    same probe (in float32), with fewer nearly the same in a fraction of the time.
    """

    epochs: int = option(100, "passes over the training videos; rate ÷ 10 after 60 % and 80 % of them", (1, 10**6))
    lr: float = option(1.5, "learning rate at a total batch of 16, scaled linearly", (0, 1e6))
    weight_decay: float = option(0.0, "weight decay of SGD", (0, 1000))
    cached: int = option(0, "views of a video whose features are computed once, and reused; 0: new views", (0, 10_000))

    DROPS = (60, 80)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(ClassifyConfig):
    """Fine-tuning: how well does the encoder classify after being trained to, as a whole?

    Pooled feature → dropout → linear layer; encoder and layer are trained together by SGD. Training clips are augmented
    as in pretraining on UCF101, without blur. The last checkpoint is tested, by a video's mean class probability.
    """

    epochs: int = option(150, "passes over the training videos; rate ÷ 10 after 40 % and 80 % of them", (1, 10**6))
    lr: float = option(0.0033, "learning rate at a total batch of 16, scaled linearly", (0, 1e6))
    dropout: float = option(-1.0, "before the classifier; -1: 0.7 on ucf101, 0.5 on others", (-1, 1))
    jitter_p: float = option(0.8, "probability of colour jitter", (0, 1))
    gray_p: float = option(0.2, "probability of grayscale", (0, 1))

    DROPS = (60, 120)


@dataclasses.dataclass(frozen=True)
class ExportConfig(Options):
    """Options of writing an encoder for other code."""

    checkpoint: str = option("", "checkpoint.pt of a run, or another project's")
    encoder: str = option("", "video encoder; as in the checkpoint", ("", *ENCODERS))
    width: float = option(0.0, "factor on the encoder's numbers of channels; 0: as trained, or 1", (0, 8))
    to: str = option("torch", "torch: weights; onnx: the encoder itself, for onnxruntime", ("torch", "onnx"))
    frames: int = option(0, "for onnx: frames of a clip; 0: as trained, or 16", (0, 4096))
    crop: int = option(0, "for onnx: height and width of a clip; 0: as trained, or 224", (0, 1024))
    out: str = option("", "file to write (default: encoder.pt or encoder.onnx beside the checkpoint)")


def find_labelled(dataset: str, root: str, train: bool, split: int, listed="", exclude="") -> data.VideoList:
    """`find.find_videos`, for protocols that need to know the classes. Raises ValueError for a video without a label,
    one that a list names twice, or a folder that may not be listed."""
    videos = find.find_videos(dataset, root, train, split, listed, exclude)
    if videos.closed:
        raise ValueError(f"{videos.report}: evaluation leaves none out, run `chmod -R u+rX {shlex.quote(root)}`")
    if listed and len({*videos.paths}) < len(videos):
        raise ValueError(f"{listed} names a video more than once")
    if unknown := videos.labels.count(-1):
        raise ValueError(f"{listed or root}: {unknown} videos have no label: put each class in a folder or a list")
    return videos


def with_same_classes(train: data.VideoList, test: data.VideoList) -> tuple[data.VideoList, data.VideoList]:
    """Both lists with one list of classes, as a list file by itself knows those that it names: first the training
    videos', then those of test videos alone, which their report names. Raises ValueError if none is in common."""
    unseen = [name for name in test.classes if name not in train.classes]
    if len(unseen) == len(test.classes):
        raise ValueError(f"no class of the test videos ({unseen[0]}, …) has training videos ({train.classes[0]}, …)")
    classes = train.classes + unseen
    labels = [classes.index(test.classes[label]) for label in test.labels]
    report = test.report + f"; without training videos: {', '.join(map(shown, unseen))}" * bool(unseen)
    train = dataclasses.replace(train, classes=classes)
    return train, dataclasses.replace(test, labels=labels, classes=classes, report=report)


def prepare(config: RetrieveConfig) -> tuple:
    """This process, the options filled in, the encoder, training and test videos, and on the first process what of all
    this a run to resume must have seen."""
    if config.features and type(config) not in (LinearConfig, RetrieveConfig, KnnConfig, SvmConfig):
        raise UserError(f"{config.protocol} needs the encoder: it takes videos, not --features")
    if config.features and getattr(config, "cached", 0):
        raise UserError("--features has clips of its own: take out --cached")
    process = start_process(config.device, getattr(config, "timeout", 10), getattr(config, "deterministic", "") == "on")
    encoder, config = (features.load_stored if config.features else load_encoder)(config, process.say)

    def find_both() -> tuple[data.VideoList, data.VideoList]:
        if config.features:
            return encoder.parts
        train = find_labelled(config.dataset, config.data, True, config.split, config.list_file, config.exclude)
        test = find_labelled(config.dataset, config.data, False, config.split, config.test_list)
        return with_same_classes(train, test)

    with user_errors():
        train, test = process.first(find_both, lambda found: [videos.mark(config.data) for videos in found])
    if both := [*find.same_files(train.paths, test.paths), *train.shared]:
        advice = "divide them into train/ and test/ folders, or by --list_file and --test_list, or --exclude them"
        what = f"{min(both)} is a training video and a test video, one of {len(both)} by name or link"
        raise UserError(f"{what}: {advice}")
    if getattr(config, "dropout", 0) < 0:
        config = dataclasses.replace(config, dropout=0.7 if config.dataset == "ucf101" else 0.5)
    seen = {}
    if isinstance(config, ClassifyConfig):
        if process.rank == 0:
            seen = {"training videos": train.seen(config.data), "test videos": test.seen(config.data)}
            seen |= {"encoder": check_sums(encoder)} if config.features or config.resume in ("", "auto") else {}
        config = continued(config, process, seen)
    with user_errors((OSError,)):
        process.of_first(lambda: check_out(config))
    process.say(f"{train.report}\n{test.report}")
    return process, config, encoder.to(process.device), train, test, seen


def share_of(videos: data.VideoList, fraction: float, seed: int) -> data.VideoList:
    """A random share of each class's videos, drawn from (seed, class), rounded, at least one; all of them for 1."""
    labels, kept = np.array(videos.labels), []
    for label in range(len(videos.classes)):
        own = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        kept += own[: max(round(fraction * len(own)), 1)].tolist()
    kept.sort()
    return dataclasses.replace(videos, paths=[videos.paths[i] for i in kept], labels=labels[kept].tolist())


def recall_at_k(queries: Tensor, labels: Tensor, gallery: Tensor, known: Tensor, ks=RECALLS) -> dict[int, Tensor]:
    """For each k, whether any of the k nearest gallery videos has the query's label (R@k of Table 6 is the mean):
    queries (Q, C), labels (Q,), gallery (G, C), its labels (G,) → (Q,) bool; a k above G counts all the gallery."""
    same = known[nearest(queries, gallery, max(ks))[1]] == labels[:, None]
    return {k: same[:, :k].any(1) for k in ks}


def chance_at_k(labels: Tensor, known: Tensor, classes: int, ks=RECALLS) -> dict[int, float]:
    """R@k of a gallery in random order, by k: labels of queries (Q,) and gallery (G,) → the mean over queries."""
    size, drawn = len(known), torch.arange(min(len(known), max(ks)))
    others = size - torch.bincount(known, minlength=classes)[labels, None]  # (Q, 1), of other classes
    misses = ((others - drawn).clamp(min=0) / (size - drawn)).cumprod(1).mean(0)  # none of the first 1, 2, … is a hit
    return {k: 1 - misses[:k][-1].item() for k in ks}


def knn_scores(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Votes of the k nearest, weighing exp(cosine / temperature) (Wu et al., CVPR 2018, Sec. 3.4), as shares that sum
    to 1: queries (Q, C), gallery (G, C), its labels (G,) → (Q, classes)."""
    cosines, indices = nearest(queries, gallery, k)
    weights = (cosines / temperature).softmax(1)
    return torch.zeros(len(queries), classes, dtype=weights.dtype).scatter_add_(1, labels[indices], weights)


def svm_scores(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, cost: float, process: Process) -> Tensor:
    """w·x + b of linear SVMs, one class against the rest, trained on a gallery with the squared hinge loss:
    queries (Q, C), gallery (G, C), its labels (G,) → (Q, classes); −∞ for a class that is not in the gallery. Raises
    ValueError where this holds fewer than two classes."""
    from sklearn.svm import LinearSVC  # here, so that nothing else needs scikit-learn

    scores = torch.full((len(queries), classes), -math.inf)
    for label in progress(process, labels.unique().tolist(), desc="planes", unit="class", leave=False):
        machine = LinearSVC(C=cost, dual="auto", random_state=0, max_iter=10_000)
        machine.fit(gallery.numpy(), (labels == label).numpy())
        scores[:, label] = torch.from_numpy(machine.decision_function(queries.numpy()))
    return scores


def in_top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether fewer than k other classes score as high as the true one: (N, classes), (N,) → (N,) bool. A tie counts
    against the video, so that classes without a vote are no hits, and so does a score that is no number."""
    own = scores.gather(1, labels[:, None])
    return (~(scores < own)).sum(1) <= k


def result_files(config: RetrieveConfig) -> tuple[Path, Path]:
    """JSON file of the numbers: --out, or PROTOCOL_DATASET[_splitK][_FRACTION][_features][_cachedN][_NAME].json beside
    the checkpoint NAME.pt, if that is not `checkpoint.pt`, or in a folder of the untrained encoder; of linear and
    finetune, result.json in a run folder of this name. The picture of a confusion matrix lies beside it."""
    folder = Path(config.checkpoint).parent if config.checkpoint else Path("runs", f"untrained_{config.encoder}")
    split, fraction, cached = config.split, getattr(config, "fraction", 1), getattr(config, "cached", 0)
    name = f"{config.protocol}_{config.dataset}" + f"_split{split}" * (split > 1) + f"_{fraction:g}" * (fraction < 1)
    stem = Path(config.checkpoint).stem
    trains = isinstance(config, ClassifyConfig)
    name += "_features" * (trains and bool(config.features)) + f"_cached{cached}" * (cached > 0)
    name += f"_{stem}" * (stem not in ("", "checkpoint"))
    out = Path(config.out or folder / name, "result.json") if trains else Path(config.out or folder / f"{name}.json")
    return out, out.parent / f"{out.stem}_confusion.png"


def check_out(config: RetrieveConfig) -> None:
    """Raises UserError or OSError where the results can't be written: now, not after the work."""
    out, picture = result_files(config)
    if isinstance(config, ClassifyConfig):
        claim_folder(out.parent, config.resume)
    check_replaceable(out, b'{\n "protocol"')
    if not isinstance(config, ClassifyConfig) and out.exists() and out.stat().st_size:
        record = read_json(out)
        if record.get("protocol") != config.protocol:
            raise UserError(f"{out} holds the result of {record.get('protocol')}: name another --out")
        held, mine = (
            options | {name: os.path.realpath(options[name]) for name in ("checkpoint", "data") if options.get(name)}
            for options in (record.get("config", {}), dataclasses.asdict(config))
        )
        other = [name for name in mine.keys() & held.keys() - FREE if held[name] != mine[name]]
        if other:
            options = " ".join(f"--{name} {held[name] or 'none'}" for name in sorted(other))
            raise UserError(f"{out} holds the result of {options}: name another --out")
    check_replaceable(picture, PNG)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out.parent}: no permission to write the result there, name another --out")


def save_result(process: Process, config: RetrieveConfig, result: dict, percent=None, count: int = 0) -> None:
    """Prints percentages by name of `count` test videos, if given, beside chance where the result has it; writes the
    result, and what is needed to get it."""
    if percent:
        both = percent, result.get("chance_percent", {})
        reached, chance = ("  ".join(f"{name} {value:.1f} %" for name, value in values.items()) for values in both)
        process.say(f"{reached}  of {count} test videos" + f"\nby chance: {chance}" * bool(chance))
    if process.rank == 0:
        out, record = result_files(config)[0], {"protocol": config.protocol, **made_by(config)}
        with user_errors((OSError,)):
            write_file(out, json.dumps(record | {"processes": process.world_size, "result": result}, indent=1) + "\n")
        process.say(f"written to {out}")


def save_accuracy(
    process: Process, config: RetrieveConfig, test: data.VideoList, scores: Tensor, good: Tensor, bad: list, more: dict
) -> None:
    """Prints accuracies of scores (N, classes); writes them, those of each class, and up to 1000 classes' confusion."""
    labels = torch.tensor(test.labels)
    top1, top5 = ((in_top_k(scores, labels, k) & good).double() for k in (1, 5))
    counts = torch.bincount(labels, minlength=len(test.classes))
    per_class = torch.bincount(labels, top1, len(test.classes)) / counts  # nan for a class without test videos
    percent = {"top1": top1.mean(), "top5": top5.mean(), "mean_class": per_class.nanmean()}
    percent = {name: round(100 * value.item(), 2) for name, value in percent.items()}
    result = {f"{name}_percent": value for name, value in percent.items()}
    chance = {name: min(k / len(counts), 1.0) for name, k in (("top1", 1), ("top5", 5), ("mean_class", 1))}
    result["chance_percent"] = {name: round(100 * value, 2) for name, value in chance.items()}
    values = (None if math.isnan(value) else round(100 * value, 2) for value in per_class.tolist())
    result["per_class_percent"] = dict(zip(test.classes, values, strict=True))
    result |= {"test_videos": len(test), "unreadable": bad} | more
    save_result(process, config, result, percent, len(test))
    if process.rank == 0 and len(counts) <= 1000:
        confusion = torch.zeros(len(counts), len(counts))
        confusion.index_put_((labels[good], scores[good].argmax(1)), torch.ones(()), accumulate=True)
        title = f"{config.protocol} on {config.dataset}, top-1 {percent['top1']:.1f} % of {len(test)} videos"
        picture = result_files(config)[1]
        draw_confusion(picture, 100 * confusion / counts.clamp(min=1)[:, None], test.classes, title)
        process.say(f"written to {picture}")


def plain(name: str) -> str:
    """A name as matplotlib is to show it: no formula, which $ begins, and no bytes that are no characters."""
    return shown(name).replace("$", r"\$")


def draw_confusion(path: Path, percent: Tensor, classes: list[str], title: str) -> None:
    """A picture of a confusion matrix (true classes, predicted classes), in percent of each class's test videos."""
    from matplotlib.figure import Figure  # here, so that nothing else needs matplotlib and scikit-learn
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(classes) <= 20
    side = 3 + (0.5 if few else 0.16) * len(classes)
    axes = Figure((side, side), layout="constrained").subplots()
    options = dict(include_values=few, values_format=".0f", xticks_rotation="vertical", im_kw=dict(vmin=0, vmax=100))
    ConfusionMatrixDisplay(percent.numpy(), display_labels=list(map(plain, classes))).plot(ax=axes, **options)
    axes.set_title(f"{title}, in % of each class", fontsize=8)
    axes.tick_params(labelsize=7)
    memory = io.BytesIO()
    axes.figure.savefig(memory, dpi=150, bbox_inches="tight")
    with user_errors((OSError,)):
        write_file(path, memory.getbuffer())


class Classifier(nn.Module):
    """A linear layer on an encoder's pooled features, after dropout, trained by cross-entropy. An encoder that is
    frozen is not trained and stays in eval mode, and its features are L2-normalised."""

    def __init__(self, encoder: nn.Module, classes: int, frozen: bool, dropout: float = 0.0):
        super().__init__()
        self.encoder, self.frozen = encoder.requires_grad_(not frozen), frozen
        self.dropout, self.fc, self.metrics = nn.Dropout(dropout), nn.Linear(encoder.out_channels, classes), {}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of one view a video as `data.PretrainingViews` makes it, or of "feature"s (B, C) → cross-entropy."""
        self.encoder.train(self.training and not self.frozen)
        features = batch.get("feature")
        if features is None:
            color = None if self.frozen else batch["color"][:, 0, 0]
            features = pooled_features(self.encoder, batch["clip"][:, 0], color)
        scores, labels = self.scores(features), batch["label"]
        accuracy = (scores.argmax(1) == labels).float().mean()
        self.metrics = {"accuracy": accuracy, "chance/class": math.log(scores.shape[1])}
        return {"class": F.cross_entropy(scores, labels)}

    def scores(self, features: Tensor) -> Tensor:
        """Pooled features (N, C) → logits (N, classes), float32."""
        return self.fc(self.dropout(F.normalize(features, dim=1) if self.frozen else features)).float()

    def probabilities(self, clips: Tensor) -> Tensor:
        """uint8 clips (N, 3, frames, H, W) → (N, classes); nan where a score is not finite."""
        scores = self.scores(pooled_features(self.encoder, clips))
        return scores.softmax(1).where(scores.isfinite().all(1, keepdim=True), math.nan)  # softmax makes 0 of −inf


def training_views(config: ClassifyConfig, train: data.VideoList) -> data.PretrainingViews:
    """A random clip, cropped and flipped, of each training video that --fraction leaves; colours for fine-tuning."""
    few, shape = share_of(train, config.fraction, config.seed), (config.crop, config.frames, config.frame_stride)
    color = dict(jitter_p=getattr(config, "jitter_p", 0), gray_p=getattr(config, "gray_p", 0), blur_p=0)
    return data.PretrainingViews(few, *shape, 0, config.seed, config.min_scale, color=color, windows=1)


class CachedViews(data.Items):
    """Each video's views of the epochs 0 … N − 1, for `clip_outputs`."""

    def __init__(self, views: data.PretrainingViews, count: int):
        self.views, self.videos, self.count = views, views.videos, count

    def empty(self, *batch: int) -> dict[str, Tensor]:
        return {"clips": self.views.empty(*batch, self.count)["clip"].squeeze(-5)}

    def write(self, index: int, item: dict[str, Tensor]) -> list:
        rest, bad = self.views.empty(), []
        for epoch, clip in enumerate(item["clips"].split(1)):
            bad += self.views.write((epoch, index), rest | {"clip": clip})
        return bad


def cached_features(encoder: nn.Module, config: LinearConfig, process: Process, views: data.PretrainingViews) -> tuple:
    """Features (videos, views, C) of --cached views, or of a file's clips, and labels (videos,): of readable videos."""
    function, title = unit_features(encoder), "training videos"
    if config.features:
        features, good, _ = video_outputs(function, views.videos, config, process, title, average=False)
    else:
        batch_size = max(config.test_batch * config.clips // config.cached, 1)  # as many clips a forward as in testing
        work = process, loader_workers(config), batch_size, title
        features, good, *_ = clip_outputs(function, CachedViews(views, config.cached), *work)
    return features[good], torch.tensor(views.videos.labels)[good]


def classify(config: ClassifyConfig) -> None:
    """Trains a classifier by the loop of pretraining, and tests it, as the last step leaves it, on all test videos."""
    process, config, encoder, train, test, seen = prepare(config)
    views, frozen = training_views(config, train), isinstance(config, LinearConfig)
    classifier = Classifier(encoder, len(train.classes), frozen, 0 if frozen else config.dropout)
    place = config.batch_size * config.accumulate, config.epochs, config.seed, process.rank, process.world_size
    with user_errors():  # fewer videos than in a batch: said before their features are computed, and where some are bad
        sampler, cached = data.StepSampler(len(views), *place), None
        if frozen and (config.cached or config.features):
            cached = cached_features(encoder, config, process, views)
            sampler = data.StepSampler(len(cached[1]), *place)

    def make_loader(start: int) -> Iterator[dict]:
        sampler.start_step = start
        if not cached:
            return data.load_batches(views, sampler, loader_workers(config))
        features, labels = cached
        batches = (torch.tensor(keys).unbind(1) for keys in sampler)
        return ({"feature": features[v, epoch % features.shape[1]], "label": labels[v]} for epoch, v in batches)

    steps, threads = sampler.steps_per_epoch, torch.get_num_threads()
    if cached:
        torch.set_num_threads(1)  # steps so small take longer where threads wait for each other
    options = dict(out=str(result_files(config)[0].parent), seen=seen, clips_per_video=1, paths=views.videos.paths)
    checkpoint = fit_in_folder(classifier, config, process, make_loader, steps, **options)
    torch.set_num_threads(threads)
    probabilities, good, bad = video_outputs(classifier.eval().probabilities, test, config, process, "test videos")

    def as_trained() -> tuple[float, dict]:  # also where nothing was left to train
        state = load_checkpoint(checkpoint, whole=False)
        options = {name: state["config"][name] for name in config.TUNED & state["config"].keys()}
        return state["step"] / state["steps_per_epoch"], options

    epochs, options = process.of_first(as_trained)  # no other may have the folder
    config, more = dataclasses.replace(config, **options), {"training_videos": sampler.length, "trained_epochs": epochs}
    save_accuracy(process, config, test, probabilities, good, bad, more)


def compare(config: RetrieveConfig) -> None:
    """Compares test videos with training videos by a frozen encoder's features, of each video the mean over uniformly
    spaced clips (centre crop) of the L2-normalised pooled features."""
    process, config, encoder, train, test, _ = prepare(config)
    function, labels, classes = unit_features(encoder), torch.tensor(test.labels), len(test.classes)
    gallery, known, _ = video_outputs(function, train, config, process, "training videos")
    queries, good, bad = video_outputs(function, test, config, process, "test videos")
    gallery, gallery_labels = gallery[known], torch.tensor(train.labels)[known]
    if isinstance(config, KnnConfig):
        scores = knn_scores(queries, gallery, gallery_labels, classes, config.k, config.temperature)
        save_accuracy(process, config, test, scores, good, bad, {"gallery": len(gallery)})
    elif isinstance(config, SvmConfig):
        with user_errors():
            scores = svm_scores(queries, gallery, gallery_labels, classes, config.cost, process)
        save_accuracy(process, config, test, scores, good, bad, {"training_videos": len(gallery)})
    else:
        hits = recall_at_k(queries, labels, gallery, gallery_labels)
        recalls = {f"R@{k}": round(100 * (hit & good).float().mean().item(), 2) for k, hit in hits.items()}
        chance = chance_at_k(labels, gallery_labels, classes)
        found = {"recall_percent": recalls, "chance_percent": {f"R@{k}": round(100 * p, 2) for k, p in chance.items()}}
        found |= {"queries": len(queries), "gallery": len(gallery), "unreadable": bad}
        save_result(process, config, found, recalls, len(test))


def export(config: ExportConfig) -> None:
    """Writes an encoder's weights under the names of torchvision's networks or of piergiaj's I3D, for their code.

    Without a classifier: load with strict=False. Their code is to be given clips normalised as here, of an i3d_piergiaj
    RGB in [-1, 1]. For piergiaj, whose batch norm has eps 1e-3, that of an i3d gets factors with which its outputs in
    eval mode stay the same; to evaluate such a file here, say --encoder i3d.

    --to onnx writes the encoder with its weights: normalised "clips" (any number, 3, frames, H, W) → "maps".
    """
    if not config.checkpoint:
        raise UserError("export needs a --checkpoint")
    given, name = Path(features.checkpoint_path(config.checkpoint)), "encoder." + config.to.replace("torch", "pt")
    out = Path(config.out or (given if given.is_dir() else given.parent) / name)
    check_replaceable(out)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("to", "out")}
    encoder, filled = load_encoder(EncoderConfig(**options))
    if config.to == "onnx":
        if not importlib.util.find_spec("onnxscript"):
            raise UserError("--to onnx needs another package: pip install onnxscript")
        clips = torch.zeros(2, 3, filled.frames, filled.crop, filled.crop)
        names = dict(input_names=["clips"], output_names=["maps"], dynamic_shapes=({0: "number"},))
        program = torch.onnx.export(encoder, (clips,), dynamo=True, verbose=False, **names)
        with user_errors((OSError,)):
            write_file(out, program.model_proto.SerializeToString())
        print(f"written to {out}: clips of {filled.frames} frames, {filled.crop} × {filled.crop}")
        return
    memory = io.BytesIO()
    with user_errors():
        weights = export_weights(encoder)
        if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise UserError(f"{config.checkpoint}: {len(broken)} tensors are not finite, such as {broken[0]}")
        torch.save(weights, memory)
        write_file(out, memory.getbuffer())
    print(f"{len(weights)} entries written to {out}")


class WithHalves(data.TestClips):
    """Four clips of a video, (4, 3, frames, crop, crop): its first, its last, and each of these again in a random crop
    and flip of its own. `clips` is to be 4; "start" has the first two."""

    def write(self, index: int, item: dict[str, Tensor]) -> list:
        clips, halves = item["clips"].split(2)
        bad, rng = super().write(index, {"clips": clips, "start": item["start"][:2]}), np.random.default_rng(index)
        for clip, half in zip(clips, halves, strict=True):
            region = data.draw_region(rng, self.crop, self.crop)
            images = clip.permute(1, 2, 3, 0).numpy()  # (frames, crop, crop, 3)
            data.crop_resize(images, region, bool(rng.random() < 0.5), half)
        return bad


def first_look(encoders: dict, root: str, shape: tuple[int, int, int], process: Process, workers: int) -> None:
    """Prints what encoders, by name, know of held-out videos, beside chance; `shape` is crop, frames and frame stride.
    "same motion": R@1 of the class among the training videos, two clips a video. "own other half": R@1 of the same
    video among the held-out ones, from one half to the other, under another crop and flip: what L_VV teaches."""
    with user_errors():
        train, test = (find_labelled("synthetic", root, part, 1) for part in (True, False))
    own, labels, known = torch.arange(len(test)), torch.tensor(test.labels), torch.tensor(train.labels)
    functions = [unit_features(encoder.to(process.device)) for encoder in encoders.values()]

    def look(videos: data.TestClips, title: str) -> Tensor:  # (videos, clips, encoders, C)
        return clip_outputs(lambda x: torch.stack([f(x) for f in functions], 1), videos, process, workers, 8, title)[0]

    gallery = look(data.TestClips(train, *shape, 2), "training videos")
    looked_at = look(WithHalves(test, *shape, 4), "held-out videos")
    process.say(f"\n{len(test)} held-out videos    same motion R@1    own other half R@1")
    process.say(f"  {'chance':<20}{1 / len(test.classes):>15.1%}{1 / len(test):>22.1%}")
    for i, name in enumerate(encoders):
        queries, halves = looked_at[:, :, i].split(2, 1)
        motion = recall_at_k(queries.mean(1), labels, gallery[:, :, i].mean(1), known, (1,))[1]
        half = torch.cat([recall_at_k(halves[:, j], own, halves[:, 1 - j], own, (1,))[1] for j in (0, 1)])
        process.say(f"  {name:<20}{motion.float().mean():>15.1%}{half.float().mean():>22.1%}")


PROTOCOLS = {
    "linear": (classify, LinearConfig),
    "finetune": (classify, FinetuneConfig),
    "retrieve": (compare, RetrieveConfig),
    "knn": (compare, KnnConfig),
    "svm": (compare, SvmConfig),
    "features": (features.write_features, features.FeaturesConfig),
    "export": (export, ExportConfig),
}


def main() -> None:
    """`evaluate.py PROTOCOL --flag value …`"""
    _, protocol, config, _ = dispatch(PROTOCOLS, __doc__)
    protocol(config)


if __name__ == "__main__":
    command_line(main)
