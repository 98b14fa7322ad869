"""What imports what, so that each part can be copied alone and imports run one way."""

import ast
import graphlib
import sys

from helpers import ROOT

FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
PARTS = {  # which can be copied alone, but data with video
    "video": {"av", "numpy"},
    "synthetic": {"av", "numpy", "tqdm"},
    "losses": {"torch"},
    "models": {"torch", "torchvision"},
    "augment": {"torch"},
    "train": {"torch", "tqdm"},
    "data": {"torch", "numpy", "tqdm", "video"},
}
METHODS = {"moco", "fima", "fame", "dclr", "mcl"}


def imports(name: str, everywhere: bool = False) -> set[str]:
    """Top-level names of all modules a file imports at its top, or everywhere, without the standard library."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    nodes = [*ast.walk(tree)] if everywhere else tree.body
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.partition(".")[0] for module in found} - sys.stdlib_module_names


def test_parts_import_nothing_that_is_not_copied_with_them_and_imports_run_one_way():
    """But where they need them: data's command, and pretrain's look at what was learnt in the first run."""
    for name, libraries in PARTS.items():
        of_its_command = {"cli", "find", "train"} if name == "data" else set()
        assert imports(name) <= libraries and imports(name, everywhere=True) <= libraries | of_its_command, name
    for name in METHODS:
        assert imports(name) & FILES.keys() <= {*PARTS, "pretrain", "cli", "moco"} - {name}, name
    for name in ("pretrain", "cli", "runs", "find", *PARTS):
        assert not imports(name) & (METHODS | {"evaluate", "visualize"}), name
    assert not (imports("evaluate") | imports("features")) & METHODS
    graphlib.TopologicalSorter({name: imports(name) & FILES.keys() for name in FILES}).prepare()  # there is no cycle
