"""Train GPT-2 small with llm.c, eager PyTorch and optcpu, on the same batch from the same weights.

    git clone https://github.com/karpathy/llm.c
    python examples/llm_c.py llm.c

llm.c is no package, so it is no variant of `optcpu compare`: this builds its CPU program with a C compiler,
hands it weights and tokens in its own file formats, and prints the loss of each step and the median time.
"""

import argparse
import copy
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import optcpu
from optcpu.data import code_corpus
from optcpu.models.gpt2 import GPT2, gpt2_small

BATCH, LENGTH, PADDED_VOCABULARY = 4, 64, 50304  # as llm.c's program has them
STEPS = 10


def write_weights(model: GPT2, path: Path) -> None:
    """Write what `gpt2_build_from_checkpoint` reads: a header, then each kind of weight of all layers."""
    config, state = model.config, model.state_dict()
    sizes = (config.context_length, config.vocab_size, config.layers, config.heads, config.width)
    header = np.zeros(256, np.int32)
    header[:8] = [20240326, 3, *sizes, PADDED_VOCABULARY]
    padding = torch.zeros(PADDED_VOCABULARY - config.vocab_size, config.width)
    per_layer = (
        "attention_norm",
        "attention.qkv",
        "attention.projection",
        "feed_forward_norm",
        "feed_forward.expansion",
        "feed_forward.projection",
    )
    with path.open("wb") as file:
        header.tofile(file)
        weights = [state["token_embedding.weight"], padding, state["position_embedding.weight"]]
        weights += [
            state[f"blocks.{layer}.{part}.{kind}"]
            for part in per_layer
            for kind in ("weight", "bias")
            for layer in range(config.layers)
        ]
        for weight in [*weights, state["norm.weight"], state["norm.bias"]]:
            weight.numpy().tofile(file)


def write_tokens(tokens: torch.Tensor, path: Path) -> None:
    """Write what llm.c's loader reads: a header, then the tokens in 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, np.int32)
    header[:3] = [20240520, 1, len(tokens)]
    with path.open("wb") as file:
        header.tofile(file)
        tokens.numpy().astype(np.uint16).tofile(file)


def llm_c_steps(source: Path, model: GPT2, tokens: torch.Tensor) -> Iterator[tuple[float, float]]:
    """Loss and milliseconds of each step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(model, folder / "gpt2_124M.bin")
        for part in ("train", "val"):
            data = folder / "dev/data/tinyshakespeare"
            write_tokens(tokens, data / f"tiny_shakespeare_{part}.bin")
        flags = ["-Ofast", "-march=native", "-fopenmp", "-DOMP", "-w", f"-I{source}"]
        program = [str(source / "train_gpt2.c"), "-lm", "-o", str(folder / "train_gpt2")]
        subprocess.run([os.environ.get("CC", "cc"), *flags, *program], check=True)
        with subprocess.Popen(
            [
                "stdbuf",
                "-oL",
                str(folder / "train_gpt2"),
            ],  # line by line, not when a buffer is full
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if step := re.match(r"step \d+: train loss (\S+) \(took (\S+) ms\)", line):
                    yield float(step[1]), float(step[2])
                if line.startswith(f"step {STEPS - 1}:"):
                    process.terminate()  # it would make 41 steps, and write text in between
                    return
            if process.wait():
                raise SystemExit(f"llm.c's program ended with code {process.returncode}")


def pytorch_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> Iterator[tuple[float, float]]:
    """Loss and milliseconds of each step."""
    inputs, targets = tokens[:-1].view(BATCH, LENGTH), tokens[1:]
    for _ in range(STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        yield loss.item(), (time.perf_counter() - started) * 1e3


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """llm.c's optimizer with its settings."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)


def show(name: str, steps: Iterator[tuple[float, float]]) -> None:
    """Run the steps and print their losses, and the median time of the second half."""
    losses, milliseconds = zip(*steps, strict=True)
    median = statistics.median(milliseconds[len(milliseconds) // 2 :])
    print(f"{name:8} {median:8.0f} ms a step; losses {' '.join(f'{one:.4f}' for one in losses)}")


def main(source: Path) -> None:
    torch.manual_seed(0)
    tokens = code_corpus().tokens[: BATCH * LENGTH + 1].long()
    model = gpt2_small(vocab_size=50257)
    show("llm.c", llm_c_steps(source, model, tokens))
    plain = copy.deepcopy(model)
    show("eager", pytorch_steps(plain, adamw(plain), tokens))
    show("optcpu", pytorch_steps(*optcpu.optimize(model, adamw(model)), tokens))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train GPT-2 with llm.c, PyTorch and optcpu.")
    parser.add_argument("source", type=Path, help="a checkout of llm.c")
    main(parser.parse_args().source)
