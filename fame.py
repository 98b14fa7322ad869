"""FAME: Motion-aware Contrastive Video Representation Learning via Foreground-background Merging (CVPR 2022).

MoCo-v2 in which one of the two clips of a video shows its moving foreground on the background of another video of the
batch (Sec. 3.2, Fig. 4), by `augment.ForegroundBackgroundMerging`. `python fima.py --fame single` puts it before FIMA.

    python fame.py                                                          # small encoder, generated videos, on a CPU
    python fame.py --dataset ucf101 --data /data/ucf101                     # one GPU
    torchrun --nproc_per_node=8 fame.py --dataset k400 --data /data/k400    # eight GPUs, the paper's setting
"""

import dataclasses

import moco
from augment import ForegroundBackgroundMerging as Merging
from cli import command_line
from pretrain import main
from train import UserError, option


@dataclasses.dataclass(frozen=True)
class FAMEConfig(moco.MoCoConfig):
    """Options of FAME; the defaults are the paper's."""

    foreground: float = option(0.5, "portion of the picture that is foreground, beta (Table 1)", (0.01, 1))
    branches: str = option("single", "merge one clip of each video, or both (Table 1)", Merging.BRANCHES)
    background: str = option("inter", "another video's, the other clip's, or none (Table 3)", Merging.BACKGROUNDS)
    mask: str = option("fame", "colours of what moves, the middle, what moves, its grid (Table 4)", Merging.MASKS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.background == "inter" and self.batch_size < 2:
            raise UserError("--background inter takes another video of the batch: --batch_size 2 or more")


PRESETS = moco.PRESETS | {"k400": moco.PRESETS["k400"] | dict(epochs=200)}


class FAME(moco.MoCo):
    """L = L_nce (Eq. 1) on merged clips (Eq. 4), in both directions: each view is once the query, once the key.

    With `--losses vv,vd`, the frame differences are those of the clips before merging.
    """

    def __init__(self, config: FAMEConfig):
        super().__init__(config)
        self.merge = Merging(config.foreground, config.mask, config.background, config.branches)  # Eq. 2-4


if __name__ == "__main__":
    command_line(lambda: main(FAME, FAMEConfig, PRESETS, __doc__))
