"""Text to token ids and back, behind one interface for sentencepiece models and Hugging Face tokenizers."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jorch.data import tokenizer_json
from jorch.sections import TokenizerConfig

END_OF_TURN = "<|im_end|>"
_SPACE = "▁"
"""What sentencepiece writes for a space."""


class Tokenizer(Protocol):
    """Lossless for any text (Qwen3's: for text in Unicode's form NFC, to which it brings everything else).

    Special tokens in the text become their single ids.
    """

    vocab_size: int
    end_of_turn_id: int
    digest: str
    """Of the tokenizer's file: a checkpoint of another one is refused."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids, i32[n]; nothing is added in front or behind."""
        ...

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str: ...

    def save(self, folder: Path) -> None:
        """Write the files from which `load` reads this tokenizer again, and those that vLLM wants."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.end_of_turn_id = self._processor.piece_to_id(END_OF_TURN)
        self.digest = hashlib.sha256(model).hexdigest()
        self._space_sign = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if self.end_of_turn_id == self._processor.unk_id():
            raise ValueError(f"the sentencepiece model has no {END_OF_TURN} token; train it with that symbol")

    def encode(self, text: str) -> np.ndarray:
        first, *others = map(self._processor.encode, text.split(_SPACE))
        # A "▁" of the text itself must not become a space, so it goes in as its bytes.
        return np.asarray(first + [i for part in others for i in (*self._space_sign, *part)], np.int32)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's; such ids mean nothing.
        return self._processor.decode([int(i) for i in token_ids if i < self.vocab_size])

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._model)
        converted = tokenizer_json.convert(self._model)
        if converted is not None:  # else the model can be trained, and served by token ids only
            pad = self._processor.id_to_piece(max(self._processor.pad_id(), 0))
            config = tokenizer_json.dump(tokenizer_json.config(END_OF_TURN, pad))
            (folder / "tokenizer.json").write_text(converted, encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, e.g. Qwen3's byte-level BPE."""

    def __init__(self, model: bytes, config: bytes | None = None) -> None:
        """`config`: what tokenizer_config.json beside it holds, the chat template above all."""
        import tokenizers

        self._config = config
        self._model = model
        self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        end_of_turn_id = self._tokenizer.token_to_id(END_OF_TURN)
        if end_of_turn_id is None:
            raise ValueError(f"tokenizer.json has no {END_OF_TURN} token; jorch needs a ChatML tokenizer")
        self.end_of_turn_id = end_of_turn_id
        self.digest = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(self._model)
        if self._config is not None:
            (folder / "tokenizer_config.json").write_bytes(self._config)


def load(config: TokenizerConfig) -> Tokenizer:
    """Read a tokenizer. Raises ValueError where the file is missing or not one."""
    path = Path(config.path)
    if config.kind == "huggingface" and path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"no tokenizer at {path}; set tokenizer.path to a {config.kind} tokenizer")
    beside = path.with_name("tokenizer_config.json")
    try:
        if config.kind == "sentencepiece":
            return SentencePieceTokenizer(path.read_bytes())
        return HuggingFaceTokenizer(path.read_bytes(), beside.read_bytes() if beside.is_file() else None)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a {config.kind} tokenizer: {error}") from error


def load_folder(folder: Path) -> Tokenizer:
    """The tokenizer that lies beside exported weights."""
    if (folder / "tokenizer.model").is_file():
        return load(TokenizerConfig(kind="sentencepiece", path=str(folder / "tokenizer.model")))
    return load(TokenizerConfig(kind="huggingface", path=str(folder)))


def train_sentencepiece(symbols: Sequence[str], multiple_of: int = 64) -> bytes:
    """A small, lossless, deterministic sentencepiece model: whole symbols, and bytes for all other text.

    Args:
        symbols: kept whole wherever they occur, the longest first.
        multiple_of: reserved pieces fill the vocabulary up to a multiple of this, so that it shards.
    """
    import sentencepiece

    # sentencepiece writes a space as "▁" before it looks for symbols; a lone one would else become its bytes.
    unique = list(dict.fromkeys([*(symbol.replace(" ", _SPACE) for symbol in symbols), _SPACE]))
    # Padding, unknown, the bytes, and the one character of the corpus, which the trainer insists on.
    num_special = 2 + 256 + 1
    num_reserved = -(num_special + len(unique)) % multiple_of
    reserved = [f"<|reserved_{i}|>" for i in range(num_reserved)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_special + len(unique) + num_reserved,
        hard_vocab_limit=False,
        user_defined_symbols=unique + reserved,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
