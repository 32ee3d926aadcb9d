"""Fuzzing targets: undamaged files with unusual encodings, compressions, names, JSON and hidden files.

A case is a JSON description from which files are generated. They must be read with their content, or be
rejected.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import zstandard
from hypothesis import strategies as st

from dualsm.data import inputs, readers
from dualsm.evaluation.tasks import load_task
from dualsm.process.errors import UserError
from tests.fuzzing.artifacts import Target, jsonl
from tests.fuzzing.damage import ODD_TEXTS, odd_values

CASE = "case.json"
MAX_BYTES = 1 << 20
ENCODINGS = [
    "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin-1",
    "cp1252", "cp1251", "koi8-r", "shift_jis", "euc_jp", "iso2022_jp", "iso2022_kr", "gb18030", "big5",
    "cp949", "cp037",
]  # fmt: skip
SENTENCES = [
    "Plain words, nothing else.", "déjà vu, café", "Съешь же ещё этих булок", "吾輩は猫である。名前は無い。",
    "모든 인간은 태어날 때부터", "सभी मनुष्यों को गौरव", "وُلِدَ الناس أحراراً", "a\tb", "x",
]  # fmt: skip
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
SKIPPED_NAMES = [
    ".ipynb_checkpoints/{}-checkpoint.jsonl", ".{}.jsonl", "._{}.jsonl", "__MACOSX/._{}.jsonl", "{}.jsonl~",
    "#{}.jsonl#", ".#{}.jsonl", "{}.jsonl.bak", ".{}.jsonl.swp", "~${}.jsonl", ".git/objects/{}.jsonl",
]  # fmt: skip
COPIED_NAMES = ["{} copy.jsonl", "{} (1).jsonl", "old/{}.jsonl", "{}-Copy1.jsonl"]
_NAMES = st.text("abAB01 []*?!{}~,.#%'\"\\é🙂-", min_size=1, max_size=12).filter(
    lambda name: name.strip(". ")
)
_TEXTS = st.lists(st.sampled_from(SENTENCES) | st.text(max_size=30), min_size=1, max_size=4)


def targets() -> dict[str, Target]:
    """Returns a target for each kind of file."""
    made = {
        "encodings": (_use_encoding, _encodings()),
        "compressions": (_use_compression, _compressions()),
        "odd paths": (_use_path, _paths()),
        "odd JSON": (_use_json, _values()),
        "hidden files": (_use_hidden, _folders()),
    }
    first = {
        "encodings": {"texts": SENTENCES, "encoding": "utf-8", "form": ".txt"},
        "compressions": {"texts": SENTENCES, "parts": [".gz"], "suffix": ".gz", "cut": 1.0},
        "odd paths": {"name": "d[1]", "suffix": ".jsonl", "others": ["d1"], "inside": True},
        "odd JSON": {"texts": SENTENCES, "odd": "[[]]", "layout": "lines"},
        "hidden files": {"names": ["a"], "skipped": [0], "copied": []},
    }
    return {
        name: Target({CASE: json.dumps(first[name]).encode()}, _reader(use), content.map(_as_json), share=2.0)
        for name, (use, content) in made.items()
    }


def _as_json(case: dict) -> bytes:
    return json.dumps(case).encode()


def _reader(use: Callable[[Path, dict], None]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        use(folder, json.loads((folder / CASE).read_text()))

    return read


def read(pattern: str, divide: bool = False) -> list[str]:
    """Returns the texts of all documents; raises `UserError` for unusable documents, as `prepare` does."""
    texts = []
    for path in inputs.find_inputs(pattern):
        for block in readers.read_blocks(path, "text", MAX_BYTES, divide):
            for item in block.items:
                try:
                    texts.append(readers.parse(item, block.form, "text"))
                except readers.Fault as fault:
                    raise UserError(str(fault)) from fault
    return texts


def _encodings() -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "texts": st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=20),
            "encoding": st.sampled_from(ENCODINGS),
            "form": st.sampled_from([".txt", ".jsonl", ".json", ".train"]),
        }
    )


def _use_encoding(folder: Path, case: dict) -> None:
    """Checks that text in another encoding is rejected, unless its bytes are also valid UTF-8."""
    texts, form = case["texts"], case["form"]
    whole = "\n".join(texts) + "\n"
    if form.startswith(".j"):
        whole = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    try:
        content = whole.encode(case["encoding"])
    except UnicodeEncodeError as error:
        raise UserError("the encoding lacks these characters") from error
    (folder / f"a{form}").write_bytes(content)
    expected = texts if form.startswith(".j") else ["\n".join(texts) + "\n" * (form == ".txt")]
    assert read(str(folder / f"a{form}")) == expected, "text of another encoding was read as UTF-8"


def _compressions() -> st.SearchStrategy[dict]:
    kinds = st.sampled_from(sorted(COMPRESS))
    return st.fixed_dictionaries(
        {
            "texts": _TEXTS,
            "parts": kinds.flatmap(lambda kind: st.lists(st.just(kind), min_size=1, max_size=3)),
            "suffix": kinds,
            "cut": st.sampled_from([1.0, 1.0, 1.0, 0.3, 0.9, 0.99]),
        }
    )


def _use_compression(folder: Path, case: dict) -> None:
    """Checks that a compressed file with any name is read completely or rejected."""
    texts = [text for text in case["texts"] if _is_text(text)]
    lines, kind = jsonl({"text": text} for text in texts), case["parts"][0]
    parts = [COMPRESS[kind](lines) for _ in case["parts"]]
    content = b"".join(parts)
    borders = {sum(map(len, parts[:number])) for number in range(len(parts) + 1)}
    end = round(len(content) * case["cut"])
    path = folder / f"a.jsonl{case['suffix']}"
    path.write_bytes(content[:end])
    found = read(str(path))
    if kind and end not in borders:
        raise AssertionError("a truncated compressed file was read without an error")
    assert not texts or kind == "" or found == texts * (len(found) // len(texts))
    assert end < len(content) or found == texts * len(parts)


def _paths() -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "name": _NAMES,
            "suffix": st.sampled_from([".jsonl", ".JSONL", ".json", ".ndjson", ".jsonl.gz", ".txt"]),
            "others": st.lists(_NAMES, max_size=3),
            "inside": st.booleans(),
        }
    )


def _use_path(folder: Path, case: dict) -> None:
    """Checks that an existing file is found by its name, and that a glob finds all files of the folder."""
    inside = folder / case["name"] if case["inside"] else folder / "plain"
    inside.mkdir()
    names = {name + case["suffix"] for name in (case["name"], *case["others"])}
    for name in names:
        content = jsonl([{"text": name}]) if "j" in case["suffix"].lower() else name.encode()
        (inside / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    before = os.getcwd()
    for pattern in (str(inside), inside.name):
        os.chdir(folder)
        try:
            for name in names:
                given = f"{pattern}/{name}"
                if not given.startswith("~"):
                    assert read(given) == [name], given
            if "," not in pattern and not pattern.startswith("~"):
                found = read(f"{pattern}/*")
                assert sorted(found) == sorted(name for name in names if name[0] != "."), found
        finally:
            os.chdir(before)


def _values() -> st.SearchStrategy[dict]:
    spelled = [
        "1" * 5000, "-" + "9" * 10_000, "1e99999", "NaN", "[" * 3000 + "]" * 3000,
        '{"a":' * 3000 + "1" + "}" * 3000,
        r'"\ud800"', '"\t"', '"}{]["', r'"\\"', r'"\"{"', '{"text": "another"}', '[{"text": "another"}]',
    ]  # fmt: skip
    return st.fixed_dictionaries(
        {
            "texts": _TEXTS | st.lists(st.sampled_from(ODD_TEXTS), min_size=1, max_size=3),
            "odd": st.sampled_from(spelled) | odd_values().map(json.dumps),
            "layout": st.sampled_from(["lines", "array", "array, indented", "objects, indented"]),
        }
    )


def _use_json(folder: Path, case: dict) -> None:
    """Checks that a text is read for any value of other fields and in every layout."""
    texts, layout = [text for text in case["texts"] if _is_text(text)], case["layout"]
    gap, sign = ("\n  ", " ") if "indented" in layout else (" ", "")
    objects = [
        "{" + gap + f'"odd":{sign}{case["odd"]},' + gap + f'"text":{sign}{json.dumps(text)}' + gap[0] + "}"
        for text in texts
    ]
    whole = "\n".join(objects) + "\n" if "array" not in layout else "[" + (gap + ",").join(objects) + "]"
    (folder / "a.json").write_text(whole)
    assert read(str(folder / "a.json")) == texts


def _is_text(text: str) -> bool:
    """Returns True for text that `prepare` keeps."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text.strip())


def _folders() -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "names": st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True),
            "skipped": st.lists(st.integers(0, len(SKIPPED_NAMES) - 1), max_size=4),
            "copied": st.lists(st.integers(0, len(COPIED_NAMES) - 1), max_size=1),
        }
    )


def _use_hidden(folder: Path, case: dict) -> None:
    """Checks that the questions of a task are those of its visible files."""
    lines = {
        name: jsonl({"sentence_good": f"{name} {i}", "sentence_bad": "x"} for i in range(3))
        for name in case["names"]
    }
    for name, content in lines.items():
        files = [
            f"{name}.jsonl",
            *(SKIPPED_NAMES[number].format(name) for number in case["skipped"]),
            *(COPIED_NAMES[number].format(name) for number in case["copied"]),
        ]
        for file in files:
            path = folder / "blimp" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    questions = load_task("blimp", folder)
    assert not case["copied"], "copies were read as additional questions"
    assert len(questions) == 3 * len(lines)
