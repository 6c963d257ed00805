"""States go back: after any number of the tokens read, in one call or several, they are what reading those gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hla_dist
from hla_dist import HLAAttention, MemoryAttention, Pending, SoftmaxAttention
from hla_dist.models import LanguageModel, ModelConfig
from tests.harness import assert_close, raises_value_error, shifted
from tests.problems import RIDGED, STREAMING, Problem, draw, mask_options
from tests.tolerances import FLOAT64

LAYERS: dict[str, dict[str, Any]] = {
    "linear_attention": dict(op="linear_attention", decay="channel"),
    "hla2": dict(num_kv_heads=2, decay_heads=2, ridge=0.3),
    "prefix": dict(mask="prefix", decay="head"),
    "paper": dict(decay_form="paper", normalize=True),
    "ahla": dict(op="ahla", decay=None, conv=4),
    "hla3": dict(op="hla3", conv=4, rope_theta=1e4),
    "key term": dict(key_term=True, conv=3),
    "levels": dict(levels=3, conv=3, num_kv_heads=2),
    "softmax": dict(rope_theta=None),
    "window": dict(window=4, num_kv_heads=2),
    "memory": dict(window=4, num_kv_heads=2),
    "memory, joined per token": dict(window=4, memory="all", join="token", gate_bias=0.0),
    "memory, hla2": dict(op="hla2", window=3, decay="head"),
    "memory, hla3": dict(op="hla3", window=2),
}
CALLS = [3, 1, 1, 2]  # tokens of the calls that may be taken back


def close(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert_close(name, a, b, FLOAT64)


def layer_of(kind: str) -> HLAAttention | SoftmaxAttention:
    torch.manual_seed(shifted(0))
    kinds = {"softmax": SoftmaxAttention, "window": SoftmaxAttention, "memory": MemoryAttention}
    made: Any = kinds.get(kind.split(",")[0], HLAAttention)
    layer = made(16, 4, **LAYERS[kind]).double()
    if getattr(layer, "skip", None) is not None:
        layer.skip.data.fill_(0.7)
    return layer


@pytest.mark.parametrize(("gates", "normalize"), [("BTH", False), ("H", True)])
@pytest.mark.parametrize(("name", "mask"), STREAMING)
def test_an_operators_state_after_any_number_of_tokens(name: str, mask: str, gates: str, normalize: bool) -> None:
    ridge = 0.4 if name in RIDGED else 0.0
    problem = Problem(name, mask, B=3, T=6, H=4, G=2, gates=gates, normalize=normalize, scale=0.5, ridge=ridge)
    tensors = draw(problem)
    q, k, v, log_decay = tensors.q, tensors.k, tensors.v, tensors.log_decay
    options = dict(scale=0.5, ridge=ridge, normalize=normalize, **mask_options(mask))

    def state_of(before: Any, rows: slice, n: int) -> Any:
        decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[rows, :n]
        entering = before if before is None else [x[rows] for x in before]
        operands = (x[rows, :n] for x in (q, k, v))
        marks = dict(log_decay=decay, initial_state=entering, output_final_state=True)
        return getattr(hla_dist, name)(*operands, **marks, **options)[1]

    everything = slice(None)
    for before in (None, state_of(None, everything, 6)):
        pending = Pending(name, before, q, k, v, log_decay=log_decay, **options)
        for n in (0, 2, 6):
            close(pending.after(n), state_of(before, everything, n))
        rows = pending.after(torch.tensor([2, 0, 5]))
        for row, n in enumerate((2, 0, 5)):
            one = slice(row, row + 1)
            close(type(rows)(*(x[one] for x in rows)), state_of(before, one, n))
    close(pending.after(torch.tensor([4, 4, 4])), pending.after(4))


@pytest.mark.parametrize(("prompt", "padded"), [(0, False), (4, True)])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layer_goes_back_over_several_calls(kind: str, prompt: int, padded: bool) -> None:
    """Rows accept different numbers; what follows is what it is without the tokens that were taken back."""
    layer = layer_of(kind)
    x = torch.randn(3, 14, 16, dtype=torch.float64)
    filled = torch.rand(3, 14) < 0.8
    start = prompt + sum(CALLS)
    read, more, both = slice(prompt, start), slice(start, 14), slice(prompt, 14)

    def call(piece: slice, state: Any, keep: Any = None, **options: Any) -> Any:
        """The layer over a piece; keep [3, 14] says which of the places are tokens."""
        present = keep if not padded else filled if keep is None else filled & keep
        marks = {} if present is None else {"attention_mask": present[:, piece]}
        places = torch.arange(14).expand(3, -1)[:, piece]
        return layer(x[:, piece], state, positions=places, output_final_state=True, **marks, **options)

    before = call(slice(0, prompt), None)[1] if prompt else None
    state, at = before, prompt
    for length in CALLS:
        y, state = call(slice(at, at + length), state, pending=True)
        at += length
    assert isinstance(state, Pending) and state.tokens == sum(CALLS)
    want = call(read, before)
    close(state.state, want[1])
    assert_close("y", y, want[0][:, -CALLS[-1] :], FLOAT64)
    for n in range(sum(CALLS) + 1):
        close(state.after(n), call(slice(prompt, prompt + n), before)[1])
    counts, place = torch.tensor([5, 0, 2]), torch.arange(14)
    keep = (place < prompt + counts[:, None]) | (place >= start)
    rows = state.after(counts)
    close(rows, call(read, before, keep)[1])
    assert_close("y", call(more, rows)[0], call(both, before, keep)[0][:, start - prompt :], FLOAT64)
    # a pending state goes on as the state after its last token; a copy of it and other rows are pending, too
    assert_close("y", call(more, state)[0], call(both, before)[0][:, start - prompt :], FLOAT64)
    close(copy.deepcopy(state).after(3), state.after(3))
    order = [2, 0, 1, 2]
    close(state.map(lambda one: one[order]).after(3), type(rows)(*(one[order] for one in state.after(3))))


def test_what_cannot_go_back_is_refused_by_name() -> None:
    q = torch.randn(2, 3, 1, 4)
    with raises_value_error("operands: expected q, k and v, got 2 tensors"):
        Pending("hla2", None, q, q)
    pending = Pending("hla2", None, q, q, q)
    for wrong in (-1, 4, torch.tensor([0, 4]), torch.tensor([-1, 0])):
        with raises_value_error("tokens: expected 0 to 3, the tokens that may be taken back, got"):
            pending.after(wrong)
    for wrong in (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0])):
        with raises_value_error("tokens: expected integers [2], got"):
            pending.after(wrong)
    with raises_value_error("op: expected one of", "got 'gla'"):
        Pending("gla", None, q, q, q)
    with raises_value_error("group: expected one of the options log_decay", "got an unknown one"):
        Pending("hla2", None, q, q, q, group=None)
    for layer in (HLAAttention(8, 2), SoftmaxAttention(8, 2)):
        with raises_value_error("pending: expected rows of one text each, got cu_seqlens"):
            layer(torch.randn(1, 4, 8), cu_seqlens=torch.tensor([0, 2, 4]), pending=True)


@pytest.mark.parametrize(("pattern", "whole"), [pytest.param("hla2", True, marks=pytest.mark.slow), ("memory", False)])
def test_a_compiled_model_goes_back_alike(pattern: str, whole: bool) -> None:
    """Without graph breaks, but for layers with a window, which torch.compile leaves out."""
    torch.manual_seed(shifted(0))
    config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, pattern=pattern)
    model, text = LanguageModel(config).double(), torch.randint(11, (2, 6))
    torch._dynamo.reset()
    after = []
    with torch.no_grad():
        for call in (model, torch.compile(model, backend="eager", fullgraph=whole)):
            state, logits = None, []
            for part in text.split(3, 1):
                y, state = call(part, state, return_state="pending")
                logits.append(y)
            after.append((torch.cat(logits, 1), state[0].after(torch.tensor([4, 1]))))
    (want, wanted), (got, state) = after
    assert_close("logits", got, want, FLOAT64)
    close(state, wanted)
