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
    """Trains with a log line per step; batches, steps and log lines are slow.

    Steps are slow when they start, as on a CPU core that computes them before it returns.

    Returns:
      The metrics of each line; its seconds; the time at which its step had been computed; for each batch,
      True if the devices were idle.
    """
    config = micro_config(corpus_path)
    config.mesh.data, config.steps, config.log.every = -1, 6, 1
    config.valid.objectives, config.checkpoint.every = "", 100
    written, asked, idle, results = [], [], [], []
    write = MetricsWriter.write

    def slow_write(*arguments):
        written.append(time.perf_counter())
        time.sleep(DELAY)
        write(*arguments)

    def slow_batches(*arguments):
        batches = read_batches(*arguments)
        while True:
            asked.append(time.perf_counter())
            idle.append(all(sums.loss.is_ready() for sums in results))
            time.sleep(DELAY)
            yield next(batches)

    def observed_program(*arguments):
        program = compile_train_step(*arguments)

        def step(state, batch):
            time.sleep(DELAY)
            state, sums = program.step(state, batch)
            results.append(sums)
            return state, sums

        return program._replace(step=step)

    workdir = tmp_path_factory.mktemp("clock") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "write", slow_write)
        patch.setattr("dualsm.training.loop.read_batches", slow_batches)
        patch.setattr("dualsm.training.loop.compile_train_step", observed_program)
        train(config, workdir)
    tokens = config.batch_size * config.seq_len
    lines = read_metrics(workdir)
    seconds = [tokens / line["perf/tokens_per_second"] for line in lines]
    # The loop asks for the next batch when a step has been computed; the last line is written then.
    computed = [*asked[1:], written[-1]]
    return SimpleNamespace(lines=lines, seconds=seconds, computed=computed, idle=idle)


def test_intervals_are_contiguous(run):
    assert len(run.lines) == 6
    assert sum(run.seconds[1:]) == pytest.approx(run.computed[-1] - run.computed[0], abs=2 * DELAY)


def test_every_line_has_the_time_of_its_step_and_of_writing_the_line_before(run):
    assert min(run.seconds[1:]) > 3 * DELAY  # and of its batch


def test_waiting_for_data_is_measured(run):
    for line, seconds in zip(run.lines[1:], run.seconds[1:], strict=True):
        assert DELAY <= line["perf/data_wait_fraction"] * seconds <= seconds - 2 * DELAY


def test_devices_are_idle_while_the_loop_waits_for_data(run):
    assert run.idle == [True] * 6
