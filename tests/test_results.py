"""The tables of docs/results.md that results/make.sh makes: `python tests/test_results.py` writes them anew."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "results"
TABLE = re.compile(r"(<!-- rows of (\w+) -->\n\|[^\n]*\n\|[^\n]*\n)((?:\|[^\n]*\n)*)")
NAMES = {  # of a row: what it is called, and the paper's linear probe on UCF101
    "untrained": ("untrained encoder", ""),
    "single": ("labels, of one frame a video", ""),
    "supervised": ("labels (supervised)", ""),
    "moco": ("L_VV (MoCo)", "58.1"),
    "moco_vd": ("L_VV + L_VD", "68.7"),
    "fra": ("L_VV + L_Fra", "69.7"),
    "dc": ("L_VV + L_Pix, DC alone", "69.7"),
    "dc_fs": ("… DC + FS", "71.2"),
    "dc_md": ("… DC + MD", "71.0"),
    "pix": ("L_VV + L_Pix: DC + FS + MD", "73.1"),
    "fg_30": ("… a smaller foreground", "71.6"),
    "fg_70": ("… a larger foreground", "71.5"),
    "fg_rgb": ("… masks by RGB", "72.1"),
    "fg_diff": ("… masks by frame difference", "71.1"),
    "fg_source": ("… masks of the prediction", "71.7"),
    "fg_target": ("… masks of the target", "72.2"),
    "fima": ("FIMA: L_VV + L_Pix + L_Fra", "75.3"),
    "fima_longer": ("FIMA, 100 epochs, larger crops, longer windows", ""),
    "fame": ("FAME", ""),
    "dclr": ("DCLR", ""),
    "mcl": ("MCL", ""),
    "mcl_v2": ("… aligning features (Eq. 5)", ""),
    "fima_fame": ("FIMA + FAME", ""),
    "i3d": ("I3D, a quarter as wide, untrained", ""),
    "i3d_moco": ("I3D, MoCo", ""),
    "i3d_fima": ("I3D, FIMA", ""),
}
MEASURES = {
    "people": ("linear", "R@1", "kNN", "fight", "shared"),
    "scenes": (
        *("test", "still", "test less shuffled", "unseen", "other", "other, as its scene's motion"),
        *("scene of other", "noise", "rise or fall", "grow or shrink"),
    ),
}


def runs_of(videos: str, row: str) -> list[dict]:
    """The results of a row by seed."""
    runs = map(json.loads, (RESULTS / "generated.jsonl").read_text().splitlines())
    return sorted((run for run in runs if (run["set"], run["row"]) == (videos, row)), key=lambda run: run["seed"])


def spread(values: list[float]) -> str:
    """Mean and standard deviation of the seeds; nothing of none."""
    return " ± ".join(f"{measure(values):.1f}" for measure in (statistics.mean, statistics.stdev)[: len(values)])


def cells(runs: list[dict], *measures: str) -> list[str]:
    return [spread([run[measure] for run in runs if measure in run]) for measure in measures]


def seeds(runs: list[dict]) -> str:
    return ", ".join(str(run["seed"]) for run in runs)


def line(*cells: str) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def rows(videos: str) -> str:
    """The rows of the table of a set, beside the linear probe of the logs of older code, where there are such."""
    table, prefix = "", "" if videos == "motion" else f"{videos}_"
    for row, (name, paper) in NAMES.items():
        if runs := runs_of(videos, row):
            command = runs[-1]["command"].removeprefix("none").strip()
            more = []
            if videos == "scenes":
                more = [*cells(runs_of("half", row), "other"), *cells(runs_of("even", row), "other")]
            elif videos not in MEASURES:
                older = sorted((RESULTS / "motion").glob(f"{prefix}{row}_[0-9].jsonl"))
                before = [json.loads(log.read_text().splitlines()[0])["linear_top1_percent"] for log in older]
                more = [spread(before), paper]
            found = cells(runs, *MEASURES.get(videos, ("linear", "R@1")))
            table += line(name, command and f"`{command}`", seeds(runs), *found, *more)
    return table


def masks(_: str) -> str:
    """What the foreground masks hold, of encoders whose checkpoints were kept for some epochs, and of people."""
    table = ""
    for videos, row in [(videos, row) for videos in ("shots", "people") for row in NAMES]:
        runs, name = [run for run in runs_of(videos, row) if "masks" in run], NAMES[row][0]
        epochs = {"epoch_0006": "6", "": "24"} if videos == "shots" else {"": "all"}
        for kept, epoch in ({"": "0"} if "untrained" in name else epochs).items():
            if found := [run["masks"][kept] for run in runs]:
                measures = [f"objects_{by}" for by in ("rgb", "difference", "both", "another")]
                found = cells(found, *measures, "motion_both", "motion_another")
                table += line(f"{'people: ' * (videos == 'people')}{name}", epoch, seeds(runs), *found)
    return table


def spans(_: str) -> str:
    """FIMA by how frame differences are made: of which frames, coloured after them or before."""
    table = ""
    for videos, name in (("shots", "four shots"), ("motion", "default set"), ("shake", "moving camera")):
        made = [runs_of(videos, row) for row in ("adjacent_last", "adjacent", "fima_last", "fima")]
        table += line(name, *(cells(runs, measure)[0] for measure in ("linear", "R@1") for runs in made))
    return table


def clips_apart(_: str) -> str:
    """Rows of short videos, of long ones, and of long ones whose motion changes."""
    table = ""
    for row in ("moco", "moco_vd", "dc", "pix", "fima"):
        made = [runs_of(videos, row) for videos in ("motion", "long", "shots")]
        table += line(NAMES[row][0], *(cells(runs, measure)[0] for measure in ("linear", "R@1") for runs in made))
    return table


TABLES = {"apart": clips_apart, "masks": masks, "spans": spans}


def test_tables_are_made_of_the_results():
    found = TABLE.findall(PAGE.read_text())
    same = [table == TABLES.get(name, rows)(name) for _, name, table in found]
    assert same and all(same), "write them anew as the docstring says"


def test_what_readme_and_notebooks_say_of_the_results_is_there():
    page, texts = PAGE.read_text(), [("", (ROOT / "README.md").read_text())]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = (cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown")
        paragraphs = [text for cell in cells for text in "".join(cell["source"]).split("\n\n")]
        texts += [(link[1], text) for text in paragraphs if (link := re.search(r"docs/results\.md#([\w-]+)", text))]
    assert len(texts) >= 4
    for anchor, text in texts:
        title = anchor.capitalize().replace("-", " ")
        section = re.search(rf"^## {title}$.*?(?=^## |\Z)", page, re.M | re.S)[0] if anchor else page
        found = re.findall(r"\d+\.\d(?= ±)" if not anchor else r"\d+\.\d(?= [%±])", text)
        assert found and set(found) <= set(re.findall(r"\d+\.\d", section)), anchor


def test_each_division_of_the_courts_tests_each_stroke():
    strokes = json.loads((ROOT / "results" / "people.json").read_text())
    courts = {court for groups in strokes["groups"].values() for court in groups}
    assert len(strokes["groups"]) == 7 and len(strokes["test"]) == 3 and courts == {*range(47)}
    for test in map(set, strokes["test"]):
        assert test < courts
        assert all(
            len(groups) == 53 and 13 <= sum(map(test.__contains__, groups)) <= 19
            for groups in strokes["groups"].values()
        )


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda match: match[1] + TABLES.get(match[2], rows)(match[2]), PAGE.read_text()))
