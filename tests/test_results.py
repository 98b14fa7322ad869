"""The tables of docs/results.md that results/make.sh makes: `python tests/test_results.py` writes them anew."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, LINES = ROOT / "docs" / "results.md", ROOT / "results" / "generated.jsonl"
TABLE = re.compile(r"(<!-- rows of (\w+) -->\n\|[^\n]*\n\|[^\n]*\n)((?:\|[^\n]*\n)*)")
NAMES = {  # of a row: what it is called, the linear probe before the corrections of the code, and the paper's on UCF101
    "untrained": ("untrained encoder", "21.9 ± 1.5", ""),
    "moco": ("L_VV (MoCo)", "13.5 ± 3.1", "58.1"),
    "moco_vd": ("L_VV + L_VD", "18.3 ± 2.3", "68.7"),
    "fra": ("L_VV + L_Fra", "47.7 ± 3.9", "69.7"),
    "dc": ("L_VV + L_Pix, DC alone", "16.8 ± 2.6", "69.7"),
    "dc_fs": ("… DC + FS", "16.7 ± 1.7", "71.2"),
    "dc_md": ("… DC + MD", "41.4 ± 1.8", "71.0"),
    "pix": ("… DC + FS + MD", "45.7 ± 3.2", "73.1"),
    "fima": ("FIMA: L_VV + L_Pix + L_Fra", "57.6 ± 3.2", "75.3"),
}


def rows(videos: str) -> str:
    """The rows of the table of a set: means and standard deviations over the seeds that were run."""
    runs, table = [json.loads(line) for line in LINES.read_text().splitlines()], ""
    for row, (name, before, paper) in NAMES.items():
        if own := [run for run in runs if (run["set"], run["row"]) == (videos, row)]:
            command = f"`{own[0]['command']}`".replace("`none`", "")
            seeds = ", ".join(sorted(str(run["seed"]) for run in own))
            values = [[run[measure] for run in own] for measure in ("linear", "R@1")]
            numbers = [f"{statistics.mean(x):.1f} ± {statistics.stdev(x):.1f}" if x[1:] else f"{x[0]}" for x in values]
            table += "| " + " | ".join([name, command, seeds, *numbers, before, paper]).replace("|  |", "| |") + " |\n"
    return table.replace("  |", " |")


def test_tables_are_made_of_the_results():
    found = TABLE.findall(PAGE.read_text())
    assert found and all(table == rows(videos) for _, videos, table in found), "write them anew as the docstring says"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda match: match[1] + rows(match[2]), PAGE.read_text()))
