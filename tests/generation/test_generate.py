"""Long prompts and what follows them: pieces, ranks, batches, kept states; launch/generate.py as a user starts it."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hla_dist import SequenceParallelHLA
from hla_dist.checkpoints.export import Trained, export
from hla_dist.data.text import Codec, TextStream
from hla_dist.generation.generate import GREEDY, USUAL, Reading, Sampling, follow, generate, pick, read
from hla_dist.generation.prompt_state import fingerprint, load_state, save_state
from hla_dist.generation.speculate import speculate
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import UserError
from tests.harness import RankPool, assert_bitwise, assert_close, group, raises_value_error, shifted
from tests.tolerances import FLOAT64

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 150
TEXT = [int(x) for x in torch.randint(50, (61,), generator=torch.Generator().manual_seed(shifted(3)))]


def small(seed: int = 0, **changes: Any) -> LanguageModel:
    torch.manual_seed(shifted(seed))
    config = ModelConfig(**{"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes})
    return LanguageModel(config).double()


def same(got: Reading, want: Reading) -> None:
    assert (got.position, got.last) == (want.position, want.last)
    for index, (mine, other) in enumerate(zip(got.state, want.state, strict=True)):
        assert type(mine) is type(other)
        for name, a, b in zip(mine._fields, mine, other, strict=True):
            assert_close(f"layer {index} {name}", a, b, FLOAT64)


def read_over_ranks(ranks: int, mixers: dict[str, Any], split: int) -> Reading | None:
    if (pg := group(ranks)) is None:
        return None
    model = SequenceParallelHLA(small(**mixers), pg, reduce_gradients=False)
    before = read(model, TEXT[:split], piece=5)
    return read(model, TEXT[split:], before, piece=7)


def memory_of(**options: Any) -> dict[str, Any]:
    return dict(pattern="memory", memory={"window": 4, **options})


@pytest.mark.parametrize(
    "mixers", [{}, dict(attention={"rope_theta": 100.0, "conv": 4}), memory_of(op="hla2", decay="head")], ids=str
)
def test_ranks_and_pieces_read_what_one_pass_reads(pool: RankPool, mixers: dict[str, Any]) -> None:
    model = small(**mixers)
    want = read(model, TEXT)
    same(read(model, TEXT[20:], read(model, TEXT[:20], piece=6), piece=13), want)
    for ranks, split in ((3, 40), (8, 1)):  # with one token nothing is read yet, and shards are empty
        readings = [c for c in pool.run(read_over_ranks, ranks, mixers, split) if c is not None]
        assert len(readings) == ranks
        for reading in readings:  # every rank's
            same(reading, want)
    new = [row[0] for row in follow(model, [readings[0]], 8, GREEDY)]
    text = list(TEXT)
    with torch.no_grad():
        for _ in range(8):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert new == text[len(TEXT) :]


def test_texts_of_a_batch_do_not_see_each_other() -> None:
    model = small(attention={"rope_theta": 100.0})
    prompts = [TEXT, TEXT[:1], TEXT[7:20]]
    sampling = Sampling(1.0, 0, 0.9)
    rows = list(follow(model, [read(model, prompt) for prompt in prompts], 12, sampling, seed=5))
    for index, prompt in enumerate(prompts):
        alone = generate(model, prompt, 12, sampling, seed=5 + index)
        assert [row[index] for row in rows] == alone


def test_reading_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="prompt: expected at least one token, got none"):
        read(small(), [])
    with pytest.raises(ValueError, match="prompt: expected tokens of the model's vocabulary of 50, got 3 to 50"):
        read(small(), [3, 50])
    with pytest.raises(ValueError, match="piece: expected at least 1 token, got 0"):
        read(small(), [3], piece=0)


def test_top_p_draws_the_fewest_that_reach_it() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    generator = torch.Generator().manual_seed(shifted(0))
    for top_p, want in ((0.4, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert {pick(logits, Sampling(1.0, 0, top_p), generator) for _ in range(200)} == want
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            Sampling(**wrong)


KEPT: dict[str, dict[str, Any]] = {
    "hla2": dict(op="hla2"),
    "ahla": dict(op="ahla", attention={"conv": 3}),
    "hla3": dict(op="hla3"),
    "linear_attention": dict(op="linear_attention"),
    "memory": memory_of(),
    "memory, hla2": memory_of(op="hla2", decay="head"),
    "memory, ahla": memory_of(op="ahla", memory="all"),
    "memory, hla3": memory_of(op="hla3", window=None),
    "memory, joined per token": memory_of(memory="all", join="token", gate_bias=0.0),
    "softmax": dict(pattern="softmax", softmax={"window": 4}),
    "softmax without a window": dict(pattern="softmax"),
}


@pytest.mark.parametrize("mixers", KEPT)
def test_a_kept_state_goes_on_bit_for_bit(tmp_path: Path, mixers: str) -> None:
    model = small(**KEPT[mixers])
    reading = read(model, TEXT)
    save_state(reading, model, tmp_path / "deep" / "text.safetensors")
    loaded = load_state(tmp_path / "deep" / "text.safetensors", model)
    assert (loaded.position, loaded.last) == (len(TEXT) - 1, TEXT[-1])
    for mine, other in zip(loaded.state, reading.state, strict=True):
        assert type(mine) is type(other)
        for name, a, b in zip(mine._fields, mine, other, strict=True):
            assert_bitwise(name, a, b)
    assert list(follow(model, [loaded], 8, USUAL)) == list(follow(model, [reading], 8, USUAL))


@torch.no_grad()
@pytest.mark.parametrize("mixers", KEPT)
def test_a_state_holds_the_bytes_of_its_numbers_alone(mixers: str) -> None:
    """A view on the prompt's keys, values or projections would hold all of them."""
    model = small(**KEPT[mixers])
    _, prefill = model(torch.tensor([TEXT, TEXT[::-1]]), return_state=True)
    _, step = model(torch.tensor([[1], [2]]), prefill, return_state=True)
    for layer in (*prefill, *step):
        storages = [x.untyped_storage() for x in layer]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert sum(held.values()) == sum(x.nbytes for x in layer), type(layer).__name__


