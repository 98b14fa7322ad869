"""FAME: Motion-aware Contrastive Video Representation Learning via Foreground-background Merging (CVPR 2022).

MoCo-v2 in which one of the two clips of a video shows its moving foreground on the background of another video of the
batch (Sec. 3.2, Fig. 4), so that a scene no longer gives away which clips belong together. The augmentation itself is
`augment.ForegroundBackgroundMerging`; `python fima.py --fame single` puts it before FIMA.

    python fame.py                                                          # small encoder, generated videos, on a CPU
    python fame.py --dataset ucf101 --data /data/ucf101                     # one GPU
    torchrun --nproc_per_node=8 fame.py --dataset k400 --data /data/k400    # eight GPUs, the paper's setting

Tables of the paper as flags: 1 --foreground 1, 0.7, 0.5, 0.3 and --branches; 3 --background; 4 --mask.
"""

import dataclasses

from augment import ForegroundBackgroundMerging as Merging
from cli import command_line
from moco import PRESETS as MOCO_PRESETS
from moco import MoCo, MoCoConfig
from pretrain import main
from train import UserError, option


@dataclasses.dataclass(frozen=True)
class FAMEConfig(MoCoConfig):
    """Options of FAME; the defaults are the paper's."""

    foreground: float = option(0.5, "portion of the picture that is foreground, beta (Table 1)", (0.01, 1))
    branches: str = option("single", "merge one clip of each video, or both (Table 1)", Merging.BRANCHES)
    background: str = option(
        "inter",
        "where the background comes from (Table 3). inter: another video of the batch; intra: the video's other clip; "
        "none: nothing is merged, which is MoCo",
        Merging.BACKGROUNDS,
    )
    mask: str = option(
        "fame",
        "how the foreground is found (Table 4). fame: by the colours of what moves; gauss: the middle of the picture; "
        "seed: what moves; grid: the cells of a 4 x 4 grid that move most",
        Merging.MASKS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.background == "inter" and self.batch_size < 2:
            raise UserError("--background inter takes another video of the batch: --batch_size 2 or more")


PRESETS = MOCO_PRESETS | {"k400": MOCO_PRESETS["k400"] | dict(epochs=200)}


class FAME(MoCo):
    """L = L_nce (Eq. 1) on merged clips (Eq. 4), in both directions: each view is once the query, once the key.

    With `--losses vv,vd`, the frame differences are those of the clips before merging.
    """

    def __init__(self, config: FAMEConfig):
        super().__init__(config)
        self.merge = Merging(config.foreground, config.mask, config.background, config.branches)  # Eq. 2-4


if __name__ == "__main__":
    command_line(lambda: main(FAME, FAMEConfig, PRESETS, __doc__))
