"""Packed documents: the loss of every document read alone, on any number of ranks, each sample read by one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hla_dist import SequenceParallelHLA
from hla_dist.data.corpus import load_corpus
from hla_dist.data.packing import cuts_between, part_of
from hla_dist.data.windows import Windows
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.parallel.shard import default_lengths
from hla_dist.processes.failure import UserError
from hla_dist.processes.mesh import MeshPlace, build_mesh, factorise
from hla_dist.training.loop import Trainer
from hla_dist.training.optim import build_adamw
from tests.harness import RankPool, assert_close, run_ranks, shifted
from tests.tolerances import FLOAT64
from tests.training.corpora import small_config, write_text
from tests.training.test_steps import mesh_of, model_bytes, run_config

T, SAMPLES, VOCABULARY, SEED = 45, 8, 30, 0
LENGTHS = [1, 1, 2, 7, 130, 3, 19, 1, 64, 11, 5, 90, 2, 33, 8, 15, 45, 45, 3, 60, 1, 27, 12, 9]
DOCUMENTS = np.cumsum([0, *LENGTHS[:-1]])
TOKENS = np.random.default_rng(shifted(0)).integers(0, VOCABULARY, sum(LENGTHS)).astype(np.uint8)


class Counted:
    """Tokens that note where they are read."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.starts.append(part.start)
        return TOKENS[part]


def model() -> LanguageModel:
    torch.manual_seed(shifted(5))
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=2)
    return LanguageModel(ModelConfig(**sizes, attention={"conv": 4})).double()


def packed_step(mesh: MeshPlace) -> tuple[float, list[torch.Tensor], list[int], float]:
    """Loss and gradients of one step over SAMPLES samples, where this rank has read, and an evaluation."""
    lengths = default_lengths(T, mesh.shards)
    wrapped = SequenceParallelHLA(model(), mesh.sequence, gradient_group=mesh.world, shard_lengths=lengths)
    tokens: Any = Counted()
    windows = Windows(tokens, T, VOCABULARY, SEED, DOCUMENTS)
    accumulate = SAMPLES // mesh.replicas
    trainer = Trainer(
        wrapped, build_adamw(wrapped, 1e-2, 0.1), windows, mesh, batch_size=1, accumulate=accumulate, clip=0.0,
        bf16=False,
    )  # fmt: skip
    agreed = trainer.compute_gradients()
    held_out = trainer.evaluate(TOKENS, [0, T, 5 * T], DOCUMENTS)
    return agreed.loss, [p.grad.clone() for p in wrapped.parameters()], tokens.starts, held_out


def on_ranks(pg: dist.ProcessGroup) -> Any:
    return packed_step(mesh_of(pg))


def on_a_mesh() -> Any:
    return packed_step(build_mesh(factorise(4, sp=2), torch.device("cpu")))


