"""`jorch sft`: where demonstrations, tokenizer and starting weights come from; `train/sft.py` does the rest."""

import hashlib
import json
import random
from pathlib import Path

import jax

from jorch.config import SftConfig
from jorch.data import tokenizer as tokenizers
from jorch.data.chat import CHAT_SYMBOLS, demonstration_tokens
from jorch.data.tasks import shuffled
from jorch.data.tokenizer import SentencePieceTokenizer, Tokenizer
from jorch.export import hf, pretrained
from jorch.model.transformer import Params, Qwen3
from jorch.processes import is_writer, open_shared_run_folder, to_host
from jorch.sections import computation
from jorch.sharding import make_mesh
from jorch.synth import miniature
from jorch.train import sft

MINIATURE = "miniature"
SHIPPED_DIGEST = pretrained.BASE.with_suffix(".sha256")


def run(config: SftConfig, *, resume: bool, fresh: bool) -> None:
    """Clone behaviour, then export to OUT/model. Raises ValueError for what a user can mend."""
    with open_shared_run_folder(config, resume=resume, fresh=fresh) as folder:
        mesh = make_mesh(config.mesh)
        tokenizer = _tokenizer(config)
        demonstrations = _demonstrations(config, tokenizer)
        model, params = _start(config, mesh, tokenizer)
        if is_writer():
            hf.save_architecture(folder, model.config, tokenizer)
        params = to_host(sft.train(config, folder, mesh, model, params, tokenizer, demonstrations))
        if not is_writer():
            return
        hf.save(folder / "model", model.config, params, tokenizer)
        print(f"model: {folder / 'model'}")
        if config.demonstrations == MINIATURE and config.init_from is None:
            _compare_with_shipped(digest(folder / "model"))


def _compare_with_shipped(rebuilt: str) -> None:
    """Say whether a rebuilt base is the shipped one. Another CPU may round otherwise: that is no error."""
    shipped = SHIPPED_DIGEST.read_text().strip()
    verdict = "the shipped base" if rebuilt == shipped else f"not the shipped base, which is {shipped}"
    print(f"sha256 {rebuilt}: {verdict}")


def digest(folder: Path) -> str:
    """SHA-256 over the files of an exported model, in the order of their names."""
    content = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        content.update((folder / name).read_bytes())
    return content.hexdigest()


def train_tokenizer() -> Tokenizer:
    """The miniature world's tokenizer; the same bytes every time."""
    symbols = [*CHAT_SYMBOLS, *miniature.symbols()]
    return SentencePieceTokenizer(tokenizers.train_sentencepiece(symbols))


def _tokenizer(config: SftConfig) -> Tokenizer:
    if config.init_from is not None:
        return tokenizers.load_folder(pretrained.folder_of(config.init_from))
    return tokenizers.load(config.tokenizer) if config.tokenizer else train_tokenizer()


def _start(config: SftConfig, mesh: jax.sharding.Mesh, tokenizer: Tokenizer) -> tuple[Qwen3, Params]:
    if config.init_from is not None:
        # The architecture is the weights' own; how to compute with it is the run's.
        settings = computation(config.model) if config.model else {}
        start = pretrained.load(config.init_from, mesh, **settings)
        return start.model, start.params
    assert config.model is not None
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size}; set it to at least that"
        )
    model = Qwen3(config.model)
    return model, model.init(jax.random.key(config.seed), mesh)


def _demonstrations(config: SftConfig, tokenizer: Tokenizer) -> sft.Demonstrations:
    if config.demonstrations == MINIATURE:
        return lambda number: miniature.demonstration(
            random.Random(f"{config.seed}/demonstration/{number}"), config.rule_fraction
        )
    rows = _read(Path(config.demonstrations), config, tokenizer)
    order = shuffled(len(rows), config.seed)
    return lambda number: rows[order(number)]


def _read(path: Path, config: SftConfig, tokenizer: Tokenizer) -> list[list[dict[str, str]]]:
    """All demonstrations of a file, each checked to become a sample that fits a row."""
    if not path.is_file():
        raise ValueError(f"no demonstrations at {path}; set demonstrations to a JSONL file")
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines() also splits inside of strings
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = _messages(line)
            token_ids, _ = demonstration_tokens(messages, tokenizer, config.chat.style)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: unreadable demonstration: {error}") from error
        if len(token_ids) > config.batch.row_tokens:
            raise ValueError(
                f"{path}:{number}: {len(token_ids)} tokens do not fit batch.row_tokens={config.batch.row_tokens}"
            )
        rows.append(messages)
    if not rows:
        raise ValueError(f"{path}: no demonstrations in it")
    return rows


def _messages(line: str) -> list[dict[str, str]]:
    row = json.loads(line)
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise ValueError("no 'messages', a list")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError("a message is an object with the strings 'role' and 'content'")
    return messages
