"""Corpora: the manifest, checks of the files, and the documents of each split.

A corpus is a folder with `tokenizer.model`, `manifest.json` and, for each split ("train" and "valid"),
ArrayRecord shards, a file with the lengths of all documents, and its index. Documents are sorted by hash, so
every prefix of a split is a random sample of it.
"""

from __future__ import annotations

import json
import re
from concurrent import futures

from etils import epath

from dualsm.data.damaged_corpus import DamagedCorpus
from dualsm.data.document_lengths import open_lengths
from dualsm.data.documents import Documents, token_dtype
from dualsm.data.tokenizer import Tokenizer
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.data.verification import Verification, check_hash
from dualsm.process.errors import UserError
from dualsm.process.paths import sizes_in, user_path

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "valid")
_THREADS = 8  # for hashes, and to hide the latency of a bucket


def _array_keys(split: dict) -> list[str]:
    """Returns the manifest keys of the files beside the shards. Earlier versions write fewer of them."""
    optional = ("lengths_index", "document_bytes", "document_domains")
    return ["lengths", *(key for key in optional if key in split)]


def _positive(value) -> int:
    """Returns `value` if it is a positive integer of 64 bits, and raises `TypeError` otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise TypeError(f"{value!r} is not a positive integer of 64 bits")
    return value


def _text(value) -> str:
    """Returns `value` if it is a string, and raises `TypeError` otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


class CorpusNotFound(UserError):
    """Raised if there is no corpus at a path."""


class Corpus:
    """A corpus written by `python -m dualsm.prepare`.

    Attributes:
      folder: path of the corpus.
      manifest: the parsed `manifest.json`.
      vocab_size: number of token ids.
      identity: hash of the tokenizer and all shards; does not depend on the path.
    """

    def __init__(self, path: str, key: str = ""):
        """Opens a corpus.

        Args:
          path: its path.
          key: config key or flag with the path, for messages; "" if there is none.

        Raises:
          CorpusNotFound: if `path` contains no corpus.
          DamagedCorpus: if a file is missing, or the manifest or the size of a shard is wrong.
          UserError: if the corpus has another format.
        """
        self.folder = user_path(path)
        self._verification: Verification | None = None
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text())
        except OSError as error:
            raise CorpusNotFound(
                f"{key and key + ': '}no corpus at {path!r} ({MANIFEST} is missing); correct the path, or "
                "make a corpus with `python -m dualsm.prepare --input=... --output=...`"
            ) from error
        except ValueError as error:
            raise DamagedCorpus(f"{self.folder / MANIFEST} is not JSON ({error})") from error
        try:
            self._check()
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedCorpus(f"{self.folder / MANIFEST} is damaged ({error!r})") from error

    def _check(self) -> None:
        if self.manifest["format"] != FORMAT:
            raise UserError(
                f"corpus {self.folder} has format {self.manifest['format']}, but this version of dualsm "
                f"reads format {FORMAT}; remove the folder and prepare the corpus again"
            )
        self.vocab_size: int = _positive(self.manifest["vocabulary"])
        self.identity: str = _text(self.manifest["identity"])
        _text(self.manifest["tokenizer_sha256"])
        _positive(self.manifest["splits"]["valid"]["gzip_bytes"])
        for split in (self.manifest["splits"][name] for name in SPLITS):
            _positive(split["tokens"]), _positive(split["bytes"])
            for key in _array_keys(split):
                _text(split[f"{key}_sha256"])
            for name in [split[key] for key in _array_keys(split)] + [s["file"] for s in split["shards"]]:
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise DamagedCorpus(
                        f"{self.folder / MANIFEST} refers to {name!r}, which is outside the corpus folder"
                    )
            for count in split.get("domains", {}).values():
                _positive(count), _text(split["document_domains"])
            for shard in split["shards"]:
                _text(shard["sha256"]), _positive(shard["documents"]), _positive(shard.get("records", 1))
        sizes = sizes_in(self.folder)
        splits = [self.manifest["splits"][name] for name in SPLITS]
        for shard in (shard for split in splits for shard in split["shards"]):
            if sizes.get(shard["file"]) != shard["size"]:
                raise DamagedCorpus(f"corpus shard {self.folder / shard['file']} is missing or truncated")
        for name in [TOKENIZER] + [split[key] for split in splits for key in _array_keys(split)]:
            if name not in sizes:
                raise DamagedCorpus(f"corpus file {self.folder / name} is missing")

    def check_small_files(self) -> None:
        """Checks the tokenizer and the files beside the shards, whose sizes were checked on opening.

        Reads neither shards nor, if they have an index, the lengths of the documents: their size is checked.

        Raises:
          DamagedCorpus: if a file has changed. The message names the file.
          BucketError: if a bucket does not answer.
        """
        check_hash(self.folder / TOKENIZER, self.manifest["tokenizer_sha256"])
        for split in SPLITS:
            self._check_arrays(split)
            open_lengths(self.folder, self.manifest["splits"][split])

    def verify(self, split: str) -> None:
        """Reads every shard of a split and the lengths of its documents, and checks their hashes.

        `Documents.read` checks records by their own checksums. This method finds damage before a record is
        read, and also finds shards that were replaced.

        Raises:
          DamagedCorpus: if the hash of a file has changed. The message names the file.
        """
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(check_hash, *zip(*self._hashes(split).items(), strict=True)):
                pass

    def start_verification(self) -> None:
        """Starts to verify the hashes of all files in the background, so that training does not wait.

        `Documents.read` raises `UserError` once a damaged file has been found.
        """
        self._verification = Verification(self._hashes("valid") | self._hashes("train"))

    def finish_verification(self, timeout: float | None = None) -> bool:
        """Waits for the verification, at most `timeout` seconds; see `Verification.finish`.

        Returns:
          True if all files are verified, or the verification was not started.
        """
        return self._verification is None or self._verification.finish(timeout)

    def _check_verification(self) -> None:
        if self._verification is not None:
            self._verification.check()

    def _hashes(self, split: str) -> dict[epath.Path, str]:
        entry = self.manifest["splits"][split]
        hashes = {self.folder / shard["file"]: shard["sha256"] for shard in entry["shards"]}
        return hashes | {self.folder / entry["lengths"]: entry["lengths_sha256"]}

    def tokens(self, split: str) -> int:
        """Returns the number of tokens of a split."""
        return self.manifest["splits"][split]["tokens"]

    def documents(self, split: str) -> Documents:
        """Returns the documents of the split "train" or "valid"."""
        self._check_arrays(split)
        entry = self.manifest["splits"][split]
        return Documents(self.folder, entry, token_dtype(self.vocab_size), self._check_verification)

    def _check_arrays(self, split: str) -> None:
        """Raises `DamagedCorpus` if a file beside the shards of a split has changed."""
        entry = self.manifest["splits"][split]
        for key in _array_keys(entry):
            if key == "lengths" and "lengths_index" in entry:
                continue  # each group of lengths is checked when it is read
            check_hash(self.folder / entry[key], entry[f"{key}_sha256"])

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the corpus."""
        tokenizer = load_tokenizer(str(self.folder / TOKENIZER))
        if tokenizer.sha256() != self.manifest["tokenizer_sha256"]:
            raise DamagedCorpus(
                f"{self.folder / TOKENIZER} is not the tokenizer that the corpus was prepared with"
            )
        return tokenizer
