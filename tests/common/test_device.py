"""An error of the GPU is one line with its stage and what to change; cuDNN is kept out of attention."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_run

from gdro.cli import main
from gdro.common.device import failure, telling
from gdro.common.errors import UserError
from gdro.models import load_model
from gdro.runner import pipeline

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee the manual.")
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")
EXECUTION = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`")
CUDNN = RuntimeError("mha_graph.execute(handle, variant_pack).is_good() INTERNAL ASSERT FAILED at MHA.cpp")
FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 4 GB")


@pytest.mark.parametrize(
    ("stage", "error", "expected"),
    [
        (
            "sample",
            OUT_OF_MEMORY,
            "gdro: sample: out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.); expected "
            "sample.batch_size below 16, or mixed_precision: bf16, or quantization: int8, or smaller images; then the "
            "same command resumes\n",
        ),
        (
            "train",
            ILLEGAL,
            "gdro: train: CUDA error: an illegal memory access was encountered; likely a kernel that fails on this "
            "GPU: attention, compiled or quantized: expected compile: false, quantization: null or "
            "mixed_precision: no, where set otherwise; set CUDA_LAUNCH_BLOCKING=1 in the environment to see where it "
            "happens\n",
        ),
        ("train", OUT_OF_MEMORY, "expected train.group_gradient: two_pass with train.images_per_pass: 1, or train.gra"),
        ("validate", OUT_OF_MEMORY, "gdro: validate: out of memory"),
        ("score", EXECUTION, "gdro: score: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ("train", CUDNN, "likely cuDNN fails on this GPU"),
        ("evaluate", FULL, "expected evaluate.batch_size below 16, or"),
        ("check", ILLEGAL, "gdro: run: CUDA error"),
    ],
)
def test_an_error_of_the_gpu_is_one_line(
    tmp_path: Path,
    flux_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    error: Exception,
    expected: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    def validate(*_: Any, **how: Any) -> None:
        how["validate"](None, 3)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    for name in ("sample_groups", "score", "train"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: None)
    if stage == "validate":
        monkeypatch.setattr(pipeline, "train", validate)
        monkeypatch.setattr(pipeline, "make_scored", fail)
    elif stage == "evaluate":
        monkeypatch.setattr(pipeline.Run, "_export", lambda _: None)
        monkeypatch.setattr(pipeline.Run, "is_trained", lambda _: True)
        monkeypatch.setattr("gdro.models.diffusers_model.DiffusersModel.load_adapter", lambda *_: None)
        monkeypatch.setattr(pipeline, "evaluate", fail)
    else:
        monkeypatch.setattr(pipeline, "sample_groups" if stage == "sample" else stage, fail)
    assert main(["run", str(small_run(tmp_path, flux_folder)), "--out", "out"]) == 2
    err = capsys.readouterr().err
    line = err.splitlines()[-1] + "\n"
    assert "Traceback" not in err
    assert line.startswith("gdro: ")
    assert expected in line


def test_where_it_happened_is_told_once_cuda_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")

    def kernel() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(UserError, match=f"train: CUDA error: .*; it happened in kernel, {__file__}:"), telling("train"):
        kernel()


def test_other_errors_are_left_as_they_are() -> None:
    assert failure("train", RuntimeError("shape '[2, 3]' is invalid for input of size 5")) is None
    assert failure("train", RuntimeError("Expected all tensors on the same device, found cuda:0 and cpu!")) is None
    assert failure("train", ValueError("CUDA")) is None


def test_cudnns_attention_is_off_once_a_model_is_asked_for(flux_folder: Path) -> None:
    """Also for a GPU this machine may not have: the switch is torch's own, for all of the process."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(str(flux_folder), device=torch.device("meta"), dtype=torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
