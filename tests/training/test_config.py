"""The command line: complete help, typed values, one-line errors."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from hla_dist.models import ModelConfig
from hla_dist.processes.failure import UserError
from hla_dist.processes.options import flag
from hla_dist.training.config import RUN_FILES, ModelShape, TrainConfig, parse
from hla_dist.training.estimate import Step, step_flops


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out.replace("│", " ")
    for group, options in asdict(TrainConfig()).items():
        assert f" {group} options " in text
        for name in options:  # the flag, perhaps others and a value, and then words that explain it
            assert re.search(rf" {flag(name)}\b[^\n]*?(\s{{2,}}|\n\s+)\w+", text), name
    assert f"directory of the run: {', '.join(RUN_FILES)}; none" in " ".join(text.split())


def test_values_are_typed() -> None:
    config = parse(
        ["--data", "a", "b", "--seq-len", "64", "--lr", "1e-3", "--bf16", "--no-parity", "--max-minutes", "2"]
    )
    assert (config.data.data, config.data.seq_len, config.optimisation.lr) == (["a", "b"], 64, 1e-3)
    assert (config.optimisation.bf16, config.output.parity) == (True, False)
    assert parse(["--steps", "9"]).optimisation.max_minutes == 0.0  # the demonstration's limit is for the demonstration
    assert parse([]).optimisation.max_minutes > 0


def test_values_may_look_like_other_things() -> None:
    config = parse(["--out", "None", "--prompt=--a_b", "--resume", "--checkpoint-activations", "--steps", "9"])
    assert (config.output.out, config.output.prompt, config.output.resume) == ("None", "--a_b", "")
    assert config.optimisation.checkpoint_activations == "layer"


def test_options_are_flat_in_json_and_read_again() -> None:
    config = parse(["--seq-len", "64", "--steps", "9"])
    flat = config.to_dict()
    assert (flat["seq_len"], flat["steps"], flat["data"]) == (64, 9, [])
    del flat["max_skips"]  # an older run's file, which does not know every option
    assert TrainConfig.from_dict(flat) == config
    del flat["conv"], flat["key_term"]  # an older one still: its layers had neither
    older = TrainConfig.from_dict(flat)
    assert (older.model.conv, older.model.key_term) == (0, False)
    assert older.model_config(256).differences(ModelConfig.named("tiny", attention={
        "decay_range": (0.5, 512.0), "feature_map": "relu"})) == []  # fmt: skip
    with pytest.raises(UserError, match="expected those of launch/train.py, got also colour"):
        TrainConfig.from_dict(flat | {"colour": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--seq", "4"], "unrecognized arguments: --seq"),
        (["--seq_len", "4"], "unrecognized arguments: --seq_len"),
        (["--data"], "--data: expected at least one argument"),
        (["--steps"], "--steps: expected one argument"),
        (["--seq-len", "x"], "--seq-len: invalid int value: 'x'"),
        (["--seq-len", "0"], "--seq-len: expected at least 1, got 0"),
        (["--lr", "nan"], "--lr: expected at least 0, got nan"),
        (["--size", "huge"], "--size: invalid choice: 'huge'"),
        (["--held-out", "1"], "--held-out: expected a share between 0 and 1, got 1.0"),
        (["--exchange", "gossip"], "--exchange: invalid choice: 'gossip'"),
        (["--bf16-wire"], "--bf16-wire: expected --no-parity beside it"),
        (["--resume"], "--resume: expected a directory, or --out"),
        (["--save-every", "5"], "--save-every: expected --out to save checkpoints in, got 5 and no --out"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_cannot_be_built_is_a_user_error() -> None:
    with pytest.raises(UserError, match="expected hidden_size divisible by num_heads"):
        TrainConfig(model=ModelShape(hidden_size=30, heads=4)).model_config(256)


def test_an_option_of_the_model_counts_where_it_is_typed() -> None:
    """At its default too: it must not be passed over where a file describes another model."""
    for words in ([], ["--prompt=--op"], ["--vocab-size", "9"], ["--no-parity"], ["--init-from", "op"]):
        assert not parse(words).describes_model
    for words in (["--op", "hla2"], ["--op=hla2"], ["--tie-embeddings"], ["--no-tie-embeddings"], ["--heads", "0"]):
        assert parse(words).describes_model
    assert TrainConfig(model=ModelShape(heads=2)).describes_model and not TrainConfig().describes_model


def test_untied_embeddings_are_an_option_and_cost_no_arithmetic() -> None:
    tied, untied = (parse([f"--{no}tie-embeddings"]).model_config(256) for no in ("", "no-"))
    assert tied.tie_word_embeddings and not untied.tie_word_embeddings
    assert step_flops(Step(tied, 64)) == step_flops(Step(untied, 64))


def test_gates_are_an_option_and_the_usual_ones_are_not_named() -> None:
    named = ModelConfig.named("tiny", vocab_size=256)
    for kind, more in {"token": {}, "head": {"decay": "head"}, "none": {"decay": None}}.items():
        assert parse(["--decay", kind]).model_config(256).attention == named.attention | more


def test_how_gates_and_a_key_term_start_are_options() -> None:
    words = "--key-term-start 1 0 --decay-range 64 4096 --decay-temperature 16"
    given = parse(words.split()).model_config(256).attention
    assert given["key_term"] == [1.0, 0.0] and given["decay_range"] == [64.0, 4096.0]
    assert given["decay_temperature"] == 16.0 and "decay_temperature" not in parse([]).model_config(256).attention
    for words, message in (
        ("--key-term-start 1 0 --key-term False", "--key-term-start: expected --key-term beside it, or no word on it"),
        (
            "--decay-temperature 16 --decay none",
            "--decay-temperature: expected a --decay, whose gates it softens, got none",
        ),
        (
            "--decay-range 64 4096 --decay none",
            "--decay-range: expected a --decay, whose gates start from them, got none",
        ),
    ):
        with pytest.raises(UserError, match=message):
            parse(words.split()).model_config(256)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--pattern softmax --conv 3", r"--conv: expected a layer that takes it \(hla2, .*\), got softmax"),
        ("--pattern softmax --decay head", "--decay: expected a layer that takes it .* got softmax"),
        (
            "--pattern memory,softmax --decay-range 2 64",
            "--decay-range: expected a layer that takes it .* got memory, softmax",
        ),
        ("--window 64", r"--window: expected a layer that takes it \(softmax, memory\), got hla2"),
        ("--op ahla --pattern hla2,softmax", r"--op: expected a layer of --pattern \(hla2, softmax\), got ahla"),
        ("--balance 0.5", "--balance: expected --experts, which it keeps equally busy, got none"),
    ],
)
def test_an_option_that_no_layer_takes_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(words.split()).model_config(256)


def test_an_option_that_some_layer_takes_is_not_refused() -> None:
    for words in ("--pattern softmax --conv 0", "--pattern softmax --decay none", "--op ahla --pattern ahla,softmax",
                  "--pattern hla2,softmax --window 64 --conv 3", "--experts 4 --balance 0.5"):  # fmt: skip
        parse(words.split()).model_config(256)
