"""What the command lines of all methods share: which videos to train on, and the run from options to checkpoint."""

import copy
import dataclasses
import shlex
import time
from collections.abc import Iterator

import torch
from torch import nn

import data
import evaluate
import find
from cli import parse
from runs import continued, unused_folder
from train import Options, fit, leave_signals, loader_workers, option, start_process, user_errors


@dataclasses.dataclass(frozen=True)
class VideosConfig(Options):
    """Options that say which videos to train on."""

    dataset: str = option("synthetic", "what to train on", find.DATASETS)
    data: str = option("", "folder of the data set (default: datasets/DATASET)")
    list_file: str = option("", "with --dataset folder: a file of lines 'path label', label optional")
    exclude: str = option("", "files of videos to leave out, by commas: of data.py check, or a run's bad_videos.log")
    split: int = option(1, "official split of the data set", (1, 99))

    @property
    def root(self) -> str:
        """Folder of the data set."""
        return self.data or f"datasets/{self.dataset}"

    def find_videos(self) -> "data.VideoList":  # quoted, as data is an option here
        """`find.find_videos` by these options; of `synthetic`, the unlabeled videos if there are any."""
        files = self.list_file or None, self.exclude or None
        return find.find_videos(self.dataset, self.root, True, self.split, *files, unlabeled=True)


def main(method_class: type[nn.Module], config_class: type[Options], presets: dict[str, dict], doc: str) -> None:
    """Trains a method as its command line says; on the generated videos, shows at the end what it has learnt."""
    config = parse(config_class, doc, presets)
    process = start_process(config.device, config.timeout, config.deterministic == "on")
    with user_errors():
        torch.manual_seed(config.seed)
        method = method_class(config)
        untrained = copy.deepcopy(method.encoder) if config.dataset == "synthetic" else None
        with process.first():
            videos = config.find_videos()
        process.say(videos.report)
        seen = {"videos": videos.seen(config.root)} if process.rank == 0 else {}
        config = continued(config, process, seen)
        total_batch = config.batch_size * process.world_size
        if len(videos) < total_batch:
            raise ValueError(
                f"{config.root}: {len(videos)} videos, fewer than the total batch of {total_batch}: lower --batch_size"
            )
        if config.queue > len(videos):
            process.say(
                f"warning: --queue {config.queue} exceeds the {len(videos)} videos, which then meet their own keys"
            )
        with process.first():
            views = method.make_views(videos)

    def sampler(start: int) -> data.StepSampler:
        return data.StepSampler(
            len(views), config.batch_size, config.epochs, config.seed, process.rank, process.world_size, start
        )

    def make_loader(start: int) -> Iterator[dict]:
        return data.load_batches(views, sampler(start), loader_workers(config, process), leave_signals)

    name = method_class.__name__.lower()
    unused = f"runs/{name}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    with user_errors():
        out = config.out or process.of_first(lambda: unused_folder(unused))
    steps, paths = sampler(0).steps_per_epoch, views.videos.paths
    checkpoint = fit(method, config, process, make_loader, steps, out, paths=paths, seen=seen)
    if config.dataset == "synthetic":
        shape = config.crop, config.frames, config.frame_stride
        encoders = {"untrained": untrained, name: method.encoder}
        evaluate.first_look(encoders, config.root, shape, process, loader_workers(config, process))
    quoted = shlex.quote(str(checkpoint))
    process.say(
        f"\nnext:\n  python evaluate.py retrieve --checkpoint {quoted}    # R@k, 10 clips a video\n"
        f"  python evaluate.py linear --checkpoint {quoted} --cached 10    # accuracy of a linear classifier\n"
        f"  python {name}.py --dataset folder --data YOUR_VIDEOS --encoder {config.encoder} --width {config.width} "
        f"--crop {config.crop}    # your own videos\n"
        f"  python {name}.py --help    # every option, and what each data set's preset sets"
    )
