"""`examples/llm_c.py`, with a program in the place of llm.c's that reads the same files."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optcpu.models.gpt2 import GPT2, gpt2_small

EXAMPLE = Path(__file__).parents[1] / "examples" / "llm_c.py"

# Prints numbers of the files where llm.c prints a loss: each is checked below.
READER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static FILE *open_checked(const char *path, int magic, int version, int *header) {
    FILE *file = fopen(path, "rb");
    if (!file || fread(header, 4, 256, file) != 256) exit(3);
    if (header[0] != magic || header[1] != version) exit(4);
    return file;
}

int main(void) {
    int header[256], size[256];
    FILE *file = open_checked("gpt2_124M.bin", 20240326, 3, size);
    size_t T = size[2], L = size[4], C = size[6], Vp = size[7];
    size_t count = Vp * C + T * C + L * (12 * C * C + 13 * C) + 2 * C;
    float *weights = malloc(count * 4);
    if (fread(weights, 4, count, file) != count || fgetc(file) != EOF) exit(5);
    const char *path = "dev/data/tinyshakespeare/tiny_shakespeare_train.bin";
    file = open_checked(path, 20240520, 1, header);
    uint16_t token;
    fseek(file, 1024 + 2 * (header[2] - 1), SEEK_SET);
    if (fread(&token, 2, 1, file) != 1 || fgetc(file) != EOF) exit(6);
    size_t qkv = Vp * C + T * C + 2 * L * C;
    float shown[] = {weights[0], weights[(size_t)size[3] * C], weights[qkv + 3 * C * C], weights[count - 1],
                     token, atoi(getenv("OMP_NUM_THREADS"))};
    printf("val loss 3.0\n");
    for (int step = 0; step < 6; step++)
        printf("step %d: train loss %f (took %f ms)\n", step, shown[step], 1.5 + step);
    return 0;
}
"""


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE), run_name="example")


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    model = gpt2_small(context_length=8, layers=2, heads=2, width=4)
    nn.init.normal_(model.norm.bias)
    return model


def test_the_program_gets_weights_tokens_and_threads(
    example: dict[str, Any], model: GPT2, tmp_path: Path
) -> None:
    (tmp_path / "train_gpt2.c").write_text(READER)
    steps = list(example["llm_c_steps"](tmp_path, model, torch.arange(257) * 190))
    expected = [
        model.token_embedding.weight[0, 0].item(),
        0.0,  # the padding of the vocabulary
        model.blocks[1]
        .attention.qkv.weight[0, 0]
        .item(),  # llm.c has the layers of a kind side by side
        model.norm.bias[-1].item(),
        256 * 190,
        torch.get_num_threads(),
    ]
    assert [loss for loss, _ in steps] == pytest.approx(expected, abs=1e-5)
    assert [milliseconds for _, milliseconds in steps] == [1.5 + step for step in range(6)]


def test_a_program_that_fails_is_told(example: dict[str, Any], model: GPT2, tmp_path: Path) -> None:
    (tmp_path / "train_gpt2.c").write_text("int main(void) { return 7; }")
    with pytest.raises(SystemExit, match="ended with code 7"):
        list(example["llm_c_steps"](tmp_path, model, torch.arange(257)))


def test_pytorch_trains_on_the_same_tokens(example: dict[str, Any], model: GPT2) -> None:
    model = gpt2_small(vocab_size=300, context_length=64, layers=1, heads=2, width=8)
    steps = example["pytorch_steps"](model, example["adamw"](model), torch.arange(257))
    losses = [loss for loss, _ in steps]
    assert len(losses) == example["STEPS"]
    assert losses[-1] < losses[0]
