import itertools
import math
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from crevnet.command import CONFIGS, load_config, parse_train_config, save_config, train_parser
from crevnet.config import FeedingConfig, OptimiserConfig, RunConfig, TrainConfig
from crevnet.data import MovingMNISTConfig, VideosConfig
from crevnet.model import CrevNetConfig

PAPER = ["moving_mnist_convlstm", "moving_mnist_stlstm"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimiserConfig(learning_rate=0), "optimiser.learning_rate must be positive, got 0"),
        (lambda: OptimiserConfig(learning_rate=-1e-3), "optimiser.learning_rate must be positive, got -0.001"),
        (lambda: OptimiserConfig(learning_rate=math.nan), "optimiser.learning_rate must be positive, got nan"),
        (lambda: OptimiserConfig(warmup_steps=-1), "optimiser.warmup_steps and optimiser.clip_norm"),
        (lambda: OptimiserConfig(clip_norm=-1.0), "optimiser.warmup_steps and optimiser.clip_norm"),
        (lambda: OptimiserConfig(schedule="linear"), "optimiser.schedule must be one of"),
        (lambda: OptimiserConfig(drop_every=0), "optimiser.drop_every must be at least 1, got 0"),
        (lambda: OptimiserConfig(drop_factor=0.0), "optimiser.drop_factor must be between 0 and 1, got 0.0"),
        (lambda: OptimiserConfig(drop_factor=1.0), "optimiser.drop_factor must be between 0 and 1, got 1.0"),
        (lambda: OptimiserConfig(drop_factor=math.nan), "optimiser.drop_factor must be between 0 and 1, got nan"),
        (lambda: FeedingConfig(kind="scheduled"), "got fall_from=0, fall_to=0"),
        (lambda: FeedingConfig(kind="scheduled", fall_from=9, fall_to=5), "got fall_from=9, fall_to=5"),
        (lambda: FeedingConfig(kind="scheduled", fall_from=-1, fall_to=5), "got fall_from=-1, fall_to=5"),
        (lambda: FeedingConfig(kind="student"), "feeding.kind must be one of"),
        (lambda: RunConfig(checkpoint_every=0), "run.checkpoint_every must be at least 1, got 0"),
        (lambda: RunConfig(keep=0), "run.keep must be at least 1, got 0"),
        (lambda: RunConfig(validate_every=-5), "run.validate_every must be at least 1, got -5"),
        (lambda: RunConfig(validation_sequences=0), "run.validation_sequences must be at least 1"),
        (lambda: RunConfig(log_every=0), "run.log_every must be at least 1"),
        (lambda: RunConfig(workers=-1), "run.workers and run.threads must not be negative"),
        (lambda: RunConfig(threads=-1), "run.workers and run.threads must not be negative"),
        (lambda: RunConfig(precision="16-mixed"), "run.precision must be one of"),
        (lambda: TrainConfig(steps=-1), "steps must not be negative and batch_size at least 1, got -1 and 16"),
        (lambda: TrainConfig(seed=-1), "seed must be 0 to 2**32 - 1, got -1"),
        (lambda: TrainConfig(seed=2**32), "seed must be 0 to 2**32 - 1, got 4294967296"),
        (lambda: TrainConfig(batch_size=0), "got 300000 and 0"),
        (
            lambda: TrainConfig(data=MovingMNISTConfig(image_size=32)),
            "data.image_size 32 and model.image_size 64 differ",
        ),
        (
            lambda: TrainConfig(data=MovingMNISTConfig(image_size=8, digit_size=4), model=CrevNetConfig(image_size=8)),
            "model.image_size must be at least 11, the window of SSIM, got 8",
        ),
        (lambda: TrainConfig(observed=2), "observed must be at least model.clip (3) and below data.frames (20), got 2"),
        (lambda: TrainConfig(observed=20), "below data.frames (20), got 20"),
        (
            lambda: TrainConfig(
                data=VideosConfig(train=Path("films"), channels=1), run=RunConfig(folder=Path("films/run"))
            ),
            "run.folder films/run lies within data.train films, where its pictures would be read as videos",
        ),
    ],
)
def test_values_out_of_range_are_named_with_what_was_given(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--observed=99", "observed must be at least model.clip (2) and below data.frames (6), got 99"),
        ("--model.image_size=18", "data.image_size 16 and model.image_size 18 differ"),
        ("--optimiser.learning_rate=-1", "optimiser.learning_rate must be positive"),
        ("--optimiser.schedule=linear", "optimiser.schedule"),
        ("--steps=many", "steps"),
        ("--optimiser.lr=1", "optimiser.lr"),
    ],
)
def test_a_command_line_out_of_range_ends_with_status_2_and_the_reason(argument, message, tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_config("test", "", [*tiny.arguments(None), argument])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_limits_that_are_allowed():
    TrainConfig(observed=3)
    TrainConfig(observed=19)
    TrainConfig(steps=0)
    FeedingConfig(kind="teacher", fall_from=9, fall_to=5)


def test_the_command_line_makes_the_configuration_of_its_options(tiny, tmp_path):
    options = tiny.scheduled | {"optimiser.betas": [0.5, 0.75], "data.root": tmp_path}
    found = parse_train_config("test", "", tiny.arguments(tmp_path / "run", options))
    assert found == tiny.config(tmp_path / "run", options)


# --- schedules ---


def test_constant_learning_rate():
    assert {OptimiserConfig(learning_rate=0.25).rate(step, 100) for step in range(100)} == {0.25}


def test_the_learning_rate_warms_up_linearly_and_reaches_its_value_with_the_last_warm_up_step():
    optimiser = OptimiserConfig(learning_rate=0.8, warmup_steps=4)
    assert [optimiser.rate(step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_cosine_falls_from_the_learning_rate_to_almost_zero():
    optimiser = OptimiserConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine")
    rates = [optimiser.rate(step, 110) for step in range(10, 110)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(1.0)
    assert rates[25] == pytest.approx(1 + math.sqrt(0.5))
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 0.99))


def test_cosine_of_a_run_that_only_warms_up():
    optimiser = OptimiserConfig(learning_rate=1.0, warmup_steps=8, schedule="cosine")
    assert [optimiser.rate(step, 4) for step in range(4)] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


def test_the_learning_rate_drops_after_so_many_steps_of_the_run_whatever_their_number():
    optimiser = OptimiserConfig(learning_rate=0.8, warmup_steps=2, schedule="step", drop_every=3, drop_factor=0.5)
    expected = [0.4, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2]
    for steps in (8, 100):
        assert [optimiser.rate(step, steps) for step in range(8)] == pytest.approx(expected)


def test_teacher_forcing_and_free_running_never_change():
    for step in (0, 10, 10**6):
        assert FeedingConfig(kind="teacher").truth_probability(step) == 1
        assert FeedingConfig(kind="free").truth_probability(step) == 0


def test_scheduled_feeding_falls_linearly_from_one_to_zero():
    feeding = FeedingConfig(kind="scheduled", fall_from=10, fall_to=20)
    found = [feeding.truth_probability(step) for step in (0, 10, 11, 15, 19, 20, 500)]
    assert found == pytest.approx([1, 1, 0.9, 0.5, 0.1, 0, 0])


def test_predicted_frames_are_those_after_the_observed_ones(tiny):
    assert tiny.config().predicted == 3
    assert TrainConfig().predicted == 10


# --- files ---


def test_a_written_configuration_is_read_back_equal(tiny, tmp_path):
    odd = {
        "model.blocks": [2, 1],
        "model.stacking": "channels",
        "model.mode": "stored",
        "data.root": tmp_path,
        "data.speed": [1.5, 1e5 / 3],
        "optimiser.betas": [0.5, 0.75],
        "optimiser.learning_rate": 1e-5 / 3,
        "feeding.kind": "scheduled",
        "feeding.fall_to": 7,
        "run.precision": "bf16-mixed",
        "seed": 12,
    }
    config = tiny.config(tmp_path / "run", odd)
    assert config.optimiser.learning_rate == 1e-5 / 3
    assert config.optimiser.betas == (0.5, 0.75)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_defaults_are_written_and_read_back(tmp_path):
    save_config(TrainConfig(), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == TrainConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_is_shipped_loads(path):
    videos = ["--data.train=films", "--data.test=others"] if path.stem in ("videos", "kitti") else []
    config = parse_train_config("test", "", [f"--config={path}", *videos])
    assert config.predicted >= 1
    assert config.data.image_size == config.model.image_size


def test_all_shipped_configurations_were_found():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"quick", *PAPER}


def test_what_the_paper_says_of_kitti():
    config = parse_train_config(
        "test", "", [f"--config={CONFIGS / 'kitti.yaml'}", "--data.train=films", "--data.test=others"]
    )
    assert config.model.frame_size == (128, 160)
    assert (3 * sum(config.model.blocks), config.model.modules) == (48, 40)
    assert (config.observed, config.predicted) == (10, 1)
    assert not config.data.test_overlap  # as PredNet's evaluation, which the paper follows


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.model == CrevNetConfig(
        cell=name.rpartition("_")[2],
        channels=1,
        image_size=64,
        clip=3,
        stacking="depth",
        blocks=(4, 5, 3),
        modules=8,
        clips_at_once=20,
    )
    assert 3 * sum(config.model.blocks) == 36  # three convolutions per block
    assert config.optimiser == OptimiserConfig(
        learning_rate=5e-4, betas=(0.9, 0.999), clip_norm=0, warmup_steps=0, schedule="step"
    )
    rates = [config.optimiser.rate(step, config.steps) for step in (0, 249_999, 250_000, 299_999)]
    assert rates == pytest.approx([5e-4, 5e-4, 1e-4, 1e-4])
    assert (config.steps, config.batch_size) == (300_000, 16)
    assert (config.observed, config.predicted) == (10, 10)
    assert (config.data.num_digits, config.data.image_size, config.data.test_sequences) == (2, 64, 5000)
    assert config.feeding.kind == "teacher"


def test_the_papers_setting_with_st_lstm_is_the_default_but_for_the_drop_and_speed_and_how_often_it_validates():
    config = load_config(CONFIGS / "moving_mnist_stlstm.yaml")
    config.optimiser.schedule = TrainConfig().optimiser.schedule
    config.run.validate_every = TrainConfig().run.validate_every
    config.model.clips_at_once = TrainConfig().model.clips_at_once
    assert config == TrainConfig()


def test_options_after_a_file_override_it():
    config = parse_train_config(
        "test", "", [f"--config={CONFIGS / 'quick.yaml'}", "--steps=7", "--optimiser.betas=[0.5,0.9]"]
    )
    assert (config.steps, config.optimiser.betas) == (7, (0.5, 0.9))
    assert config.model.blocks == load_config(CONFIGS / "quick.yaml").model.blocks


def test_every_option_is_explained_by_help():
    parser = train_parser("test", "")
    assert isinstance(parser, ArgumentParser)
    unexplained = [a.option_strings for a in parser._actions if a.option_strings and not a.help]
    text = " ".join(parser.format_help().split())
    assert "Learning rate after warm-up." in text
    assert "Largest norm of the whole gradient; 0 does not clip." in text
    assert unexplained == []


@pytest.mark.parametrize(("given", "size"), [("auto", None), (5, 5), ("2 KiB", 2048), ("1.5 MB", 1_500_000)])
def test_memory_is_bytes_or_what_is_free(given, size):
    assert RunConfig(memory=given).memory_bytes == size


@pytest.mark.parametrize("given", ["much", "4", -1, "4 GiB or so"])
def test_memory_of_another_form_is_refused(given):
    with pytest.raises(
        ValueError, match=r"run\.memory must be 'auto', bytes or a text such as '4 GiB' or '500 MB', got"
    ):
        RunConfig(memory=given)
