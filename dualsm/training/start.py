"""The start of a run: checks of its config and corpus, agreement of its processes, the lock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.corpus import Corpus
from dualsm.data.sequence_order import SequenceOrder
from dualsm.devices import sharding
from dualsm.model.attention import why_not_kernel
from dualsm.model.head_shapes import head_dim, num_kv_heads
from dualsm.objectives.plan import MixturePlan
from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.progress import say, warn
from dualsm.rundir.checkpoint import check_not_lost
from dualsm.rundir.workdir import CONFIG, check_config_of_run, check_same, lock, write_config
from dualsm.training.fork import never_predicted, start_step


def open_job(config: ConfigDict, workdir: epath.Path) -> tuple[ConfigDict, Corpus, jax.sharding.Mesh]:
    """Returns the complete config, the corpus and the mesh, the same in all processes of a job.

    Raises:
      UserError: if the config is invalid or incomplete, or differs between the processes.
    """
    with distributed.together():
        configs.check_config(config)
        configs.check_installed(config)
        corpus = Corpus(config.data.path)
        config = complete(config, corpus)
        config.start.step = start_step(config, workdir, corpus)
        config.model.never_predicted = never_predicted(config, workdir)
    # Processes start at different times, and the run to fork may have saved a newer checkpoint in between.
    config.start.step = int(distributed.broadcast(str(config.start.step)))
    with distributed.together():
        mesh = sharding.make_mesh(config.mesh, jax.devices())
        config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
    main_config = distributed.broadcast(configs.save_config(config))
    with distributed.together():
        check_same(config, main_config)
    return config, corpus, mesh


def complete(config: ConfigDict, corpus: Corpus) -> ConfigDict:
    """Returns the config with `model.vocab_size` and `data.identity` set from the corpus.

    Raises:
      UserError: if the config has another value for either of them.
    """
    config = config.copy_and_resolve_references()
    if config.model.vocab_size not in (0, corpus.vocab_size):
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} differs from the vocabulary of the corpus "
            f"{corpus.folder}, {corpus.vocab_size} ids; leave it at 0"
        )
    if config.data.identity not in ("", corpus.identity):
        raise UserError(
            f"config.data.identity={config.data.identity} is not the identity of the corpus {corpus.folder}, "
            f"{corpus.identity}; leave it empty"
        )
    config.model.vocab_size = corpus.vocab_size
    config.data.identity = corpus.identity
    return config


@contextlib.contextmanager
def locked_workdir(config: ConfigDict, workdir: epath.Path, corpus: Corpus) -> Iterator[None]:
    """Locks the run directory inside the context, starts to verify the corpus, and writes the config.

    Raises:
      UserError: if the directory is in use or contains another run. Then nothing has been written.
    """
    is_first_on_host = distributed.is_first_on_host()
    with contextlib.ExitStack() as stack:
        with distributed.together():  # before anything is written
            if distributed.is_main_process():
                check_config_of_run(workdir, config, corpus)
                stack.enter_context(lock(workdir))
                check_config_of_run(workdir, config, corpus)  # another run may have started before the lock
                check_not_lost(workdir)
            if config.data.verify and is_first_on_host:
                corpus.start_verification()
        with distributed.together():
            if distributed.is_main_process():
                write_config(workdir, config, corpus)
        with distributed.together():
            if not (workdir / CONFIG).exists():
                raise UserError(
                    f"--workdir={workdir} is not visible to all processes; use a bucket or a shared disk"
                )
        yield


def print_start(
    config: ConfigDict, mesh: jax.sharding.Mesh, plan: MixturePlan, order: SequenceOrder, num_parameters: int
) -> None:
    """Prints the model, data and mixture of a run."""
    listed = ", ".join(
        f"{entry.name} {first:g}" if first == last else f"{entry.name} {first:g} to {last:g}"
        for entry, first, last in zip(plan.entries, plan.shares_SxE[0], plan.shares_SxE[-1], strict=True)
    )
    say(
        f"model: {num_parameters:,} parameters on {mesh.size} x {mesh.devices.flat[0].device_kind}\n"
        f"data: {order.budget:,} tokens = {order.unique:,} unique x {config.repetitions} repetitions, from "
        f"{config.data.path}\n"
        f"mixture: {listed}"
    )


def warn_without_kernel(config: ConfigDict) -> None:
    """Warns if `config.model.attention=auto` chooses XLA attention on an accelerator, and says why."""
    model = config.model
    if model.attention != "auto" or sharding.platform() == "cpu":
        return
    rows = config.batch_size // config.gradient_accumulation_steps
    q_shape, k_shape = (
        (rows, config.seq_len, heads, head_dim(model)) for heads in (model.num_heads, num_kv_heads(model))
    )
    if reason := why_not_kernel(q_shape, k_shape):
        warn(f"config.model.attention=auto uses XLA attention, not a kernel: {reason}")
