"""Each third-party library is imported in named places only: a change in one has one place to go to."""

from __future__ import annotations

import re
import sys
from collections import defaultdict

from tests.guards.source import COMPUTED, ROOT, Module, modules

# library -> the modules that may import it; a name that ends with a dot stands for everything below it
PLACES: dict[str, tuple[str, ...]] = {
    # the model stack: whole rooms
    "torch": (
        "adapters.",
        "attention.",
        "export.",
        "hardware",
        "loading.",
        "memory.",
        "ops.",
        "patching.",
        "quant.",
        "serving.compare",
        "serving.vllm",
        "training.",
        "weights.",
    ),
    "transformers": (
        "adapters.",
        "attention.",
        "data.",
        "export.",
        "loading.",
        "memory.",
        "serving.",
        "training.",
    ),
    # boundaries: one place for each thing done with the library
    "peft": (
        "adapters.attach",
        "adapters.save",
        "loading.adapter",
        "export.verify_model",
        "export.verify_streamed",
    ),
    "trl": ("training.trainer",),
    "accelerate": ("export.verify_streamed", "training.trainer"),
    "datasets": ("data.for_trl", "data.prepare", "data.rows", "data.store"),
    "pyarrow": ("data.packing", "data.rows", "data.store"),
    "safetensors": ("loading.adapter",),
    "huggingface_hub": ("serving.hub", "sources.hub"),
    "typer": ("cli.",),
    "rich": ("cli.tables", "data.inspect", "data.report", "training.progress"),
    "pydantic": ("data.options", "training.config", "training.config_errors"),
    "yaml": ("training.config", "training.run"),
    "numpy": (
        "data.checks",
        "data.packing",
        "data.prepare",
        "data.store",
        "data.tally",
        "export.gguf_write",
        "export.merged",
        "export.verify_in_llama",
    ),
    "gguf": ("export.gguf_run", "export.gguf_write"),
    "llmcompressor": ("export.calibrate_engine",),
    "llama_cpp": ("export.gguf_engine", "export.verify_in_llama"),
    "tokenizers": ("data.isolated",),
    "jinja2": ("data.opaque", "export.gguf_ollama", "export.verify_render"),
    "bitsandbytes": ("quant.library",),
    "triton": ("ops.triton.",),
    "vllm": ("export.verify_in_vllm", "serving.generate_in_vllm"),
}
# with torch's builds for GPUs, and only there; vLLM in an environment of its own
COMES_ALONG = frozenset({"triton", "vllm"})
DISTRIBUTIONS = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python"}  # where the name to install differs


def test_libraries_are_imported_where_the_table_says() -> None:
    broken = [
        f"{module.at(found.line)} imports {found.target}"
        for module in modules()
        for found in module.imports()
        if not is_allowed(module, found.target)
    ]
    assert broken == []


def test_the_table_names_no_place_that_is_not_used() -> None:
    used = defaultdict(set)
    for module in modules():
        for found in module.imports():
            used[found.target.partition(".")[0]].add(module.name.partition(".")[2] + ".")
    unused = [
        (library, place)
        for library, places in PLACES.items()
        for place in places
        if not any(name.startswith(place) for name in used[library])
    ]
    assert unused == []


def test_every_library_used_is_a_declared_dependency() -> None:
    declared = re.findall(r'^    "([\w-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    used = {DISTRIBUTIONS.get(library, library) for library, places in PLACES.items() if places}
    assert used - COMES_ALONG <= set(declared)


def test_the_check_finds_what_it_looks_for() -> None:
    assert not is_allowed(Module("pronghorn.loading.x", ""), "trl.SFTTrainer")
    assert not is_allowed(Module("pronghorn.weights.x", ""), "transformers")
    assert not is_allowed(Module("pronghorn.weights.x", ""), "unheard_of")
    assert is_allowed(Module("pronghorn.cli.x", ""), "typer")
    assert is_allowed(Module("pronghorn.weights.x", ""), "os.path")


def is_allowed(module: Module, target: str) -> bool:
    """Whether the table lets a module import ``target``; the standard library is free."""
    library = target.partition(".")[0]
    if library in sys.stdlib_module_names or library in {"pronghorn", COMPUTED}:
        return True
    place = module.name.partition(".")[2] + "."
    return any(place.startswith(f"{allowed.rstrip('.')}.") for allowed in PLACES.get(library, ()))
