import io
import json
import math
import threading
import time

import pytest
from rich.console import Console

from gpt.config import LogConfig, TrainConfig, UsageError
from gpt.training.metrics import Reporter, Silent, Smoothed, as_settings, drop_later_records


def record(step, **more):
    return {"step": step, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 12345.6, **more}


def reporter_on(run, *, terminal=False, first_step=0, **log):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    reporter = Reporter(
        run,
        LogConfig(**log),
        console=console,
        first_step=first_step,
        max_steps=100,
        settings=as_settings(TrainConfig()),
    )
    return reporter, console.file


def test_plain_output_has_one_line_for_each_record(tmp_path):
    reporter, output = reporter_on(tmp_path)
    with reporter:
        reporter.step(record(10))
        reporter.evaluation(
            {"step": 10, "validation_loss": 2.25, "bits_per_byte": 3.25}, best=True, sample="a\nb"
        )
        reporter.step(record(20, mfu=0.415))
    first, validation, a, b, last = output.getvalue().splitlines()
    assert first.startswith("step  10/100  loss 2.5000  val   -     lr 1.0e-03  12,346 tok/s  0:00")
    assert validation == "step 10: validation 2.2500 nats/token, 3.2500 bits/byte (best so far)"
    assert (a, b) == ("  │ a", "  │ b")
    assert "val 2.2500" in last
    assert "MFU 41.5%" in last
    assert "\x1b" not in output.getvalue()


def test_a_sample_is_shown_unchanged_line_by_line(tmp_path):
    reporter, output = reporter_on(tmp_path)
    long = "[b]word :cat: " * 30
    with reporter:
        reporter.evaluation(
            {"step": 10, "validation_loss": 2.25, "bits_per_byte": 3.25}, best=True, sample=long
        )
    assert output.getvalue().splitlines()[1] == f"  │ {long}"


def test_on_a_terminal_there_is_a_bar_with_the_same_figures(tmp_path):
    reporter, output = reporter_on(tmp_path, terminal=True)
    with reporter:
        reporter.step(record(50))
        reporter._progress.refresh()
    assert "\x1b" in output.getvalue()
    assert " 50/100 loss 2.5000" in output.getvalue()
    assert "━" in output.getvalue()


def test_metrics_have_one_json_object_on_each_line(tmp_path):
    reporter, _ = reporter_on(tmp_path)
    with reporter:
        reporter.step(record(10))
        reporter.evaluation(
            {"step": 10, "validation_loss": 2.25, "bits_per_byte": 3.25}, best=False, sample=""
        )
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there while the run goes
    assert json.loads(lines[0]) == record(10)
    assert json.loads(lines[1]) == {"step": 10, "validation_loss": 2.25, "bits_per_byte": 3.25}


def test_a_resumed_run_writes_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (10, 20, 30)) + '{"step": 4')
    drop_later_records(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_smoothing_starts_unbiased_and_follows():
    smooth = Smoothed(decay=0.5)
    assert math.isnan(smooth.value)
    smooth.add(4.0)
    assert smooth.value == pytest.approx(4)
    smooth.add(1.0)
    assert smooth.value == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)


def test_wandb_offline_keeps_the_metrics_in_the_run(tmp_path):
    reporter, _ = reporter_on(tmp_path, wandb="offline")
    with reporter:
        reporter.step(record(10))
        reporter.evaluation(
            {"step": 10, "validation_loss": 2.25, "bits_per_byte": 3.25}, best=True, sample="x"
        )
    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 60  # wandb's own process writes the file
    while b"batch_tokens" not in (content := log.read_bytes()) and time.monotonic() < end:
        threading.Event().wait(0.1)
    for field in (b"tokens_per_second", b"validation_loss", b"bits_per_byte", b"batch_tokens"):
        assert field in content


def test_the_bar_and_its_figures_fit_80_columns(tmp_path):
    reporter, output = reporter_on(tmp_path, terminal=True)
    reporter._console.width = 80
    with reporter:
        reporter._validation = 1.2345
        reporter._max_steps = 10_000
        reporter.step(record(5_000))
        reporter._progress.refresh()
    assert "12,346 tok/s 0:00:00<0:00:0" in output.getvalue()


def test_wandb_without_a_login_is_a_one_line_error(tmp_path, monkeypatch):
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match="log.wandb is 'online', and wandb cannot start: No"):
        reporter_on(tmp_path, wandb="online")


def test_a_restarted_run_has_step_0_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "validation_loss": 4.0}\n')
    reporter, _ = reporter_on(tmp_path)
    with reporter:
        pass
    assert path.read_text() == ""


def test_wandb_keeps_its_run_over_a_resume_and_each_step_once(tmp_path, monkeypatch):
    import wandb

    sent = []

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, record):
            sent.append((record["step"], "loss" in record))

        def finish(self, exit_code):
            assert exit_code == 0

    started = []
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or Run())
    reporter, _ = reporter_on(tmp_path, wandb="offline")
    evaluation = {"validation_loss": 2.0, "bits_per_byte": 3.0}
    with reporter:
        for step in (10, 20, 30):
            reporter.step(record(step))
    reporter, _ = reporter_on(tmp_path, first_step=20, wandb="online")
    with reporter:
        for step in (30, 40):  # 30 a second time, of which a kill had left the evaluation out
            reporter.step(record(step))
            reporter.evaluation({"step": step, **evaluation}, best=True, sample="")
    whole = [(10, True), (20, True), (30, True), (30, False), (40, True), (40, False)]
    assert sent == whole
    one, two = started
    assert one["id"] == two["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert (one["resume"], two["resume"]) == (None, "allow")
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(r["step"], "loss" in r) for r in records] == whole


def test_two_real_offline_runs_have_one_id(tmp_path):
    for first_step in (0, 10):
        reporter, _ = reporter_on(tmp_path, wandb="offline", first_step=first_step)
        with reporter:
            reporter.step(record(first_step + 10))
    run_id = (tmp_path / "wandb_id").read_text().strip()
    started = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(started) == 2
    assert all((path / f"run-{run_id}.wandb").exists() for path in started)


def test_a_damaged_line_in_the_metrics_is_deleted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n{"st\xffep": 15}\nnull\n{"step": 20}\n{"step": 30}\n')
    assert {kind[0] for kind in drop_later_records(path, 20)} == {10, 20, 30}
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'


def test_flushing_brings_the_records_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("gpt.training.metrics.os.fsync", synced.append)
    reporter, _ = reporter_on(tmp_path)
    with reporter:
        reporter.step(record(10))
        reporter.flush()
        assert synced == [reporter._file.fileno()]


def test_a_skipped_update_is_a_record_and_a_line(tmp_path):
    reporter, output = reporter_on(tmp_path)
    with reporter:
        reporter.skipped({"step": 1234, "skipped": 1}, "the loss is nan")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1234, "skipped": 1}
    assert "step 1,234: the loss is nan" in output.getvalue()


def test_the_silent_reporter_has_all_methods_of_a_reporter():
    public = {name for name in vars(Reporter) if not name.startswith("_")}
    assert public == {name for name in vars(Silent) if not name.startswith("_")}
