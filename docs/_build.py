"""What MkDocs does not do by itself: the commands' own help as a page, and links out of docs/.

A link to a Markdown file or picture of the repository becomes one to its copy in the site, under
`repository/`; a link to code becomes the name of the file.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import click
from mkdocs.structure.files import File

from rolora.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
SHOWN = (".md", ".png")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
_FENCE = re.compile(r"^```(\w+)[ \t]+[^\n]*$", re.MULTILINE)


def on_files(files, config):
    """Adds the pages and pictures of the repository that pages of docs/ link to."""
    found = [*ROOT.glob("*.md"), *(ROOT / "benchmarks" / "results").rglob("*")]
    found.append(ROOT / "rolora" / "experiments" / "DIGITS.md")
    for path in found:
        if path.suffix in SHOWN:
            name = f"repository/{path.relative_to(ROOT)}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Help texts filled in, flags of fences taken off, links that leave docs/ mended."""
    if page.file.src_uri == "reference/commands.md":
        markdown = markdown.replace("<!-- commands -->", helps())
    inside = page.file.src_uri.startswith("repository/")
    name = page.file.src_uri.removeprefix("repository/")
    folder = (ROOT if inside else ROOT / "docs") / name
    depth = page.file.src_uri.count("/")
    markdown = _FENCE.sub(r"```\1", markdown)
    return _LINK.sub(lambda link: _mended(link, folder.parent, depth, inside), markdown)


def _mended(link: re.Match, folder: Path, depth: int, inside: bool) -> str:
    mark, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    if "://" in target or target.startswith(("mailto:", "/")):
        return link[0]
    path = (folder / target).resolve()
    up = "../" * depth
    docs = ROOT / "docs"
    if path.is_relative_to(docs):
        return f"{mark}[{text}]({up}{path.relative_to(docs)}{anchor})"
    if path.is_file() and path.suffix in SHOWN:
        return f"{mark}[{text}]({up}repository/{path.relative_to(ROOT)}{anchor})"
    return text if text.startswith("`") else f"{text} (`{path.relative_to(ROOT)}`)"


def helps() -> str:
    """Every command's `--help`, as printed."""
    texts = []
    for name, about in COMMANDS.items():
        command = import_module(f"rolora.{name}").command
        context = click.Context(command, info_name=f"rolora {name}", max_content_width=96)
        context.terminal_width = 96
        texts.append(f"## rolora {name}\n\n{about}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(texts)
