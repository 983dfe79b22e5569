"""Training a tokenizer: reconstruct clips through their codes.

Legend: N clips, B of them a step, K codes.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from multitask_jax.masked.tokenizers import model, quantizers, signals
from multitask_jax.masked.tokenizers.types import (
    Config,
    Statistics,
    Tokenizer,
    vocabulary,
)
from multitask_jax.training.optimizers import adamw

Array = jax.Array
_EVERY = 25  # steps a record
_EVALUATIONS = 10  # on validation data, in a run
_VALID = 64  # clips of it that are looked at


def fit(
    config: Config,
    data: np.ndarray,
    valid_data: np.ndarray | None = None,
    *,
    key: Array,
    steps: int,
    batch: int,
    learning_rate: float = 1e-3,
    progress: bool = True,
) -> tuple[Tokenizer, list[dict[str, float]]]:
    """Trains a tokenizer; the same arguments give the same tokenizer.

    AdamW with betas (.9, .99), as the paper's, warm-up and cosine decay, gradients
    clipped to norm 1 (clipping is our choice).

    Args:
      config: what to train.
      data: clips [N, ...] in the data's units, perhaps mapped from a file; NaN where
        depth or gaze is unknown.
      valid_data: clips that only measure, ten times in a run; at most 64 are used.
      key: of weights, order and revived codes.
      steps: of B = `batch` clips.
      batch: clips a step.
      learning_rate: the highest one.
      progress: a bar on standard error, if that is a terminal.

    Returns:
      The tokenizer, and a record every 25 steps: "step"; "loss" of reconstruction
      and "commitment", means since the last record; "used" share and "perplexity" of
      the codes since then; "valid_loss" in some.

    Raises:
      ValueError: clips of other shapes, or too few.
      FloatingPointError: the loss is not finite.
    """
    signals.check(config, data, "data")
    if valid_data is not None:
        signals.check(config, valid_data, "valid_data")
    if steps < 1 or not 1 <= batch <= len(data):
        raise ValueError(
            f"got steps={steps}, batch={batch} for {len(data)} clips; expected at least"
            " one step, and batches from 1 to the number of clips"
        )
    order_key, init_key, key = jax.random.split(key, 3)
    statistics = signals.measure(config, data)
    optimizer = adamw(learning_rate, steps=steps, clip=1.0, b2=0.99)
    variables = jax.jit(model.init, static_argnums=0)(config, init_key)
    opt_state = jax.jit(optimizer.init)(_trained(variables))
    step = _stepper(config, statistics, optimizer)
    valid_loss = jax.jit(lambda v, x: _forward(config, statistics, v, x)[1][0])
    order = _order(order_key, len(data), steps, batch)

    judged = {round(steps * (i + 1) / _EVALUATIONS) for i in range(_EVALUATIONS)}
    history, pending = [], []
    off = None if progress else True  # None: unless it is a terminal
    with tqdm(total=steps, unit="step", disable=off, desc=config.kind) as bar:
        for done, rows in enumerate(order, 1):
            variables, opt_state, found = step(
                variables, opt_state, jax.random.fold_in(key, done), data[rows]
            )
            pending.append(found)
            bar.update()
            if done % _EVERY and done not in judged:
                continue
            record = _record(pending, done)
            pending = []
            if valid_data is not None and done in judged:
                some = np.asarray(valid_data[:_VALID])
                record["valid_loss"] = float(valid_loss(variables, some))
            history.append(record)
            bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)
    return Tokenizer(config, variables, statistics), history


def _trained(variables: Any) -> Any:
    """The variables that have a gradient: all but the codebook."""
    return {name: variables[name] for name in ("encoder", "decoder")}


def _forward(
    config: Config, statistics: Statistics, variables: Any, x: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """The loss of clips x, and (reconstruction, commitment, encodings, codes)."""
    signal, known = signals.to_network(config, statistics, x)
    encodings = model.encode(config, variables, signal)
    quantized = model.quantize(config, variables, encodings)
    y = model.decode(config, variables, quantized.values)
    error = model.loss(y, signal, known)
    aux = error, quantized.loss, encodings, quantized.codes
    return error + quantized.loss, aux


def _stepper(
    config: Config, statistics: Statistics, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """One step: (variables, opt_state, key, clips [B, ...]) -> the same and metrics.

    A program of one step, not a scan over several: on a CPU, XLA's convolutions are ten
    times slower within a loop.
    """

    def step(variables: Any, opt_state: Any, key: Array, x: Array) -> Any:
        def loss_of(trained: Any) -> Any:
            return _forward(config, statistics, variables | trained, x)

        trained = _trained(variables)
        gradient, aux = jax.grad(loss_of, has_aux=True)(trained)
        error, commitment, encodings, codes = aux
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        new = variables | optax.apply_updates(trained, updates)
        if config.quantizer == "vq":
            new["codebook"] = quantizers.ema_update(
                variables["codebook"], encodings, codes, key
            )
        counts = quantizers.code_counts(codes, vocabulary(config))
        return new, opt_state, (error, commitment, counts)

    return jax.jit(step, donate_argnums=(0, 1))


def _record(pending: list[Any], done: int) -> dict[str, float]:
    """Means over the steps since the last record, and the use of codes in them."""
    errors, commitments, counts = zip(*jax.device_get(pending), strict=True)
    record = {
        "step": done,
        "loss": float(np.mean(errors)),
        "commitment": float(np.mean(commitments)),
        "used": float(quantizers.used_share(sum(counts))),
        "perplexity": float(quantizers.perplexity(sum(counts))),
    }
    _check_finite(record)
    return record


def _order(key: Array, clips: int, steps: int, batch: int) -> np.ndarray:
    """The clips of each step, [steps, B]: shuffled anew each time all were seen."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    rounds = -(-steps * batch // clips)
    order = np.concatenate([rng.permutation(clips) for _ in range(rounds)])
    return order[: steps * batch].reshape(steps, batch)


def _check_finite(record: dict[str, float]) -> None:
    if not np.isfinite(record["loss"] + record["commitment"]):
        raise FloatingPointError(
            f"the loss is {record['loss']} by step {record['step']}; try a lower"
            " learning_rate, and look for NaN or infinity in cameras"
        )
