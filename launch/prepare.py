"""Turns text into a memmap of tokens, once, for launch/train.py --data FILE.bin; see --help.

python launch/prepare.py --data TEXT MORE.jsonl ROWS.parquet hf:NAME@SPLIT --tokenizer bytes --out out/corpus.bin
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

from tqdm import tqdm
from tyro.conf import arg

from hla_dist.data.sources import LeftOut, read_documents, total_size
from hla_dist.data.text import JOINED, Codec
from hla_dist.data.token_file import about_path, write_tokens
from hla_dist.processes.failure import expect
from hla_dist.processes.options import Checked, Count, Natural, Paths
from hla_dist.processes.program import Program


@dataclass
class PrepareConfig(Checked):
    """Which text, and what becomes of it."""

    # text files, .jsonl, both perhaps .gz, .xz or .zst, .parquet, folders of them, or hf:NAME[@SPLIT] of the package
    # datasets, streamed
    data: Paths
    out: Annotated[str, arg(metavar="FILE.bin")]  # what is written, beside it FILE.bin.json
    tokenizer: Annotated[str, arg(metavar="FILE")] = "bytes"  # JSON of 'tokenizers', or bytes
    end_token: Annotated[str | None, arg(metavar="TOKEN")] = None  # follows each document that does not end in it
    text_field: str = "text"  # field of JSONL and Parquet rows
    max_tokens: Natural = 0  # stop after so many; 0: read all
    processes: Count = 1  # processes that encode text, each on a core

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.out.endswith(".bin"), "--out", "a file with the suffix .bin", self.out)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, no half a file is left behind
    return Program("prepare.py", "Turn text into a memmap of tokens and a JSON that says what they are.").run(prepare)


def prepare(program: Program) -> int:
    config = program.options(PrepareConfig)
    out, counted, left_out = Path(config.out), 0, LeftOut()
    documents = read_documents(config.data, config.text_field, left_out)
    with tqdm(total=total_size(config.data), unit="B", unit_scale=True, dynamic_ncols=True) as bar:

        def progress(size: int, tokens: int) -> None:
            nonlocal counted
            counted += tokens
            bar.set_postfix_str(f"{counted:,} tokens", refresh=False)
            bar.update(size)

        try:
            about = write_tokens(
                out, documents, config.tokenizer, config.max_tokens, progress, config.end_token, config.processes
            )
        except KeyboardInterrupt:
            program.say("error: stopped by Ctrl-C, nothing is written")
            return 130
        if bar.total and not config.max_tokens:
            bar.update(bar.total - bar.n)  # empty rows and binary files are passed over
    if str(left_out):
        program.say(str(left_out))
    if len(about.documents) > 1 and Codec(config.tokenizer, end_token=config.end_token).joins_documents:
        program.say(JOINED)
    print(
        f"{out}: {about.tokens:,} tokens ({about.dtype}, vocabulary {about.vocab_size:,}) of {len(about.documents):,} "
        f"document(s), described in {about_path(out)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
