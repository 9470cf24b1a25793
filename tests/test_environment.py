"""The description of a machine: the same in every process of it, and different where results may be."""

import json
import os
import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import scipy.linalg
import torch

from rediffuse.tracking.environment import (
    describe_cuda,
    describe_environment,
    differences,
    environment_digest,
    same_machine_class,
)

SOURCE = Path(__file__).resolve().parents[1] / "src"


def described_in(folder, **variables):
    """The description in another process, which must not import anything heavy before it is asked."""
    code = (
        "import sys, json, rediffuse.tracking.environment as e; "
        "assert not {'torch', 'numpy', 'mlflow', 'dvc'} & set(sys.modules); "
        "print(json.dumps(e.describe_environment()))"
    )
    how = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, **how).stdout)


@pytest.fixture(scope="module")
def here():
    return describe_environment()


def test_every_process_of_a_machine_gives_the_same(here, tmp_path):
    """In another folder, time zone, language and order of sets, with or without SciPy at work."""
    variables = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    scipy.linalg.inv([[1.0]])
    assert described_in(tmp_path, **variables) == here == describe_environment()


def test_threads_and_instruction_sets_in_force_make_a_difference(here, tmp_path):
    threads, capability = torch.get_num_threads(), here["decides"]["cpu"]["capability"]
    variables = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    other = described_in(tmp_path, OMP_NUM_THREADS=str(threads + 1), **variables)
    found = differences(here, other)
    assert f"threads {threads}, here {threads + 1}" in found
    assert "variables.ONEDNN_MAX_CPU_ISA none, here AVX2" in found
    assert capability == "DEFAULT" or f"cpu.capability {capability}, here DEFAULT" in found
    assert not same_machine_class(here, other)
    assert environment_digest(here) != environment_digest(other)


def test_it_has_the_versions_in_force_and_no_name_of_this_machine_or_moment(here):
    packages = here["decides"]["packages"]
    assert [packages["torch"], packages["numpy"]] == [torch.__version__, numpy.__version__]
    assert None not in packages.values() and here["informs"]["python"] == sys.version.split()[0]
    for private in (platform.node(), str(SOURCE.parent), sys.prefix, str(Path.home()), str(os.getpid())):
        assert len(private) < 2 or f'"{private}' not in json.dumps(here)


def test_differences_name_both_values_and_what_decides_comes_first(here):
    assert differences(here, here) == []
    other = deepcopy(here)
    other["informs"]["cpu"] = "another model"
    assert same_machine_class(here, other) and environment_digest(here) != environment_digest(other)
    other["decides"]["packages"]["torch"] = "9.9"
    cpu = f"cpu {here['informs']['cpu']}, here another model"
    assert differences(here, other) == [f"torch {torch.__version__}, here 9.9", cpu]
    assert not same_machine_class(here, other)
    del other["decides"]["threads"]
    assert f"threads {torch.get_num_threads()}, here none" in differences(here, other)


def gpu(multiprocessors=132):
    """What is asked of torch about a GPU."""
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=multiprocessors)
    return SimpleNamespace(
        cuda=SimpleNamespace(get_device_properties=lambda index: properties),
        device=torch.device,
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 92400, allow_tf32=True)),
        version=SimpleNamespace(cuda="13.0"),
    )


def test_a_gpu_is_described_by_what_chooses_its_kernels(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    whole, part = describe_cuda(gpu()), describe_cuda(gpu(multiprocessors=16))
    expected = {"device": "NVIDIA H100", "capability": "9.0", "version": "13.0", "cudnn": 92400}
    assert expected.items() <= whole.items()
    assert differences({"decides": whole}, {"decides": part}) == ["multiprocessors 132, here 16"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a stage sets it: the same as not yet set
    assert describe_cuda(gpu()) == whole
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert describe_cuda(gpu()) == whole | {"cublas_workspace": ":0:0"}
