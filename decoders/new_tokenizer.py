"""A tokenizer trained from plain text, for a base that is trained from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from memdec.decoders.reading.tokenizer import END_OF_TEXT

CHAT_MARKS = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>\nTools: {{ tools | tojson }}\n"
    'Call one with <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>\n{% endif %}'
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}"
    "<tool_call>{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}</tool_call>"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `vocabulary` ids in all, `<|endoftext|>` first."""
    bpe = Tokenizer(token_models.BPE())
    # Digits are split one by one: long numbers would otherwise eat a small vocabulary.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = token_decoders.ByteLevel()
    special = [END_OF_TEXT, *CHAT_MARKS]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )
