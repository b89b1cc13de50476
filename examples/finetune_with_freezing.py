"""Fine-tune with and without freezing: time (compiling included) and accuracy over some seeds.

A network learns digits that stand upside down, then upright ones; the freezer stops training its first
layers once their gradients have settled, if what remains of the run pays for compiling once more.
"""

import copy
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

import optcpu
from optcpu.data import digits

SEEDS, STEPS = 2, 400
train, test = digits().train, digits().test


def fit(model, images, labels, steps, freezing=False):
    """Train, and return the freezer (None without) and the seconds that it took."""
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model, optimizer = optcpu.optimize(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    freezer = None
    if freezing:
        freezer = optcpu.DynamicFreezer(
            model, optimizer, window=25, patience=3, max_freezes=3, total_steps=steps
        )
    for _ in range(steps):
        batch = torch.randint(len(images), (128,))
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if freezer is not None:
            freezer.step()
    return freezer, time.perf_counter() - start


def accuracy(model):
    with torch.no_grad():
        return 100 * (model(test[0]).argmax(1) == test[1]).float().mean().item()


ratios, differences, froze = [], [], 0
for seed in range(SEEDS):
    torch.manual_seed(seed)
    hidden = [part for _ in range(3) for part in (nn.Linear(512, 512), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), *hidden, nn.Linear(512, 10))
    fit(model, train[0].flip(-2), train[1], 150)
    results = []
    for freezing in (False, True) if seed % 2 else (True, False):  # neither is always the second
        torch.manual_seed(seed)
        twin = copy.deepcopy(model)
        freezer, seconds = fit(twin, *train, STEPS, freezing)
        results.append((freezing, seconds, accuracy(twin)))
        if freezer is not None:
            froze += freezer.frozen_fraction > 0
            for event in freezer.events:
                print(
                    f"  step {event.step}: {event.kind} {', '.join(event.blocks)}: {event.reason}"
                )
    (_, usual, before), (_, less, after) = sorted(results)
    ratios.append(less / usual)
    differences.append(after - before)
    print(f"seed {seed}: {usual:.1f} s, {before:.1f} % right; freezing {less:.1f} s, {after:.1f} %")

print(
    f"{froze} of {SEEDS} runs froze layers; with freezing they took {statistics.median(ratios):.2f} of "
    f"the time (median; without any freeze the difference is noise) for "
    f"{statistics.mean(differences):+.2f} points of accuracy (mean)"
)
