from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from optcpu import cpu

AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
HASWELL = frozenset({"sse4_1", "avx", "avx2"})
ZEN5 = HASWELL | AVX512 | {"avx512_vnni", "avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN5 | {"avx512_fp16", "amx_tile", "amx_bf16"}
GRAVITON3 = frozenset({"asimd", "sve", "bf16"})


@pytest.mark.parametrize(
    ("architecture", "flags", "environment", "isa"),
    [
        ("x86_64", ZEN5, {}, "avx512_bf16"),
        ("x86_64", SAPPHIRE_RAPIDS, {}, "amx_bf16"),
        ("x86_64", HASWELL, {}, "avx2"),
        ("x86_64", ZEN5, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
        ("x86_64", ZEN5, {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, "avx512_vnni"),
        ("x86_64", ZEN5, {"DNNL_MAX_CPU_ISA": "AVX2"}, "avx2"),
        ("x86_64", ZEN5, {"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
        ("x86_64", ZEN5, {"ATEN_CPU_CAPABILITY": "default"}, "sse4_1"),
        ("x86_64", ZEN5, {"ATEN_CPU_CAPABILITY": "avx512"}, "avx512_bf16"),
        ("x86_64", ZEN5, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "avx512_bf16"),
        ("x86_64", ZEN5, {"ONEDNN_MAX_CPU_ISA": "nonsense"}, "avx512_bf16"),
        ("x86_64", SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        ("x86_64", SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx_bf16"),
        ("x86_64", HASWELL, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx2"),
        ("x86_64", ZEN5, {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "ALL"}, "avx2"),
        ("aarch64", GRAVITON3, {}, "sve_bf16"),
        ("aarch64", GRAVITON3, {"ATEN_CPU_CAPABILITY": "default"}, "neon"),
        ("aarch64", frozenset({"asimd"}), {}, "neon"),
    ],
)
def test_highest_level(
    architecture: str, flags: frozenset[str], environment: dict[str, str], isa: str
) -> None:
    levels, _ = cpu._usable_levels(architecture, flags, environment)
    assert levels[-1] == isa


def test_only_what_takes_something_away_counts_as_emulation() -> None:
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"}
    assert cpu._usable_levels("x86_64", ZEN5, environment)[1] == ("ONEDNN_MAX_CPU_ISA=AVX512_CORE",)
    assert cpu._usable_levels("x86_64", HASWELL, environment)[1] == ()


def test_emulation_takes_bf16_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_processor", lambda: ("AuthenticAMD", "EPYC", ZEN5))
    monkeypatch.setattr(cpu, "_architecture", lambda: "x86_64")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    assert cpu.capabilities().bf16
    assert not cpu.capabilities().amx
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not cpu.capabilities().bf16
    assert cpu.capabilities().emulated == ("ONEDNN_MAX_CPU_ISA=AVX512_CORE",)


def test_unknown_processor_is_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_processor", lambda: ("", "", frozenset()))
    found = cpu.capabilities()
    assert found.isa == "generic"
    assert not found.bf16


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_this_processor_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    found = cpu.capabilities()
    if found.architecture == "x86_64":
        bf16, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
        assert found.bf16 == (bf16 or amx)
    assert 1 <= found.physical_cores <= found.logical_cores
    assert found.model


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_both_sources_agree_on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    told = cpu._torch_flags()
    if not told:
        pytest.skip("this torch does not tell")
    _, _, flags = cpu.parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    architecture = cpu._architecture()
    assert cpu._usable_levels(architecture, told, {}) == cpu._usable_levels(architecture, flags, {})


def test_cpuinfo_of_x86() -> None:
    text = (
        "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) 8480+\n"
        "flags\t\t: fpu avx2 amx_tile\n\nprocessor\t: 1\nmodel name\t: another\nflags\t\t: fpu\n"
    )
    assert cpu.parse_cpuinfo(text) == (
        "GenuineIntel",
        "Intel(R) Xeon(R) 8480+",
        frozenset({"fpu", "avx2", "amx_tile"}),
    )


def test_cpuinfo_of_arm() -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    assert cpu.parse_cpuinfo(text) == ("ARM", "", frozenset({"fp", "asimd", "bf16"}))


def test_cpuinfo_that_says_nothing() -> None:
    assert cpu.parse_cpuinfo("") == ("", "", frozenset())


def test_missing_torch_detection_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu._torch_flags() == frozenset()


def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for thread, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        topology = tmp_path / f"cpu{thread}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert cpu._cores(tmp_path) == (3, 2)


def test_every_thread_is_a_core_without_a_topology(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert cpu._cores(tmp_path) == (2, 2)


def test_cores_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cpu.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cpu._cores() == (8, 4)


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (16.0, 8), (3.5, 3), (0.5, 1)])
def test_quota_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(cpu, "_cores", lambda: (16, 8))
    assert cpu.capabilities().physical_cores == cores


class TestCgroupQuota:
    @staticmethod
    def _write(root: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    def test_tightest_of_version_2(self, tmp_path: Path) -> None:
        self._write(
            tmp_path,
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/cpu.max": "max 100000\n",
                "sys/a/cpu.max": "150000 100000\n",
                "sys/a/b/cpu.max": "400000 100000\n",
            },
        )
        assert cpu.cgroup_quota(tmp_path / "proc", tmp_path / "sys") == 1.5

    def test_container_that_sees_only_the_root(self, tmp_path: Path) -> None:
        self._write(
            tmp_path,
            {"proc/self/cgroup": "0::/host/path\n", "sys/cpu.max": "200000 100000\n"},
        )
        assert cpu.cgroup_quota(tmp_path / "proc", tmp_path / "sys") == 2

    def test_version_1(self, tmp_path: Path) -> None:
        self._write(
            tmp_path,
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n",
                "sys/cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                "sys/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                "sys/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
        )
        assert cpu.cgroup_quota(tmp_path / "proc", tmp_path / "sys") == 2.5

    def test_no_limit_and_no_cgroups(self, tmp_path: Path) -> None:
        assert cpu.cgroup_quota(tmp_path / "proc", tmp_path / "sys") is None
        self._write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/cpu.max": "max 100000\n"})
        assert cpu.cgroup_quota(tmp_path / "proc", tmp_path / "sys") is None


def test_caches(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in {"level": level, "type": kind, "size": size}.items():
            (folder / name).write_text(f"{text}\n")
    assert cpu._caches(tmp_path) == (48 * 1024, 1024 * 1024, None)


def test_macos_without_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(cpu.subprocess, "run", missing)
    monkeypatch.setattr(cpu, "_architecture", lambda: "aarch64")
    assert cpu._from_sysctl() == ("Apple", "", frozenset({"asimd"}))
