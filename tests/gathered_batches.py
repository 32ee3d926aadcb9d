"""Reads batches in several processes: together, their rows must be the whole batch. Run by a test."""

import sys

import jax
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils

from dualsm.config import default_config
from dualsm.data.batches import BatchSource, OrderedDocuments
from dualsm.data.corpus import Corpus
from dualsm.data.sequence_order import SequenceOrder
from dualsm.devices import sharding
from dualsm.process import distributed

_CORPUS = flags.DEFINE_string("corpus", None, "")
_JOB = [flags.DEFINE_string("coordinator", None, "")]
_JOB += [flags.DEFINE_integer(name, None, "") for name in ("processes", "process_id")]
_TENSOR = flags.DEFINE_integer("tensor", 1, "")
ROWS = 16


def main(_) -> None:
    with distributed.job(*(flag.value for flag in _JOB)):
        config = default_config().mesh
        config.tensor = _TENSOR.value
        mesh = sharding.make_mesh(config, jax.devices())
        documents = Corpus(_CORPUS.value).documents("train")
        order = SequenceOrder(documents.lengths, 20_000, 32, seed=0)
        mine = sharding.process_rows(mesh, ROWS)
        part = BatchSource([OrderedDocuments(documents, order)], ROWS, 32, 0, mine)
        whole = BatchSource([OrderedDocuments(documents, order)], ROWS, 32, 0, np.arange(ROWS))
        for step in (0, 7):
            for name in ("tokens", "documents"):
                placed = sharding.shard_batch(mesh, part[step][name], ROWS)
                gathered = multihost_utils.process_allgather(placed, tiled=True)
                assert gathered.tobytes() == whole[step][name].tobytes()
        print(f"rows {len(mine)} of {ROWS}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