def test_a_state_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "text.safetensors"
    save_state(read(model, TEXT), model, file)
    others = [small(1), small(norm_eps=1e-5), small()]
    with torch.no_grad():
        others[2].norm.weight[3] += 1e-12
    assert fingerprint(small()) == fingerprint(model)
    bare, cut = tmp_path / "bare.safetensors", tmp_path / "cut.safetensors"
    save_file(load_file(file), bare)
    cut.write_bytes(file.read_bytes()[:-8])
    for path, to, message in (
        *((file, other, r"expected a state of this model \(\w{12}\), got .*, which is of another") for other in others),
        (bare, model, "expected a file that --save-state wrote, got .*bare.safetensors without"),
        (cut, model, "cannot read .*cut.safetensors"),
        (tmp_path / "none", model, "cannot read .*none"),
    ):
        with pytest.raises(UserError, match=f"^--state: {message}") as caught:
            load_state(path, to)
        assert "\n" not in str(caught.value)


def test_characters_come_whole() -> None:
    stream = TextStream(Codec())
    given = [stream.add(token) for token in "aé☃".encode()] + [stream.add(0xE2), stream.end()]
    assert given == ["a", "", "é", "", "", "☃", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of bytes, untrained."""
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    export(Trained(small(vocab_size=256).float(), None, True, 0, []), file)
    return str(file)


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("generate_program", ROOT / "launch" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(program: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    return program.main()


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}


@pytest.mark.slow
def test_ranks_read_a_file_and_one_goes_on(
    tmp_path: Path, checkpoint: str, program: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    book, kept = tmp_path / "book.txt", tmp_path / "book.safetensors"
    book.write_text("All happy families are alike. " * 40)
    model = ["--checkpoint", checkpoint, "--greedy", "--tokens", "12", "--threads", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    reading = ["--prompt-file", str(book), "--piece", "100"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "launch" / "generate.py"), *model, *reading, "--save-state", str(kept), "--stats"],
        env=environment(), capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert "prompt: 1,200 tokens after 0 in " in done.stderr.decode() and "2 rank(s)" in done.stderr.decode()
    capfd.readouterr()
    for arguments in (reading, ["--state", str(kept)]):
        assert call(program, monkeypatch, *model, *arguments) == 0
        assert capfd.readouterr().out.encode() == done.stdout
    outputs = []
    for arguments in (["--state", str(kept)], reading):
        assert call(program, monkeypatch, *model, *arguments, "--prompt", "One", "Another") == 0
        outputs.append(capfd.readouterr().out)
    assert (
        outputs[0] == outputs[1] and outputs[0].startswith("--- 1 of 2\nOne") and "\n--- 2 of 2\nAnother" in outputs[0]
    )


def test_mistakes_are_one_line(
    tmp_path: Path, checkpoint: str, program: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--checkpoint", str(tmp_path / "none")], "checkpoint: expected a directory with manifest.json"),
        (["--checkpoint", checkpoint, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ([], "the following arguments are required: --checkpoint"),
        (["--checkpoint", checkpoint, "--top-p", "2"], "--top-p: expected a number above 0 and at most 1, got 2.0"),
        (["--checkpoint", checkpoint, "--tokens", "-1"], "--tokens: expected at least 0, got -1"),
        (["--checkpoint", checkpoint, "--prompt", ""], "prompt: expected at least one token, got none"),
        (["--checkpoint", checkpoint, "--prompt-file", "/none"], "/none: No such file or directory"),
        (["--checkpoint", checkpoint, "--device", "cpux"], "--device: expected cpu, cuda, cuda:1, ..., got cpux"),
        (["--checkpoint", checkpoint, "--save-state", "x", "--prompt", "a", "b"], "--save-state: expected one prompt"),
        (["--checkpoint", checkpoint, "--save-state", "/proc/x/y"], "--save-state: cannot write /proc/x/y"),
        (["--checkpoint", checkpoint, "--state", checkpoint], "--state: expected a file that --save-state wrote"),
    ):
        assert call(program, monkeypatch, *arguments) == 1
        said = capfd.readouterr()
        assert not said.out and len(said.err.splitlines()) == 1
        assert said.err.startswith(f"generate.py: error: {message}")


def test_tokens_come_while_others_are_still_to_come(checkpoint: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / "generate.py"), "--checkpoint", checkpoint]
    endless = [*command, "--tokens", str(10**9), "--prompt", "Wait", "--threads", "1"]
    # a shell starts what runs in its background, the tests perhaps, with this signal ignored
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(endless, env=environment(), preexec_fn=heeded, **pipes)
    assert process.stdout is not None
    try:
        assert process.stdout.read(40).startswith(b"Wait")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130 and b"Traceback" not in stderr


MIXERS: dict[str, dict[str, Any]] = {
    "convolution": dict(op="hla3", attention={"conv": 4}),
    "hybrid": dict(
        pattern="ahla,softmax,memory",
        num_layers=3,
        attention={"rope_theta": 100.0},
        softmax={"window": 9},
        memory={"window": 4},
    ),
}


@pytest.mark.parametrize("mixers", ["convolution", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_speculation_writes_what_greedy_does(mixers: str) -> None:
    """By a draft that is sometimes right, where texts keep different numbers of tokens, and by one that always is."""
    model = small(**MIXERS[mixers])
    model.embedding.weight.data.mul_(20)  # as initialised it continues nearly anything with the same token
    draft = copy.deepcopy(model)
    for parameter in draft.blocks.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    texts = [TEXT[:20], TEXT[20:23], TEXT[23:]]
    readings = [read(model, text) for text in texts]
    want = [list(row) for row in zip(*follow(model, readings, 12, GREEDY), strict=True)]
    for guesser in (draft, model):
        rounds = list(speculate(model, guesser, readings, [read(guesser, text) for text in texts], 12, block=3))
        for row, tokens in enumerate(want):
            assert [token for new in rounds for token in new[row]][:12] == tokens
        if guesser is model:
            assert len(rounds) == 3
        else:
            assert any(len(set(map(len, new))) > 1 for new in rounds)


def test_a_draft_that_does_not_fit_is_refused() -> None:
    model, other = small(), small(vocab_size=40)
    with raises_value_error("draft: expected a model of the same vocabulary of 50, got 40"):
        next(speculate(model, other, [], [], 1))
    with raises_value_error("block: expected at least 1 token, got 0"):
        next(speculate(model, model, [], [], 1, block=0))
