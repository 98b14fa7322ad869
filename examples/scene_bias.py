"""Do the features follow the motion or the scene? An example of a measure of one's own.

python data.py synthetic datasets/scenes --scene_bias 0.95
python fima.py --dataset synthetic --data datasets/scenes --out runs/scenes
python examples/scene_bias.py --checkpoint runs/scenes/checkpoint.pt

A linear SVM, as in `evaluate.py svm`, names the motion of test videos, of their clips' middle frames repeated, and of
their frames shuffled. Of a set made with --scene_bias also that of unseen/ and other/, and which of two opposite
motions test videos show; that of noise/, by an SVM of four fifths of these videos for the others; and scenes, by one
that is trained on the training videos' scenes.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
import data
from cli import command_line, parse
from evaluate import SvmConfig, find_labelled, in_top_k, prepare, save_result, svm_scores, with_same_classes
from features import unit_features, video_outputs
from synthetic import SCENE_PARTS, scene_of
from train import option, user_errors


@dataclasses.dataclass(frozen=True)
class BiasConfig(SvmConfig):
    """Options of the test of motion against scene."""

    clips: int = option(10, "uniformly spaced clips of a video", (1, 10_000))


def with_stills(function: Callable[[Tensor], Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """A function, clips (N, 3, T, H, W) → (N, D), as one that gives (N, 3, D): what it makes of each clip, of
    its middle frame repeated, and of its frames in an order drawn from the seed."""

    def outputs(clips: Tensor) -> Tensor:
        still = clips[:, :, clips.shape[2] // 2, None].expand_as(clips)
        drawn = torch.rand(len(clips), 1, clips.shape[2], 1, 1, generator=torch.Generator().manual_seed(seed))
        shuffled = clips.take_along_dim(drawn.argsort(2).to(clips.device), 2)
        return torch.stack([function(clips), function(still), function(shuffled)], 1)

    return outputs


def main() -> None:
    process, config, encoder, train, test, _ = prepare(parse(BiasConfig, __doc__))
    parts = SCENE_PARTS if config.dataset == "synthetic" and scene_of(test.paths[0]) else ()

    def find_parts() -> list[data.VideoList]:
        found = (find_labelled("folder", os.path.join(config.data, part), False, 1) for part in parts)
        return [with_same_classes(train, videos)[1] for videos in found]

    with user_errors():
        others = process.first(find_parts, lambda found: [videos.mark(config.data) for videos in found])
    function = unit_features(encoder)
    gallery, known, _ = video_outputs(function, train, config, process, "training videos")
    queries, readable, bad = video_outputs(with_stills(function, config.seed), test, config, process, "test videos")
    features = dict(zip(("test", "still", "shuffled"), queries.unbind(1), strict=True))
    videos, good = dict.fromkeys(features, test), dict.fromkeys(features, readable)
    for part, found in zip(parts, others, strict=True):
        videos[part] = found
        features[part], good[part], unreadable = video_outputs(function, found, config, process, f"{part} videos")
        bad += unreadable

    def scores_by(labels: Tensor) -> dict[str, Tensor]:
        arguments = gallery[known], labels[known], len(train.classes), config.cost, process
        with user_errors():
            scores = svm_scores(torch.cat([*features.values()]), *arguments)
        return dict(zip(features, scores.split([*map(len, features.values())]), strict=True))

    def scenes(videos: data.VideoList) -> Tensor:
        return torch.tensor([train.classes.index(scene_of(path)) for path in videos.paths])

    def right(name: str, scores: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        return (in_top_k(scores, labels, 1) & good[name]).double(), 1 / scores.shape[1]

    def noise_scores(labels: Tensor) -> Tensor:
        """By SVMs of the other noise: what noise looks like to an encoder would drown its motion for that of videos."""
        noise, part = features["noise"], torch.arange(len(labels)) % 5  # classes come one after another
        scores = torch.zeros(len(labels), len(train.classes))
        for fold in part.unique():
            tested, shown = part == fold, (part != fold) & good["noise"]
            with user_errors():
                arguments = noise[shown], labels[shown], len(train.classes), config.cost, process
                scores[tested] = svm_scores(noise[tested], *arguments)
        return scores

    motions = scores_by(torch.tensor(train.labels))
    if parts:
        motions["noise"] = noise_scores(torch.tensor(videos["noise"].labels))
    rows = {name: right(name, motions[name], torch.tensor(videos[name].labels)) for name in videos}
    rows["test less shuffled"] = rows["test"][0] - rows["shuffled"][0], 0.0
    if parts:
        named, labels = scores_by(scenes(train)), torch.tensor(test.labels)
        rows["other, as its scene's motion"] = right("other", motions["other"], scenes(videos["other"]))
        for name in ("test", "other"):
            rows[f"scene of {name}"] = right(name, named[name], scenes(videos[name]))
        for pair in (("rise", "fall"), ("grow", "shrink")):
            two = torch.tensor([train.classes.index(name) for name in pair])
            hits, chance = right("test", motions["test"][:, two], (labels == two[1]).long())
            rows[" or ".join(pair)] = hits[torch.isin(labels, two)], chance
    process.say(f"{'':<30}{'right':>9}{'chance':>11}{'videos':>9}")
    table = {}
    for row, (hits, chance) in rows.items():
        values = round(100 * hits.mean().item(), 2), round(100 * chance, 2), len(hits)
        table[row] = dict(zip(("percent", "chance_percent", "videos"), values, strict=True))
        process.say("{:<30}{:>7.1f} %{:>9.1f} %{:>9}".format(row, *values))
    save_result(process, config, {"table": table, "unreadable": bad})


if __name__ == "__main__":
    command_line(main)
