"""The description of a machine: the same in every process of it, and different where results may be."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rediffuse.tracking.environment import describe_cuda, describe_environment, differences, environment_digest, same_machine_class

SOURCE = Path(__file__).resolve().parents[1] / "src"


def described_elsewhere(folder: Path, **variables: str) -> dict[str, Any]:
    """By a process of its own."""
    code = "import json; from rediffuse.tracking.environment import describe_environment as d; print(json.dumps(d()))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return describe_environment()


def test_every_process_of_a_machine_gives_the_same(here: dict[str, Any], tmp_path: Path) -> None:
    """Another working directory, time zone, language and order of sets, and SciPy's own library of linear algebra loaded or not."""
    again = described_elsewhere(
        tmp_path, OMP_NUM_THREADS=str(torch.get_num_threads()), TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="7", HOME=str(tmp_path)
    )
    assert again == here == describe_environment()
    import scipy.linalg

    scipy.linalg.inv([[1.0]])
    assert environment_digest(describe_environment()) == environment_digest(again)


def test_threads_and_instruction_sets_in_force_are_told(here: dict[str, Any], tmp_path: Path) -> None:
    threads, capability = torch.get_num_threads(), here["decides"]["cpu"]["capability"]
    other = described_elsewhere(tmp_path, OMP_NUM_THREADS=str(threads + 1), ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="AVX2")
    told = differences(here, other)
    assert f"threads {threads}, here {threads + 1}" in told
    assert "variables.ONEDNN_MAX_CPU_ISA none, here AVX2" in told
    assert capability == "DEFAULT" or f"cpu.capability {capability}, here DEFAULT" in told
    assert not same_machine_class(here, other)
    assert environment_digest(here) != environment_digest(other)


def test_nothing_names_this_machine_or_moment(here: dict[str, Any]) -> None:
    text = json.dumps(here)
    for private in (platform.node(), str(SOURCE.parent), sys.prefix, str(Path.home()), str(os.getpid())):
        assert len(private) < 2 or f'"{private}' not in text


def test_versions_are_those_in_force(here: dict[str, Any]) -> None:
    import numpy
    import PIL
    import sklearn

    packages = here["decides"]["packages"]
    assert (packages["torch"], packages["numpy"]) == (torch.__version__, numpy.__version__)
    assert (packages["scikit-learn"], packages["pillow"]) == (sklearn.__version__, PIL.__version__)
    assert None not in packages.values()
    assert here["decides"]["threads"] == torch.get_num_threads()
    assert here["informs"]["python"] == sys.version.split()[0]


def test_the_module_itself_imports_nothing_heavy() -> None:
    code = "import sys, rediffuse.tracking.environment; print(sorted({'torch', 'numpy', 'mlflow', 'dvc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_digest_is_that_of_the_sorted_json() -> None:
    text = '{"decides": {"a": 1, "b": [true, null]}, "informs": {}}'
    assert environment_digest({"informs": {}, "decides": {"b": [True, None], "a": 1}}) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_differences_are_told_in_words_those_that_decide_first(here: dict[str, Any]) -> None:
    assert differences(here, here) == []
    other = deepcopy(here)
    other["informs"]["cpu"] = "another model"
    assert same_machine_class(here, other)
    assert environment_digest(here) != environment_digest(other)
    other["decides"]["packages"]["torch"] = "9.9"
    other["decides"]["cpu"]["bfloat16"] = not here["decides"]["cpu"]["bfloat16"]
    other["decides"]["cuda"] = {"device": "some GPU", "version": "13.0"}
    words = ("yes", "no") if here["decides"]["cpu"]["bfloat16"] else ("no", "yes")
    cuda = "cuda none, here device some GPU, version 13.0" if here["decides"]["cuda"] is None else None
    told = differences(here, other)
    assert told[0] == f"cpu.bfloat16 {words[0]}, here {words[1]}"
    assert cuda is None or told[1] == cuda
    assert told[-2:] == [f"torch {torch.__version__}, here 9.9", f"cpu {here['informs']['cpu']}, here another model"]
    assert not same_machine_class(here, other)
    del other["decides"]["threads"]
    assert f"threads {torch.get_num_threads()}, here none" in differences(here, other)


def gpu(name: str = "NVIDIA H100 80GB HBM3", multiprocessors: int = 132) -> Any:
    """What is asked of torch about a GPU."""
    properties = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=multiprocessors)
    return SimpleNamespace(
        cuda=SimpleNamespace(get_device_properties=lambda index: properties),
        device=torch.device,
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 92400, allow_tf32=True)),
        version=SimpleNamespace(cuda="13.0"),
    )


def test_a_gpu_is_told_by_what_chooses_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    whole = describe_cuda(gpu())
    assert (whole["device"], whole["capability"], whole["version"], whole["cudnn"]) == ("NVIDIA H100 80GB HBM3", "9.0", "13.0", 92400)
    assert differences({"decides": whole}, {"decides": describe_cuda(gpu(multiprocessors=16))}) == ["multiprocessors 132, here 16"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a stage sets it: the same as not yet set
    assert describe_cuda(gpu()) == whole
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert differences({"decides": whole}, {"decides": describe_cuda(gpu())}) == ["cublas_workspace :4096:8, here :0:0"]
