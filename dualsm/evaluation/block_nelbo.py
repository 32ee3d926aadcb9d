"""The change of the held-out NELBO that block-causal attention causes, for unmasking with a cache."""

from __future__ import annotations

import jax

from dualsm.evaluation.held_out import open_held_out
from dualsm.evaluation.scoring import scoring_batch_size
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.valid_rows import rows_by_source
from dualsm.training.validation import SourceValidation, Validation

_ROWS = 64  # packed sequences per source
_OBJECTIVES = ("masked_diffusion", "block_diffusion")


def block_nelbo(run: TrainedRun, block: int) -> tuple[float, float]:
    """Returns the held-out NELBO with attention to whole documents and with blocks, in nats per token.

    Both use the same masks.

    Args:
      run: the run.
      block: tokens per block.

    Raises:
      UserError: if the held-out text of the run's corpus cannot be read.
    """
    config = run.config.copy_and_resolve_references()
    config.objectives.masked_diffusion.shifted = True
    config.objectives.block_diffusion.update(block=block, form="noisy")
    config.batch_size = scoring_batch_size(run.mesh, config.seq_len)
    config.gradient_accumulation_steps = 1
    rows, special = rows_by_source(open_held_out(run), config.seq_len, _ROWS), run.tokenizer.special
    validation = SourceValidation(
        {name: Validation(config, _OBJECTIVES, special, part, run.mesh) for name, part in rows.items()}
    )
    with jax.set_mesh(run.mesh):
        metrics = validation(run.params)
    whole, blocked = (metrics[f"valid/{name}/loss"] for name in _OBJECTIVES)
    return whole, blocked


def describe_block_nelbo(run: TrainedRun, block: int) -> str:
    """Returns a description of the change in the held-out NELBO, or why it was not measured."""
    try:
        whole, blocked = block_nelbo(run, block)
    except UserError as error:
        return f"the change in the held-out NELBO was not measured ({error})"
    return (
        f"the held-out NELBO is {blocked:.3f} nats per token with blocks of {block}, "
        f"{whole:.3f} with attention to whole documents ({blocked - whole:+.3f})"
    )
