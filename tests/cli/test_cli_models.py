"""Models, tokenizers, engines and folders that a training cannot use: which key is blamed."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from command_line_jobs import log_of, pairs, write_lines
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, tiny_llama

pytest.importorskip("datasets")


@pytest.fixture
def saved(material, tmp_path):
    """A folder of the tiny model without some of its files, or of another with its tokenizer."""

    def save(*without, model=None):
        folder = tmp_path / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(material / "model", folder)
        if model is not None:
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder)
        for name in without:
            (folder / name).unlink()
        return folder

    return save


def base_model():
    return tiny_llama().model


def reward_model():
    return transformers.LlamaForSequenceClassification(tiny_llama(pad_token_id=0).config)


@pytest.mark.parametrize("key", ["model", "reference_model"])
@pytest.mark.parametrize("make", [base_model, reward_model])
def test_a_model_of_another_kind_has_no_head(refused, saved, key, make):
    model = make()
    folder = saved(model=model)
    assert refused(**{key: str(folder)}) == (
        f"{key}: {folder} has no lm_head.weight (it was saved as {type(model).__name__}), so its"
        " head would be random; name a causal language model"
    )


def test_a_tied_head_is_not_missing(job, saved, tmp_path):
    assert job("train", model=str(saved(model=tiny_llama(tie_word_embeddings=True)))) == 0
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("reference", ["precomputed", "model"])
def test_a_reference_of_another_vocabulary_is_refused(refused, saved, reference):
    wider = tiny_llama()
    wider.resize_token_embeddings(VOCAB + 9)
    folder = saved(model=wider)
    assert refused(reference_model=str(folder), reference=reference) == (
        f"reference_model: got '{folder}' with a vocabulary of 70, needs the 61 of the model that"
        " trains; name one with the same vocabulary"
    )


def test_a_reference_whose_tokenizer_numbers_otherwise_is_refused(refused, saved):
    folder = saved()
    path = folder / "tokenizer.json"
    ids = tiny_tokenizer().get_vocab()
    text = path.read_text()
    for word, number in (("cat", ids["mat"]), ("mat", ids["cat"])):
        assert f'"{word}": {ids[word]}' in text
        text = text.replace(f'"{word}": {ids[word]}', f'"{word}_": {number}')
    path.write_text(text.replace("cat_", "cat").replace("mat_", "mat"))
    said = refused(reference_model=str(folder))
    assert said.startswith(f"reference_model: got '{folder}', whose tokenizer has '")
    assert said.endswith("as the policy's has; name a model of the same tokenizer")


def test_a_tokenizer_of_tokens_that_the_model_has_not_is_refused(refused, tmp_path):
    folder, tokenizer = tmp_path / "tokenizer", tiny_tokenizer()
    tokenizer.add_tokens([f"more{number}" for number in range(VOCAB)])
    tokenizer.save_pretrained(folder)
    rows = [row | {"chosen": f"more{VOCAB - 1}"} for row in pairs(4)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    said = refused(tokenizer=str(folder), dataset=data, loss="simpo")
    assert said.startswith(f"tokenizer: data: got token id {len(tokenizer) - 1}, needs ids of at")


def test_a_folder_that_is_no_whole_model_is_told_what_it_lacks(refused, saved, tmp_path):
    folder = saved("config.json")
    needs = "a folder without config.json, needs one that save_pretrained wrote"
    assert refused(model=str(folder)) == f"model: got '{folder}', {needs}"
    folder = saved("model.safetensors")
    said = refused(model=str(folder))
    assert said.startswith(f"model: got '{folder}', which cannot be loaded (Error no file named")
    assert said.endswith("needs a hub name or a folder with config and weights")
    (folder / "model.safetensors").write_bytes(b"half")
    assert f"model: got '{folder}', whose weights are damaged: " in refused(model=str(folder))
    (tmp_path / "empty").mkdir()
    said = refused(tokenizer=str(tmp_path / "empty"))
    assert said.startswith(f"tokenizer: got '{tmp_path / 'empty'}', whose tokenizer cannot be load")


def test_a_model_without_a_tokenizer_is_told_to_name_one(refused, saved):
    folder = saved("tokenizer.json", "tokenizer_config.json")
    said = refused(model=str(folder))
    assert said.startswith(f"model: got '{folder}', whose tokenizer cannot be loaded (")
    assert said.endswith("; name one with the key tokenizer")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "model_type: got 'lama' (did you mean 'llama'"),
        ({"model_type": "t5"}, "model_type: got 't5', needs that of a causal language model"),
        ({"hidden_size": 7}, "got no model_type, needs one such as llama"),
        ({"model_type": "llama", "hidden_size": "x"}, "hidden_size"),
    ],
)
def test_a_config_of_no_language_model_is_told_so(refused, material, config, message):
    said = refused(model=None, model_config=config, tokenizer=str(material / "model"))
    assert said.startswith("model_config: ") and message in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_an_engine_of_gpus_is_refused_before_anything_is_loaded(refused, monkeypatch, engine):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = refused(engine=engine, model="no/such/model")
    assert said.startswith(f"engine: got '{engine}' on cpu, needs a GPU, or TRITON_INTERPRET=1")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    refused, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        said = refused(f"output_dir={folder}", model="no/such/model")
        assert said == f"output_dir: got {folder}, but {file} is a file; needs a folder"
    monkeypatch.setattr("os.access", lambda *_: False)
    said = refused(f"output_dir={tmp_path / 'a' / 'b'}", model="no/such/model")
    assert said == f"output_dir: got {tmp_path / 'a' / 'b'}, but {tmp_path} cannot be written to"


def test_what_the_reference_pass_meets_is_blamed_on_its_own_key(refused, saved, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(cache_dir=str(tmp_path / "file")).startswith("cache_dir: [Errno ")
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    folder = str(saved(model=broken))
    for key in ("model", "reference_model"):
        said = refused(**{key: folder})
        assert said.startswith(f"{key}: got ref_chosen_logps=nan for feature "), said


def test_a_damaged_cache_is_blamed_on_its_folder(job, refused, tmp_path):
    assert job("reference", cache_dir=str(tmp_path / "cache")) == 0
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    said = refused(cache_dir=str(tmp_path / "cache"))
    assert said.startswith(f"cache_dir: {kept}: got a damaged or truncated file")


def test_a_mistake_of_the_code_keeps_its_traceback(job, monkeypatch):
    from fused_prefopt import reference

    def wrong(*_, **__):
        raise ValueError("of the code")

    monkeypatch.setattr(reference, "add_reference_logps", wrong)
    with pytest.raises(ValueError, match="of the code"):
        job("train")


def test_pictures_want_matplotlib_before_anything_is_loaded(refused, monkeypatch):
    from fused_prefopt import checks

    find = checks.find_spec
    monkeypatch.setattr(checks, "find_spec", lambda n: None if n == "matplotlib" else find(n))
    wanted = 'pictures needs matplotlib: pip install "fused-prefopt[plots]"'
    assert refused(pictures=True, model="no/such/model") == wanted
