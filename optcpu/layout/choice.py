"""Whether Intel's extension multiplies the weights of a model faster than PyTorch's own oneDNN.

Measured in a process of its own, since importing the extension changes the process, and remembered
beside the choices of kernels. Asked only where an extension for this release of PyTorch is installed.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

from optcpu.layout import ipex, native
from passes.gemm import remembered, times
from passes.packed import Packing

_ROWS = 256  # of a product; the batch is not known yet
_MOST_SHAPES = 4  # that take most of the time
_WORTH = 0.95  # times the native time at most
_TIMEOUT_SECONDS = 300

_log = logging.getLogger("optcpu")


def ipex_wins(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether products with weights of these shapes (N, K) are faster in the extension's layout.

    A trial that fails counts as lost.
    """
    if not shapes or ipex.why_impossible() is not None or native.why_impossible() is not None:
        return False
    largest = sorted(Counter(shapes).items(), key=lambda item: -item[1] * item[0][0] * item[0][1])[
        :_MOST_SHAPES
    ]
    key = f"layout {json.dumps(largest)} {torch.get_num_threads()}"
    return remembered(key, lambda: _winner(largest), {"ipex", "native"}.__contains__) == "ipex"


def _winner(shapes: Sequence[tuple[tuple[int, ...], int]]) -> str:
    _log.info("optcpu: trying whether the layout of %s is faster here", ipex.PACKAGE)
    trial = [
        sys.executable,
        "-m",
        "optcpu.layout.choice",
        json.dumps(shapes),
        str(torch.get_num_threads()),
    ]
    try:
        done = subprocess.run(
            trial, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS
        )
        seconds = json.loads(done.stdout.strip().splitlines()[-1])
        return "ipex" if seconds["ipex"] < _WORTH * seconds["native"] else "native"
    except (subprocess.TimeoutExpired, ValueError, IndexError, KeyError, TypeError) as error:
        _log.info("optcpu: the trial gave no result (%s); the native layout is used", error)
        return "native"


def trial(shapes: Sequence[tuple[Sequence[int], int]]) -> dict[str, float]:
    """Seconds that the products of one step take in either layout, forward and for the input's gradient.

    Args:
        shapes: of weights, (N, K), and how many there are of each.
    """
    packings: dict[str, Packing] = {"native": native.NativePacking(), "ipex": ipex.IpexPacking()}
    total = dict.fromkeys(packings, 0.0)
    for (outputs, inputs), count in shapes:
        weight = torch.randn(outputs, inputs).bfloat16()
        for side in (weight, weight.t()):
            x = torch.randn(_ROWS, side.shape[1]).bfloat16()
            runs = {
                name: partial(
                    packing.linear, x, packing.pack(side, _ROWS, None), None, "none", None
                )
                for name, packing in packings.items()
            }
            for name, seconds in times(runs).items():
                total[name] += count * seconds
    return total


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(trial(json.loads(sys.argv[1]))))
