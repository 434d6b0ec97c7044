"""Tokenizers built in memory for the data tests: of words with a chat template, of letters."""

import pytest

WORDS = "<unk> <s> </s> <end> user assistant the cat sat on mat 1 2".split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }} "
    "<end>{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)


def tiny_tokenizer(adds_bos=False, template=CHAT_TEMPLATE):
    """A real PreTrainedTokenizerFast over a dozen words."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


class Letters:
    """The least that a tokenizer must offer: one id a letter, a = 1, 0 at the end."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens):
        return [ord(letter) - 96 for letter in text if letter.isalpha()]


def chat(**turns):
    """Messages from role=content pairs."""
    return [{"role": role, "content": content} for role, content in turns.items()]
