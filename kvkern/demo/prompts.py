"""Cuts real text into prompts of an exact number of tokens. Knows tokens; knows nothing of engines.

Every document starts at a different place in the text, so no two documents share a first block.
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from . import corpus

TEXT_CHARS = 1_200_000
PIECE_CHARS = 20_000  # encoding is linear in small pieces


class OutOfText(RuntimeError):
    """The local text has too few tokens left."""


@dataclass
class PromptLibrary:
    """Hands out documents from front to back. The same library in another process hands out the same documents."""

    tokens: list[int]  # the whole text
    next_token: int = 0  # tokens [next_token, end) have not been handed out

    @classmethod
    def from_model(
        cls,
        model: Path,  # a model folder with a tokenizer.json
    ) -> "PromptLibrary":
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        text = corpus.text(TEXT_CHARS)
        pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
        encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
        return cls([token for encoding in encodings for token in encoding.ids])

    def document(self, num_tokens: int) -> list[int]:
        """Return the next `num_tokens` tokens of the text. Raises OutOfText if fewer are left."""
        end = self.next_token + num_tokens
        if end > len(self.tokens):
            left = len(self.tokens) - self.next_token
            raise OutOfText(
                f"The text is used up: {num_tokens} tokens asked, {left} left. Use fewer or shorter documents."
            )
        document = self.tokens[self.next_token : end]
        self.next_token = end
        return document

    def documents(self, count: int, num_tokens: int) -> list[list[int]]:
        return [self.document(num_tokens) for _ in range(count)]
