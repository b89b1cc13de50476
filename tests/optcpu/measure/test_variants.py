from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optcpu.compare import compare
from optcpu.measure import variants
from optcpu.measure.variants import (
    VARIANTS,
    default_other_variants,
    default_stock_variants,
    import_problem,
    named_variants,
    prepare,
    tuned_twins,
)

Installer = Callable[[str, str], None]

PEERS = ["ipex", "ipex-tuned", "ipex-compiled-tuned", "zentorch"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    """Makes a package importable, here and in processes started from here."""
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def make(package: str, source: str) -> None:
        (tmp_path / f"{package}.py").write_text(source)

    return make


def names(chosen: list[variants.Variant]) -> list[str]:
    return [variant.name for variant in chosen]


def test_the_reference_comes_first_and_nothing_comes_twice() -> None:
    chosen = named_variants(["optcpu", "compiled-bf16", "eager-fp32", "optcpu"])
    assert names(chosen) == ["eager-fp32", "optcpu", "compiled-bf16"]


def test_an_unknown_variant_is_met_with_the_nearest_known() -> None:
    with pytest.raises(ValueError, match=r"'compiled-fb16'. Did you mean 'compiled-bf16'\?"):
        named_variants(["compiled-fb16"])


def test_variants_must_be_a_list_of_names() -> None:
    with pytest.raises(TypeError, match=r"variants=\['optcpu'\]"):
        named_variants("optcpu")
    with pytest.raises(ValueError, match="variants is empty"):
        named_variants([])


def test_bf16_is_left_out_by_default_without_hardware_for_it() -> None:
    assert names(default_stock_variants(bf16_hardware=False)) == ["eager-fp32", "compiled-fp32"]
    assert len(default_stock_variants(bf16_hardware=True)) == 4


def test_the_fastest_stock_variants_are_tuned() -> None:
    seconds = {"eager-fp32": 3.0, "eager-bf16": 1.2, "compiled-fp32": 2.9, "compiled-bf16": 1.0}
    assert names(tuned_twins(seconds)) == ["eager-bf16-tuned", "compiled-bf16-tuned"]
    assert names(tuned_twins({"eager-fp32": 1.0, "compiled-fp32": 2.0})) == ["eager-fp32-tuned"]
    assert tuned_twins({}) == []
    assert all(variant.name in VARIANTS for variant in tuned_twins(seconds))


def test_a_package_that_is_not_there_is_told() -> None:
    assert import_problem("no_such_package_at_all") == "it is not installed"
    assert import_problem("json") is None


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("import os; os._exit(3)", "its import ended the process with code 3"),
        (
            "import os; os.write(2, b'a warning'); os._exit(3)",
            "its import ended the process with code 3 (a warning)",
        ),
        ("import os; os.kill(os.getpid(), 11)", "its import ended the process with code -11"),
    ],
)
def test_a_package_that_breaks_on_import_is_told(
    source: str, problem: str, install: Installer
) -> None:
    install("broken_extension", source)
    assert import_problem("broken_extension") == problem
    assert "broken_extension" not in sys.modules


def test_what_a_package_printed_before_it_broke_is_told(install: Installer) -> None:
    # So does IPEX on another torch than its own: it means to exit.
    install("odd_extension", "print('needs another torch'); raise AttributeError('no exit')")
    assert import_problem("odd_extension") == "AttributeError: no exit (needs another torch)"


def test_a_peer_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "import_problem", lambda package: "it is not installed")
    refusal = "'ipex' cannot run here: intel_extension_for_pytorch cannot be imported: it is not"
    with pytest.raises(ValueError, match=refusal):
        named_variants(["ipex"])


def on_a_processor_with(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = dataclasses.replace(variants.capabilities(), isa=isa, bf16=isa.endswith("bf16"))
    monkeypatch.setattr(variants, "capabilities", lambda: told)


def test_zentorch_is_refused_where_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "import_problem", lambda package: None)
    on_a_processor_with("avx2", monkeypatch)
    with pytest.raises(ValueError, match="without AVX-512 zentorch is plain"):
        named_variants(["zentorch"])
    for isa in ("avx512", "avx512_bf16", "amx_bf16"):
        on_a_processor_with(isa, monkeypatch)
        assert names(named_variants(["zentorch"])) == ["eager-fp32", "zentorch"]


