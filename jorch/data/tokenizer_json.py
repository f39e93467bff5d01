"""A sentencepiece model as Hugging Face's `tokenizer.json`, for transformers and vLLM: same text, same ids."""

import json
from typing import Any

from jorch.data import chat_template

_SPACE = "▁"


def convert(model: bytes) -> str | None:
    """The text of `tokenizer.json`; None for models other than BPE with byte fallback that leave text as it is.

    Pieces are written with a plain space where sentencepiece writes "▁". So a "▁" of the text itself has no piece and
    becomes its three bytes, as in `SentencePieceTokenizer.encode`, and nothing needs to be normalised.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders
    from tokenizers.models import BPE

    messages: Any = sentencepiece_model_pb2  # generated code, which says nothing to a type checker
    proto = messages.ModelProto()
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    changes_text = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.name != "identity"
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback or changes_text:
        return None
    names = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces]
    vocab = {name: index for index, name in enumerate(names)}
    scores = {name: piece.score for name, piece in zip(names, proto.pieces, strict=True) if piece.type == piece.NORMAL}
    unknown = names[trainer.unk_id]
    bpe = BPE(vocab, _merges(scores), unk_token=unknown, byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    symbols = [
        name
        for name, piece in zip(names, proto.pieces, strict=True)
        if piece.type == piece.USER_DEFINED and name != " "
    ]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in symbols])
    return tokenizer.to_str(pretty=False)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs that make a piece, the best piece's first: sentencepiece merges by score, tokenizers by rank."""
    pairs = [
        (-score, (name[:cut], name[cut:]))
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    return [pair for _, pair in sorted(pairs)]


def config(end_of_turn: str, pad: str) -> dict[str, Any]:
    """`tokenizer_config.json` beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_turn,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template.COMPACT,
    }


def dump(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
