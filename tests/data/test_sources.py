"""Documents from JSONL, Parquet and Hugging Face datasets, prepared token files, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from hla_dist.data import token_file
from hla_dist.data.corpus import Corpus, load_corpus
from hla_dist.data.sources import Document, LeftOut, read_documents, total_size
from hla_dist.data.text import JOINED
from hla_dist.data.token_file import about_path, open_tokens, write_tokens
from hla_dist.processes.failure import UserError
from tests.harness import RankPool, run_program
from tests.training.corpora import WORDS, small_config
from tests.training.test_program import ROOT, SECONDS, SMALL, errors, start
from tests.training.test_steps import mistakes

TEXTS = [f"document {n}: " + " ".join(WORDS[: n % 9]) + " ü" for n in range(40)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    rows = [json.dumps({"id": n, field: text}) for n, text in enumerate(texts)]
    path.write_text("\n\n".join(rows) + "\n")  # empty lines do not matter
    return path


def write_parquet(path: Path, texts: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the optional package pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=7)
    return path


def texts_of(*paths: object, field: str = "text") -> list[str]:
    return [document.text.decode() for document in read_documents([str(p) for p in paths], field)]


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program(ROOT / "launch" / "prepare.py", *arguments, cwd=ROOT, timeout=SECONDS)


def test_each_row_is_a_document(tmp_path: Path) -> None:
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, ""])) == TEXTS
    assert texts_of(write_jsonl(tmp_path / "b.jsonl", TEXTS, "body"), field="body") == TEXTS
    rows = write_parquet(tmp_path / "c.parquet", [*TEXTS, None, ""])
    assert texts_of(rows) == TEXTS
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "d.txt").write_text("one file")
    assert texts_of(tmp_path) == [*TEXTS, *TEXTS, "one file"]
    corpus = load_corpus([str(tmp_path)], seq_len=8)
    assert "81 documents in 3 file(s)" in corpus.description
    for tokens, documents in documents_of(corpus):
        assert documents[0] == 0 and all(tokens[documents[1:] - 1] == 0)  # the separator ends the document before
        assert len(documents) == int((tokens == 0).sum())
    assert sum(len(documents) for _, documents in documents_of(corpus)) == 81


def documents_of(corpus: Corpus) -> list[tuple[np.ndarray, np.ndarray]]:
    assert corpus.texts[0].documents is not None and corpus.held_out_documents is not None
    return [(corpus.train, corpus.texts[0].documents), (corpus.held_out, corpus.held_out_documents)]


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"id": list(range(40)), "text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", TEXTS)
    assert texts_of(f"hf:{tmp_path / 'one'}") == TEXTS
    assert texts_of(f"hf:{tmp_path / 'splits'}") == TEXTS
    assert texts_of(f"hf:{tmp_path / 'splits'}@test") == TEXTS[:3]
    assert texts_of(f"hf:{tmp_path / 'folder'}") == TEXTS  # streamed
    stream = read_documents([f"hf:{tmp_path / 'folder'}"])
    assert next(stream).text.decode() == TEXTS[0]
    for path, field, message in (
        (f"hf:{tmp_path / 'splits'}@dev", "text", "--data: expected a split of .*, one of train, test, got 'dev'"),
        (f"hf:{tmp_path / 'one'}", "body", "--text-field: expected one of id, text .* got body"),
        (f"hf:{tmp_path / 'folder'}", "body", "--text-field: expected one of id, text .* got body"),
        (f"hf:{tmp_path / 'none'}", "text", "--data: cannot read hf:.*none"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            texts_of(path, field=field)
        assert "\n" not in str(caught.value)


def test_a_prepared_file_is_the_text(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    out = tmp_path / "new" / "corpus.bin"
    done = prepare("--data", rows, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "40 document(s)" in done.stdout and "100%" in done.stderr
    about = json.loads(about_path(out).read_text())
    assert (about["dtype"], about["vocab_size"], about["tokenizer"]) == ("uint8", 256, "bytes")
    assert sorted(path.name for path in out.parent.iterdir()) == ["corpus.bin", "corpus.bin.json"]
    text = b"".join(text.encode() + b"\0" for text in TEXTS)
    assert out.read_bytes() == text and about["text_bytes"] == about["tokens"] == len(text)
    corpus = load_corpus([str(out)], seq_len=16)
    assert isinstance(corpus.train, np.memmap) and corpus.codec.known and corpus.bytes_per_token == 1.0
    assert corpus.texts[0].documents is not None and corpus.texts[0].documents[:2].tolist() == [
        0,
        len(TEXTS[0].encode()) + 1,
    ]


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_compressed_text_is_read_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    pack: Any = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}[suffix]
    texts = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(4000)]
    plain = write_jsonl(tmp_path / "rows.jsonl", texts).read_bytes()
    path, book = tmp_path / f"rows.jsonl.{suffix}", tmp_path / f"book.txt.{suffix}"
    path.write_bytes(pack(plain[:1000]) + pack(plain[1000:]))  # frames one after another, as programs append them
    plain_path = tmp_path / "rows.jsonl"
    plain_path.unlink()
    book.write_bytes(pack(b"a book"))
    assert texts_of(tmp_path) == ["a book", *texts] and total_size([str(tmp_path)]) is None
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], b"text that only says it is compressed"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"--data: cannot read .*rows.jsonl.{suffix}: .+") as caught:
            texts_of(path)
        assert "\n" not in str(caught.value)


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (root / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (root / "a.txt", root / "inner" / "b.txt", elsewhere / "c.txt"):
        path.write_text(path.name)
    (elsewhere / "up").symlink_to(tmp_path)
    (root / "Linked").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "inner")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / ".git").mkdir()
    (root / "empty").touch()
    (root / "x.png").write_bytes(b"\0\1")
    left_out = LeftOut()
    names = [document.name for document in read_documents([str(root)], left_out=left_out)]
    assert names == ["Linked/c.txt", "a.txt", "inner/b.txt"]
    assert str(left_out) == (
        "left out: 1 hidden (.git), 1 neither file nor folder (self), 4 folder(s) that a link leads to again (again, "
        "loop, Linked/up/elsewhere, ..), 1 empty (empty), 1 binary (x.png)"
    )
    assert load_corpus([str(root)], seq_len=2).notes == (str(left_out),) and str(LeftOut()) == ""


def word_level(path: Path, words: dict[str, int]) -> str:
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path))
    return str(path)


def test_an_end_token_goes_between_documents(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "t.json", {"[UNK]": 0, "a": 1, "b": 2})
    documents = [Document("d", "d", text, 9) for text in (b"a b", b"b a <eos>", b"")]
    out = tmp_path / "c.bin"
    about = write_tokens(out, documents, tokenizer, end_token="<eos>")
    assert np.fromfile(out, about.dtype).tolist() == [1, 2, 3, 2, 1, 3] and open_tokens(out).end_token == "<eos>"
    files = {"one.txt": "a b a b", "two.txt": "b a b a"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in files]
    corpus = load_corpus(paths, seq_len=2, tokenizer=tokenizer, end_token="<eos>")
    assert corpus.train[4] == 3 and not corpus.notes
    assert load_corpus(paths, seq_len=2, tokenizer=tokenizer).notes == (JOINED,)
    for options, message in (
        ({"end_token": "</s>", "tokenizer": tokenizer}, r"--end-token: expected a token of .*t.json, got '</s>'"),
        ({"end_token": "<eos>"}, "--end-token: expected a --tokenizer that it belongs to, got '<eos>' with bytes"),
    ):
        with pytest.raises(UserError, match=message):
            load_corpus(paths, seq_len=2, **options)
    with pytest.raises(UserError, match=r"--end-token: .* prepared with it, got .*c.bin: <eos>"):
        load_corpus([str(out)], seq_len=2, tokenizer=tokenizer, end_token="</s>")


def test_processes_write_the_file_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "BATCH", 50)
    documents = [Document(str(n), "d", text.encode(), len(text)) for n, text in enumerate(TEXTS)]
    one, two = (write_tokens(tmp_path / f"{n}.bin", documents, "bytes", processes=n) for n in (1, 2))
    assert one.sha256 == two.sha256 and np.array_equal(one.documents, two.documents)


def test_a_tokenizer_belongs_to_its_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    files = []
    for size in (5, 300):
        words = {"[UNK]": 0} | {f"word{n}": n for n in range(1, size)} | {"document": size}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        files.append(str(tmp_path / f"{size}.json"))
        tokenizer.save(files[-1])
    out = tmp_path / "corpus.bin"
    about = write_tokens(out, [Document("a", "a", b"document word1 word299", 22)] * 30, files[1])
    assert (about.dtype, about.vocab_size, about.tokens) == ("uint16", 301, 90)
    corpus = load_corpus([str(out)], seq_len=8, tokenizer=files[1])
    assert corpus.codec.known and corpus.bytes_per_token == pytest.approx(22 / 3)
    assert corpus.train[:3].tolist() == [300, 1, 299]
    assert not load_corpus([str(out)], seq_len=8).codec.known
    for options, message in (
        ({"tokenizer": files[0]}, r"--tokenizer: expected what .*corpus.bin was made with, .* got .*5.json"),
        ({"tokenizer": "bytes"}, r"--tokenizer: expected what .*corpus.bin was made with, .* got bytes: bytes"),
        ({"vocab_size": 300}, r"--vocab-size: expected at least the data's 301, got 300"),
    ):
        with pytest.raises(UserError, match=message):
            load_corpus([str(out)], seq_len=8, **options)


def test_damage_to_a_prepared_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "corpus.bin"
    write_tokens(path, [Document("a", "a", text.encode(), len(text)) for text in TEXTS], "bytes")
    whole, described = path.read_bytes(), about_path(path).read_text()
    read = json.loads(described)
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    cases = [
        (flipped, described, rf"--data: expected SHA-256 {read['sha256'][:16]}.. of .*corpus.bin .*, got"),
        (whole[:-1], described, rf"--data: expected {len(whole)} bytes in .*, got {len(whole) - 1}"),
        (whole, described[:-9], r"--data: expected what launch/prepare.py writes in .*corpus.bin.json, got"),
        (whole, json.dumps(read | {"documents": [0, 5, 5]}), "documents that do not make up the tokens"),
        (
            whole,
            json.dumps({key: read[key] for key in read if key != "dtype"}),
            "expected what launch/prepare.py writes",
        ),
    ]
    for data, about, message in cases:
        path.write_bytes(data)
        about_path(path).write_text(about)
        with pytest.raises(UserError, match=message) as caught:
            load_corpus([str(path)], seq_len=16)
        assert "\n" not in str(caught.value)
    path.write_bytes(flipped)
    about_path(path).write_text(described)
    assert open_tokens(path, verify=False).tokens == len(whole)  # what a rank that is not the first looks at


def fails_after(n: int) -> Any:
    for text in TEXTS[:n]:
        yield Document("a", "a", text.encode(), len(text))
    raise UserError("--data: cannot read x: Input/output error")


def test_a_prepared_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "corpus.bin"
    with pytest.raises(UserError, match="Input/output error"):
        write_tokens(path, fails_after(9), "bytes")
    with pytest.raises(UserError, match="--data: expected text, got none"):
        write_tokens(path, [], "bytes")
    assert not list(tmp_path.iterdir())
    assert write_tokens(path, fails_after(9), "bytes", max_tokens=30).tokens >= 30
    before = path.read_bytes()
    with pytest.raises(UserError, match="Input/output error"):
        write_tokens(path, fails_after(9), "bytes")
    assert path.read_bytes() == before and open_tokens(path)


BAD_LINES = {
    '{"text": "good"}\n{"text": "cut o': "--data: expected a JSON object in {path} line 2, got: Unterminated string",
    '{"text": "good"}\n\n[1, 2]\n': "--data: expected a JSON object in {path} line 3, got list",
    '{"id": 1, "body": "x"}\n': "--text-field: expected one of id, body (the fields of {path} line 1), got text",
    '{"text": 5}\n': "--text-field: expected text in field text of {path} line 1, got int",
    '{"text": "\\ud800"}\n': "--data: expected Unicode text in {path} line 1, got half of a surrogate pair",
}


def test_every_rank_refuses_bad_rows_in_the_same_line(pool: RankPool, tmp_path: Path) -> None:
    cases = []
    for number, (lines, message) in enumerate(BAD_LINES.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(lines)
        cases.append((small_config(path), message.format(path=path)))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    cases.append((small_config(tmp_path / "broken.parquet"), f"--data: cannot read {tmp_path / 'broken.parquet'}: "))
    rows = write_parquet(tmp_path / "rows.parquet", TEXTS)
    cases.append((small_config(rows, text_field="body"), f"(the fields of {rows}), got body"))
    damaged = tmp_path / "damaged.bin"
    write_tokens(damaged, [Document("a", "a", text.encode(), len(text)) for text in TEXTS], "bytes")
    damaged.write_bytes(damaged.read_bytes()[::-1])
    cases.append((small_config(damaged), "--data: expected SHA-256 "))  # the first rank alone compares it
    short = write_jsonl(tmp_path / "short.jsonl", TEXTS[:2])
    cases.append((small_config(short, seq_len=64), "--data: expected at least 65 training tokens"))
    said = pool.run_group(3, mistakes, [config for config, _ in cases])
    assert said[0] == said[1] == said[2]
    for (_, want), got in zip(cases, said[0], strict=True):
        assert isinstance(got, str) and want in got and "\n" not in got


def test_programs_say_one_line_and_fail(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n')
    line = f"--data: expected a JSON object in {path} line 2, got: "
    (tmp_path / "empty").mkdir()
    out = tmp_path / "corpus.bin"
    for arguments, message in (
        (["--data", path, "--out", out], line),
        (["--data", tmp_path / "empty", "--out", out], "a folder without files"),
    ):
        done = prepare(*arguments)
        assert done.returncode == 1 and not done.stdout and not out.exists()
        said = [text for text in done.stderr.splitlines() if text.startswith("prepare.py: error: ")]
        assert len(said) == 1 and message in said[0] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_ranks_say_one_line_and_fail(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n')
    done = start(2, *SMALL, "--data", str(path))
    assert done.returncode != 0 and not done.stdout
    assert len(errors(done)) == 1 and f"--data: expected a JSON object in {path} line 2, got: " in errors(done)[0]
