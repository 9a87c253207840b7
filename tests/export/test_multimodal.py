"""Models with an image tower: merged in the base's own layout of names, or as their language model alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pronghorn.errors import ConfigError, ExportError, NotSupportedError
from pronghorn.export.onto import MergeFormat
from pronghorn.export.repair import repair
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.weights.folder import open_weights
from tests import multimodal, tiny
from tests.multimodal import BASES
from tests.stack import PEFT_SCALES_EMBEDDINGS
from tests.tiny import EOS

IDS = torch.arange(5, 69)[None]  # no token of an image
TOLERANCE = 1e-4  # float32 alone gives 2e-5


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def check_logits(base: Path, adapter: Path, merged: Any) -> None:
    """``merged`` computes what PEFT computes unmerged, and not what the base does; all in float32."""
    wanted = logits(multimodal.load(base, adapter))
    assert (wanted - logits(merged)).abs().max() < TOLERANCE
    assert (wanted - logits(multimodal.load(base))).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(("family", "layout"), BASES)
def test_every_layout_merges_and_stays(family: str, layout: str, tmp_path: Path) -> None:
    multimodal.require(family, layout)
    base = multimodal.write_base(tmp_path / "base", family, layout, dtype=torch.float32)
    adapter = multimodal.write_adapter(tmp_path / "adapter", base)
    report = export(adapter, tmp_path / "merged", verify=False)
    assert report.tensors_merged == 14 and report.changes == ()
    for one, other in zip(open_weights(base).shards, open_weights(tmp_path / "merged").shards, strict=True):
        assert (one.path.name, one.prefix) == (other.path.name, other.prefix)
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == files
    for name in (name for name in files if not name.endswith(".safetensors")):
        assert (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    check_logits(base, adapter, multimodal.load(tmp_path / "merged"))


# an adapter on the image tower
TOWERS = {
    "gemma3": r".*vision_tower\..*\.(q_proj|fc1)",
    "mistral3": r".*vision_tower\..*\.(q_proj|gate_proj)|.*projector\.linear_1",
    "qwen2_5_vl": r".*visual\..*\.(qkv|gate_proj)",
    "qwen3_vl": r".*visual\..*\.(qkv|linear_fc1)",
}


OTHERS = [(layout, True) for layout in multimodal.LAYOUTS["gemma3"]]


@pytest.mark.parametrize(
    ("family", "layout", "other"), [(*base, False) for base in BASES] + [("gemma3", *one) for one in OTHERS]
)
def test_an_adapter_on_the_tower_merges_too(family: str, layout: str, other: bool, tmp_path: Path) -> None:
    """``other``: the names of Gemma 3's tower in the other generation of transformers, a level apart."""
    multimodal.require(family, layout)
    base = multimodal.write_base(tmp_path / "base", family, layout, dtype=torch.float32)
    adapter = multimodal.write_adapter(tmp_path / "adapter", base, target_modules=TOWERS[family])
    wanted = multimodal.load(base, adapter).merge_and_unload().state_dict()
    if other:
        rename(adapter / "adapter_model.safetensors")
    export(adapter, tmp_path / "merged", verify=False)
    found = multimodal.load(tmp_path / "merged").state_dict()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def rename(adapter: Path) -> None:
    """The tower's names of the other generation of transformers."""
    level = "vision_tower.vision_model."
    tensors = load_file(adapter)
    has = any(level in name for name in tensors)
    names = (level, "vision_tower.") if has else ("vision_tower.", level)
    save_file({name.replace(*names): value for name, value in tensors.items()}, adapter)


