"""Real text that is wherever torch is: windows of the source files that its package installs, to classify by language."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LANGUAGES = {"Python": ".py", "C++": ".h", "CUDA": ".cuh", "CMake": ".cmake"}
_MIN_BYTES = 1024  # shorter files are mostly licence headers and lists of includes
_MAX_FILES = 60  # of one language; enough to learn from, and read in a moment


class Windows(NamedTuple):
    """Pieces of source text.

    text: int64 [count, length], the bytes.
    language: int64 [count], the index of the language in ``Corpus.languages``.
    """

    text: Tensor
    language: Tensor


class Corpus(NamedTuple):
    languages: tuple[str, ...]
    train: Windows
    held_out: Windows
    train_files: int
    held_out_files: int


def load_corpus(train: int, held_out: int, length: int, seed: int, root: Path | None = None) -> Corpus:
    """Windows of the source files under ``root`` (default: the installed torch package).

    One file in three is held out: its text occurs in ``held_out`` only. Every language and every file of a language is
    drawn equally often. The same arguments and the same files give the same windows on every machine and device.

    train, held_out: how many windows. length: bytes of a window.
    """
    root = root or Path(torch.__file__).parent
    # Files that cannot hold one window are of no use either.
    min_bytes = max(_MIN_BYTES, length)
    paths = {
        name: sorted(p for p in root.rglob(f"*{suffix}") if p.is_file() and p.stat().st_size >= min_bytes)
        for name, suffix in LANGUAGES.items()
    }
    paths = {name: found for name, found in paths.items() if len(found) >= 3}
    if len(paths) < 2:
        wanted = ", ".join(f"{name} (*{suffix})" for name, suffix in LANGUAGES.items())
        raise FileNotFoundError(
            f"root={str(root)!r} holds at least three files of {min_bytes} bytes in {len(paths)} of the languages {wanted}; "
            "expected two or more languages. Pass a folder of source files, or reinstall torch if this is its package."
        )

    rng = random.Random(seed)
    train_files, held_out_files = [], []
    for found in paths.values():
        chosen = rng.sample(found, min(len(found), _MAX_FILES))
        cut = len(chosen) // 3
        held_out_files.append(chosen[:cut])
        train_files.append(chosen[cut:])

    generator = torch.Generator().manual_seed(seed)
    return Corpus(
        languages=tuple(paths),
        train=_draw(train_files, train, length, generator),
        held_out=_draw(held_out_files, held_out, length, generator),
        train_files=sum(map(len, train_files)),
        held_out_files=sum(map(len, held_out_files)),
    )


def _draw(files: list[list[Path]], count: int, length: int, generator: torch.Generator) -> Windows:
    """``count`` windows at random places of ``files[language]``."""
    language = torch.randint(len(files), (count,), generator=generator)
    choice = torch.rand(count, generator=generator, dtype=torch.float64)  # which file of the language
    place = torch.rand(count, generator=generator, dtype=torch.float64)  # where in the file
    contents = [[torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in of_one] for of_one in files]
    text = torch.empty(count, length, dtype=torch.int64)
    for i, (l, c, s) in enumerate(zip(language.tolist(), choice.tolist(), place.tolist(), strict=True)):
        content = contents[l][int(c * len(contents[l]))]
        start = int(s * (content.numel() - length + 1))
        text[i] = content[start : start + length]
    return Windows(text, language)
