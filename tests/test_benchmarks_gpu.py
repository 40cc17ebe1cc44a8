"""What only a GPU can show of the benchmarks: that counts and memory are seen there."""

import json

import pytest

from benchmarks import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("model", "shape", "name"),
    [
        pytest.param("resnet8", ["--batch-size", "32"], "step_resnet8_s2_b32_bf16_cuda", id="cifar"),
        pytest.param(
            "resnet18",
            ["--batch-size", "8", "--image-size", "128"],
            "step_resnet18_s2_b8_i128_bf16_cuda",
            id="imagenet",
        ),
    ],
)
def test_every_form_is_measured_with_its_kernels_waits_and_memory(model, shape, name, tmp_path):
    arguments = ["--suite", "step", "--device", "cuda", "--model", model, *shape, "--repeats", "2"]
    assert run.main([*arguments, "--modes", "eager,graphed", "--providers", PROVIDERS, "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    rows = {row["provider"]: row for row in saved["rows"]}
    forms = [f"{mode}/{strategy}" for mode in ("eager", "graphed") for strategy in ("loop", "branches", "grouped")]
    assert {f"fastfuse {form}" for form in forms} < set(rows)
    assert saved["settings"]["copy_gb_per_s"] > 0 and saved["settings"]["matrix_tflop_per_s"] > 0
    assert rows["published"]["waits"] >= 21
    for name, row in rows.items():
        assert row["kernels"] > 0 and row["launches"] > 0 and row["peak_mb"] > 0, name
        assert 0 < row["of_roofline"] < 1, name
        if row["mode"] != "-":
            assert row["waits"] == 0, name
        if row["mode"] == "graphed":
            assert row["launches"] < 10 < row["kernels"], name


def test_an_epoch_is_graphed(tmp_path):
    arguments = ["--suite", "epoch", "--device", "cuda", "--model", "resnet8", "--batch-size", "32", "--images", "100"]
    assert run.main([*arguments, "--modes", "graphed", "--strategies", "loop", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "epoch_resnet8_s2_b32_bf16_cuda.json").read_text())["rows"]
    assert row["images_per_s"] > 0


PROVIDERS = "published,published-amp,networks-only,fastfuse"
