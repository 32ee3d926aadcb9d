"""Prompts as token ids; what cannot be one is refused before a model is loaded with it."""

import pytest

from dualsm.errors import UserError
from dualsm.generation.prompts import encode_prompt, read_prompts


def test_masks_stand_where_the_prompt_says(corpus):
    tokenizer = corpus.tokenizer()
    special = tokenizer.special
    a, b = tokenizer.encode(["a", "b"])
    assert encode_prompt(tokenizer, "a<mask:3>b<mask>") == [
        special.bos, *a, *[special.mask] * 3, *b, special.mask,
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["<mask:65537>", f"<mask:{'9' * 5000}>", "half \ud800 a pair"])
def test_impossible_prompts_are_refused(corpus, prompt):
    with pytest.raises(UserError):
        encode_prompt(corpus.tokenizer(), prompt)


def test_files_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_prompts(str(tmp_path / "a.jsonl"))
