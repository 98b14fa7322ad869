"""README, CONTRIBUTING and docs: commands parse, and files, links, flags, names and tests that they name exist."""

import ast
import itertools
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest
from helpers import ROOT

import cli

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
ALL = "\n".join(PAGES.values())
REPRODUCE, TRAINING = PAGES["docs/reproduce.md"], PAGES["docs/training.md"]
SOURCES = [path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("examples/*.py"))]
HELP = re.findall(r"(?m)^ *(?:python|torchrun) .*", "\n".join(SOURCES))
BLOCKS = "".join(re.findall(r"^```bash\n(.*?)^```", ALL, re.DOTALL | re.MULTILINE))
LINES = [line.partition("#")[0].strip() for line in [*BLOCKS.splitlines(), *HELP]]
ROWS = re.findall(r"^\|.*", ALL, re.MULTILINE)
OF_TABLES = [f"python {command}" for row in ROWS for command in re.findall(r"`(\w+\.py [^`]*)`", row)]
OF_ROWS = [  # the flags of a table's row after the base command, which is the block above the table
    f"{base.strip()} {flags}"
    for base, below in re.findall(r"^```bash\n(.*?)^```(.*?)(?=^```|\Z)", REPRODUCE, re.DOTALL | re.MULTILINE)
    for flags in re.findall(r"^\|[^`\n]*`(--[^`\n]*)`", below, re.MULTILINE)
]
SCRIPTS = {  # the words from the script's name on, of each command that runs one of ours
    line: shlex.split(match[1])
    for line in LINES + OF_TABLES + OF_ROWS
    if (match := re.search(r"(?:python|torchrun) (?:--\S+ )*(\S+\.py.*)", line))
}


def ends_itself(monkeypatch, script, *flags):
    """Runs a script with flags that end it: its exit code."""
    monkeypatch.setattr(cli, "command_line", lambda main: main())
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_parses(command, monkeypatch):
    script, *flags = SCRIPTS[command]
    checkpoint = {"method": mock.ANY, "config": {"dataset": "ucf101"}, "model": {}, "step": 1}
    monkeypatch.setattr(cli, "load_checkpoint", lambda path: checkpoint)
    own = ".parse_args(" in (ROOT / script).read_text()  # a parser without --print_config
    assert ends_itself(monkeypatch, script, *flags, "--help" if own else "--print_config") == 0


def test_commands_are_there():
    assert {"pip install -r requirements.txt && python " + words for words in ("fima.py", "-m pytest")} <= set(LINES)
    assert len(OF_TABLES) > 10 and len(OF_ROWS) > 30
    assert all((ROOT / word).is_file() for line in LINES for word in line.split() if word.startswith("tests/"))


def test_every_run_that_a_table_names_is_made_once():
    made = re.findall(r"--out runs/([\w.]+)", REPRODUCE)
    lists = [names.split(",") for names in re.findall(r"runs/\{(.*?)\}", REPRODUCE)]
    named = {name for names in lists for name in names} | set(re.findall(r"\| runs/([\w.]+) \|", REPRODUCE))
    assert len(made) == len(set(made)) > 20 and named <= set(made)


def anchors(page: str) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_that_are_named_exist(name):
    of_users = {"run.json", "labels.json", "train.json", "validation.json"}
    of_users |= {f"Diving48_{part}.json" for part in ("V2_train", "V2_test", "vocab")}
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]*)\)", PAGES[name])):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists() and (not anchor or anchor in anchors(path.read_text())), f"{target}#{anchor}"
    for file in re.findall(r"`([\w/]+\.(?:py|sh|json|md))(?=[` ])", PAGES[name]):
        places = [ROOT / folder / file for folder in ("", "tests", "docs", "results")]
        assert any(place.is_file() for place in places) or file in of_users, file


def test_flags_that_are_named_exist(monkeypatch, capsys):
    known = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr"}  # of torchrun
    for words in {(script, *itertools.takewhile(str.isalpha, rest)) for script, *rest in SCRIPTS.values()}:
        ends_itself(monkeypatch, *words, "--help_all", "--help")
        known |= {*re.findall(r"(?m)^  (?:-h, )?(--\w+)", capsys.readouterr().out)}
    without_slurm = re.sub(r"^```sh\n.*?^```", "", ALL, flags=re.DOTALL | re.MULTILINE)
    assert {*re.findall(r"--\w+", without_slurm)} <= known


def test_names_that_are_imported_exist():
    for block in re.findall(r"^```python\n(.*?)^```", ALL, re.DOTALL | re.MULTILINE):
        exec("\n".join(line for line in block.splitlines() if line.startswith(("from ", "import "))), {})


def test_what_runs_have_written_holds_no_path_of_a_machine_and_no_progress_bar():
    notebooks, records = [*ROOT.glob("notebooks/*.ipynb")], [*ROOT.glob("results/**/*.json*")]
    assert notebooks and records and all('"output_type"' in path.read_text() for path in notebooks)
    for path in notebooks + records:
        assert not re.search(r'/(tmp|root|home|work|Users)/|it/s\]|\d%\||"stderr"', path.read_text()), path


def test_every_promise_names_a_test():
    promises = re.findall(r"^- (?:.+\n)(?:  .+\n)*", TRAINING.partition("## Ten promises")[2], re.MULTILINE)
    assert len(promises) == 10 and all(re.search(r"`test_\w+\.py`", promise) for promise in promises)


def test_troubleshooting_quotes_what_the_program_prints():
    table = TRAINING.partition("## Troubleshooting")[2].partition("## ")[0]
    quoted = re.findall(r"`(.*?)`", "\n".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)))
    printed = []  # with … for each value that an f-string takes in
    for node in itertools.chain(*(ast.walk(ast.parse(source)) for source in SOURCES)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        printed.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    assert len(quoted) > 20
    assert not [beginning for beginning in quoted if not any(text.startswith(beginning) for text in printed)]
