"""Progress bars outside a terminal."""

import re
import time

from dualsm.process import progress


def test_a_bar_in_a_log_is_lines_at_intervals(capsys, monkeypatch):
    """Lines printed above the bar neither erase nor repeat it, as they do in a terminal."""
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.05)
    start = time.monotonic()
    with progress.bar(total=40, desc="training", unit="step") as bar:
        for step in range(40):
            time.sleep(0.005)
            bar.update()
            progress.say(f"step {step}")
    seconds = time.monotonic() - start
    printed, log = capsys.readouterr()
    assert printed.splitlines() == [f"step {step}" for step in range(40)]
    assert "\r" not in log
    assert all(re.match(r"training: +\d+%\|", line) for line in log.splitlines())
    assert 2 <= len(log.splitlines()) <= seconds / 0.05


def test_a_short_task_has_no_bar_in_a_log(capsys):
    with progress.bar(total=1, desc="reading") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
