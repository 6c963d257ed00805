"""What the site needs beside the pages: README as its front, MathML, pictures of reports.

MathML is part of HTML: browsers show it without a script, so the site needs nothing from elsewhere.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"(^```(?!math\b).*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```math\n(.*?)^```$|^\$\$(.*?)\$\$$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])")
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?:\.\./)?benchmarks/results/([\w-]+\.png)\)")
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)")
TAG = re.compile(r"\\tag\{(\d+)\}")


def on_files(files: Any, config: Any) -> Any:
    """The front page is README.md, seen from docs/; pictures lie beside their reports."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
    text = re.sub(r"\]\((?=benchmarks/|tests/|hla_dist/)", "](../", text)
    files.append(File.generated(config, "index.md", content=text))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas and links of a page; code stays as it is."""
    markdown = PICTURE.sub(r"\1results/\2)", markdown)
    parts = CODE.split(BLOCK.sub(_block, markdown))
    return "".join(part if number % 2 else _prose(part) for number, part in enumerate(parts))


def _block(match: re.Match[str]) -> str:
    latex = match[1] or match[2]
    tags = TAG.findall(latex)
    number = f'<span style="float:right">({tags[0]})</span>' if len(tags) == 1 else ""
    return f'<div class="formula">{number}{_mathml(TAG.sub("", latex), "block")}</div>'


def _prose(text: str) -> str:
    # in a span: Markdown takes a line that begins with <math> for a block
    return INLINE.sub(
        lambda match: f"<span>{_mathml(match[1], 'inline')}</span>", OUTSIDE.sub(r"\1", text)
    )


def _mathml(latex: str, display: str) -> str:
    try:
        return convert(" ".join(latex.split()), display=display)
    except Exception:  # a formula it does not know is shown as it is written
        return f"<code>{escape(latex)}</code>"
