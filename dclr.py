"""DCLR: Dual Contrastive Learning for Spatio-temporal Representation (ACM MM 2022).

A clip is drawn to a still of another clip of its video (L_VS) and to a frame difference that moves like its own
(L_VD), which is looked for in other videos too; still and frame difference are driven apart (L_SD), and their
activation maps say where the clip's features are static and where dynamic. The whole method is `DCLR.forward`.

    python dclr.py                                                          # small encoder, generated videos, on a CPU
    python dclr.py --dataset ucf101 --data /data/ucf101                     # one GPU
    torchrun --nproc_per_node=4 dclr.py --dataset k400 --data /data/k400    # four GPUs
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

import losses
import moco
from cli import command_line
from models import MomentumQueue, momentum_update
from pretrain import main, pool
from train import SWITCH, UserError, detail, option

PARTS = {"none": "", "static": "s", "motion": "d", "both": "sd"}  # inputs that an option names


@dataclasses.dataclass(frozen=True)
class DCLRConfig(moco.MoCoConfig):
    """Options of DCLR; their defaults are the paper's, or ours where it gives none. Presets have the others."""

    losses: str = option("vs,vd,sd,ac", "losses to sum, of vv, vs, vd, sd, ac (Eq. 1, 6, 10, 8, 12); sd is maximised")
    ac_weight: float = detail(0.5, "weight of ac, lambda (Eq. 16)", (0, 1000))
    same_view: str = detail("off", "vs and vd within a view, not across the two (Table 4)", SWITCH)
    search: str = option("motion", "stills or differences of which positives are retrieved (Table 5)", tuple(PARTS))
    retrieved: int = detail(5, "positives retrieved for each clip, K (Table 6)", (1, 65_536))
    retrieved_weights: str = detail("prior", "their weights: by similarity, or equal (Table 6)", ("prior", "uniform"))
    decouple: str = detail("both", "which of vs, vd pools RGB by activation (Eq. 14, 15; Table 7)", tuple(PARTS))
    delay: float = detail(10.0, "epochs before retrieval and decoupling start", (0, 1e6))
    refresh: int = detail(10, "epochs between two updates of the slow extractor", (1, 10**6))
    momentum: float = option(0.0, "what the slow extractor keeps of itself at an update", (0, 1))
    queue: int = option(2048, "length of the pool of features to retrieve from", (1, 2**24))
    gray_p: float = option(0.0, "probability of grayscale, which the paper does without", (0, 1))
    bn: str = option("local", "batch norm with several processes, of each process's own clips", ("local",))

    KNOWN_LOSSES = ("vv", "vs", "vd", "sd", "ac")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {"vv", "vs", "vd"} & set(self.terms):
            raise UserError(f"--losses {self.losses}: sd and ac alone learn nothing; add some of vv, vs, vd")
        if self.batch_size < 2:
            raise UserError("--batch_size 1: the negatives are the other videos of a process's batch, take 2 or more")
        if self.search != "none" and self.same_view == "on":
            raise UserError("--same_view on: what is retrieved is of no view, add --search none, as in Table 4")
        if self.search != "none" and self.retrieved > self.queue:
            raise UserError(f"--retrieved {self.retrieved} is more than the --queue of {self.queue} holds")


PAPER = dict(encoder="r2plus1d_18", crop=112, batch_size=16, lr=0.04)
PRESETS = {
    # the pool is used from half of the run on: before, features know too little motion to find any
    "synthetic": moco.PRESETS["synthetic"]
    | dict(momentum=0.0, delay=6.0, refresh=1, difference="adjacent", color_first="off"),  # d is never coloured
    "ucf101": PAPER | dict(epochs=200, queue=2048, delay=10.0, refresh=10),
    "k400": PAPER | dict(epochs=100, queue=16384, delay=5.0, refresh=5),
}


