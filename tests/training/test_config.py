"""The command line: complete help, typed values, one-line errors."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hla_dist.processes.failure import UserError
from hla_dist.training.config import RUN_FILES, TrainConfig, flag, parse
from hla_dist.training.estimate import Step, step_flops


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for item in fields(TrainConfig):
        assert f"  {flag(item.name)}" in text
        assert item.metadata["help"].split()[0] in text
    assert f"directory of the run: {', '.join(RUN_FILES)}; none" in " ".join(text.split())


def test_values_are_typed() -> None:
    config = parse(
        ["--data", "a", "b", "--seq-len", "64", "--lr", "1e-3", "--bf16", "--no-parity", "--max-minutes", "2"]
    )
    assert (config.data, config.seq_len, config.lr, config.bf16, config.parity) == (["a", "b"], 64, 1e-3, True, False)
    assert parse(["--steps", "9"]).max_minutes == 0.0  # the demonstration's limit is for the demonstration
    assert parse([]).max_minutes > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--seq", "4"], "unrecognized arguments: --seq"),
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
        TrainConfig(hidden_size=30, heads=4).model_config(256)


def test_untied_embeddings_are_an_option_and_cost_no_arithmetic() -> None:
    tied, untied = (TrainConfig(tie_embeddings=tie).model_config(256) for tie in (True, False))
    assert tied.tie_word_embeddings and not untied.tie_word_embeddings
    assert step_flops(Step(tied, 64)) == step_flops(Step(untied, 64))
