"""What stands beside the weights in the folder of a model: configs, tokenizers and code."""

from __future__ import annotations

import re
from pathlib import Path

from .candidates import has_own_folder
from .checkpoints import RECORD

_BESIDE = re.compile(r".+\.(json|txt|model|tiktoken|jinja|py|spm|codes|bpe)")
_NOT_BESIDE = re.compile(rf".+\.index\.json|trainer_state\.json|.+_results\.json|{RECORD}\.json|requirements\.txt")
#: The largest tokenizers have 40 MB.
_MOST_NBYTES = 100 * 10**6

#: The file in which transformers keeps the dtype of the weights, and that dtype, of parts of the model too.
_CONFIG = "config.json"
_DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"(?:float64|float32|bfloat16|float16)"')
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def beside(path: str) -> list[Path]:
    """Return the small files that stand beside the weights of an input, for a folder.

    Beside a file of another name than a model's own there may be anything.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not has_own_folder(folder.name):
            return []
        folder = folder.parent
    return [
        file
        for file in sorted(folder.iterdir())
        if _BESIDE.fullmatch(file.name) and not _NOT_BESIDE.fullmatch(file.name)
        if file.is_file() and file.stat().st_size <= _MOST_NBYTES
    ]


def changed_texts(files: list[Path], dtype: str | None) -> dict[str, str]:
    """Return the new text of each of these files that names the dtype of the weights, if the weights have a new one.

    With the old one, ``from_pretrained`` would load the weights in it.
    """
    if dtype is None:
        return {}
    texts = {file.name: _text(file) for file in files if file.name == _CONFIG}
    changed = {name: _DTYPE.sub(rf'\1"{_DTYPES[dtype]}"', text) for name, text in texts.items()}
    return {name: text for name, text in changed.items() if text != texts[name]}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text in UTF-8: {error}") from None