def test_by_default_the_peers_that_fit_are_measured_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    own = ["optcpu", "optcpu+optimizer"]
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("intel_extension_for_pytorch", "zentorch") else found(name),
    )
    chosen, left_out = default_other_variants()
    assert (names(chosen), left_out) == (own, [])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    on_a_processor_with("avx512", monkeypatch)
    tried: list[str] = []
    monkeypatch.setattr(variants, "import_problem", tried.append)
    monkeypatch.setattr(variants, "_why_not_packed", lambda: "no BF16")
    chosen, left_out = default_other_variants()
    assert (names(chosen), left_out) == ([*PEERS, *own], [])
    with pytest.raises(
        ValueError, match=r"'optcpu\+ipex' cannot run here: no weights are packed here: no BF16"
    ):
        named_variants(["optcpu+ipex"])
    tried.clear()
    monkeypatch.setattr(variants, "_why_not_packed", lambda: None)
    chosen, left_out = default_other_variants()
    layouts = ["optcpu+native", "optcpu+ipex"]
    assert (names(chosen), left_out) == ([*PEERS, *own, *layouts], [])
    assert tried == ["intel_extension_for_pytorch", "zentorch"]

    monkeypatch.setattr(variants, "_why_not_packed", lambda: "no BF16")
    monkeypatch.setattr(variants, "import_problem", lambda package: "ImportError: no")
    on_a_processor_with("avx2", monkeypatch)
    chosen, left_out = default_other_variants()
    assert names(chosen) == own
    assert left_out == [
        "Left out: ipex, ipex-tuned, ipex-compiled-tuned; intel_extension_for_pytorch cannot be imported: "
        f"ImportError: no; a version that fits torch {torch.__version__} is needed.",
        "Left out: zentorch; without AVX-512 zentorch is plain torch.compile.",
    ]


