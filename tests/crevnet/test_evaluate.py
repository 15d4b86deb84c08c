import json
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch

from crevnet.data import MovingMNISTConfig
from crevnet.evaluate import evaluate, score
from crevnet.metrics import METRICS, copy_last_frame
from crevnet.run import load_run

pytestmark = pytest.mark.usefixtures("single_thread")
CPU = torch.device("cpu")


@pytest.fixture
def loaded(finished_run):
    return load_run(finished_run, "last", CPU)


def assert_close(found, expected, rel=1e-5):
    """Equal but for float32 convolutions, which round differently in batches of different sizes."""
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], rel=rel)
        assert found["per_frame"][name] == pytest.approx(expected["per_frame"][name], rel=rel)
        assert found["copy_last_frame"][name] == pytest.approx(expected["copy_last_frame"][name], rel=1e-12)
    assert found["sequences"] == expected["sequences"]


# --- score ---


def test_metrics_are_those_of_the_definition(loaded):
    dataset = loaded.config.data.build_test()
    result = score(loaded.model, dataset, 3, batch_size=2, device=CPU)
    frames = dataset.batch(range(5)).double()
    given, target = frames[:, :3], frames[:, 3:]
    prediction = loaded.model.predict(given.float(), 3).double().clamp(0, 1)
    for name, guess in (("ours", prediction), ("copied", copy_last_frame(given, 3))):
        mse = (guess - target).square().sum(dim=(2, 3, 4)).mean(dim=0)
        psnr = -10 * (guess - target).square().mean(dim=(2, 3, 4)).log10().mean(dim=0)
        found = result if name == "ours" else result["copy_last_frame"]
        assert found["mse"] == pytest.approx(float(mse.mean()), rel=1e-6)
        if name == "ours":
            assert found["per_frame"]["mse"] == pytest.approx(mse.tolist(), rel=1e-6)
            assert found["per_frame"]["psnr"] == pytest.approx(psnr.tolist(), rel=1e-6)
    assert set(result) == {*METRICS, "per_frame", "sequences", "copy_last_frame"}
    assert set(result["copy_last_frame"]) == set(METRICS)
    assert result["sequences"] == 5
    for name in METRICS:
        assert len(result["per_frame"][name]) == 3
        assert sum(result["per_frame"][name]) / 3 == pytest.approx(result[name])


def test_the_baseline_can_be_left_out(loaded, monkeypatch):
    dataset = loaded.config.data.build_test()
    usual = score(loaded.model, dataset, 3, batch_size=2, device=CPU)
    monkeypatch.setattr("crevnet.evaluate.copy_last_frame", None)
    del usual["copy_last_frame"]
    assert score(loaded.model, dataset, 3, batch_size=2, device=CPU, baseline=False) == usual


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_metrics_do_not_depend_on_the_batch_size(batch_size, loaded):
    dataset = loaded.config.data.build_test()
    found = score(loaded.model, dataset, 3, batch_size=batch_size, device=CPU)
    assert_close(found, score(loaded.model, dataset, 3, batch_size=3, device=CPU))


