"""The start of a run: checks of its config and corpus, agreement of its processes, the lock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dualsm import config as configs
from dualsm.data.batches import OrderedDocuments
from dualsm.data.sequence_order import ORDER_VERSION
from dualsm.devices import sharding
from dualsm.model.attention import why_not_kernel
from dualsm.model.head_shapes import head_dim, num_kv_heads
from dualsm.objectives.plan import MixturePlan
from dualsm.process import distributed
from dualsm.process.errors import UserError
from dualsm.process.progress import say, warn
from dualsm.rundir.checkpoint_folder import check_not_lost
from dualsm.rundir.workdir import CONFIG, check_config_of_run, check_same, lock, write_config
from dualsm.training.fork import never_predicted, start_step
from dualsm.training.run_corpora import RunCorpus, open_corpora


def open_job(
    config: ConfigDict, workdir: epath.Path
) -> tuple[ConfigDict, list[RunCorpus], jax.sharding.Mesh]:
    """Returns the complete config, the corpora and the mesh, the same in all processes of a job.

    Raises:
      UserError: if the config is invalid or incomplete, or differs between the processes.
    """
    with distributed.together():
        configs.check_config(config)
        configs.check_installed(config)
        corpora = open_corpora(config)
        config = complete(config, corpora)
        config.start.step = start_step(config, workdir, corpora[0].corpus)
        config.model.never_predicted = never_predicted(config, workdir)
    # Processes start at different times, and the run to fork may have saved a newer checkpoint in between.
    config.start.step = int(distributed.broadcast(str(config.start.step)))
    with distributed.together():
        mesh = sharding.make_mesh(config.mesh, jax.devices())
        config.gradient_accumulation_steps = sharding.accumulation_steps(config, mesh)
    main_config = distributed.broadcast(configs.save_config(config))
    with distributed.together():
        check_same(config, main_config)
    return config, corpora, mesh


def complete(config: ConfigDict, corpora: Sequence[RunCorpus]) -> ConfigDict:
    """Returns the config with `model.vocab_size`, the order's version and each corpus's identity set.

    Raises:
      UserError: if the config has another value for one of them.
    """
    config, corpus = config.copy_and_resolve_references(), corpora[0].corpus
    if config.model.vocab_size not in (0, corpus.vocab_size):
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} differs from the vocabulary of the corpus "
            f"{corpus.folder}, {corpus.vocab_size} ids; leave it at 0"
        )
    for source, corpus in corpora:
        section, key = (
            (config.sources[source.name], source.key) if source.name else (config.data, "config.data")
        )
        found = section.get("identity", "")
        if found not in ("", corpus.identity):
            raise UserError(
                f"{key}.identity={found} is not the identity of the corpus {corpus.folder}, "
                f"{corpus.identity}; leave it empty"
            )
        with section.unlocked():
            section.identity = corpus.identity
    if config.data.order_version not in (0, ORDER_VERSION):
        raise UserError(
            f"config.data.order_version={config.data.order_version} is not the version of this dualsm, "
            f"{ORDER_VERSION}; leave it at 0"
        )
    config.data.order_version = ORDER_VERSION
    config.model.vocab_size = corpus.vocab_size
    return config


@contextlib.contextmanager
def locked_workdir(config: ConfigDict, workdir: epath.Path, corpora: Sequence[RunCorpus]) -> Iterator[None]:
    """Locks the run directory inside the context, starts to verify the corpora, and writes the config.

    Raises:
      UserError: if the directory is in use or contains another run. Then nothing has been written.
    """
    is_first_on_host = distributed.is_first_on_host()
    with contextlib.ExitStack() as stack:
        with distributed.together():  # before anything is written
            if distributed.is_main_process():
                check_config_of_run(workdir, config)
                stack.enter_context(lock(workdir))
                check_config_of_run(workdir, config)  # another run may have started before the lock
                check_not_lost(workdir)
            if config.data.verify and is_first_on_host:
                for _, corpus in corpora:
                    corpus.start_verification()
        with distributed.together():
            if distributed.is_main_process():
                write_config(workdir, config, corpora[0].corpus)
        with distributed.together():
            if not (workdir / CONFIG).exists():
                raise UserError(
                    f"--workdir={workdir} is not visible to all processes; use a bucket or a shared disk"
                )
        yield


def print_start(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    plan: MixturePlan,
    ordered: Sequence[OrderedDocuments],
    num_parameters: int,
) -> None:
    """Prints the model, data and mixture of a run."""
    listed = ", ".join(
        f"{entry.source}/{entry.name} {_share_text(share_S)}".lstrip("/")
        for entry, share_S in zip(plan.entries, plan.shares_SxE.T, strict=True)
    )
    data = [
        f"data{' ' * bool(source.name)}{source.name}: {order.budget:,} tokens = {order.unique:,} unique x "
        f"{source.repetitions or order.budget / order.unique:g} repetitions, from {source.corpus}"
        for source, (_, order) in zip(plan.sources, ordered, strict=True)
    ]
    say(
        "\n".join(
            [
                f"model: {num_parameters:,} parameters on {mesh.size} x {mesh.devices.flat[0].device_kind}",
                *data,
                f"mixture: {listed}",
            ]
        )
    )


def _share_text(share_S: np.ndarray) -> str:
    """Formats the share of an entry at each step: one number, or the first, the last and the mean."""
    first, last = share_S[0], share_S[-1]
    if (share_S == first).all():
        return f"{first:g}"
    return f"{first:g} to {last:g} (mean {share_S.mean():.3g})"


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