@pytest.mark.slow
def test_importing_and_optimizing_imports_no_peer(install: Installer) -> None:
    for package in ("intel_extension_for_pytorch", "zentorch"):
        install(package, "import os; os._exit(3)")
    code = """
        import sys
        import torch
        import optcpu
        import optcpu.compare, optcpu.cli, optcpu.doctor, optcpu.inspect, optcpu.measure.worker

        model = optcpu.optimize(torch.nn.Linear(4, 2))
        model(torch.randn(3, 4)).sum().backward()
        assert not {"intel_extension_for_pytorch", "zentorch"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_an_import_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "did not end within" in (import_problem("json") or "")


@pytest.fixture
def fake_ipex(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An IPEX that changes nothing, and how it was called."""
    calls: list[dict[str, Any]] = []

    def optimize(model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
        calls.append(options)
        return model, options["optimizer"]

    module = ModuleType("intel_extension_for_pytorch")
    module.optimize = optimize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "intel_extension_for_pytorch", module)
    return calls


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The backends that ``torch.compile`` was called with; it compiles nothing."""
    used: list[Any] = []

    def compiled(model: nn.Module, backend: Any = "inductor") -> nn.Module:
        used.append(backend)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    return used


@pytest.mark.parametrize(
    ("isa", "precision", "bf16"),
    [
        ("avx2", "auto", False),
        ("avx512_bf16", "auto", True),
        ("avx512_bf16", "fp32", False),
        ("avx2", "bf16", True),
    ],
)
def test_ipex_is_set_up_as_its_documentation_trains(
    isa: str,
    precision: str,
    bf16: bool,
    fake_ipex: list[dict[str, Any]],
    backends: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_processor_with(isa, monkeypatch)
    model = nn.Linear(4, 2)
    for name, expected in (("ipex", []), ("ipex-compiled-tuned", ["ipex"])):
        prepared = prepare(VARIANTS[name], model, variants.default_optimizer, precision)
        options = fake_ipex.pop()
        assert options["dtype"] is (torch.bfloat16 if bf16 else None)
        assert options["optimizer"] is prepared.optimizer
        assert options["weights_prepack"] is (name == "ipex")
        assert options["inplace"] is True
        assert backends == expected
        with prepared.autocast():
            assert torch.is_autocast_enabled("cpu") is bf16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zentorch_compiles_with_its_backend(
    precision: str, backends: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zentorch", ModuleType("zentorch"))
    prepared = prepare(VARIANTS["zentorch"], nn.Linear(4, 2), variants.default_optimizer, precision)
    assert backends == ["zentorch"]
    with prepared.autocast():
        assert torch.is_autocast_enabled("cpu") is (precision == "bf16")


@pytest.mark.parametrize(("name", "dtype"), [("eager-fp32", "float32"), ("eager-bf16", "bfloat16")])
def test_autocast_is_what_the_name_says(name: str, dtype: str) -> None:
    prepared = prepare(VARIANTS[name], nn.Linear(4, 2), variants.default_optimizer, "auto")
    with prepared.autocast():
        assert str(prepared.call(torch.randn(3, 4)).dtype) == f"torch.{dtype}"


def test_zentorch_must_not_train_on_the_weights_of_its_first_step() -> None:
    assert dict(VARIANTS["zentorch"].environment) == {"ZENDNNL_MATMUL_WEIGHT_CACHE": "0"}
    assert "trains on the weights of its first step" in (VARIANTS["zentorch"].note or "")


def regression() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(16, 4), (torch.randn(32, 16), torch.randn(32, 4))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


QUICK: dict[str, Any] = {
    "optimizer": sgd,
    "steps": 10,
    "rounds": 1,
    "round_seconds": 0.01,
    "precision": "fp32",
    "progress": False,
}

STALE_IPEX = """
    import torch

    class Stale(torch.nn.Linear):
        def forward(self, x):
            # The gradient reaches the weight, the weight does not reach the output.
            return super().forward(x) - torch.nn.functional.linear(
                x, self.weight - first[0], self.bias - first[1]
            ).detach()

    first = []

    def optimize(model, optimizer, **options):
        first.extend([model.weight.detach().clone(), model.bias.detach().clone()])
        model.__class__ = Stale
        return model, optimizer
"""


@pytest.mark.slow
@pytest.mark.usefixtures("known_limits")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def optimize(*_, **__): raise KeyError('odd')", "failed: KeyError: 'odd'"),
        (
            "import sys\nif 'optcpu' in sys.modules: import os; os._exit(7)",
            "ended with exit code 7",
        ),
        ("import sys\nif 'optcpu' in sys.modules: raise SystemExit(5)", "failed: SystemExit: 5"),
        (textwrap.dedent(STALE_IPEX), "ipex: did not learn as eager-fp32 did: its loss went from"),
    ],
    ids=["raises", "ends its process", "exits", "stale weights"],
)
def test_a_peer_that_fails_or_does_not_learn_is_told_and_hurts_no_other(
    source: str, reason: str, install: Installer
) -> None:
    install("intel_extension_for_pytorch", source)
    model, batch = regression()
    compared = compare(model, batch, variants=["ipex", "eager-fp32-tuned"], **QUICK)
    assert not compared["ipex"].learned
    assert compared["eager-fp32-tuned"].learned
    assert compared["eager-fp32-tuned"].step_ms is not None
    assert reason in " ".join(str(compared).split())


@pytest.mark.slow
@pytest.mark.usefixtures("known_limits")
@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.kind == "peer"])
def test_a_peer_that_can_run_here_learns(name: str) -> None:
    try:
        named_variants([name])
    except ValueError as reason:
        pytest.skip(str(reason))
    model, batch = regression()
    row = compare(model, batch, variants=[name], **QUICK)[name]
    assert row.failed is None
    assert row.learned


def test_the_default_optimizer_is_fused() -> None:
    optimizer = variants.default_optimizer(nn.Linear(4, 2).parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["lr"] == 1e-4
