"""The README and docs/: size, links, commands, settings, files and generated pages."""

import argparse
import importlib
import importlib.util
import json
import pathlib
import re
import shlex

import pytest

from scaleup.cli.entry import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "configs", "docs", "launch", "results", "scaleup", "tests")
MODULES = "|".join(FOLDERS)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: pathlib.Path) -> list[str]:
    """Return the lines of the code blocks of a page, joined where they end with a backslash."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def inline(page: pathlib.Path) -> list[str]:
    """Return the inline code of a page, which may show parts of commands."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]


def code(page: pathlib.Path) -> list[str]:
    return commands(page) + inline(page)


def slug(heading: str) -> str:
    """Return the anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: pathlib.Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)}


def test_readme_has_at_most_ten_kilobytes():
    assert README.stat().st_size <= 10_240


@every_page
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


@every_page
def test_files_named_in_the_text_exist(page):
    pattern = re.compile(rf"(?:{MODULES})/[\w./-]*[\w/]")
    for span in code(page):
        for name in pattern.findall(span):
            if not re.search(rf"[\w/]{re.escape(name)}", span):  # not the end of a longer path
                file = re.sub(r"\.csv/.*", ".csv", name)  # TABLE.csv/TRIAL is a row of a table
                assert (ROOT / file).exists(), f"{page.name} names {name}"


@every_page
def test_modules_named_in_the_text_exist(page):
    for name in re.findall(rf"python -m ((?:{MODULES})[\w.]+)", "\n".join(code(page))):
        assert importlib.util.find_spec(name), f"{page.name} runs {name}"


@every_page
def test_make_targets_exist(page):
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for span in code(page):
        command = re.match(r"\s*make ((?:[a-z][\w-]*\s?)+)", span.partition("#")[0])
        for target in command.group(1).split() if command else []:
            assert target in rules, f"{page.name}: make {target}"


@every_page
def test_scaleup_commands_in_code_blocks_parse(page):
    for line in commands(page):
        name, words = scaleup_command(line)
        if name is None or not words or "--help" in words:
            continue
        try:
            parser = parser_of(name)
            # argparse cannot mix positional words with flags where there are subcommands.
            parse = parser.parse_args if name == "bench" else parser.parse_intermixed_args
            parse(words)
        except (argparse.ArgumentError, SystemExit) as error:
            raise AssertionError(f"{page.name}: {line}: {error}") from error


@every_page
def test_scaleup_commands_and_options_in_the_text_exist(page):
    for span in code(page):
        name, words = scaleup_command(span)
        if name is None:
            continue
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        known = parser_of(name)._option_string_actions
        assert all(option in known for option in options), f"{page.name}: {span}"


def scaleup_command(line: str) -> tuple[str | None, list[str]]:
    """Return the name and the arguments of the `scaleup` command in a line."""
    command = re.search(r"(?:^|--wrap ')scaleup ([a-z][^#';|&\n]*)", line.strip())
    if command is None:
        return None, []
    name, *words = shlex.split(re.sub(r"\$\w+", "1", command.group(1)))
    return name, words


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, or fail if there is no such command."""
    assert name in COMMANDS, f"scaleup {name}"
    parser = argparse.ArgumentParser(
        allow_abbrev=False, conflict_handler="resolve", exit_on_error=False
    )
    importlib.import_module(f"scaleup.cli.{name.replace('-', '_')}").configure(parser)
    return parser


@every_page
def test_settings_named_in_the_text_exist(page):
    schema = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    keys = {}
    for section, value in schema["properties"].items():
        options = value.get("anyOf", [value])
        reference = next(option["$ref"] for option in options if "$ref" in option)
        keys[section] = set(schema["$defs"][reference.rpartition("/")[2]]["properties"])
    pattern = re.compile(rf"(?<![\w/.])({'|'.join(keys)})\.(\w+)(?![\w/.*])")
    for span in code(page):
        for section, key in pattern.findall(span):
            is_file = key in ("py", "sbatch", "csv", "md", "yaml", "safetensors")
            assert is_file or key in keys[section], f"{page.name} names {section}.{key}"


def test_generated_pages_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/tools/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, page in generate.PAGES.items():
        assert path.read_text(encoding="utf-8") == page(), f"{path.name}: run `make docs-pages`"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name
