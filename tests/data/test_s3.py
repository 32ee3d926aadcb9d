"""Inputs in S3, from an emulator (moto): the same corpus as from local files."""

import json
import shutil

import pytest

from dualsm.data import inputs
from dualsm.data.corpus import Corpus
from dualsm.process.errors import UserError
from tests.conftest import run_command
from tests.data.reading import TEXTS, read

pytestmark = pytest.mark.extras
server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def environment():
    """Returns the environment variables that direct s3fs to the emulator, which has an empty bucket."""
    store = server.ThreadedMotoServer(port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield variables
    store.stop()


@pytest.fixture(scope="module")
def files(environment, jsonl, tmp_path_factory):
    """Returns a folder with files that are also in the bucket."""
    folder = tmp_path_factory.mktemp("s3") / "text"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(jsonl, folder / "a.jsonl")
    (folder / "sub" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for path in sorted(folder.rglob("*.jsonl")):
        boto3.client("s3").upload_file(str(path), "bucket", f"text/{path.relative_to(folder)}")
    return folder


@pytest.mark.parametrize("part", ["", "/a.jsonl", "/*.jsonl", "/**", "/s*", "/sub/b.jsonl"])
def test_files_folders_and_globs_give_the_documents_of_local_files(files, part):
    url = f"s3://bucket/text{part}"
    assert read(url) == read(f"{files}{part}") != []
    assert all(path.startswith("s3://bucket/text/") for path in inputs.find_inputs(url))


def test_a_corpus_of_s3_is_that_of_local_files(files, environment, corpus_path, tmp_path):
    identities = []
    for name, source in (("s3", "s3://bucket/text"), ("local", str(files))):
        done = run_command(
            "dualsm.prepare", f"--input={source}", f"--output={tmp_path / name}",
            f"--tokenizer={corpus_path / 'tokenizer.model'}", "--workers=1", env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        identities.append(Corpus(str(tmp_path / name)).identity)
    assert identities[0] == identities[1]


def test_a_bucket_or_file_that_does_not_exist_is_named(files):
    for url in ("s3://bucket/none.jsonl", "s3://none/a.jsonl", "s3://bucket/text/*.csv"):
        with pytest.raises(UserError) as error:
            read(url)
        assert url in str(error.value) and "\n" not in str(error.value)
