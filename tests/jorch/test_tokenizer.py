"""Text to token ids and back without loss, with the chat's and the miniature world's symbols whole."""

import functools
import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jorch.data import tokenizer as tokenizers
from jorch.data import tokenizer_json
from jorch.data.chat import CHAT_SYMBOLS
from jorch.data.tokenizer import END_OF_TURN, SentencePieceTokenizer, train_sentencepiece
from jorch.export.pretrained import BASE
from jorch.sections import TokenizerConfig
from jorch.synth import miniature
from jorch.synth.sft import train_tokenizer

TOKENIZER = train_tokenizer()
SYMBOLS = [*CHAT_SYMBOLS, *miniature.symbols()]
texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SYMBOLS)), max_size=6).map("".join)
seeded = settings(derandomize=True, deadline=None, max_examples=300)


@given(texts)
@example("a b  c ")
@example("a ▁▁ b")  # sentencepiece's own sign for a space
@example("\0\r\n\u2028<unk><0x41> ⁇ <|reserved_0|>")
@example("e\u0301 \ufeff \U0001f600")
@seeded
def test_any_text_survives(text):
    token_ids = TOKENIZER.encode(text)
    assert token_ids.dtype == np.int32
    assert ((token_ids >= 0) & (token_ids < TOKENIZER.vocab_size)).all()
    assert TOKENIZER.decode(token_ids) == text


def test_symbols_are_single_tokens_wherever_they_stand():
    for symbol in SYMBOLS:
        assert len(TOKENIZER.encode(symbol)) == 1, symbol
        [token_id] = TOKENIZER.encode(symbol)
        assert TOKENIZER.encode(f"a{symbol}a").tolist() == [*TOKENIZER.encode("a"), token_id, *TOKENIZER.encode("a")]
    assert TOKENIZER.encode(END_OF_TURN).tolist() == [TOKENIZER.end_of_turn_id]


def test_the_longest_symbol_wins():
    tokenizer = SentencePieceTokenizer(train_sentencepiece([END_OF_TURN, "ab", "abc", " ab"]))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abcab ab")] == ["abc", "ab", " ab"]


def test_training_is_deterministic_and_the_vocabulary_shards():
    assert train_tokenizer().digest == TOKENIZER.digest
    assert TOKENIZER.vocab_size % 64 == 0
    other = SentencePieceTokenizer(train_sentencepiece([END_OF_TURN, "x y"], multiple_of=96))
    assert other.vocab_size % 96 == 0
    assert other.digest != TOKENIZER.digest


def test_the_shipped_base_has_this_tokenizer():
    assert tokenizers.load_folder(BASE).digest == TOKENIZER.digest, "rebuild: jorch sft configs/quickstart_base.yaml"


def test_ids_of_a_padded_vocabulary_mean_nothing():
    """A model's vocabulary may be larger, and an untrained model samples from all of it."""
    token_ids = [*TOKENIZER.encode("cheap"), TOKENIZER.vocab_size, TOKENIZER.vocab_size + 63]
    assert TOKENIZER.decode(token_ids) == "cheap"


def test_saved_beside_weights_it_is_found_again(tmp_path):
    TOKENIZER.save(tmp_path)
    assert tokenizers.load_folder(tmp_path).digest == TOKENIZER.digest


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense", b'{"a": 1}', b"\xff\xfe\x00"])
def test_what_is_no_tokenizer_is_one_line_with_its_path(kind, content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        tokenizers.load(TokenizerConfig(kind=kind, path=str(path)))
    line = str(caught.value)
    assert str(path) in line
    assert "\n" not in line
    assert line.startswith("no tokenizer at " if not content else f"{path} is not a {kind} tokenizer: ")


def test_a_tokenizer_without_an_end_of_turn_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["<|im_start|>"]))
    with pytest.raises(ValueError, match=r"tokenizer\.model .* has no <\|im_end\|> token; train it with that symbol"):
        tokenizers.load_folder(tmp_path)


@pytest.fixture(scope="module")
def qwen3():
    root = Path(os.environ.get("JORCH_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (root / "qwen3" / "tokenizer.json").is_file():
        pytest.skip(f"no qwen3/tokenizer.json in {root}: set JORCH_SHARED_DATA to a folder with Qwen3's tokenizer")
    return tokenizers.load(TokenizerConfig(kind="huggingface", path=str(root / "qwen3")))


def test_qwen3s_known_ids(qwen3):
    assert qwen3.encode("Hello world").tolist() == [9707, 1879]
    assert qwen3.encode("<|im_start|>user\n<|im_end|>").tolist() == [151644, 872, 198, 151645]
    assert qwen3.end_of_turn_id == 151645
    assert qwen3.vocab_size <= 151936


@given(text=texts)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_qwen3_keeps_any_text_in_normal_form(qwen3, text):
    assert qwen3.decode(qwen3.encode(text)) == unicodedata.normalize("NFC", text)


def test_qwen3_saves_and_loads(qwen3, tmp_path):
    qwen3.save(tmp_path)
    assert tokenizers.load_folder(tmp_path).digest == qwen3.digest
    assert qwen3.decode([9707, 151900]) == "Hello", "ids of the padded vocabulary mean nothing"


@given(text=texts)
@example(text="▁ <0x41>▁")
@seeded
def test_tokenizer_json_gives_the_same_ids(text):
    """What transformers and vLLM read, against the sentencepiece model that it was made from."""
    ours, theirs = TOKENIZER, converted()
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids.tolist()
    assert theirs.decode(ids.tolist(), skip_special_tokens=False) == text


@functools.cache
def converted():
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer_json.convert(TOKENIZER._model))


def test_merges_of_a_trained_model_are_kept():
    """A sentencepiece model with real merges, as somebody else may bring it."""
    import sentencepiece
    import tokenizers

    words = "the orchestrator asks the cheapest expert that can answer the question and then the answer is checked"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text = tokenizer_json.convert(model.getvalue())
    assert text is not None
    ours = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    theirs = tokenizers.Tokenizer.from_str(text)
    for sample in (words, "the expert checks", "xyz the é", "answer  twice"):
        assert theirs.encode(sample, add_special_tokens=False).ids == ours.encode(sample)
