"""Predictions of exported networks, and what is no program or image."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastfuse import cli
from fastfuse.errors import InputError
from fastfuse.train.predict import predict, read_image
from tests.train.exported import labelled_images, trained


def test_predictions_are_those_of_the_network(finished, program, tiny_npz, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="no Pillow, which reads images")
    files = []
    for i, pixels in enumerate(np.load(tiny_npz)["test_images"][:3]):
        files.append(str(tmp_path / f"{i}.png"))
        image.fromarray(pixels).save(files[-1])
    capsys.readouterr()
    assert cli.main(["predict", str(program), *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        wanted = trained(finished)(labelled_images(tiny_npz)[0][:3]).logits.softmax(1)
    for one, file, shares in zip(found, files, wanted, strict=True):
        assert one["image"] == file and len(one["top"]) == 3
        best = [(row["class"], row["probability"]) for row in one["top"]]
        order = shares.argsort(descending=True)
        assert [name for name, _ in best] == [str(i) for i in order.tolist()]
        torch.testing.assert_close(torch.tensor([share for _, share in best]), shares[order], rtol=1e-4, atol=1e-5)
    assert cli.main(["predict", str(program), *files]) == 0
    table = capsys.readouterr().out
    assert all(file in table for file in files) and f"{found[0]['top'][0]['probability']:.4f}" in table


def test_a_file_that_is_no_image_does_not_stop_the_others(program, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="no Pillow, which reads images")
    image.new("L", (20, 9), 200).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    names = [str(tmp_path / name) for name in ("bad.png", "missing.png", "cut.png", "good.png")]
    capsys.readouterr()
    assert cli.main(["predict", str(program), *names]) == 2
    captured = capsys.readouterr()
    assert names[-1] in captured.out
    lines = captured.err.splitlines()
    assert [line.split(" cannot be read: ")[0] for line in lines] == [f"fastfuse: {name}" for name in names[:3]]
    assert lines[1].endswith("it does not exist")


def test_images_are_made_rgb_resized_on_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="no Pillow, which reads images")
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, :, 0] = np.arange(20)
    image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", (8, 8))[0, 3].tolist() == list(range(6, 14))
    assert read_image(tmp_path / "wide.png", (4, 10)).shape == (3, 4, 10)
    image.new("RGBA", (30, 50), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", (16, 12))[:, 2, 3].tolist() == [10, 20, 30]
    image.new("L", (5, 5), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", (8, 8)).unique().tolist() == [7]


def test_a_prediction_needs_no_networks_of_this_package(program, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="no Pillow, which reads images")
    image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    code = (
        "import sys; from fastfuse import cli; status = cli.main(sys.argv[1:])\n"
        "assert not [m for m in sys.modules if m.startswith(('fastfuse.models', 'fastfuse.methods', 'fastfuse.nn'))]\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "predict", str(program), str(tmp_path / "black.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "black.png" in done.stdout, done.stderr


def test_what_is_no_program_is_refused(finished, program, tmp_path, capsys):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    torch.export.save(torch.export.export(Twice(), (torch.zeros(1),)), tmp_path / "other.pt2")
    (tmp_path / "damaged.pt2").write_bytes(program.read_bytes()[:-5000])
    refusals = {
        tmp_path / "missing.pt2": "does not exist",
        finished / "leader.safetensors": r"is no \.pt2 file",
        tmp_path / "damaged.pt2": "damaged or another kind of file",
        tmp_path / "other.pt2": "does not say how images are normalised",
    }
    for file, message in refusals.items():
        with pytest.raises(InputError, match=message):
            list(predict(file, [tmp_path / "image.png"]))
    assert cli.main(["predict", str(program)]) == 2
    assert "needs an exported file and images" in capsys.readouterr().err
