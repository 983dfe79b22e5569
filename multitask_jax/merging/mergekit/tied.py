"""A tied head, where models that tie it meet models that do not.

A model whose config.json has tie_word_embeddings stores no head: its head is its
embedding. Next to a model that stores one, it is presented with a head of its own.
"""

from collections.abc import Mapping
from pathlib import Path

from multitask_jax.checkpoints import Reader
from multitask_jax.merging.mergekit import companions
from multitask_jax.merging.mergekit.alignment import embeddings_of
from multitask_jax.merging.mergekit.views import Part, View


def untie(
    readers: Mapping[Path, Reader], homes: Mapping[Path, Path], *, any_rows: bool
) -> tuple[dict[Path, Reader], list[str]]:
    """Gives tied models the heads that others store.

    Args:
      readers: by path.
      homes: where the config.json of each is.
      any_rows: whether vocabularies may differ in size (they are aligned later).

    Returns:
      The readers, views where a head was added, and notes in words.
    """
    of = {path: embeddings_of(r) for path, r in readers.items()}
    out, notes = dict(readers), []
    for path, reader in readers.items():
        if not companions.ties_embeddings(companions.read_config(homes[path])):
            continue
        known = reader.tensors.keys() | reader.aliases.keys()
        parts = {n: Part(reader, n, info) for n, info in reader.tensors.items()}
        for other in readers:
            for name in sorted(of[other] - known - parts.keys()):
                shape = readers[other].tensors[name].shape
                skipped = 1 if any_rows else 0
                embeddings = [
                    info
                    for info in (reader.tensors[n] for n in of[path])
                    if len(info.shape) == 2 and info.shape[skipped:] == shape[skipped:]
                ]
                if len(shape) != 2 or len(embeddings) != 1:
                    continue
                (embedding,) = embeddings
                presented = embedding._replace(name=name)
                parts[name] = Part(reader, embedding.name, presented)
                notes.append(
                    f"{name} of {path.name} is its {embedding.name}, to which"
                    " config.json ties it; the output stores it on its own."
                )
        if len(parts) > len(reader.tensors):
            out[path] = View(parts, reader.path, reader.aliases)
    return out, notes
