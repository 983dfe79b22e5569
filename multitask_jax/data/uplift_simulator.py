"""A *synthetic* randomised experiment whose individual effects are known.

Effects are tiered, as a campaign's are: any treatment adds a base effect, single arms
add increments, and outcomes share what drives them:

    z_s = tanh(x w_s)                              latents, shared by all outcomes
    y0_o = c_o z,  tau_jo = scale_j (b_jo + d_jo z), of either sign
    y_o(arm) = y0_o + sum_j tiers[arm, j] tau_jo   + noise, or a coin with that chance

Legend: N people, F features, A arms (0 is the control), O outcomes, J effects,
S latents.
"""

import numpy as np

from multitask_jax.data.uplift import Trial, tiers

LATENTS = 3


def simulate(
    n: int,
    *,
    seed: int = 0,
    features: int = 8,
    arms: int = 3,
    outcomes: int = 3,
    noise: float = 1.0,
    effect: float = 1.0,
    others: bool = False,
) -> Trial:
    """N people, assigned to arms with equal chances; *synthetic*.

    All outcomes but the last are binary. Effects of different sizes come by `effect`,
    0 for none at all. By `others`, other people of the same population, which `seed`
    and all sizes (n too) decide.

    Raises:
      ValueError: fewer than two arms, or no outcome.
    """
    if arms < 2 or outcomes < 1 or n < 1:
        raise ValueError(
            f"got n={n}, arms={arms}, outcomes={outcomes}; expected a control, a"
            " treated arm and an outcome at least"
        )
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)).astype(np.float32)
    to_latents = rng.normal(size=(features, LATENTS))
    to_outcomes = rng.normal(size=(LATENTS, outcomes))
    increments = max(1, arms - 1)
    offset = np.array([0.5] + [0.1] * (increments - 1))  # the base effect helps most
    slope = rng.normal(size=(LATENTS, increments, outcomes))
    if others:  # after what the population is made of
        x = rng.normal(size=(n, features)).astype(np.float32)
    z = np.tanh(x @ to_latents * features**-0.5 * 2)
    natural = z @ to_outcomes / LATENTS**0.5  # [N, O]
    raw = np.einsum("ns,sjo->njo", z, slope) + offset[None, :, None]
    size = effect * np.array([1.0] + [0.6] * (increments - 1))
    tau = size[None, :, None] * raw  # [N, J, O]
    expected = natural[:, None] + np.einsum("aj,njo->nao", tiers(arms), tau)
    binary = np.array([o < outcomes - 1 for o in range(outcomes)])
    # Chances lie between .05 and .95, effects within them.
    chance = np.clip(0.3 + 0.12 * expected, 0.05, 0.95)
    expected = np.where(binary[None, None], chance, expected)
    arm = rng.integers(0, arms, n).astype(np.int32)
    seen = expected[np.arange(n), arm]
    drawn = np.where(
        binary[None],
        rng.uniform(size=seen.shape) < seen,
        seen + noise * rng.normal(size=seen.shape),
    )
    strong = np.where(x[:, 0] > 0, "first feature above 0", "below 0")
    return Trial(
        x=x,
        arm=arm,
        y=drawn.astype(np.float32),
        features=tuple(f"feature {f}" for f in range(features)),
        arms=("control", *(f"treatment {a}" for a in range(1, arms))),
        outcomes=tuple(
            f"outcome {o + 1}" if b else "amount" for o, b in enumerate(binary)
        ),
        binary=tuple(bool(b) for b in binary),
        segments={"feature 0": strong},
        effects=(expected - expected[:, :1]).astype(np.float32),
    )