@pytest.mark.parametrize(
    ("family", "layout"), [("gemma3", "hub"), ("gemma3", "since 4.52"), ("qwen2_5_vl", "hub")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_tied_embedding_that_trains_gets_a_head_beside_it(family: str, layout: str, tmp_path: Path) -> None:
    multimodal.require(family, layout)
    base = multimodal.write_base(tmp_path / "base", family, layout, dtype=torch.float32)
    if family == "gemma3" and not PEFT_SCALES_EMBEDDINGS:
        pytest.skip("PEFT 0.17 forgets the scale of Gemma's embeddings in its update")
    targets = ["language_model.embed_tokens", "language_model.layers.0.self_attn.q_proj"]
    adapter = multimodal.write_adapter(tmp_path / "adapter", base, target_modules=targets)
    export(adapter, tmp_path / "merged", verify=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    head = {"gemma3hub": "language_model.lm_head.weight"}.get(family + layout, "lm_head.weight")
    assert head in open_weights(tmp_path / "merged").tensors
    check_logits(base, adapter, multimodal.load(tmp_path / "merged"))


def test_an_untied_head_keeps_its_name(tmp_path: Path) -> None:
    built = multimodal.model("gemma3", both={"tie_word_embeddings": False})
    base = multimodal.write_base(tmp_path / "base", built=built, dtype=torch.float32)
    targets = multimodal.LANGUAGE + "|lm_head"
    adapter = multimodal.write_adapter(tmp_path / "adapter", base, target_modules=targets)
    assert export(adapter, tmp_path / "merged", verify=False).tensors_merged == 15
    assert "language_model.lm_head.weight" in open_weights(tmp_path / "merged").tensors
    check_logits(base, adapter, multimodal.load(tmp_path / "merged"))


TEXT_CLASSES = {"gemma3": "Gemma3ForCausalLM", "mistral3": "MistralForCausalLM"}


@pytest.mark.parametrize(("family", "layout"), [base for base in BASES if base[0] in TEXT_CLASSES])
def test_the_language_model_alone_is_a_folder_of_its_class(family: str, layout: str, tmp_path: Path) -> None:
    multimodal.require(family, layout)
    base = multimodal.write_base(tmp_path / "base", family, layout, dtype=torch.float32)
    adapter = multimodal.write_adapter(tmp_path / "adapter", base)
    report = export(adapter, tmp_path / "text", format=MergeFormat(text_only=True), verify=False)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == TEXT_CLASSES[family]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_logits(base, adapter, model)
    names = {path.name for path in (tmp_path / "text").iterdir()}
    assert not [name for name in names if "process" in name]
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    assert tokenizer("a<b").input_ids == AutoTokenizer.from_pretrained(base)("a<b").input_ids
    assert "preprocessor_config.json: left out" in report.changes
    assert verify(tmp_path / "text", base=base).passed, str(verify(tmp_path / "text", base=base))


def only_version_5(base: Path) -> None:
    """What transformers 5 writes."""
    path = base / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
        text.pop(key, None)
    path.write_text(json.dumps(config))
    path = base / "tokenizer_config.json"
    settings = {
        **json.loads(path.read_text()),
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
    }
    path.write_text(json.dumps({**settings, "extra_special_tokens": [EOS]}))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", *multimodal.FAMILIES])
def test_what_only_transformers_5_reads_is_said_twice(family: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    if family in multimodal.FAMILIES:
        multimodal.require(family, "hub")
        multimodal.write_adapter(adapter, multimodal.write_base(base, family))
    else:
        tiny.write_adapter(adapter, tiny.write_base(base, family.removesuffix("_text")))
    readable = json.loads((base / "config.json").read_text())
    if "rope_parameters" not in readable.get("text_config", readable):
        pytest.skip("transformers 4 writes its own words")
    only_version_5(base)
    report = export(adapter, tmp_path / "merged", verify=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == readable
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in settings
    assert settings["additional_special_tokens"] == [EOS] and "extra_special_tokens" not in settings
    assert [line.partition(":")[0] for line in report.changes] == ["config.json", "tokenizer_config.json"]
    told = {verdict.engine: verdict.outcome for verdict in verify(tmp_path / "merged").engines}
    assert told == {"transformers 5": "right", "transformers 4": "right", "vllm": "right"}


def test_what_engines_make_of_a_tower_is_told_and_put_right(tmp_path: Path) -> None:
    """The real engines' part: ``tests/external/test_vllm_images.py``."""
    base = multimodal.write_base(tmp_path / "base", "gemma3", "one level less")
    report = verify(base)
    assert {one.engine: one.outcome for one in report.engines} == {
        "transformers 5": "right", "transformers 4": "wrong logits", "vllm": "refused"
    }  # fmt: skip
    changes = repair(base, tmp_path / "repaired").changes
    assert changes[0].startswith("32 tensors renamed")
    assert all(one.outcome == "right" for one in verify(tmp_path / "repaired").engines)
    shutil.copytree(tmp_path / "repaired", tmp_path / "without")
    (tmp_path / "without" / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json is missing" in str(verify(tmp_path / "without").engine("vllm"))
    again = repair(tmp_path / "without", tmp_path / "again", base=tmp_path / "repaired")
    assert again.report.engine("vllm").outcome == "right"


@pytest.mark.slow
def test_a_config_of_the_hub_that_leaves_most_to_its_class(tmp_path: Path) -> None:
    """Gemma 3's config.json states neither vocab_size nor heads: both folders are verified in full."""
    defaults = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    text = {"hidden_size": 64, "num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 256}
    special = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    built = multimodal.model(
        "gemma3", text={**defaults, **text, **special, "max_position_embeddings": 131_072}
    )
    base = multimodal.write_base(tmp_path / "base", "gemma3", built=built)
    path = base / "config.json"
    config = json.loads(path.read_text())
    stated = {key: config["text_config"][key] for key in ("hidden_size", "intermediate_size", "model_type")}
    stated |= {"num_hidden_layers": 6, "sliding_window": 32}
    kept = ("architectures", "model_type", "mm_tokens_per_image", "torch_dtype", "vision_config")
    named = {key: config[key] for key in kept} | {"eos_token_id": [1, 3], "text_config": stated}
    path.write_text(json.dumps(named))
    adapter = multimodal.write_adapter(tmp_path / "adapter", base)
    assert export(adapter, tmp_path / "merged").verified
    assert export(adapter, tmp_path / "text", format=MergeFormat(text_only=True)).verified
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert written == {
        **stated, "architectures": ["Gemma3ForCausalLM"], "eos_token_id": [1, 3],
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip


def test_text_only_is_refused_where_there_is_no_language_model_of_its_own(tmp_path: Path) -> None:
    format_ = MergeFormat(text_only=True)
    base = tiny.write_base(tmp_path / "llama")
    with pytest.raises(NotSupportedError, match=r"llama is no multimodal model \(llama\)"):
        export(tiny.write_adapter(tmp_path / "a", base), tmp_path / "out", format=format_)
    base = multimodal.write_base(tmp_path / "qwen", "qwen2_5_vl")
    adapter = multimodal.write_adapter(tmp_path / "b", base)
    with pytest.raises(NotSupportedError, match=r"\(qwen2_5_vl_text\) has no class without the image tower"):
        export(adapter, tmp_path / "out", format=format_)
    with pytest.raises(ConfigError, match=r"text_only is for merged_16bit, .*, not for gguf-q8_0") as caught:
        MergeFormat("gguf-q8_0", text_only=True)
    assert "write merged_16bit with text_only (--text-only) first" in caught.value.fix
    base = multimodal.write_base(tmp_path / "gemma")
    adapter = multimodal.write_adapter(tmp_path / "c", base)
    file = next(base.glob("model-00001*"))
    extra = {**load_file(file), "audio_tower.x": torch.ones(1)}
    save_file(extra, file, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["audio_tower.x"] = file.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"audio_tower\.x of the base is neither of the language model nor"):
        export(adapter, tmp_path / "out", format=format_)
    assert not (tmp_path / "out").exists()


def test_the_processor_s_chat_template_stays_with_the_text(tmp_path: Path) -> None:
    """Older folders have it in chat_template.json alone, which tokenizers do not read."""
    base = multimodal.write_base(tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    adapter = multimodal.write_adapter(tmp_path / "adapter", base)
    report = export(adapter, tmp_path / "text", format=MergeFormat(text_only=True), verify=False)
    assert "chat_template.jinja: the processor's" in report.changes
    assert AutoTokenizer.from_pretrained(tmp_path / "text").chat_template == template
    assert not (tmp_path / "text" / "chat_template.json").exists()
