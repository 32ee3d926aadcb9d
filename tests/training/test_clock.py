"""Throughput includes all time of a run; waiting for data includes only time in which devices are idle."""

import time
from types import SimpleNamespace

import pytest

from dualsm.data.batches import read_batches
from dualsm.rundir.metrics import MetricsWriter, read_metrics
from dualsm.training.loop import train
from dualsm.training.program import compile_train_step
from tests.micro import micro_config

DELAY = 0.1


@pytest.fixture(scope="module")
def run(corpus_path, tmp_path_factory):
    """Trains with a log line per step; batches and log lines are delayed as on a slow disk.

    Returns:
      The metrics of each line; the time of each line; for each batch, True if the devices were idle.
    """
    config = micro_config(corpus_path)
    config.mesh.data, config.steps, config.log.every = -1, 6, 1
    config.valid.objectives, config.checkpoint.every = "", 100
    written, idle, results = [], [], []
    write = MetricsWriter.write

    def slow_write(*arguments):
        written.append(time.perf_counter())
        time.sleep(DELAY)
        write(*arguments)

    def slow_steps(*arguments):
        batches = read_batches(*arguments)
        while True:
            idle.append(all(sums.loss.is_ready() for sums in results))
            time.sleep(DELAY)
            yield next(batches)

    def observed_program(*arguments):
        program = compile_train_step(*arguments)

        def step(state, batch):
            state, sums = program.step(state, batch)
            results.append(sums)
            return state, sums

        return program._replace(step=step)

    workdir = tmp_path_factory.mktemp("clock") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "write", slow_write)
        patch.setattr("dualsm.training.loop.read_batches", slow_steps)
        patch.setattr("dualsm.training.loop.compile_train_step", observed_program)
        train(config, workdir)
    tokens = config.batch_size * config.seq_len
    lines = read_metrics(workdir)
    seconds = [tokens / line["perf/tokens_per_second"] for line in lines]
    return SimpleNamespace(lines=lines, seconds=seconds, written=written, idle=idle)


def test_throughput_includes_the_time_of_writing_log_lines(run):
    assert len(run.lines) == 6
    assert sum(run.seconds[1:]) == pytest.approx(run.written[-1] - run.written[0], abs=DELAY)


def test_waiting_for_data_is_measured(run):
    for line, seconds in zip(run.lines[1:-1], run.seconds[1:-1], strict=True):
        assert DELAY <= line["perf/data_wait_fraction"] * seconds <= seconds - DELAY  # the rest is writing


def test_devices_are_idle_while_the_loop_waits_for_data(run):
    assert run.idle == [True] * 6
