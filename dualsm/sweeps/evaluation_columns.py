"""Columns of a cell's record that come from the results of `dualsm.evaluate`."""

from __future__ import annotations

from etils import epath

from dualsm.sweeps.cell_files import Record, number, read_object


def evaluation_columns(workdir: epath.Path) -> Record:
    """Returns the columns of all files in `eval/`; results of later checkpoints take precedence.

    Args:
      workdir: run directory of the cell.
    """
    folder = workdir / "eval"  # `glob` would also interpret characters of the folder, as in "runs[1]"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in found if path.suffix == ".json" and path.name[0] != "."]
    results = [read_object(path) for path in found]
    columns = {}
    for result in sorted(results, key=lambda result: result.get("checkpoint", 0)):
        for task, modes in result.get("tasks", {}).items():
            columns |= {f"task/{task}/{mode}": number(m["normalised"]) for mode, m in modes.items()}
            columns |= {
                f"answer/{task}/{mode}/bits_per_byte": number(m["answer"]["bits_per_byte"])
                for mode, m in modes.items()
                if "answer" in m  # absent from results of earlier versions
            }
        for objective, measured in result.get("held_out", {}).items():
            columns |= _held_out_columns(f"held_out/{objective}", measured)
            for domain, part in measured.get("domains", {}).items():
                columns |= _held_out_columns(f"held_out/{objective}/{domain}", part)
        for name in ("greedy", "sampled"):
            if measured := result.get("acceptance", {}).get(name):
                columns[f"acceptance/{name}"] = number(measured["accepted_per_draft"])
                columns[f"acceptance/{name}/stderr"] = number(measured.get("stderr"))
        if measured := result.get("infilling"):
            names = ("accuracy", "stderr", "bits_per_byte")
            columns |= {f"infilling/{name}": number(measured[name]) for name in names}
    return columns


def _held_out_columns(name: str, measured: dict) -> Record:
    """Returns the held-out loss and its standard error, which results of earlier versions lack."""
    columns = {f"{name}/loss": number(measured["nats_per_token"])}
    return columns | ({f"{name}/stderr": number(measured["stderr"])} if "stderr" in measured else {})
