"""Prompts as token ids, and invalid prompts."""

import codecs

import pytest

from dualsm.generation.prompts import encode_prompt, read_prompts
from dualsm.process.errors import UserError


def test_masks_have_the_positions_of_the_prompt(corpus):
    tokenizer = corpus.tokenizer()
    special = tokenizer.special
    a, b = tokenizer.encode(["a", "b"])
    assert encode_prompt(tokenizer, "a<mask:3>b<mask>") == [
        special.bos, *a, *[special.mask] * 3, *b, special.mask,
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["<mask:65537>", f"<mask:{'9' * 5000}>", "half \ud800 a pair"])
def test_invalid_prompts_are_rejected(corpus, prompt):
    with pytest.raises(UserError):
        encode_prompt(corpus.tokenizer(), prompt)


def test_prompts_are_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_prompts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_unusual_json_of_prompts_is_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    lines = "a é\r\n\r\nb\r\n"
    if suffix == "jsonl":
        lines = '{"prompt": "a é"}\r\n\r\n{"prompt": "b", "n": 1' + "0" * 5000 + "}"
    path.write_bytes(codecs.BOM_UTF8 + lines.encode())
    assert read_prompts(str(path)) == ["a é", "b"]
    path.write_bytes(lines.encode("utf-16"))
    with pytest.raises(UserError, match=f"a.{suffix} is encoded in UTF-16; convert it"):
        read_prompts(str(path))
    path.write_bytes(lines.encode("latin-1"))
    with pytest.raises(UserError, match=f"a.{suffix}, line 1: not UTF-8, but perhaps Latin-1"):
        read_prompts(str(path))


def test_prompt_with_a_lone_surrogate_is_rejected_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "a \\ud800"}\n')
    with pytest.raises(UserError, match="line 2: the prompt contains lone surrogates"):
        read_prompts(str(tmp_path / "a.jsonl"))
