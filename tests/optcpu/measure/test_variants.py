from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

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
    assert names(default_other_variants(bf16_hardware=False)) == ["optcpu", "optcpu+optimizer"]


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
        ("import os; os.kill(os.getpid(), 11)", "its import ended the process with code -11"),
    ],
)
def test_a_package_that_breaks_on_import_is_told(
    source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extension.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert import_problem("broken_extension") == problem
    assert "broken_extension" not in sys.modules


def test_a_peer_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "import_problem", lambda package: "it is not installed")
    with pytest.raises(ValueError, match="'ipex' needs intel_extension_for_pytorch"):
        named_variants(["ipex"])


def test_an_import_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "did not end within" in (import_problem("json") or "")


@pytest.mark.parametrize(("name", "dtype"), [("eager-fp32", "float32"), ("eager-bf16", "bfloat16")])
def test_autocast_is_what_the_name_says(name: str, dtype: str) -> None:
    prepared = prepare(VARIANTS[name], nn.Linear(4, 2), variants.default_optimizer, "auto")
    with prepared.autocast():
        assert str(prepared.call(torch.randn(3, 4)).dtype) == f"torch.{dtype}"


def test_zentorch_must_not_train_on_the_weights_of_its_first_step() -> None:
    assert dict(VARIANTS["zentorch"].environment) == {"ZENDNNL_MATMUL_WEIGHT_CACHE": "0"}


def test_the_default_optimizer_is_fused() -> None:
    optimizer = variants.default_optimizer(nn.Linear(4, 2).parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["lr"] == 1e-4