def pieces_at(starts: list[int]) -> list[torch.Tensor]:
    """The parts of documents inside the windows at ``starts``, found token by token."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    found = []
    for start in starts:
        window = range(start, start + T + 1)
        for n in sorted({owner[t] for t in window}):
            found.append(torch.tensor([int(TOKENS[t]) for t in window if owner[t] == n]))
    return found


def one_by_one(reference: LanguageModel, starts: list[int]) -> torch.Tensor:
    """Mean loss over the labels of all documents, each read alone."""
    pieces = [piece for piece in pieces_at(starts) if len(piece) > 1]
    losses = [F.cross_entropy(reference(p[None, :-1])[0], p[1:], reduction="sum") for p in pieces]
    return torch.stack(losses).sum() / sum(len(p) - 1 for p in pieces)


@pytest.fixture(scope="module")
def starts() -> list[int]:
    windows = Windows(TOKENS, T, VOCABULARY, SEED)
    return [windows.start(n) for n in range(SAMPLES)]


@pytest.fixture(scope="module")
def want(starts: list[int]) -> tuple[float, list[torch.Tensor], float]:
    # the windows meet every case: documents of one token, one that fills a window, a label that begins a document
    lengths = [len(piece) for piece in pieces_at(starts)]
    assert min(lengths) == 1 and max(lengths) == T + 1
    assert set(DOCUMENTS) & {start + T for start in starts}
    counted = [Windows(TOKENS, T, VOCABULARY, SEED, DOCUMENTS).labels(n, 1) for n in range(SAMPLES)]
    assert sum(counted[::2]) != sum(counted[1::2]) and sum(counted) != 2 * sum(counted[: SAMPLES // 2])
    reference = model()
    loss = one_by_one(reference, starts)
    loss.backward()
    with torch.no_grad():
        held_out = float(one_by_one(reference, [0, T, 5 * T]))
    return float(loss.detach()), [p.grad for p in reference.parameters()], held_out


def check_step(got: Any, want: Any) -> None:
    assert got[0] == pytest.approx(want[0], rel=FLOAT64)
    assert got[3] == pytest.approx(want[2], rel=FLOAT64)
    for number, (one, other) in enumerate(zip(got[1], want[1], strict=True)):
        assert_close(f"gradient {number}", one, other, FLOAT64)


@pytest.mark.parametrize("ranks", [1, 4])
def test_packed_training_equals_documents_read_one_by_one(pool: RankPool, want: Any, starts: list, ranks: int) -> None:
    for got in pool.run_group(ranks, on_ranks):
        check_step(got, want)
        assert got[2] == starts  # each rank of a sequence group the same samples, and each once


def test_each_sequence_group_reads_its_own_samples_and_each_once(want: Any, starts: list) -> None:
    steps = run_ranks(on_a_mesh, 4)
    for got in steps:
        check_step(got, want)
    read = [got[2] for got in steps]
    assert read[0] == read[1] and read[2] == read[3]
    assert len(set(starts)) == SAMPLES and sorted(read[0] + read[2]) == sorted(starts)


def test_without_packing_the_loss_is_another(starts: list, want: Any) -> None:
    """The comparison above can fail."""
    windows = Windows(TOKENS, T, VOCABULARY, SEED)
    batch = windows.batch(0, SAMPLES)
    with torch.no_grad():
        loss = F.cross_entropy(model()(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    assert abs(float(loss) - want[0]) > 1e-4
    assert windows.cuts(0) is None and windows.labels(0, SAMPLES) == SAMPLES * T


def test_cuts_and_parts() -> None:
    documents = np.array([0, 4, 5, 9])
    assert cuts_between(documents, 0, 4).tolist() == [4]  # the last label is a document's first token
    assert cuts_between(documents, 4, 5).tolist() == [1, 5]
    assert cuts_between(documents, 5, 3).tolist() == []
    assert part_of(documents, 0, 5).tolist() == [0, 4]
    assert part_of(documents, 5, 12).tolist() == [0, 4]
    assert part_of(documents, 7, 9).tolist() == [0]
    assert Windows(np.arange(12), 4, 12, 0, documents).labels(0, 1) in (2, 3)


def test_a_packed_run_goes_on_where_it_was(pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        write_text(folder / f"{number}.txt", 40 + 37 * number, seed=number)
    changes = dict(packing="documents", sample=0, seed=3)
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert pool.run_group(2, run_config, small_config(folder, out=str(whole), **changes)) == [0, 0]  # parity included
    assert pool.run_group(2, run_config, small_config(folder, out=str(again), **changes), 4) == [128, 128]
    assert pool.run_group(2, run_config, small_config(folder, out=str(again), resume="", **changes)) == [0, 0]
    assert model_bytes(again) == model_bytes(whole)


def test_packing_needs_documents_and_one_sequence_a_batch(pool: RankPool, tmp_path: Path) -> None:
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    config = small_config(tmp_path / "tokens.bin", packing="documents", vocab_size=500, token_dtype="uint16")
    said = pool.run_group(2, run_config, config)
    assert said[0] == said[1] and said[0].startswith("--packing documents: expected text, or a memmap with the JSON")
    with pytest.raises(UserError, match="--batch-size: expected 1 with --packing documents .*, got 2"):
        small_config(tmp_path, packing="documents", batch_size=2)
    assert (
        load_corpus([str(tmp_path / "tokens.bin")], seq_len=8, vocab_size=500, token_dtype="uint16").texts[0].documents
        is None
    )
