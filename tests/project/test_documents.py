"""Every block of code in the README and the documentation runs, every command line is one."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from folders import ROOT

from focal import cli
from focal.retinanet.settings import apply, preset_settings

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.stem != "trainers"  # its blocks are files that import one another: test_trainers.py
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block, capsys):
    exec(compile(block, "<block>", "exec"), {"__name__": "__block__"})
    printed = capsys.readouterr().out.split("\n")
    # A comment behind a print says what it prints.
    for expected, got in zip(re.findall(r"print\(.*\)  # (.*)", block), printed, strict=False):
        wanted, found = (
            re.findall(r"-?[\d.]+(?:e-?\d+)?|nan|True", text) for text in (expected, got)
        )
        assert len(wanted) == len(found) > 0
        for a, b in zip(wanted, found, strict=True):
            assert a == b or float(b) == pytest.approx(float(a), rel=2e-2)


def test_what_a_block_prints_is_shown_in_its_words(capsys):
    shown = 0
    for page in PAGES:
        text = page.read_text()
        for code, output in re.findall(
            r"^```python\n([^`]*)^```\n\nwhich prints\n\n```\n(.*?)^```$", text, re.S | re.M
        ):
            exec(compile(code, str(page), "exec"), {"__name__": "__block__"})
            printed = capsys.readouterr().out
            words = [re.sub(r"-?\d[\d.e+-]*", "#", t).split() for t in (printed, output)]
            assert words[0] == words[1]
            shown += 1
        assert text.count("which prints\n") == text.count("which prints\n\n```\n")
    assert shown > 0


def test_the_layout_in_the_readme_is_the_folder():
    """Every file and folder of `focal` in the layout exists; none of the first level is missing."""
    text = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"^## Repository layout\n\n```\n(.*?)^```$", text, re.S | re.M)
    named, folder = set(), ROOT
    for line in lines.splitlines():
        paths = re.match(r"\s*((?:[\w/]+(?:/|\.py)\s)+)", f"{line} ")[1].split()
        if not line.startswith(" "):
            folder = ROOT / paths[0]
            parent = folder.parent
            named |= {parent / path.removeprefix(f"{parent.name}/") for path in paths}
        else:
            named |= {folder / path for path in paths}
    assert [path for path in named if not path.exists()] == []
    there = {p for room in ("", "core", "retinanet") for p in (ROOT / "focal" / room).iterdir()}
    modules = {p for p in there if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {p.name for p in modules - named} <= {"__init__.py", "__main__.py"}


def test_local_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# ---------------------------------------------------------------- command lines


def test_every_block_is_of_a_kind_that_is_tested():
    """Besides these there is output, in blocks of `text` or without a word, and drawings."""
    kinds = {kind for page in PAGES for kind, _ in FENCE.findall(page.read_text())}
    assert kinds <= {"python", "console", "text", ""}
    for page in PAGES:
        for kind, block in FENCE.findall(page.read_text()):
            lines = block.splitlines()
            assert (kind == "console") == any(line.startswith("$ ") for line in lines), page.name
            starts = r"(focal|python|pip|make|torchrun|import|from) "
            assert kind in ("python", "console") or not re.match(starts, block), page.name


def command_lines(text: str) -> Iterator[tuple[str, str]]:
    """The commands behind `$`, and what is fed to each."""
    text = re.sub(r"\\\n\s*", "", text)
    yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M)


COMMANDS = [
    pytest.param(command, fed, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (command, fed) in enumerate(
        line
        for kind, block in FENCE.findall(page.read_text())
        if kind == "console"
        for line in command_lines(block)
    )
]


@pytest.mark.parametrize(("command", "fed"), COMMANDS)
def test_the_command_line_is_one(command, fed):
    for part in command.split(" && "):
        check_command(shlex.split(part, comments=True), fed)


def test_the_commands_in_the_help_are_commands():
    epilog = re.sub(r"\\\n\s*", "", cli.train.EPILOG)
    commands = re.findall(r"^  ((?:focal|torchrun) .*)$", epilog, re.M)
    assert len(commands) >= 4
    for command in commands:
        check_command(shlex.split(command), "")


def check_command(words: list[str], fed: str) -> None:
    """Fail unless what the words start exists and takes them."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        at = rest.index("-m")
        program, rest = "python", rest[at:]
    if program == "python" and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:])
    elif program == "focal":
        check_module("focal", rest)
    elif program == "python" and rest[0] == "-c":
        check_script(rest[1])
    elif program == "python":
        assert rest == ["-", "<<END"]
        check_script(fed.removesuffix("END\n"))
    elif program == "pip":
        check_pip(rest)
    elif program == "make":
        check_target(rest[0])
    else:
        assert (program, *rest[:2]) in {("python3.11", "-m", "venv"), (".", ".venv/bin/activate")}


def check_module(module: str, arguments: list[str]) -> None:
    if module == "focal":
        options = cli._parser().parse_args(arguments)  # exits where it does not understand
        if hasattr(options, "set"):
            start = preset_settings(options.preset or "tiny", options.convention or "paper")
            apply(start, cli.options.assignments(options))
    elif module == "benchmarks.gpu":
        importlib.import_module("benchmarks.gpu.__main__")._parser().parse_args(arguments)
    elif module in ("benchmarks.exhaustive", "benchmarks.figures", "benchmarks.gpu.page"):
        importlib.import_module(module)._parser().parse_args(arguments)
    else:
        found = find_spec(module)
        assert found is not None and found.origin is not None, module
        source = (
            Path(found.origin).read_text() if module.startswith(("benchmarks", "tests")) else ""
        )
        flags = [word for word in arguments if word.startswith("--")]
        assert module == "pytest" or all(f'"{flag}"' in source for flag in flags), arguments


def check_script(script: str) -> None:
    """It compiles, and the names that it imports are there."""
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or find_spec(f"{module.__name__}.{name}")


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words[1:]:
        if found := re.fullmatch(r"(?:\.|focal-losses)\[(.*)\]", word):
            assert set(found[1].split(",")) <= set(extras)
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file()
        else:
            pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
            assert word in {"--constraint", "--editable", "-e", ".", *pinned}


def check_target(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), target


def test_commands_named_in_the_text_exist(capsys):
    helps: dict[str, str] = {}
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = FENCE.sub("", page.read_text())
        for found in re.findall(r"`((?:focal|make|pip|python) [^`]+)`", text):
            program, command, *rest = shlex.split(" ".join(found.split()))
            if program == "make":
                check_target(command)
            elif program == "pip":
                check_pip([command, *rest])
            elif program == "python" and command == "-m":
                assert find_spec(rest[0]) is not None, found
            elif program == "python":
                assert (ROOT / command).is_file(), found
            else:
                if command not in helps:
                    with pytest.raises(SystemExit) as done:
                        cli.main([command, "--help"])
                    assert done.value.code == 0, found
                    helps[command] = capsys.readouterr().out
                for word in rest:
                    assert not word.startswith("--") or word in helps[command], found
    assert {"train", "evaluate", "check"} <= set(helps)


def test_the_records_of_results_name_no_folder_of_a_machine():
    records = [*ROOT.glob("docs/results/*.json"), *ROOT.glob("benchmarks/results/**/*.json")]
    assert len(records) > 10
    absolute = re.compile(r'"command": "[^"]*[ =\']/')
    assert [path.name for path in records if absolute.search(path.read_text())] == []
