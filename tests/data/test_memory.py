"""The memory use of reading batches and of their order does not grow with the corpus."""

import json
import os
import subprocess
import sys

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dualsm.data.document_lengths import RECORD_TOKENS
from tests.conftest import ROOT, command_env

DOCUMENTS, RECORDS = 64, 512  # records per document: 2 MB per document, 128 MB in total
MAX_MB = 40

# Reads the rows of one of two processes for one epoch; prints the growth of the process in MB.
READ = """
import json, resource, sys
import numpy as np
from etils import epath
from dualsm.data.documents import Documents
from dualsm.data.sequence_order import SequenceOrder
from dualsm.data.batches import BatchSource, OrderedDocuments

folder, split = epath.Path(sys.argv[1]), json.loads(sys.argv[2])
documents = Documents(folder, split, np.dtype("<u2"))
order = SequenceOrder(documents.lengths, documents.tokens - 1, 2048, seed=0)
source = BatchSource([OrderedDocuments(documents, order)], 16, 2048, 0, np.arange(8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(int(source[step]["tokens"].size) for step in range(len(source)))
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_process_does_not_load_the_corpus_into_memory(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "shard"), "group_size:1")
    record = np.random.default_rng(0).integers(0, 1 << 16, RECORD_TOKENS).astype("<u2").tobytes()
    for _ in range(DOCUMENTS * RECORDS):
        writer.write(record)
    writer.close()
    size = RECORDS * RECORD_TOKENS
    (tmp_path / "lengths").write_bytes(np.full(DOCUMENTS, size, "<i4").tobytes())
    split = {
        "tokens": DOCUMENTS * size,
        "bytes": 0,
        "shards": [{"file": "shard", "documents": DOCUMENTS}],
        "lengths": "lengths",
    }
    assert os.path.getsize(tmp_path / "shard") > 3 * MAX_MB << 20

    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), json.dumps(split)],
        env=command_env(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens, grown = done.stdout.split()
    assert int(tokens) > DOCUMENTS * size * 0.45  # half of the corpus was read
    assert float(grown) < MAX_MB


def test_the_order_of_a_billion_documents_takes_at_most_200_megabytes():
    """The lengths are simulated. CPU seconds to the first batch do not depend on other processes."""
    code = "import json; from benchmarks.data import ordering; print(json.dumps(ordering(10**9)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["peak_megabytes"] < 200
    assert measured["first_batch_cpu_seconds"] < 1
