"""Promises about the weight files of a model folder and the config that describes them (headers only)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from pronghorn.export.verify_codes import plain_tensors
from pronghorn.export.verify_folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    FLOATS,
    INDEX,
    SINGLE,
    Fault,
    Finding,
    Folder,
    Tensor,
    UnreadableError,
    promise,
    quantization,
    read_header,
    verdict,
)
from pronghorn.export.verify_names import LAYERS, TIED_BY_DEFAULT, original_name

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|audio|image)")
_PEFT = re.compile(
    r"^base_model\.model\.|\.base_layer\.|\.lora_(A|B|embedding_A|embedding_B)\b|\.modules_to_save\."
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_PACKED = re.compile(
    r"\.(weight_packed|weight_(global_)?scale(_inv)?|qweight|qzeros|absmax|quant_map|SCB|weight_shape)$|\.absmax\b"
)
_STRAY = re.compile(
    r"^(pytorch_model.*\.(bin|json)|consolidated.*\.pth|.*\.gguf|tf_model\.h5|flax_model\.msgpack)$"
)
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_SAMPLES, _SAMPLE_BYTES = 16, 4096
# quantisation methods that engines treat differently where no weight is quantised
METHODS = frozenset({"bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8"})


@promise("weight files are complete")
def shards_complete(folder: Folder) -> Finding:
    """Every file a loader opens is there and exactly as long as its header says."""
    if not folder.weight_files:
        said = f"no {SINGLE} and no {INDEX}: {folder.path} holds no safetensors weights"
        return verdict([Fault("no weights", said)], "")
    missing = sorted(set(folder.weight_map.values()) - set(folder.weight_files))
    problems = [Fault("unreadable", f"{file} is named by {INDEX} and missing") for file in missing]
    total = 0
    for file in sorted(set(folder.weight_map.values()) & set(folder.weight_files)) or folder.weight_files:
        try:
            total += sum(tensor.end - tensor.start for tensor in read_header(folder.path / file).values())
        except (OSError, UnreadableError) as error:
            problems.append(Fault("unreadable", str(error)))
    return verdict(problems, f"{total / 1e6:,.1f} MB of tensors; files: {len(folder.weight_files)}")


@promise("index lists exactly the tensors present")
def index_exact(folder: Folder) -> Finding:
    """The index lists exactly the tensors present, each in the file that holds it."""
    if INDEX not in folder.names:
        if folder.weight_files == (SINGLE,):
            return True, f"one file, no index needed; {len(folder.tensors)} tensors"
        said = f"no {INDEX} for {', '.join(folder.weight_files) or 'any weight file'}"
        return verdict([Fault("no index", said)], "")
    weight_map = folder.weight_map
    problems = [Fault("index names ghosts", f"{INDEX} lists no tensor")] if not weight_map else []
    held: dict[str, list[str]] = defaultdict(list)
    for file, header in folder.headers.items():
        for tensor in header:
            held[tensor].append(file)
    problems += [
        Fault("stored twice", f"{t} lies in {' and '.join(files)}")
        for t, files in held.items()
        if len(files) > 1
    ]
    problems += [
        Fault("index forgets", f"{t} is in {files[0]} but not in the index")
        for t, files in held.items()
        if t not in weight_map
    ]
    for tensor, file in weight_map.items():
        if file not in held.get(tensor, [file] if file not in folder.headers else []):
            code = "index misplaces" if tensor in held else "index names ghosts"
            problems.append(Fault(code, f"the index puts {tensor} in {file}, which does not hold it"))
    return verdict(problems, f"{len(weight_map)} tensors in {len(folder.headers)} files")


@promise("no stale weight file")
def no_stale_weights(folder: Folder) -> Finding:
    """No weight file lies beside those in use: transformers prefers a stale model.safetensors to shards."""
    used = set(folder.weight_map.values()) or {SINGLE}
    stale = [file for file in folder.weight_files if file not in used]
    stale += sorted(file for file in folder.names if _STRAY.match(file))
    problems = [
        Fault(
            "stale single file" if file == SINGLE else "stale file",
            f"{file} is not one of the weight files in use",
        )
        for file in stale
    ]
    return verdict(problems, "none")


@promise("no adapter beside the weights")
def no_adapter_beside(folder: Folder) -> Finding:
    """No adapter files beside full weights: transformers would apply the adapter a second time."""
    found = sorted(folder.names & set(ADAPTER_FILES))
    told = f"{' and '.join(found)} beside the weights"
    if ADAPTER_CONFIG not in found:
        indexed = INDEX in folder.names
        code = "adapter weights beside shards" if indexed else "adapter weights beside one file"
    elif len(found) == 1:
        code = "adapter config beside"
    else:
        code = "adapter beside shards" if INDEX in folder.names else "adapter beside one file"
    return verdict([Fault(code, told)] if found else [], "none")


@promise("tensor names are the model's own")
def no_peft_names(folder: Folder) -> Finding:
    """No tensor carries a name that only PEFT's wrappers use: loaders would not find the weight they want."""
    problems = [
        Fault("PEFT names", f"{tensor} is a PEFT name") for tensor in folder.tensors if _PEFT.search(tensor)
    ]
    return verdict(problems, f"{len(folder.tensors)} names")


