"""SimCLR for video (Chen et al., ICML 2020), an example of a new method: no queue, no key encoder, AdamW.

python examples/simclr.py                                               # small encoder, generated videos, on a CPU
torchrun --nproc_per_node=2 examples/simclr.py --dataset ucf101 --data /data/ucf101
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
from cli import command_line
from losses import similarity
from pretrain import PRESETS, Method, PretrainConfig, main, pool
from train import option


class Gather(torch.autograd.Function):
    """Rows of all processes, by rank; unlike `dist.all_gather`, with gradients, summed over the processes."""

    @staticmethod
    def forward(_ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty(rows.shape, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient := gradient.contiguous())
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


@dataclasses.dataclass(frozen=True)
class SimCLRConfig(PretrainConfig):
    """Options of SimCLR."""

    lr: float = option(0.008, "learning rate at a total batch of 256, scaled linearly", (0, 1e6))
    temperature: float = option(0.1, "temperature of the contrast", (0.001, 1000))
    warmup: float = option(1.0, "epochs in which the learning rate rises from 0", (0, 1e6))

    def learning_rate(self, total_batch: int, epoch: float) -> float:  # a linear warm-up, and the cosine of all methods
        return super().learning_rate(total_batch, epoch) * min(epoch / max(self.warmup, 1e-9), 1)


class SimCLR(Method):
    """NT-Xent (Eq. 1): a clip's positive is its video's other clip, its negatives are the clips of all other videos."""

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:  # `data.PretrainingViews`, batched → loss
        clips, color = self.both(views["clip"]), self.both(views["color"])  # (2B, …): B source clips, then B targets
        z = self.project(self.head, pool(self.encoder(self.encoder_input(clips, color[:, 0]))))  # (2B, D), unit length
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        keys = Gather.apply(z) if ranks > 1 else z  # (2B · ranks, D)
        own = torch.arange(len(z), device=z.device) + rank * len(z)  # where each row of z is among the keys
        scores = similarity(z, keys, self.config.temperature).scatter(1, own[:, None], -math.inf)  # none is its own key
        self.metrics["chance/nce"] = math.log(len(keys) - 1)  # shown beside the loss
        self.metrics["feature_std"] = z.detach().std(0).mean()  # warns when features collapse
        return {"nce": F.cross_entropy(scores, own.roll(len(z) // 2))}  # the positive is B rows further, or B before

    def optimizer(self, config: SimCLRConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), config.lr, weight_decay=config.weight_decay)


if __name__ == "__main__":
    command_line(lambda: main(SimCLR, SimCLRConfig, PRESETS, __doc__))
