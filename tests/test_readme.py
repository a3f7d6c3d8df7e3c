"""The front page: its training loop is the code's, and its map names every file."""
import ast
import inspect
import re
import subprocess
from pathlib import Path
from unittest import SkipTest

import multitask_classifier
from tests.helpers import PROJECT


def code_of(line):
    """A line of code without indentation and comment."""
    return line.split("  #")[0].strip()


def test_the_loop_on_the_front_page_is_an_ordered_excerpt_of_the_code():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    excerpt = re.search(r"```python\n(for epoch in .*?)```", readme, flags=re.DOTALL)[1]
    shown = [code_of(line) for line in excerpt.splitlines()]
    shown = [line for line in shown if line not in ("", "...") and not line.startswith("#")]
    assert len(shown) >= 9 and any("combine" in line for line in shown)

    # each shown line is found below the one before
    rest = iter(map(code_of, inspect.getsource(multitask_classifier.train).splitlines()))
    for line in shown:
        assert line in rest, f"not in train(), or not in this order: {line}"


def test_the_map_names_every_file():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    if not (PROJECT / ".git").exists():
        raise SkipTest("not a git checkout")

    # the files of the repository: a student's own may stand beside them
    tracked = subprocess.check_output(["git", "ls-files", "*.py"], cwd=PROJECT, text=True)
    names = [str(path) for path in map(Path, tracked.split())
             if str(path.parent) in (".", "data", "support") and path.name != "__init__.py"]
    rows = re.findall(r"^\| ([\w/]+\.py(?:, [\w/]+\.py)*) \|", readme, flags=re.MULTILINE)
    assert sorted(", ".join(rows).split(", ")) == sorted(names)


def test_imports_run_one_way():
    """support and data (ground) <- attention <- bert <- optimizer, pcgrad, smart <- the two scripts
    <- results, tests, sanity_check. Only support/predict.py may import an application."""
    level = {"support": 0, "data": 0, "attention": 1, "bert": 2, "optimizer": 3, "pcgrad": 3,
             "smart": 3, "multitask_classifier": 4, "pretrain_mlm": 4, "sanity_check": 5,
             "tests": 5, "results": 5}
    for path in PROJECT.rglob("*.py"):
        name = path.relative_to(PROJECT).parts[0].removesuffix(".py")
        if name not in level or path.name == "predict.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in getattr(node, "names", [])
                        if isinstance(node, ast.Import)]
            if isinstance(node, ast.ImportFrom):
                imported = [node.module]
            for module in (module.split(".")[0] for module in imported):
                lower = level.get(module, 0) < level[name] or level[name] in (0, 5)
                assert lower and (level[name] or level.get(module, 0) == 0), (path, module)
