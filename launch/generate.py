"""Continues a text with a trained model, its state of constant size; see --help.

    python launch/generate.py --checkpoint out/train --prompt "def main"
    torchrun --standalone --nproc_per_node 8 launch/generate.py --checkpoint out/train --prompt-file BOOK \
        --save-state book.safetensors                                          a long prompt, read by all ranks together
    python launch/generate.py --checkpoint out/train --state book.safetensors --prompt "Who" "Where"
    python launch/generate.py --checkpoint SmolLM2-135M-Instruct --chat --prompt "What is a monad?"

Tokens are printed as they come. Several ranks read the prompt; then rank 0 goes on alone, with the state of the whole
text. Exit codes: 0; 1 an error, said in one line; 130 stopped by Ctrl-C.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

import torch
import torch.distributed as dist

from hla_dist import SequenceParallelHLA
from hla_dist.checkpoints.export import load_trained
from hla_dist.data.text import Codec, TextStream
from hla_dist.generation.config import GenerateConfig, NewText
from hla_dist.generation.generate import Reading, follow, read
from hla_dist.generation.prompt_state import load_state, save_state
from hla_dist.processes.failure import UserError, together
from hla_dist.processes.program import Program


def main() -> int:
    return Program("generate.py", "Continue a text with a trained model.").run(generate)


def generate(program: Program) -> int:
    """Read the prompts on all ranks, then write on rank 0."""
    config = program.options(GenerateConfig)
    rank, world_size, _, _ = program.ranks
    device = program.device(config.model.device)
    program.share_cores(config.model.threads)
    if world_size > 1:
        program.connect(device, config.model.timeout)
    group: Any = dist.group.WORLD if world_size > 1 else None
    began = time.perf_counter()
    model, codec = together(group, lambda: open_model(program, config.model.checkpoint, device))
    reader = model if group is None else SequenceParallelHLA(model, group, reduce_gradients=False)
    asked = config.prompt
    before = None if asked.state is None else together(group, lambda: load_state(Path(str(asked.state)), model))
    start, loaded = 0 if before is None else before.position, time.perf_counter()
    texts = asked.prompt or ([] if before is not None or asked.prompt_file is not None else ["\n"])
    total = 0
    if asked.prompt_file is not None:
        tokens = together(group, lambda: codec.encode(Path(str(asked.prompt_file)).read_text(errors="replace")))
        before = read(reader, tokens, before, asked.piece)
        total = len(tokens)
    encode = codec.encode_turn if asked.chat else codec.encode
    prompts = together(group, lambda: [encode(text) for text in texts])
    readings = [read(reader, prompt, before, asked.piece) for prompt in prompts]
    if not readings and before is not None:
        readings = [before]
    total += sum(map(len, prompts))
    if asked.save_state is not None:
        target = Path(asked.save_state)
        together(group, lambda: save_state(readings[0], model, target) if rank == 0 else None)
    if group is not None:
        assert isinstance(reader, SequenceParallelHLA)
        reader.unwrap()
        dist.barrier()
        dist.destroy_process_group()
    if rank != 0:
        return 0
    loading, reading = loaded - began, time.perf_counter() - loaded
    began = time.perf_counter()
    shown = [text + "\n" for text in texts] if asked.chat else texts
    new = write(config.new_text, model, codec, shown, readings)
    if config.new_text.stats:
        writing = time.perf_counter() - began
        size = sum(field.numel() * field.element_size() for layer in readings[0].state for field in layer)
        program.say(
            f"model read in {loading:.1f} s; prompt: {total:,} tokens after {start:,} in {reading:.2f} s "
            f"({total / reading:,.0f} per second, {world_size} rank(s)); new: {new:,} in {writing:.2f} s "
            f"({new / writing:,.0f} per second); state: {size / 1024:,.0f} KiB per text"
        )
    return 0


def open_model(program: Program, checkpoint: str, device: torch.device) -> tuple[Any, Codec]:
    path = Path(checkpoint)
    about = path / "config.json"  # a run's has no model_type
    if path.suffix == ".gguf" or (about.is_file() and b'"model_type"' in about.read_bytes()):
        try:
            from hla_dist.huggingface.speech import load_speaker
        except ImportError as exc:
            raise UserError(f"--checkpoint: {exc}") from exc
        model, codec = load_speaker(path)
        return model.to(device), codec
    trained = load_trained(path)
    for line in trained.warnings if program.ranks.rank == 0 else []:
        program.say(f"warning: {line}")
    return trained.model.to(device).eval(), Codec(trained.tokenizer, known=trained.known_text)


def write(config: NewText, model: Any, codec: Codec, texts: list[str], readings: list[Reading]) -> int:
    """One text as it comes; of several, each when all are done. Returns the number of tokens drawn."""
    rows = follow(model, readings, config.tokens, config.sampling, config.seed)
    streams = [TextStream(codec) for _ in readings]
    drawn = 0
    if len(readings) == 1:
        print("".join(texts), end="", flush=True)
        for (token,) in rows:
            drawn += 1
            if token in codec.ends:
                break
            print(streams[0].add(token), end="", flush=True)
        print(streams[0].end(), flush=True)
        return drawn
    written, going = list(texts), set(range(len(texts)))
    for tokens in rows:
        drawn += len(going)
        going -= {index for index in going if tokens[index] in codec.ends}
        for index in going:
            written[index] += streams[index].add(tokens[index])
        if not going:
            break
    for index, text in enumerate(written):
        print(f"--- {index + 1} of {len(written)}\n{text}{streams[index].end()}", flush=True)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