@pytest.mark.parametrize("sequences", [1, 5])
def test_metrics_do_not_depend_on_the_number_of_processes(sequences, loaded):
    """Two ranks as threads, whose sum waits for both; with one sequence the second rank gets none."""
    dataset = MovingMNISTConfig(image_size=16, digit_size=8, frames=6, test_sequences=sequences).build_test()
    meeting = threading.Barrier(2, timeout=300)
    slots = [None, None]
    results = [None, None]

    def work(rank):
        def all_reduce(x):
            slots[rank] = x
            meeting.wait()
            total = slots[0] + slots[1]
            meeting.wait()
            return total

        model = load_model()
        results[rank] = score(
            model, dataset, 3, batch_size=2, device=CPU, rank=rank, world_size=2, all_reduce=all_reduce
        )

    def load_model():
        model = loaded.config.model.build()
        model.load_state_dict(loaded.model.state_dict())
        return model

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = score(loaded.model, dataset, 3, batch_size=2, device=CPU)
    for result in results:
        assert_close(result, expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_and_its_weights_are_left(training, loaded, tiny):
    model = loaded.model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    score(model, loaded.config.data.build_test(), 3, batch_size=4, device=CPU)
    assert model.training is training
    tiny.assert_equal(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


# --- the command ---


def test_evaluating_repeats_the_metrics_of_training(finished_run, capsys):
    trained = json.loads((finished_run / "metrics.json").read_text())
    found = evaluate(finished_run, device="cpu")
    assert_close(found, trained)
    assert json.loads(capsys.readouterr().out) == found
    assert (found["run"], found["checkpoint"], found["data_range"]) == (str(finished_run), "best", 1.0)
    assert (found["data"], found["observed"], found["options"]) == (trained["data"], 3, {})
    assert found["step"] == trained["step"]


def test_the_result_says_what_was_measured(finished_run, tmp_path, monkeypatch):
    digits = MovingMNISTConfig(image_size=16, digit_size=8, test_sequences=2).build_test
    monkeypatch.setattr(MovingMNISTConfig, "build_test", lambda self, frames: digits(frames))
    found = evaluate(finished_run, device="cpu", root=tmp_path, num_digits=3, frames=5, test_sequences=2)
    assert (found["data"], found["tested_on"]) == ("MNIST", "Test digits never seen in training")
    assert found["options"] == {"root": str(tmp_path), "num_digits": 3, "frames": 5, "test_sequences": 2}


def test_a_json_file_is_written(finished_run, tmp_path, capsys):
    found = evaluate(finished_run, device="cpu", output=tmp_path / "new" / "metrics.json")
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == found
    assert json.loads(capsys.readouterr().out) == found


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(finished_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("crevnet.evaluate.load_run", None)
    with pytest.raises(OSError, match="cannot be written, choose another place") as error:
        evaluate(finished_run, device="cpu", output=tmp_path / "file" / "metrics.json")
    assert error.value.filename == str(tmp_path / "file" / "metrics.json")


def test_a_result_that_cannot_be_written_in_the_end_is_printed(finished_run, tmp_path, monkeypatch, capsys):
    def out_of_disk(self, *args, **kwargs):
        self.touch()
        raise OSError("no space left")

    (tmp_path / "metrics.json").write_text("before")
    monkeypatch.setattr(Path, "write_text", out_of_disk)
    with pytest.raises(OSError, match="no space left"):
        evaluate(finished_run, device="cpu", output=tmp_path / "metrics.json")
    assert json.loads(capsys.readouterr().out)["sequences"] == 5
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("metrics.json", "before")]


def test_options_of_the_data_can_be_changed(finished_run):
    usual = evaluate(finished_run, device="cpu")
    harder = evaluate(finished_run, device="cpu", num_digits=3, test_sequences=7)
    assert (usual["sequences"], harder["sequences"]) == (5, 7)
    assert harder["copy_last_frame"]["mse"] > 1.5 * usual["copy_last_frame"]["mse"]


def test_another_number_of_frames(finished_run):
    found = evaluate(finished_run, device="cpu", frames=8)
    assert len(found["per_frame"]["mse"]) == 5
    usual = evaluate(finished_run, device="cpu")
    assert found["per_frame"]["mse"][:3] == pytest.approx(usual["per_frame"]["mse"], rel=1e-5)


def test_another_checkpoint(finished_run):
    found = evaluate(finished_run, device="cpu", checkpoint="22")
    assert (found["step"], found["checkpoint"]) == (22, "22")
    assert found["mse"] != evaluate(finished_run, device="cpu", checkpoint="last")["mse"]


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["crevnet.evaluate", *map(str, options)])
    monkeypatch.delitem(sys.modules, "crevnet.evaluate")  # as if nobody had imported it
    runpy.run_module("crevnet.evaluate", run_name="__main__")


def test_the_command_line_prints_nothing_but_json(finished_run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "metrics.json"
    options = ["--checkpoint", 22, "--num_digits", 2, "--test_sequences", 3, "--batch_size", 2, "--device", "cpu"]
    main(monkeypatch, finished_run, *options, "--output", output)
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["sequences"]) == (22, 3)
    assert json.loads(output.read_text()) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "7"], "no such checkpoint, there are steps"),
        (["--checkpoint", "newest"], "checkpoint must be 'best', 'last' or the number of a step"),
        (["--num_digits", "0"], "num_digits must be at least 1, got 0"),
        (["--test_sequences", "0"], "test_sequences must be at least 1, got 0"),
        (["--frames", "3"], "--frames must be above the 3 frames that the model is given, got 3"),
        (["--frames", "0"], "--frames must be above the 3 frames that the model is given, got 0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch_size", "-4"], "batch_size must be at least 1, got -4"),
        (["--root", "/nonexistent/mnist"], "/nonexistent/mnist"),
    ],
)
def test_mistakes_end_with_a_message(options, message, finished_run, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, finished_run, *options)
    assert stop.value.code.startswith("error: ")  # a string: Python prints it to stderr and ends with status 1
    assert message in stop.value.code


def test_a_missing_run_ends_with_status_1_and_a_message(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path / "missing")
    assert stop.value.code == (
        f"error: {tmp_path}/missing is not the folder of a run: it has no config.yaml "
        "(python -m crevnet.train makes one)"
    )
    assert capsys.readouterr().out == ""
