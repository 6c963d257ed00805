"""Text to tokens: what is read, how it is split, which windows come, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hla_dist.data.corpus import load_corpus
from hla_dist.data.sources import Document, list_files
from hla_dist.data.text import Codec
from hla_dist.data.token_file import write_tokens
from hla_dist.data.windows import MIXED, Mixture, Windows, _epoch, cut, held_out_windows
from hla_dist.processes.failure import UserError
from tests.harness import shifted
from tests.training.corpora import write_text


def test_one_file_is_split_into_head_and_tail(tmp_path: Path) -> None:
    path = write_text(tmp_path / "text.txt", 1000)
    corpus = load_corpus([str(path)], seq_len=16, held_out=0.1)
    assert bytes(np.concatenate([corpus.train, corpus.held_out])) == path.read_bytes() + b"\0"
    assert len(corpus.held_out) == 100
    assert (corpus.vocab_size, corpus.bytes_per_token) == (256, 1.0)
    assert corpus.codec.decode(corpus.codec.encode("a text")) == "a text"


def test_many_files_are_split_by_their_names_alone(tmp_path: Path) -> None:
    """A further file moves no other file to the other side."""
    held_out = []
    for folder, files in (("one", 60), ("two", 70)):
        (tmp_path / folder).mkdir()
        for number in range(files):
            (tmp_path / folder / f"{number}.txt").write_text(f"file {number:03d}")
        corpus = load_corpus([str(tmp_path / folder)], seq_len=8, held_out=0.2)
        assert len(corpus.held_out) + len(corpus.train) == files * 9
        held_out.append(set(bytes(corpus.held_out).split(b"\0")))
    assert 5 < len(held_out[0]) < 25
    assert all(int(text[5:]) >= 60 for text in held_out[1] - held_out[0])
    assert held_out[0] <= held_out[1]


def test_folders_are_read_in_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    write_text(tmp_path / "b" / "2.txt", 50)
    write_text(tmp_path / "a.txt", 50)
    write_text(tmp_path / ".git" / "x.txt", 50)
    (tmp_path / "c.bin").write_bytes(b"\0\1\2" * 50)
    assert [name for name, _ in list_files([str(tmp_path)])] == ["a.txt", "b/2.txt", "c.bin"]
    corpus = load_corpus([str(tmp_path)], seq_len=8)
    assert len(corpus.train) + len(corpus.held_out) == 2 * 51
    assert "2 file(s)" in corpus.description


def test_default_is_the_standard_library() -> None:
    names = [name for name, _ in list_files([])]
    assert "argparse.py" in names and "json/decoder.py" in names and len(names) > 300
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    corpus = load_corpus(seq_len=8192)
    assert len(corpus.train) > 5_000_000 and len(corpus.held_out) > 100_000


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_memmap_of_tokens(tmp_path: Path, suffix: str) -> None:
    tokens = np.random.default_rng(shifted(0)).integers(0, 1000, 500).astype(np.uint16)
    path = tmp_path / f"tokens{suffix}"
    np.save(path, tokens) if suffix == ".npy" else tokens.tofile(path)
    corpus = load_corpus([str(path)], seq_len=16, vocab_size=1000, token_dtype="uint16")
    assert isinstance(corpus.train, np.memmap) and corpus.bytes_per_token is None
    assert np.array_equal(np.concatenate([corpus.train, corpus.held_out]), tokens)
    with pytest.raises(UserError, match=r"--vocab-size: expected the vocabulary"):
        load_corpus([str(path)], seq_len=16)
    with pytest.raises(UserError, match=r"--vocab-size: expected tokens in 0..99, got"):
        cut(tokens, 0, 400, 100)


def test_a_bare_memmap_says_its_type_and_fits_its_vocabulary(tmp_path: Path) -> None:
    bare = tmp_path / "bare.bin"
    np.arange(500, dtype=np.uint32).tofile(bare)
    with pytest.raises(UserError, match=r"--token-dtype: expected the type of the tokens in .*bare.bin.*, got none"):
        load_corpus([str(bare)], seq_len=16, vocab_size=500)
    too_many = r"--vocab-size: expected at most the 65,536 numbers of the uint16 in .*, got 70000"
    with pytest.raises(UserError, match=too_many):
        load_corpus([str(bare)], seq_len=16, vocab_size=70000, token_dtype="uint16")
    np.save(tmp_path / "bare.npy", np.arange(500, dtype=np.uint16))
    with pytest.raises(UserError, match=too_many):
        load_corpus([str(tmp_path / "bare.npy")], seq_len=16, vocab_size=70000)
    assert load_corpus([str(bare)], seq_len=16, vocab_size=70000, token_dtype="uint32").train[3] == 3


def test_a_mixture_gives_each_text_its_share(tmp_path: Path) -> None:
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 900)
    write_tokens(tmp_path / "c.bin", [Document("c", "c", b"c" * 900, 900)], "bytes")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.bin")]
    corpus = load_corpus(paths, seq_len=8, held_out=0.1, weights=[6, 1.5, 0.5])
    assert set(bytes(corpus.held_out)) == set(b"abc\0") and corpus.bytes_per_token == 1
    assert corpus.held_out_documents is not None and len(corpus.held_out_documents) == 3
    samples = corpus.windows(8, 256, seed=1, packed=True)
    letters = samples.batch(0, 2 * MIXED)[:, 0]
    shares = [int((letters == ord(letter)).sum()) for letter in "abc"]
    assert shares == pytest.approx([1536, 384, 128], abs=6)  # a window may begin with the zero byte between documents
    assert isinstance(samples, Mixture)
    places = [samples.place(number) for number in range(MIXED - 500, MIXED + 500)]
    for text in samples.texts:  # its own samples in its own order, over the edge of a block too
        numbers = [number for of, number in places if of is text]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    again = corpus.windows(8, 256, seed=1, packed=True)
    assert torch.equal(again.batch(MIXED - 4, 9), samples.batch(MIXED - 4, 9)) and samples.cuts(5) is not None
    assert samples.labels(0, 300) == sum(samples.labels(number, 1) for number in range(300))


def test_mixtures_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    paths = [str(write_text(tmp_path / name, 500)) for name in ("a.txt", "b.txt")]
    for weights, message in (
        ([1.0], "expected one per --data path, 2, got 1"),
        ([1.0, -1.0], "expected positive numbers, none below 0.2% of their sum, got 1 -1"),
        ([1.0, 0.001], "expected positive numbers, none below 0.2% of their sum, got 1 0.001"),
    ):
        with pytest.raises(UserError, match=f"--data-weights: {message}"):
            load_corpus(paths, seq_len=8, weights=weights)
    np.save(tmp_path / "c.npy", np.arange(500, dtype=np.uint16))
    with pytest.raises(UserError, match=r"--data-weights: expected texts of one tokenizer, got .*a.txt \(256 tokens"):
        load_corpus([paths[0], str(tmp_path / "c.npy")], seq_len=8, vocab_size=500, weights=[1, 1])


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "state": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_text(tmp_path / "text.txt", 3000)
    corpus = load_corpus([str(path)], seq_len=16, tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.vocab_size == 3
    assert corpus.bytes_per_token == pytest.approx(3000 / (len(corpus.train) + len(corpus.held_out)))
    assert corpus.codec.decode(corpus.codec.encode("the state")) == "the state"
    (tmp_path / "broken.json").write_text(json.dumps({"model": 1}))
    tokenizer.enable_truncation(4)  # transformers saves what its last batch had
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "cut.json"))
    assert len(Codec(str(tmp_path / "cut.json")).encode("the state " * 10)) == 20
    with pytest.raises(UserError, match="--tokenizer: expected the JSON of a tokenizer"):
        load_corpus([str(path)], seq_len=16, tokenizer=str(tmp_path / "broken.json"))


def test_an_epoch_covers_the_text_once_in_another_order_each_time() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    windows = Windows(tokens, 16, 1000, seed=3)
    epochs = [windows.batch(epoch * windows.per_epoch, windows.per_epoch) for epoch in range(2)]
    for batch in epochs:
        assert batch.shape == (windows.per_epoch, 17) and batch.dtype == torch.int64
        assert torch.equal(batch, batch[:, :1] + torch.arange(17))
        starts = batch[:, 0].sort().values
        assert torch.equal(starts, starts[0] + 16 * torch.arange(windows.per_epoch))
    assert not torch.equal(epochs[0], epochs[1])
    _epoch.cache_clear()  # another process, that is
    assert torch.equal(epochs[0][7:9], Windows(tokens, 16, 1000, seed=3).batch(7, 2))
    assert not torch.equal(windows.batch(7, 2), Windows(tokens, 16, 1000, seed=4).batch(7, 2))


@pytest.mark.parametrize("length", [17, 18, 33, 34, 100])
def test_windows_fit_into_the_shortest_texts(length: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    windows = Windows(tokens, 16, length, seed=0)
    assert windows.batch(0, 5).shape == (5, 17)
    starts = held_out_windows(tokens, 16, 10_000)
    assert len(starts) == (length - 1) // 16 and starts[-1] + 17 <= length


def test_missing_empty_and_short_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    short = write_text(tmp_path / "short.txt", 20)
    cases = {
        str(tmp_path / "nothing"): "nothing, which does not exist",
        str(tmp_path / "empty"): "a folder without files",
        str(tmp_path / "empty.txt"): r"expected text, got none but empty or binary file\(s\)",
        str(short): r"expected at least 65 training tokens .*--seq-len 64.*, got 11 from 1 file",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_corpus([path], seq_len=64)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("--data: ")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "good.txt", 100)
    path = tmp_path / "bad.txt"
    if os.geteuid() == 0:  # root may read everything but the memory of a process at address 0
        path = Path("/proc/self/mem")
        paths = [str(tmp_path / "good.txt"), str(path)]
    else:
        write_text(path, 100).chmod(0)
        paths = [str(tmp_path)]
    with pytest.raises(UserError, match=rf"--data: cannot read {path}: \w+"):
        load_corpus(paths, seq_len=16)
