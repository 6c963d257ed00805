"""Bytes as tokens, for models trained without a tokenizer: token n is the byte n."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 tokens, which ``save_pretrained`` can store beside a model.

    It has no special tokens. For padded batches set ``pad_token_id = 0`` on the tokenizer in use, not
    on one that is saved: a loaded special token is also looked for in the text, by its printable
    stand-in.
    """
    # GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow from 256 on
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    assert set(vocabulary) == set(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return for_models(tokenizer)


def for_models(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return it with names of a model's inputs, and with padding in front for generation."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )
