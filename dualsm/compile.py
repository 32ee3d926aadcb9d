"""Compiles a config's train step for absent devices, and reports memory, FLOPs and communication.

python -m dualsm.compile --config=configs/dual_470m.py --topology=v5e:4x4
python -m dualsm.compile --config=configs/dual_7b.py --topology=v5p:8x8x8 --output=report.json
python -m dualsm.compile --config=configs/dual_470m.py --topology=h200:8 --config.model.attention=flash

TPU slices need libtpu (pip install 'dualsm[tpu]'), and GPUs of one host need JAX's CUDA plugin (pip install
'dualsm[cuda]'). The exit status is 2 if the step does not fit in the memory that JAX uses: all memory of a
TPU, and the fraction XLA_CLIENT_MEM_FRACTION of a GPU's memory, by default 75%.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dualsm import config as configs
from dualsm.aot.absent import absent_devices
from dualsm.aot.hlo import analyze
from dualsm.aot.report import (
    MEMORY_FRACTION,
    TO_SAVE_MEMORY,
    as_text,
    block_fraction,
    compile_step,
    gib,
    make_report,
    special_ids,
)
from dualsm.devices import sharding
from dualsm.devices.chips import CHIPS
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path
from dualsm.process.progress import say
from dualsm.training.program import compile_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file; see configs/")
_TOPOLOGY = flags.DEFINE_string("topology", None, f"for example v5e:4x4 or h200:8; chips: {', '.join(CHIPS)}")
_OUTPUT = cli.DEFINE_path("output", None, "JSON file for the report")
_HLO = cli.DEFINE_path("hlo", None, "text file for the compiled HLO")
flags.mark_flags_as_required(["config", "topology"])


def main(_: Sequence[str]) -> None:
    config = cli.config(_CONFIG)
    configs.check_config(config)
    if not config.model.vocab_size:
        raise UserError("config.model.vocab_size=0; set it, because this command does not read the corpus")
    devices = absent_devices(_TOPOLOGY.value)
    mesh = sharding.make_mesh(config.mesh, devices)
    config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
    say(f"compiling for {len(devices)} x {devices[0].device_kind}; this takes minutes ...")
    program = compile_train_step(config, special_ids(config), mesh)
    compiled = compile_step(config, program, mesh)
    text = compiled.as_text()
    if _HLO.value:
        user_path(_HLO.value).write_text(text)
    work = analyze(text, mesh.size, block_fraction(config, devices[0].platform))
    report = make_report(config, _TOPOLOGY.value, mesh, program, compiled.memory_analysis(), work)
    say(as_text(report))
    if _OUTPUT.value:
        user_path(_OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n")
    memory = report["memory"]
    if memory["total"] > memory["usable"]:
        hint = f", or set {MEMORY_FRACTION[0]}" if memory["usable"] < memory["chip"] else ""
        raise UserError(
            f"does not fit: the step needs {gib(memory['total'])} GiB per chip and JAX uses at most "
            f"{gib(memory['usable'])} GiB; {TO_SAVE_MEMORY}{hint}"
        )


if __name__ == "__main__":
    cli.run(main)
