"""The description of a machine: the same in every process of it, and different where results may be."""

import json
import os
import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rediffuse.tracking.environment import (
    describe_cuda,
    describe_environment,
    differences,
    environment_digest,
    same_machine_class,
)

SOURCE = Path(__file__).resolve().parents[1] / "src"


def run_code(code, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    command = [sys.executable, "-c", f"import sys, json, rediffuse.tracking.environment as e; {code}"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here():
    return describe_environment()


def test_every_process_of_a_machine_gives_the_same(here, tmp_path):
    """In another folder, time zone, language and order of sets, with or without SciPy loaded."""
    variables = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    again = run_code("print(json.dumps(e.describe_environment()))", tmp_path, **variables)
    assert again == here == describe_environment()
    import scipy.linalg

    scipy.linalg.inv([[1.0]])
    assert environment_digest(describe_environment()) == environment_digest(again)


def test_threads_and_instruction_sets_in_force_make_a_difference(here, tmp_path):
    threads, capability = torch.get_num_threads(), here["decides"]["cpu"]["capability"]
    variables = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    variables["OMP_NUM_THREADS"] = str(threads + 1)
    other = run_code("print(json.dumps(e.describe_environment()))", tmp_path, **variables)
    found = differences(here, other)
    assert f"threads {threads}, here {threads + 1}" in found
    assert "variables.ONEDNN_MAX_CPU_ISA none, here AVX2" in found
    assert capability == "DEFAULT" or f"cpu.capability {capability}, here DEFAULT" in found
    assert not same_machine_class(here, other)
    assert environment_digest(here) != environment_digest(other)


def test_nothing_names_this_machine_or_moment(here):
    text = json.dumps(here)
    for private in (platform.node(), str(SOURCE.parent), sys.prefix, str(Path.home()), str(os.getpid())):
        assert len(private) < 2 or f'"{private}' not in text


def test_versions_are_those_in_force(here):
    import numpy
    import PIL
    import sklearn

    packages = here["decides"]["packages"]
    modules = {"torch": torch, "numpy": numpy, "scikit-learn": sklearn, "pillow": PIL}
    for name, module in modules.items():
        assert packages[name] == module.__version__
    assert None not in packages.values()
    assert here["informs"]["python"] == sys.version.split()[0]


def test_the_module_itself_imports_nothing_heavy(tmp_path):
    heavy = "{'torch', 'numpy', 'mlflow', 'dvc'}"
    assert run_code(f"print(json.dumps(sorted({heavy} & set(sys.modules))))", tmp_path) == []


def test_differences_name_both_values(here):
    assert differences(here, here) == []
    other = deepcopy(here)
    other["informs"]["cpu"] = "another model"
    assert same_machine_class(here, other) and environment_digest(here) != environment_digest(other)
    other["decides"]["packages"]["torch"] = "9.9"
    other["decides"]["cuda"] = {"device": "some GPU", "version": "13.0"}
    found = differences(here, other)
    assert found[-2:] == [
        f"torch {torch.__version__}, here 9.9",
        f"cpu {here['informs']['cpu']}, here another model",
    ]
    assert here["decides"]["cuda"] or found[0] == "cuda none, here device some GPU, version 13.0"
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
    whole = describe_cuda(gpu())
    expected = {"device": "NVIDIA H100", "capability": "9.0", "version": "13.0", "cudnn": 92400}
    assert expected.items() <= whole.items()
    part = {"decides": describe_cuda(gpu(multiprocessors=16))}
    assert differences({"decides": whole}, part) == ["multiprocessors 132, here 16"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a stage sets it: the same as not yet set
    assert describe_cuda(gpu()) == whole
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert differences({"decides": whole}, {"decides": describe_cuda(gpu())}) == [
        "cublas_workspace :4096:8, here :0:0"
    ]
