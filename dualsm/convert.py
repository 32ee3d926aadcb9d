"""Imports and exports weights of transformers and of the paper's released models, and averages checkpoints.

python -m dualsm.convert import --format=huggingface --weights=SmolLM2-135M --workdir=runs/smollm2
python -m dualsm.convert import --format=reference --weights=state_dict.safetensors --workdir=runs/released
python -m dualsm.convert export --format=huggingface --workdir=runs/tiny --output=exported
python -m dualsm.convert average --workdir=runs/tiny --last=2 --output=runs/average
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import config_flags

from dualsm.exchange import (
    average_checkpoints,
    export_huggingface,
    export_milestones,
    export_reference,
    import_huggingface,
    import_reference,
)
from dualsm.exchange.hub import local_path
from dualsm.exchange.sharded_files import DTYPES
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.paths import user_path
from dualsm.rundir.trained_run import PARAMETERS, TrainedRun, open_run

_FORMAT = flags.DEFINE_string("format", None, "huggingface or reference")
_WORKDIR = cli.DEFINE_path("workdir", None, "run directory; import creates it")
_WEIGHTS = cli.DEFINE_path(
    "weights", "", "import: model folder or hf://OWNER/NAME@BRANCH; for reference also a file of weights"
)
_TOKENIZER = cli.DEFINE_path(
    "tokenizer", "", "import: tokenizer file; default: tokenizer.json in the folder of the weights"
)
_MASK_TOKEN = flags.DEFINE_string(
    "mask_token", "", "import from huggingface: existing token to use as the mask; default: a new <mask>"
)
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "import: config for further training; default: all defaults, with the weights' shape",
)
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "export: step of the checkpoint; default: the latest")
_PARAMETERS = flags.DEFINE_enum(
    "parameters",
    "last",
    list(PARAMETERS),
    "export: last: the weights; ema: their moving average (config.ema)",
)
_CHECKPOINTS = flags.DEFINE_list("checkpoints", [], "average: steps of the checkpoints")
_LAST = flags.DEFINE_integer("last", 0, "average: number of newest checkpoints", lower_bound=0)
_OUTPUT = cli.DEFINE_path("output", "", "export: folder to create; average: run directory to create")
_MILESTONES = flags.DEFINE_bool(
    "milestones",
    False,
    "export to huggingface: one folder per checkpoint of config.checkpoint.at_words, such as chck_1M",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "export to huggingface: type of the weights")
_OWN_CODE = flags.DEFINE_bool(
    "own_code", False, "export to huggingface: with own code, for all modes, even if a stock class exists"
)
_MAX_SHARD_SIZE = flags.DEFINE_float(
    "max_shard_size", 5.0, "export to huggingface: gigabytes per file of weights", lower_bound=1e-6
)
flags.mark_flags_as_required(["workdir"])


FORMATS = dict.fromkeys(("import", "export"), ("huggingface", "reference"))
VERBS = (*FORMATS, "average")
_OF_HUGGINGFACE = (_MASK_TOKEN, _MILESTONES, _DTYPE, _OWN_CODE, _MAX_SHARD_SIZE)
_FLAGS_OF_VERBS = {
    "import": (_FORMAT, _WEIGHTS, _TOKENIZER, _MASK_TOKEN, _CONFIG),
    "export": (
        _FORMAT, _CHECKPOINT, _PARAMETERS, _OUTPUT, _MILESTONES, _DTYPE, _OWN_CODE, _MAX_SHARD_SIZE
    ),
    "average": (_CHECKPOINTS, _LAST, _OUTPUT),
}  # fmt: skip


def import_run() -> str:
    """Creates a run directory from weights in another format; returns a message for the user."""
    if not _WEIGHTS.value:
        raise UserError("--weights is not set; import needs --weights=PATH")
    config = cli.config(_CONFIG) if _CONFIG.value is not None else None
    with local_path(_WEIGHTS.value) as weights:
        arguments = weights, _TOKENIZER.value, config, user_path(_WORKDIR.value)
        if _FORMAT.value == "huggingface":
            return import_huggingface.load(*arguments, _MASK_TOKEN.value)
        return import_reference.load(*arguments)


def export_run() -> str:
    """Writes a run's weights in another format; returns a message for the user."""
    if not _OUTPUT.value:
        raise UserError("--output is not set; export needs --output=DIR")
    output = user_path(_OUTPUT.value)
    if _MILESTONES.value:
        if _CHECKPOINT.value is not None:
            raise UserError(
                f"--checkpoint={_CHECKPOINT.value} has no effect with --milestones, which exports the "
                "checkpoints of all milestones; leave one of the flags out"
            )
        return export_milestones.export(
            user_path(_WORKDIR.value), output, _PARAMETERS.value, _export_huggingface
        )
    run = open_run(_WORKDIR.value, _CHECKPOINT.value, _PARAMETERS.value)
    export = _export_huggingface if _FORMAT.value == "huggingface" else export_reference.export
    return f"step {run.step} of {run.workdir}: {export(run, output)}"


def _export_huggingface(run: TrainedRun, output: epath.Path) -> str:
    max_bytes = int(1e9 * _MAX_SHARD_SIZE.value)
    return export_huggingface.export(run, output, _DTYPE.value, max_bytes, _OWN_CODE.value)


def average() -> str:
    """Writes a run directory with the mean of a run's checkpoints; returns a message for the user."""
    if not _OUTPUT.value:
        raise UserError("--output is not set; average needs --output=DIR")
    if bool(_CHECKPOINTS.value) == bool(_LAST.value):
        raise UserError("average needs either --checkpoints=STEP,STEP,... or --last=N")
    if not all(text.isdigit() for text in _CHECKPOINTS.value):
        raise UserError(f"--checkpoints={','.join(_CHECKPOINTS.value)} must be steps, such as 100,200")
    steps = [int(text) for text in _CHECKPOINTS.value]
    return average_checkpoints.write(user_path(_WORKDIR.value), steps, _LAST.value, user_path(_OUTPUT.value))


def main(argv: Sequence[str]) -> None:
    cli.set_up_jax(keep_memory=False)  # freed copies of arrays would add to the peak memory
    verb = argv[1]
    cli.check_flags(_FLAGS_OF_VERBS, verb)
    if verb == "average":
        print(average())
        return
    if _FORMAT.value is None:
        raise UserError(f"--format is not set; {verb} supports {', '.join(FORMATS[verb])}")
    if _FORMAT.value not in FORMATS[verb]:
        raise UserError(
            f"--format={_FORMAT.value}: {verb} does not support it; choose {' or '.join(FORMATS[verb])}"
        )
    cli.check_flags({"--format=huggingface": _OF_HUGGINGFACE}, f"--format={_FORMAT.value}")
    print(import_run() if verb == "import" else export_run())


if __name__ == "__main__":
    cli.run(main, verbs=VERBS)
