"""Turns text into a memmap of tokens, once, for launch/train.py --data FILE.bin; see --help.

python launch/prepare.py --data TEXT MORE.jsonl ROWS.parquet hf:NAME@SPLIT --tokenizer bytes --out out/corpus.bin
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from hla_dist.data.sources import LeftOut, read_documents, total_size
from hla_dist.data.text import JOINED, Codec
from hla_dist.data.token_file import about_path, write_tokens
from hla_dist.processes.failure import UserError, describe
from hla_dist.training.config import Parser


def options() -> argparse.Namespace:
    parser = Parser(
        prog="launch/prepare.py",
        description="Turn text into a memmap of tokens and a JSON that says what they are.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="text files, .jsonl, both perhaps .gz, .xz or .zst, .parquet, folders of them, or hf:NAME[@SPLIT] of the "
        "package datasets, streamed",
    )
    parser.add_argument("--tokenizer", default="bytes", metavar="FILE", help="JSON of 'tokenizers', or bytes")
    parser.add_argument("--end-token", metavar="TOKEN", help="follows each document that does not end in it")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of JSONL and Parquet rows")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="stop after so many; 0: read all")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that encode text, each on a core")
    parser.add_argument("--out", required=True, metavar="FILE.bin", help="what is written, beside it FILE.bin.json")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, no half a file is left behind
    try:
        given = options()
        out = Path(given.out)
        if out.suffix != ".bin":
            raise UserError(f"--out: expected a file with the suffix .bin, got {out}")
        if given.max_tokens < 0:
            raise UserError(f"--max-tokens: expected at least 0, got {given.max_tokens}")
        if given.processes < 1:
            raise UserError(f"--processes: expected at least 1, got {given.processes}")
        left_out = LeftOut()
        documents = read_documents(given.data, given.text_field, left_out)
        with tqdm(total=total_size(given.data), unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            counted = 0

            def progress(size: int, tokens: int) -> None:
                nonlocal counted
                counted += tokens
                bar.set_postfix_str(f"{counted:,} tokens", refresh=False)
                bar.update(size)

            about = write_tokens(
                out, documents, given.tokenizer, given.max_tokens, progress, given.end_token, given.processes
            )
            if bar.total and not given.max_tokens:
                bar.update(bar.total - bar.n)  # empty rows and binary files are passed over
    except (UserError, ValueError, OSError) as exc:
        print(f"prepare.py: error: {describe(exc)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: error: stopped by Ctrl-C, nothing is written", file=sys.stderr)
        return 130
    notes = [str(left_out)] if str(left_out) else []
    if len(about.documents) > 1 and Codec(given.tokenizer, end_token=given.end_token).joins_documents:
        notes.append(JOINED)
    for note in notes:
        print(f"prepare.py: {note}", file=sys.stderr)
    print(
        f"{out}: {about.tokens:,} tokens ({about.dtype}, vocabulary {about.vocab_size:,}) of {len(about.documents):,} "
        f"document(s), described in {about_path(out)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