class DCLR(moco.MoCo):
    """L = (L_VS + L_VD − L_SD) + λ L_ac (Eq. 16, Fig. 2), of v, s, d: RGB clip, still frame and frame difference.

    One encoder f sees all three, in separate forwards, and all of them get gradients. MoCo's key encoder is the slow
    extractor f̃ here. Each searched input has a ring of retrieval features f̃(d), and beside each the features f(v) and
    f(d) of the same clip, which are what is retrieved.
    """

    def __init__(self, config: DCLRConfig):
        super().__init__(config)
        searched = [x for x in PARTS[config.search] if f"v{x}" in config.terms]
        width = 3 * self.head.net[-1].out_features
        self.queues = nn.ModuleDict({x: MomentumQueue(config.queue, width) for x in searched})

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views as `data.PretrainingViews` makes them, batched, and "epoch", how many have passed → the named losses.

        At the start of every `refresh`-th epoch the slow extractor follows the encoder, and the pools start empty.
        """
        config, terms, started = self.config, self.config.terms, views["epoch"] >= self.config.delay
        if self.training and views["epoch"] % config.refresh == 0 and self.part[0] == 0:
            momentum_update(self.encoder, self.key_encoder, config.momentum)  # f̃ ← f
            momentum_update(self.head, self.key_head, config.momentum)
            for queue in self.queues.values():  # no f̃ compares with the last one; zeros are never found
                queue.keys = torch.zeros_like(queue.keys)
        inputs = self.inputs(views)  # v, s, d: Eq. 3, 4
        maps = {x: self.encoder(clips).unflatten(0, (2, -1)) for x, clips in inputs.items()}  # F(v), F(s), F(d)
        f = {x: self.project(self.head, pool(features)) for x, features in maps.items()}  # f(v), f(s), f(d), (2, N, D)
        a = {x: losses.pixel_activation(features) for x, features in maps.items()}  # A_v, A_s, A_d: Eq. 11
        values, temperature = {}, config.temperature
        if "vv" in terms:
            values["vv"] = losses.dual_contrast(f["v"], f["v"], temperature=temperature)  # Eq. 1
        for x in "sd":
            if f"v{x}" in terms:
                v = f["v"]
                if started and x in PARTS[config.decouple]:
                    v = self.project(self.head, losses.activation_pool(maps["v"], a[x]))  # f_s(v), f_d(v): Eq. 13-15
                found = self.search(x, v, f[x], inputs[x]) if x in self.queues else None
                if started and found:  # Eq. 10, of view i
                    keys = f[x].flatten(0, 1)
                    values[f"v{x}"] = losses.retrieved_contrast(v[0], f[x][0], *found, keys, temperature)
                else:  # Eq. 6, 7
                    values[f"v{x}"] = losses.dual_contrast(v, f[x], config.same_view == "on", temperature)
        if "sd" in terms:
            values["sd"] = -losses.dual_contrast(f["s"], f["d"], True, temperature)  # Eq. 8
        if "ac" in terms:
            v, reference = a["v"].flatten(0, 1), (a["s"] + a["d"]).flatten(0, 1)
            values["ac"] = config.ac_weight * losses.activation_alignment(v, reference)  # Eq. 12
            unrelated = losses.activation_alignment(v.detach(), reference.roll(1, 0))  # another video's map
            self.metrics["chance/ac"] = config.ac_weight * unrelated
        chance = 2 * math.log(2 * len(views["clip"]) - 1)
        self.metrics |= {f"chance/{x}": -chance if x == "sd" else chance for x in values if x != "ac"}
        self.metrics["feature_std"] = f["v"].detach().flatten(0, 1).std(0).mean()
        return values

    def inputs(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's inputs (2N, 3, T, H, W), as far as asked for: "v"; "s", a random frame of it that stands still,
        with colours of its own; "d", its frame difference, without colours."""
        clips, color, terms = self.both(views["clip"]), self.both(views["color"]), set(self.config.terms)
        inputs = {"v": self.encoder_input(clips, color[:, 0])}
        if {"vs", "sd", "ac"} & terms:
            frame = torch.randint(clips.shape[2], (len(clips),), device=clips.device)
            still = self.encoder_input(losses.static_frame(clips, frame), color[:, 1])
            inputs["s"] = still.expand(-1, -1, clips.shape[2], -1, -1)
        if {"vd", "sd", "ac"} & terms:
            inputs["d"] = self.encoder_input(clips, None, difference=True)
        return inputs

    @torch.no_grad()
    def search(self, x: str, v: Tensor, key: Tensor, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For view i of each video, ṽ and s̃ or d̃, (N, K, D) each, and their weights (N, K) (Sec. 3.2).

        View j is put in the pool first, so that a clip may find the other one of its own video; micro-batch by
        micro-batch, where a step has several.

        Args:
            x: "s" or "d".
            v, key: f(v) and f(s) or f(d), (2, N, D).
            clips: s or d, (2N, 3, T, H, W).
        """
        slow = self.project(self.key_head, pool(self.key_encoder(clips))).unflatten(0, (2, -1))  # f̃
        if self.training:
            self.queues[x].enqueue(torch.cat([slow[1], v[1], key[1]], 1))
        keys, found_v, found_key = self.queues[x].keys.chunk(3, 1)
        index, weight = losses.retrieve(slow[0], keys, self.config.retrieved, self.config.retrieved_weights)
        return found_v[index], found_key[index], weight


if __name__ == "__main__":
    command_line(lambda: main(DCLR, DCLRConfig, PRESETS, __doc__))