@promise("quantization_config agrees with the weights")
def quantization_agrees(folder: Folder) -> Finding:
    """A quantization_config is there exactly when the weights are quantised, nested configs included."""
    found = list(_paths(folder.config, ("quantization_config", "compression_config")))
    packed = [t for t, tensor in folder.tensors.items() if _PACKED.search(t) or tensor.dtype.startswith("F8")]
    problems = []
    if found and not packed:
        method = str(quantization(folder.config).get("quant_method"))
        code = f"{method} config left" if method in METHODS else "quantization config left"
        problems = [Fault(code, f"config.json has {path}, and no tensor is quantised") for path in found]
    elif packed and not found:
        told = f"{packed[0]} is quantised, and config.json has no quantization_config"
        lone = folder.tensors[packed[0]].dtype.startswith("F8") and not any(map(_PACKED.search, packed))
        problems = [Fault("fp8 without scales" if lone else "codes without a config", told)]
    return verdict(problems, "quantised" if packed else "16 or 32 bit, none")


def _paths(value: object, wanted: tuple[str, ...], prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in wanted and inner:
                yield prefix + key
            yield from _paths(inner, wanted, f"{prefix}{key}.")


@promise("config.json is usable")
def config_sane(folder: Folder) -> Finding:
    """config.json is there, names its class, and its sizes are finite and those of the weights."""
    if "config.json" not in folder.names:
        return verdict([Fault("no config", "config.json is missing")], "")
    config, text = folder.config, folder.text_config
    problems = [
        Fault(f"no {key}", f"config.json has no {key}")
        for key in ("architectures", "model_type")
        if not config.get(key)
    ]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        value = text.get(key, 1)
        if isinstance(value, list):  # some families give one size per layer
            continue
        if type(value) is not int or not 0 < value < 2**31:
            problems.append(Fault("unreadable", f"config.json: {key} is {value!r}"))
    layers = text.get("num_hidden_layers")
    stored = {
        int(match[1]) for t in folder.tensors if not _NOT_TEXT.search(t) and (match := _LAYER.search(t))
    }
    if isinstance(layers, int) and stored and layers > max(stored) + 1:
        told = f"config.json: num_hidden_layers is {layers}, the weights hold {max(stored) + 1}"
        problems.append(Fault("more layers", told))
    names = config.get("architectures")
    return verdict(problems, ", ".join(map(str, names)) if isinstance(names, list) else "")


@promise("vocab_size equals the embedding rows")
def vocabulary_agrees(folder: Folder) -> Finding:
    """vocab_size, where it is stated, equals the rows of the embeddings and of the output head."""
    size = folder.text_config.get("vocab_size")
    rows = {t: tensor.shape[0] for t, tensor in _vocabulary(folder).items() if tensor.shape}
    if size is None and len(set(rows.values())) == 1:
        return True, f"not stated, {rows.popitem()[1]} rows"
    problems = [
        Fault("vocabulary", f"{t} has {n} rows, vocab_size is {size}") for t, n in rows.items() if n != size
    ]
    return verdict(problems, f"{size} (in {len(rows)} tensors)")


def embedding_rows(folder: Folder) -> int:
    """Rows of the language model's embeddings."""
    return next(tensor.shape[0] for name, tensor in _vocabulary(folder).items() if not _HEAD.search(name))


def _vocabulary(folder: Folder) -> dict[str, Tensor]:
    """Embedding and head tensors of the language model, by name."""
    return {
        name: tensor
        for name, tensor in folder.tensors.items()
        if (_EMBEDDING.search(name) or _HEAD.search(name)) and not _NOT_TEXT.search(name)
    }


@promise("tie_word_embeddings agrees with lm_head")
def tying_agrees(folder: Folder) -> Finding:
    """tie_word_embeddings says what the stored lm_head says, and the head is not all zero."""
    flags = _flags(folder)
    heads = {t: x for t, x in _vocabulary(folder).items() if _HEAD.search(t)}
    tables = [x for t, x in _vocabulary(folder).items() if t not in heads]
    problems = []
    if flags == {False} and tables and not heads:
        said = "is false" if _stated(folder) else "is not stated, which means false for this model type"
        problems = [Fault("head lost", f"tie_word_embeddings {said}, and no lm_head.weight is stored")]
    elif flags == {True} and folder.base and _stores_head(folder.base) and not heads:
        problems = [Fault("head lost", "the base has an lm_head.weight of its own, and none is stored")]
    elif (
        flags == {True}
        and heads
        and tables
        and not all(_same_bytes(head, tables[0]) for head in heads.values())
    ):
        told = "tie_word_embeddings is true, and an lm_head.weight other than the embeddings is stored"
        problems = [Fault(_stray_code(folder, next(iter(heads))), told)]
    problems += [
        Fault("head of zeros", f"{name} is zero wherever it was looked at")
        for name, head in heads.items()
        if not any(any(sample) for sample in _samples(head))
    ]
    kept = (
        f"{', '.join(map(str, sorted(flags))) or 'not stated'}; lm_head {'stored' if heads else 'not stored'}"
    )
    return verdict(problems, kept)


def _stated(folder: Folder) -> set[bool]:
    configs = (folder.config, folder.text_config)
    return {c["tie_word_embeddings"] for c in configs if "tie_word_embeddings" in c}


def _flags(folder: Folder) -> set[bool]:
    """What tie_word_embeddings says; for known model types that do not state it, their class's default."""
    kind = folder.config.get("model_type")
    default = {kind in TIED_BY_DEFAULT} if kind in LAYERS else set()
    return _stated(folder) or default


def _stores_head(folder: Folder) -> bool:
    return any(_HEAD.search(name) for name in _vocabulary(folder))


def _stray_code(folder: Folder, head: str) -> str:
    """Engines differ on which of two matrices they use; the base says which is right."""
    tables = [tensor for name, tensor in _vocabulary(folder).items() if not _HEAD.search(name)]
    if tables and _same_bytes(folder.tensors[head], tables[0]):
        return "copied head"
    if folder.base is None:
        return "head or embeddings"
    return "head not to be tied" if _stores_head(folder.base) else "stray head"


def _samples(tensor: Tensor) -> Iterator[bytes]:
    """16 samples of 4 KiB, spread over the tensor."""
    size = tensor.end - tensor.start
    with tensor.file.open("rb") as file:
        for offset in range(0, size, max(size // _SAMPLES, 1)):
            file.seek(tensor.start + offset)
            yield file.read(min(_SAMPLE_BYTES, size - offset))


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and their samples (enough to tell a trained head)."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(left == right for left, right in zip(_samples(one), _samples(other), strict=True))


@promise("dtype in config.json agrees with the stored one")
def dtype_agrees(folder: Folder) -> Finding:
    """config.json's dtype is the stored one, and no layer stores a matrix in another than the rest."""
    declared = folder.config.get("dtype", folder.config.get("torch_dtype", folder.text_config.get("dtype")))
    stored: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[tuple[str, str], str] = {}
    for tensor, entry in folder.tensors.items():
        if entry.dtype in FLOATS:
            stored[entry.dtype] += entry.end - entry.start
            kind = re.sub(r"\d+", "*", tensor)
            kinds[kind][entry.dtype] += 1
            examples.setdefault((kind, entry.dtype), tensor)
    if not stored or any(_paths(folder.config, ("quantization_config",))):
        return True, "no 16 or 32 bit matrices to compare"
    main = stored.most_common(1)[0][0]
    problems = []
    if declared is not None and _STORED.get(str(declared).removeprefix("torch.")) != main:
        problems.append(Fault("declared dtype", f"config.json says {declared}, the weights are {main}"))
    for kind, counts in kinds.items():
        usual = main if main in counts else counts.most_common(1)[0][0]
        odd = [dtype for dtype in counts if dtype != usual]
        problems += [
            Fault("mixed dtypes", f"{examples[kind, dtype]} is {dtype}, its twins are {usual}")
            for dtype in odd
        ]
    return verdict(problems, f"{declared or 'not stated'}, stored {', '.join(stored)}")


@promise("same tensors as the base")
def same_as_base(folder: Folder) -> Finding:
    """Names, shapes and dtypes are the base's, but for added vocabulary rows and an untied lm_head."""
    assert folder.base is not None
    # under their names without wrappers, which break another promise
    ours = {original_name(name, folder.config): told for name, told in plain_tensors(folder).items()}
    theirs = folder.base.tensors
    problems = [Fault("linear lost", f"{t} of the base is missing") for t in theirs if t not in ours]
    for t, (shape, dtype) in ours.items():
        before = theirs.get(t)
        if before is None:
            if not (_HEAD.search(t) and folder.config.get("tie_word_embeddings") is False):
                code = _stray_code(folder, t) if _HEAD.search(t) else "unknown tensor"
                problems.append(Fault(code, f"{t} is not in the base"))
            continue
        if dtype != before.dtype:
            problems.append(Fault("mixed dtypes", f"{t} is {dtype}, in the base {before.dtype}"))
        grown = t in _vocabulary(folder) and shape[1:] == before.shape[1:] and shape > before.shape
        if shape != before.shape and not grown:
            told = f"{t} has shape {list(shape)}, in the base {list(before.shape)}"
            problems.append(Fault("shape", told))
    return verdict(problems, f"{len(theirs)} names, shapes and dtypes equal")
