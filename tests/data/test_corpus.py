"""The embedded corpus: what it holds, and that its splits share no text."""

import re

import pytest

from fused_prefopt.data import Document, load_documents, paragraphs, split_documents

PROSE = (
    "The value of this option is the name of a file that is read when the program starts, "
    "and it is not an error if the file does not exist."
)
OTHER = (
    "Return the number of items that are in the queue at the time of the call, which is only "
    "a hint, as another thread may add an item before the caller looks at the result."
)
THIRD = (
    "A message is written to the log for each of the files that could not be opened, and the "
    "rest of the archive is then copied in the order in which it was given."
)
# The names module0 … module19 whose sha256("0:name") lies in the lowest 30 %.
HELD_OUT = [f"module{i}" for i in (1, 5, 7, 8, 13, 14, 15, 18)]


def words(text):
    return re.findall("[a-z]+", text.lower())


def test_corpus_has_the_standard_library_and_the_language_reference():
    documents = load_documents()
    by_name = {document.name: document.text for document in documents}
    assert len(by_name) == len(documents) > 300
    assert list(by_name) == sorted(by_name)
    assert by_name["json"].startswith("JSON (JavaScript Object Notation)")
    assert "Simple JSON <https://json.org> decoder" in by_name["json.decoder"]
    assert 'The "if" statement is used for conditional execution' in by_name["topics/if"]
    assert not any(name.startswith(("test.", "idlelib", "encodings")) for name in by_name)
    assert sum(len(paragraphs(document)) for document in documents) > 2000


def test_paragraphs_keep_prose_on_one_line_and_leave_code_out():
    text = "\n\n".join(
        [
            "f(x, y) -> z",
            PROSE.replace(" file", "\n   file"),
            ">>> f(1)\n2",
            "name   type   default\n-----  -----  -------\n" + "a      int    0\n" * 9,
            OTHER,
        ]
    )
    assert paragraphs(Document("d", text)) == [PROSE, OTHER]


def test_a_long_paragraph_ends_with_a_whole_sentence():
    (text,) = paragraphs(Document("d", " ".join([PROSE] * 9)))
    assert text == " ".join([PROSE] * 6)
    assert len(text) <= 900 < len(text) + 1 + len(PROSE)


def test_no_document_paragraph_or_phrase_is_on_both_sides():
    train, held_out = split_documents(load_documents())
    assert {d.name for d in train}.isdisjoint(d.name for d in held_out)

    def phrases(documents):
        texts = [words(text) for document in documents for text in paragraphs(document)]
        return {tuple(t[i : i + 8]) for t in texts for i in range(len(t) - 7)}

    assert phrases(train).isdisjoint(phrases(held_out))
    every = [" ".join(words(text)) for d in train + held_out for text in paragraphs(d)]
    assert len(every) == len(set(every))
    share = len(held_out) / (len(held_out) + len(train))
    assert 0.05 < share < 0.15


def test_side_is_a_hash_of_name_and_seed():
    documents = [
        Document(f"module{i}", f"{PROSE[:-1]}, as in the {'ab'[i % 2] * (i + 3)} module.")
        for i in range(20)
    ]
    _, held_out = split_documents(documents, held_out=0.3, seed=0)
    assert [d.name for d in held_out] == HELD_OUT
    _, other = split_documents(documents, held_out=0.3, seed=1)
    assert [d.name for d in other] != HELD_OUT
    assert split_documents(documents, held_out=0.0)[1] == []
    assert split_documents(documents, held_out=1.0)[0] == []


def test_a_paragraph_of_both_sides_stays_in_held_out_only():
    held_name, train_name = HELD_OUT[0], "module0"
    near = PROSE.replace("The value of this option", "The argument of this function")
    documents = [
        Document(train_name, "\n\n".join([PROSE, near, OTHER])),
        Document(held_name, "\n\n".join([THIRD, PROSE.replace("The value", "The  VALUE")])),
    ]
    train, held_out = split_documents(documents, held_out=0.3)
    assert [paragraphs(d) for d in train] == [[OTHER]]
    assert [paragraphs(d) for d in held_out] == [[THIRD, PROSE.replace("The value", "The VALUE")]]


def test_held_out_must_be_a_fraction():
    with pytest.raises(ValueError, match=r"held_out: got 2, wanted a fraction in \[0, 1\]"):
        split_documents([], held_out=2)
