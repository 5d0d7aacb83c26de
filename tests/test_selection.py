from __future__ import annotations

from types import SimpleNamespace

import pytest

from optpipe import plugins, selection
from optpipe.errors import MissingError, UsageError
from optpipe.types import Precision, Target

LACKS = {"tensorrt": "no libnvinfer: pip install it", "inductor": "no compiler: install g++"}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The backends that load on the pretended machine; a test adds to it."""
    found: set[str] = set()
    offered: dict[str, dict[str, tuple[Precision, ...]]] = {
        "inductor": {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")},
        "onnxruntime": {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")},
        "openvino": {"cpu": ("fp32", "bf16", "int8")},
        "tensorrt": {"cuda": ("fp32", "fp16", "int8")},
    }

    def missing(name: str, target: Target) -> str | None:
        if name == "tensorrt" and "prefer_nhwc" in dict(target.options):
            raise UsageError("target.options.prefer_nhwc is not tensorrt's")
        return None if name in found else LACKS.get(name, f"no {name}")

    def backend(name: str) -> object:
        return SimpleNamespace(
            missing=lambda target: missing(name, target),
            precisions=lambda device: offered[name].get(device, ()),
        )

    monkeypatch.setattr(plugins, "backend", backend)
    monkeypatch.setattr(plugins, "names", lambda room: sorted(offered))
    return found


def target(backend: str, device: str = "cpu", precision: Precision = "fp32") -> Target:
    return Target(backend, 4, (3, 8, 8), precision, device)


def test_on_a_processor_auto_is_onnxruntime_without_a_word(loads: set[str]) -> None:
    loads |= {"onnxruntime", "openvino"}
    assert selection.select(target("auto")) == selection.Selected(("onnxruntime",))


def test_on_a_gpu_auto_is_tensorrt_where_it_loads(loads: set[str]) -> None:
    loads |= {"onnxruntime", "tensorrt", "inductor"}
    found = selection.select(target("auto", "cuda"))
    assert found.names == ("tensorrt",)
    assert found.note == "tensorrt builds the engines on cuda: the first choice, and it loads"


def test_on_a_gpu_auto_says_why_it_passes_over_a_backend(loads: set[str]) -> None:
    loads |= {"inductor"}
    found = selection.select(target("auto", "cuda"))
    assert found.names == ("inductor",)
    assert found.note == (
        "inductor builds the engines on cuda: it loads, tensorrt does not: no libnvinfer: pip install it; "
        "onnxruntime does not: no onnxruntime"
    )


def test_auto_passes_over_a_backend_that_does_not_run_the_precision(loads: set[str]) -> None:
    loads |= {"inductor", "onnxruntime", "tensorrt"}
    found = selection.select(target("auto", "cuda", "bf16"))
    assert found.names == ("inductor",)
    assert "tensorrt does not: runs fp32, fp16, int8 on cuda, not bf16; onnxruntime does not" in found.note
    loads.remove("tensorrt")
    with pytest.raises(MissingError, match=r"tensorrt: no libnvinfer: pip install it; onnxruntime: runs"):
        selection.select(target("auto", "cuda", "int8"))


def test_where_nothing_loads_every_reason_is_named(loads: set[str]) -> None:
    with pytest.raises(MissingError, match=r"on cuda: tensorrt: .*; onnxruntime: .*; inductor:"):
        selection.select(target("auto", "cuda"))
    with pytest.raises(MissingError, match=r"^no onnxruntime$"):
        selection.select(target("auto"))


def test_a_backend_that_is_named_is_taken_or_an_error(loads: set[str]) -> None:
    loads |= {"onnxruntime", "inductor"}
    assert selection.select(target("inductor", "cuda")).names == ("inductor",)
    with pytest.raises(MissingError, match="no libnvinfer"):
        selection.select(target("tensorrt", "cuda"))


def test_fastest_holds_a_contest_of_all_that_load_at_the_precision(loads: set[str]) -> None:
    loads |= {"onnxruntime", "openvino", "inductor"}
    assert selection.select(target("fastest")).names == ("inductor", "onnxruntime", "openvino")
    found = selection.select(target("fastest", precision="int8"))
    assert found.names == ("onnxruntime", "openvino")
    assert dict(found.absent) == {
        "inductor": "runs fp32, bf16 on cpu, not int8",
        "tensorrt": "does not run on cpu",
    }


def test_fastest_takes_no_options_for_they_belong_to_one_backend(loads: set[str]) -> None:
    with pytest.raises(UsageError, match="takes none"):
        selection.select(Target("fastest", 4, (3, 8, 8), options=(("cuda_graph", "on"),)))


def test_a_device_that_is_neither_cpu_nor_cuda_is_refused(loads: set[str]) -> None:
    with pytest.raises(UsageError, match=r'target.device = "tpu": must be one of cpu, cuda'):
        selection.select(target("auto", "tpu"))


def test_auto_passes_over_a_backend_that_does_not_know_an_option_and_says_so(loads: set[str]) -> None:
    loads |= {"tensorrt", "onnxruntime"}
    asked = Target("auto", 4, (3, 8, 8), device="cuda", options=(("prefer_nhwc", "on"),))
    found = selection.select(asked)
    assert found.names == ("onnxruntime",)
    assert "tensorrt does not: target.options.prefer_nhwc is not tensorrt's" in found.note
    loads.remove("onnxruntime")
    with pytest.raises(UsageError, match="prefer_nhwc"):
        selection.select(asked)
