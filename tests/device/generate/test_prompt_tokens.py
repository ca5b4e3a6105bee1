"""Token ids beside those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpq_deploy.device.generate.generation_folder import TokenizerUse
from mpq_deploy.device.generate.prompt_tokens import token_ids
from tests.tiny_models import TOKENS, write_t5, write_tokenizer

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=["clip", "clip padded with !", "t5"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "t5":
        from transformers import AutoTokenizer

        write_t5(folder, "", 8, 0)
        return AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer = write_tokenizer(folder)
    if "!" in request.param:
        # SDXL's second tokenizer and SD2's pad with it; here a letter stands for it.
        tokenizer.pad_token = "b"
    return tokenizer


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30) | st.from_regex(r"[a-f ]{0,20}"))
def test_ids_are_those_of_transformers(tokenizer: Any, text: str, tmp_path_factory: Any) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.save(str(file))
    words = tokenizer.backend_tokenizer.get_vocab_size()
    ids, cut = token_ids(TokenizerUse(file, TOKENS, tokenizer.pad_token_id, words), [text])
    given = tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    assert ids[0].tolist() == given
    assert bool(cut[0]) == (len(tokenizer(text).input_ids) > TOKENS)
    assert text.endswith(cut[0])


@pytest.mark.parametrize("text", ["a <cat>", "<cat>, <cat> b", "<dog> <cat>", "a<cat>b", "<cat>_1"])
def test_a_word_of_several_vectors_stands_for_all_of_them(tmp_path: Path, text: str) -> None:
    """As diffusers' pipelines convert prompts with textual inversions."""
    from diffusers.loaders import TextualInversionLoaderMixin

    tokenizer = write_tokenizer(tmp_path)
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = tokenizer.backend_tokenizer.get_vocab_size()
    use = TokenizerUse(tmp_path / "tokenizer.json", TOKENS, tokenizer.pad_token_id, words)
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    given = tokenizer(converted, padding="max_length", max_length=TOKENS, truncation=True)
    assert token_ids(use, [text], vectors=True)[0][0].tolist() == given.input_ids
    plain = tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True)
    assert token_ids(use, [text])[0][0].tolist() == plain.input_ids
