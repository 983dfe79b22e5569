"""merge_report.md of a merge of slices: which layers come from where."""

import json
from pathlib import Path

import multitask_jax
from multitask_jax.merging import report
from multitask_jax.merging.mergekit.arrange import Inputs
from multitask_jax.merging.plan import human


def write(directory: Path, facts: report.Facts, inputs: Inputs) -> None:
    """Writes the report and the model card; layers in place of interference."""
    rows, offset = [], 0
    for part in inputs.slices:
        start, stop = part.sources[0].layers or (0, 0)
        sources = [
            f"`{s.model}` [{s.layers[0]}, {s.layers[1]})"
            if s.layers
            else f"`{s.model}`"
            for s in part.sources
        ]
        end = offset + stop - start
        layers = f"{offset} to {end - 1}" if end > offset else "all"
        rows.append([layers, ", ".join(sources)])
        offset = end
    outside = [
        f"- `{t.name}` from `{inputs.slices[t.slice].sources[0].model}`"
        for t in inputs.targets
        if not t.layer and not inputs.recipe.whole
    ]
    notes = "\n".join(f"- {n}" for n in facts.notes) or "None."
    (directory / "merge_report.md").write_text(
        f"""# Merge report

To make it again:

{report.commands(facts)}

## Layers

{report.table(["layers of the output", "sources"], rows)}

{chr(10).join(outside)}

## Notes

{notes}

{len(facts.plan.merged)} tensors merged, {len(facts.plan.copied)} copied, inputs of
{human(facts.plan.read_bytes)}, {human(facts.plan.write_bytes)} written in
{facts.seconds:.1f} s by multitask_jax {multitask_jax.__version__}.
"""
    )
    data = {
        "version": multitask_jax.__version__,
        "recipe": dict(facts.recipe) | {"yaml": facts.yaml},
        "layers": [{"output": a, "sources": b} for a, b in rows],
        "notes": list(facts.notes),
        "seconds": round(facts.seconds, 2),
    }
    (directory / "merge_report.json").write_text(json.dumps(data, indent=1) + "\n")
    models = {r.path: None for row in inputs.readers for r in row}
    card = report.card(facts._replace(models=list(models), weights=()))
    (directory / "README.md").write_text(card)
