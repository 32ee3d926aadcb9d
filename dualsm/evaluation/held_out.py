"""Held-out losses of a trained run, over all documents and by domain, with standard errors over documents."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dualsm.data.corpus import Corpus
from dualsm.devices.sharding import batch_devices, replicated, shard_batch
from dualsm.evaluation.bootstrap import bootstrap_stderr
from dualsm.evaluation.scoring import scoring_batch_size
from dualsm.objectives.sources import Source
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun
from dualsm.training.run_corpora import RunCorpus, check_tokenizer, open_corpora
from dualsm.training.valid_rows import ValidRows, rows_by_source, valid_batches
from dualsm.training.validation import MAX_IN_FLIGHT, make_position_scores

_MAX_LOSS = 700  # nats per token; exp overflows above


class DocumentSums(NamedTuple):
    """Sums over the scored positions of each document, float64.

    Attributes:
      nats_N: weighted negative log-likelihood.
      weight_N: loss weights.
      tokens_N: loss denominator.
      bytes_N: bytes of text.
      domain_N: name of each document's domain; None if the corpus does not record domains.
    """

    nats_N: np.ndarray
    weight_N: np.ndarray
    tokens_N: np.ndarray
    bytes_N: np.ndarray
    domain_N: np.ndarray | None


def open_held_out(run: TrainedRun, path: str = "") -> list[RunCorpus]:
    """Opens and verifies the corpora whose held-out documents are scored.

    Args:
      run: the run.
      path: path of a corpus, or NAME=PATH,NAME=PATH for sources; empty for the corpora that the run was
        trained on.

    Raises:
      UserError: if a corpus is damaged, has no held-out documents, or was made with another tokenizer.
    """
    config = run.config.copy_and_resolve_references()
    for name, moved in (paths := _by_source(config, path)).items():
        config.sources[name].corpus = moved
    if path and not paths:
        corpora = [RunCorpus(Source("", path, 1), Corpus(path, "--data"))]
    else:
        corpora = open_corpora(config)
    check_tokenizer(corpora, run.tokenizer)
    for _, corpus in corpora:
        corpus.verify("valid")
        corpus.documents("valid")  # reads the document lengths, and fails if there are none
    return corpora


def _by_source(config: ConfigDict, path: str) -> dict[str, str]:
    """Returns the paths in "NAME=PATH,NAME=PATH" by the name of the source; empty for a single path."""
    parts = [part.split("=", 1) for part in path.split(",")]
    named = all(len(part) == 2 and part[0] in config.sources for part in parts)
    return dict(parts) if named else {}


def evaluate_held_out(
    run: TrainedRun,
    corpora: Sequence[RunCorpus],
    objectives: Sequence[str],
    samples: int,
    by_document: bool = False,
) -> Iterator[tuple[str, dict]]:
    """Scores held-out text under several objectives.

    Args:
      run: the run.
      corpora: from `open_held_out`.
      objectives: names of the objectives.
      samples: draws of the corruption per packed sequence.
      by_document: True adds the sums of each document to the entries.

    Yields:
      The name of each objective and its entry in the results file, over all corpora. If the run has sources,
      "<source>/<objective>" and the entry of each source follow.

    Raises:
      UserError: if a loss is not finite or too large for its perplexity to be represented.
    """
    seq_len = run.config.seq_len
    rows = rows_by_source(corpora, seq_len, 0)
    scorer = DocumentScorer(run, objectives, samples)
    folders = {source.name: str(corpus.folder) for source, corpus in corpora}
    domains = {source.name: _domains(corpus) for source, corpus in corpora}
    for name in objectives:
        start = time.perf_counter()
        sums = {source: scorer(part, domains[source], name) for source, part in rows.items()}
        seconds = time.perf_counter() - start
        parts = {name: list(rows)} | {f"{source}/{name}": [source] for source in rows if source}
        for key, sources in parts.items():
            documents = _concatenate([sums[source] for source in sources])
            result = {
                **loss_entry(documents, key),
                "bytes_of": "documents" if all(rows[source].exact for source in sources) else "tokens",
                "n": sum(len(rows[source].tokens_VxL1) for source in sources),
                "samples": samples,
                "seconds": seconds,
                "settings": {
                    "data": ", ".join(folders[source] for source in sources),
                    "seq_len": seq_len,
                    "samples": samples,
                },
            }
            if documents.domain_N is not None:
                result["domains"] = domain_entries(documents, key)
            if by_document:
                result["by_document"] = document_lists(documents)
            yield key, result


class DocumentScorer:
    """Scores held-out rows under several objectives with one compiled function, by document."""

    def __init__(self, run: TrainedRun, objectives: Sequence[str], samples: int):
        """
        Args:
          run: the run.
          objectives: names of the objectives.
          samples: number of times that each row is scored, each time with a new corruption.
        """
        self._run, self._names, self._samples = run, list(objectives), samples
        score = make_position_scores(run.config, objectives, run.tokenizer.special)
        self._score = jax.jit(score, out_shardings=replicated(run.mesh))

    def __call__(self, rows: ValidRows, domain_N: np.ndarray | None, name: str) -> DocumentSums:
        """Returns the sums of the documents that are at least partly in the rows.

        Args:
          rows: held-out rows.
          domain_N: domain of each document of the corpus; None if they are not known.
          name: one of the objectives.
        """
        document_VxL1 = rows.first_document_V[:, None] + np.maximum(rows.documents_VxL1, 0)
        count = int(document_VxL1.max()) + 1
        size = _batch_size(self._run, len(rows.tokens_VxL1) * self._samples)
        token_bytes_V, index = jnp.asarray(rows.token_bytes_V), jnp.int32(self._names.index(name))
        totals_4xN, pending = np.zeros((4, count)), []

        def add(row_B: np.ndarray, scores) -> None:
            document_T = document_VxL1[row_B % len(document_VxL1), :-1].ravel()
            for total_N, scores_BxL in zip(totals_4xN, jax.device_get(scores), strict=True):
                total_N += np.bincount(document_T, scores_BxL.ravel().astype(np.float64), count)

        with jax.set_mesh(self._run.mesh):
            for batch in valid_batches(rows, size, self._run.tokenizer.special.pad, self._samples):
                sharded = tuple(shard_batch(self._run.mesh, part) for part in batch)
                pending.append((batch[3], self._score(self._run.params, token_bytes_V, sharded, index)))
                if len(pending) == MAX_IN_FLIGHT:
                    add(*pending.pop(0))
        for item in pending:
            add(*item)
        return DocumentSums(*totals_4xN, None if domain_N is None else domain_N[:count])


def loss_entry(documents: DocumentSums, name: str) -> dict:
    """Returns the loss over all documents and its standard errors, for the results file.

    The loss is the sum of the nats over the sum of the loss weights. Over whole rows, the loss weights sum to
    the loss denominator. Over a part of the documents they differ for masked diffusion, because the masked
    tokens are drawn over the whole row; division by the loss weights removes this source of variance.

    Args:
      documents: the documents.
      name: name of the loss, for the error message.

    Raises:
      UserError: if the loss is not finite or too large for its perplexity to be represented.
    """
    sums_Nx4 = np.stack(documents[:4], axis=1)
    total_1x4 = sums_Nx4.sum(0, keepdims=True)
    loss = float(_nats_per_token(total_1x4)[0])
    if not loss < _MAX_LOSS:
        raise UserError(
            f"the held-out loss of {name} is {loss} nats per token, because training diverged; "
            "use an earlier checkpoint"
        )
    stderr, bits_stderr = bootstrap_stderr(sums_Nx4, _nats_per_token, _bits_per_byte)
    return {
        "nats_per_token": loss,
        "stderr": stderr,
        "perplexity": math.exp(loss),
        "bits_per_byte": float(_bits_per_byte(total_1x4)[0]),
        "bits_per_byte_stderr": bits_stderr,
        "documents": len(sums_Nx4),
        "weight": float(total_1x4[0, 1]),
    }


def _nats_per_token(sums_Rx4: np.ndarray) -> np.ndarray:
    return sums_Rx4[:, 0] / sums_Rx4[:, 1]


def _bits_per_byte(sums_Rx4: np.ndarray) -> np.ndarray:
    _, _, tokens_R, bytes_R = sums_Rx4.T
    return _nats_per_token(sums_Rx4) * tokens_R / bytes_R / math.log(2)


def document_lists(documents: DocumentSums) -> dict[str, list]:
    """Returns the sums of each document, and its domain if it is known, for the results file."""
    named = {name.removesuffix("_N"): values for name, values in documents._asdict().items()}
    return {name: values.tolist() for name, values in named.items() if values is not None}


def domain_entries(documents: DocumentSums, name: str) -> dict[str, dict]:
    """Returns the entries of the domains with scored tokens, in alphabetical order."""
    parts = {}
    for domain in np.unique(documents.domain_N).tolist():
        is_member_N = documents.domain_N == domain
        members = DocumentSums(*(array_N[is_member_N] for array_N in documents))
        if members.weight_N.any():
            parts[domain] = loss_entry(members, f"{name} in {domain}")
    return parts


def _concatenate(parts: Sequence[DocumentSums]) -> DocumentSums:
    """Joins the documents of several corpora; they have domains if all corpora have."""
    *sums, domains = zip(*parts, strict=True)
    known = all(domain_N is not None for domain_N in domains)
    return DocumentSums(*map(np.concatenate, sums), np.concatenate(domains) if known else None)


def _domains(corpus: Corpus) -> np.ndarray | None:
    """Returns the domain of each held-out document; None if the corpus does not record domains."""
    documents = corpus.documents("valid")
    return None if documents.domain_N is None else np.array(documents.domains)[documents.domain_N]


def _batch_size(run: TrainedRun, rows: int) -> int:
    """Returns the batch size for scoring a number of rows, a multiple of the number of devices."""
    num_devices = batch_devices(run.mesh)
    return min(scoring_batch_size(run.mesh, run.config.seq_len), -(-rows // num_devices) * num_devices)
