"""Build the site from the repository as it is: pages outside docs/, the examples as tutorials, and links between all.

On GitHub every link is a path in the repository. In the site it leads to the page made from that file, or to a copy.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages that are made from files outside docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmark_scripts.md",
    "configs/README.md": "configs.md",
    "examples/README.md": "examples.md",
    "launch/slurm/README.md": "slurm_scripts.md",
} | {f"examples/{path.name}": f"{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and every other file of the repository that a page links to."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=page_text(ROOT / source)))
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / source for source in PAGES)]:
        for target in linked_files(path):
            name = site_name(target)
            if name.startswith("files/") and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages and files of the site."""
    sources = {name: source for source, name in PAGES.items()}
    folder = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def replaced(link: re.Match[str]) -> str:
        mark, text, target, anchor = (
            link[1],
            link[2],
            posixpath.normpath(posixpath.join(folder, link[3])),
            link[4] or "",
        )
        if (ROOT / target).is_dir():
            if f"{target}/README.md" not in PAGES:
                return text  # code: the site has no page for it
            target = f"{target}/README.md"
        place = posixpath.relpath(site_name(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({place}{anchor})"

    return LINK.sub(replaced, markdown)


def site_name(target: str) -> str:
    """Return the site's path of a file of the repository."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"


def linked_files(path: Path) -> Iterator[str]:
    """Yield the files that a page links to, as paths in the repository."""
    for link in LINK.finditer(page_text(path)):
        target = posixpath.normpath(posixpath.join(path.parent.relative_to(ROOT).as_posix(), link[3]))
        if (ROOT / target).is_file():
            yield target


def page_text(path: Path) -> str:
    """Return a Markdown file, or an example as one: its cells, and below each what it prints (docs/outputs)."""
    text = path.read_text(encoding="utf-8")
    return example_page(text, path.stem) if path.suffix == ".py" else text


def example_page(script: str, name: str) -> str:
    """Convert a script with `# %%` cells to Markdown; at the end is what it has printed, and its picture if any."""
    parts = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    kept = ROOT / f"docs/outputs/{name}.txt"
    if kept.exists():
        output = kept.read_text(encoding="utf-8").rstrip()
        parts.append(f"What it printed, with the quickstart's model:\n\n```text\n{output}\n```")
    if (ROOT / f"docs/outputs/{name}.png").exists():
        parts.append(f"![Its picture](../docs/outputs/{name}.png)")
    return "\n\n".join(parts) + "\n"
