import copy
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crevnet.baselines.convlstm import ConvLSTMConfig
from crevnet.baselines.vpn import VPNConfig
from crevnet.export import export, export_predictor, save_predictor
from crevnet.model import CrevNetConfig
from crevnet.packaged import load_predictor
from crevnet.run import load_run

pytestmark = pytest.mark.usefixtures("single_thread")

TINY = {"image_size": 16, "clip": 2, "blocks": (1,), "modules": 2}
CREVNETS = {
    "stlstm": {"cell": "stlstm"},
    "convlstm, channels, oblong": {"cell": "convlstm", "stacking": "channels", "channels": 2, "image_size": (8, 16)},
    "cells inverted, batch normalisation": {"cell_states": "inverted", "norm": "batch"},
}


def make(**options):
    """A model in training mode, with gates and running statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    model = CrevNetConfig(**TINY | options).build()
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 2
    model.predict(frames_for(model, 3), 2)
    return model


def frames_for(model, observed, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, observed, model.config.channels, *model.config.frame_size, generator=generator)


def in_float(model):
    """The same weights in float arithmetic, in eval mode."""
    model = copy.deepcopy(model).eval()
    model.config = replace(model.config, arithmetic="float", cell_states="kept")
    return model


# --- what is exported ---


@pytest.mark.parametrize("options", CREVNETS.values(), ids=CREVNETS)
def test_predictions_are_those_of_the_model(options):
    model = make(**options)
    frames = frames_for(model, 4)
    found = export_predictor(model, 4, 3).module()(frames)
    torch.testing.assert_close(found, in_float(model).predict(frames, 3), rtol=1e-6, atol=1e-7)
    exact = model.eval().predict(frames, 3)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_a_baseline():
    torch.manual_seed(0)
    model = ConvLSTMConfig(image_size=16, hidden=(4,)).build().eval()
    frames = frames_for(model, 3)
    found = export_predictor(model, 3, 2).module()(frames)
    torch.testing.assert_close(found, model.predict(frames, 2), rtol=1e-6, atol=1e-7)


def test_the_graph_needs_no_operator_but_pytorchs():
    graph = export_predictor(make(), 2, 2).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert {name for name in called if not name.startswith("aten.")} == {"<built-in function getitem>"}
    assert "aten.conv3d.default" in called


def test_the_model_is_left_as_it_is():
    model = make(norm="batch")
    before, config = copy.deepcopy(model.state_dict()), copy.copy(model.config)
    export_predictor(model, 2, 1)
    assert model.config == config
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("observed", "steps"), [(1, 2), (0, 2), (2, 0), (2, -1)])
def test_too_few_frames(observed, steps):
    message = rf"observed must be at least the model's clip \(2\) and steps at least 1, got {observed} and {steps}"
    with pytest.raises(ValueError, match=message):
        export_predictor(make(), observed, steps)


def test_what_generates_pixel_by_pixel_is_refused():
    with pytest.raises(ValueError, match="vpn generates pixel by pixel"):
        export_predictor(VPNConfig(image_size=16).build(), 2, 1)


# --- compiled ahead of time ---


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_ahead_of_time(tmp_path):
    model = make(blocks=(1,), modules=1, cell="convlstm", stacking="channels")
    save_predictor(model, tmp_path / "x.pt2", 2, 1, torch.device("cpu"))
    predictor = load_predictor(tmp_path / "x.pt2")
    assert predictor.signature.compiled_for == "cpu"
    for batch in (1, 3):
        frames = frames_for(model, 2, batch)
        wanted = in_float(model).predict(frames, 1)
        torch.testing.assert_close(predictor(frames), wanted, rtol=1e-6, atol=1e-6)
        transposed = frames.transpose(3, 4).contiguous().transpose(3, 4)  # as in memory, but for the strides
        torch.testing.assert_close(predictor(transposed), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"of shape \[B, 2, 1, 16, 16\] with B at least 1, got \[3, 3, 1, 16, 16\]"):
        predictor(frames_for(model, 3))
    with pytest.raises(ValueError, match=r"x.pt2 was compiled for cpu and cannot run on meta: export it once more"):
        load_predictor(tmp_path / "x.pt2", "meta")
    damaged = bytearray((tmp_path / "x.pt2").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "x.pt2").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"x.pt2 is damaged: .* in it is not what was written"):
        load_predictor(tmp_path / "x.pt2")


def test_what_cannot_be_compiled_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(program, package_path, inductor_configs):
        Path(package_path).write_text("half of it")
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(ValueError, match=r"leave out --aot: RuntimeError: No working C\+\+ compiler found"):
        save_predictor(make(), tmp_path / "x.pt2", 2, 1, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


# --- the command line ---


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["crevnet.export", *map(str, options)])
    monkeypatch.delitem(sys.modules, "crevnet.export")  # as if nobody had imported it
    runpy.run_module("crevnet.export", run_name="__main__")


def test_the_command_line(finished_run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "x.pt2"
    main(monkeypatch, finished_run, "--output", path)
    assert capsys.readouterr().out == f"3 frames predicted from 3: {path}\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.pt2"]
    model = load_run(finished_run, "best", torch.device("cpu")).model
    frames = frames_for(model, 3)
    torch.testing.assert_close(load_predictor(path)(frames), in_float(model).predict(frames, 3), rtol=1e-6, atol=1e-7)


def test_other_numbers_of_frames_and_another_checkpoint(finished_run, tmp_path, monkeypatch):
    path = tmp_path / "x.pt2"
    main(monkeypatch, finished_run, "--output", path, "--observed", 4, "--steps", 1, "--checkpoint", 22)
    model = load_run(finished_run, "22", torch.device("cpu")).model
    frames = frames_for(model, 4)
    torch.testing.assert_close(load_predictor(path)(frames), in_float(model).predict(frames, 1), rtol=1e-6, atol=1e-7)


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(finished_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("crevnet.export.load_run", None)
    with pytest.raises(OSError, match="cannot be written, choose another place"):
        export(finished_run, output=tmp_path / "file" / "x.pt2")


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x.onnx", [], "x.onnx: the output must be a .pt2 file"),
        (
            "x.pt2",
            ["--observed", 1],
            "observed must be at least the model's clip (2) and steps at least 1, got 1 and 3",
        ),
        ("x.pt2", ["--steps", 0], "got 3 and 0"),
        ("x.pt2", ["--device", "gpu"], "device must be auto, cpu or cuda, got 'gpu'"),
        ("x.pt2", ["--checkpoint", "3"], "no such checkpoint, there are steps"),
    ],
)
def test_mistakes_end_with_a_message_and_write_nothing(output, options, message, finished_run, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, finished_run, "--output", tmp_path / output, *options)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert list(tmp_path.iterdir()) == []
