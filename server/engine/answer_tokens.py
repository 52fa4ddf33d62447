"""An answer's tokens one by one: their bytes, their names in log-probabilities, and their offsets in the text.

vLLM tells tokens by their decoded text, which a part of a character has not. To be dropped when vLLM keeps each token's own bytes beside it.
"""

import codecs
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from vllm.entrypoints.generate.base.serving import format_token_id_placeholder
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from memdec.server.engine.protocols import AddedToken, Tokenizer, Vocabulary

UNDECODED = "\ufffd"  # what decoders put for bytes that aren't a whole character
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Byte-level vocabularies write these bytes as themselves, and the others, in order, as the characters from 256 on.
BYTE_OF = {chr(b): b for b in PRINTED} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTED}))}
FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in other vocabularies


def bytes_of(tokenizer: Vocabulary, token: int) -> bytes:
    """A token's own bytes; joined, those of an answer's tokens are its text's."""
    text: str = convert_ids_list_to_tokens(tokenizer, [token])[0]
    if UNDECODED not in text:
        return text.encode("utf-8", "replace")
    piece: str = tokenizer.convert_ids_to_tokens([token])[0]
    if fallback := FALLBACK.fullmatch(piece):
        return bytes([int(fallback[1], 16)])
    if all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece)
    return text.encode()


def names_of(tokenizer: Vocabulary, texts: Mapping[int, str]) -> dict[int, str]:
    """Token -> a name that no other candidate has: its text where that is unique, else its bytes as OpenAI spells them, else its id."""
    names = dict(texts)
    for named in (lambda token: _spelled(bytes_of(tokenizer, token)), format_token_id_placeholder):
        count = Counter(names.values())
        names = {token: name if count[name] == 1 else named(token) for token, name in names.items()}
    return names


def _spelled(raw: bytes) -> str:
    r"""`bytes:\xe6\x97`."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@lru_cache(maxsize=4)
def hidden_in(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that a tokenizer leaves out of generated text with skip_special_tokens."""
    added: Mapping[int, AddedToken] = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {token for token, entry in added.items() if entry.special}


class Place:
    """Where in a choice's text its next token begins, in characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, prompt: Sequence[int] = (), echoed: str = "") -> None:
        """`skip_special`: of generated tokens. `prompt` and `echoed` are the tokens before those and their text, if the answer has them."""
        self.tokenizer, self.prompt = tokenizer, len(prompt)
        self.hidden = hidden_in(tokenizer) if skip_special else frozenset()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spelled = b"".join(bytes_of(tokenizer, token) for token in prompt).decode("utf-8", "replace")
        # The tokenizer may have put something before the prompt that its text has not, such as a beginning-of-text token.
        self.at = len(echoed) - len(spelled) if spelled.endswith(echoed) else 0

    def pass_by(self, tokens: Sequence[int]) -> list[int]:
        """The offsets [tokens] of the next tokens. A token that continues a character has the character's offset."""
        return [self._pass_one(token) for token in tokens]

    def _pass_one(self, token: int) -> int:
        begins, self.prompt = self.at, self.prompt - 1
        if self.prompt >= 0 or token not in self.hidden:
            unfinished = self.decoder.getstate()[0]
            text = self.decoder.decode(bytes_of(self.tokenizer, token))
            self.at += len(text)
            begins += int(bool(unfinished) and text.startswith(UNDECODED))  # what was unfinished stays so, and was a character
        return max(0, begins)
