"""Incremental detokenisation: text as tokens arrive, never half a character."""

from collections.abc import Sequence

from gossamer.server.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"

# Prompt tokens that give the first output token its context (whether a leading space belongs to it).
_CONTEXT = 6
# Tokens held back for a character to complete. A run this long that never ends on a character boundary is not text.
_MAX_PENDING = 64


class Detokenizer:
    """The text of one sequence of tokens, in pieces that join to the decoding of the whole.

    Each token is decoded together with the few before it, so the cost per token does not grow with the text. Trailing
    U+FFFD may be the start of a character and is held back until later tokens or `flush` settle it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = self._context(prompt_token_ids)
        self._num_settled = len(self._window)
        """Tokens of the window whose text is out; the rest are pending."""
        self._num_chars = len(self._decode(self._window).rstrip(REPLACEMENT))
        """Characters of the window's text that are out."""

    def add(self, token_id: int) -> str:
        """The text that has become certain with this token; may be empty."""
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(REPLACEMENT)
        if len(certain) < len(text) and len(self._window) - self._num_settled < _MAX_PENDING:
            return self._emit(certain)
        piece = self._emit(text)
        self._advance()
        return piece

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD. Call it once, at the end."""
        return self._emit(self._decode(self._window))

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The end of the prompt, from the start of a character: its bytes may be tokens of their own."""
        for size in range(_CONTEXT, _CONTEXT + 4):
            tail = list(prompt_token_ids[-size:])
            if not self._decode(tail).startswith(REPLACEMENT):
                return tail
        return list(prompt_token_ids[-_CONTEXT:])

    def _emit(self, text: str) -> str:
        piece = text[self._num_chars :]
        self._num_chars = max(self._num_chars, len(text))
        return piece

    def _advance(self) -> None:
        """Drops the tokens that are no longer needed as context; those just settled become it."""
        self._window = self._window[self._num_settled :]
        self._num_settled = len(self._window)
        self._num_chars = len(self._decode(self._window))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
