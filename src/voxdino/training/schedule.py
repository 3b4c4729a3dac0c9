"""Learning rate over a run, as a factor of the configured one."""

import math
from collections.abc import Callable

Curve = Callable[[float], float]

SCHEDULES: dict[str, Curve] = {  # share of the run after warm-up that is done, in [0, 1] -> factor, 1 falling to 0
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "poly": lambda done: float((1 - done) ** 0.9),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def learning_rate_factor(progress: float, *, warmup: float, curve: Curve) -> float:
    """Linear warm-up over the first `warmup` share of the run, then `curve`. progress: share of the run done, 0 to 1.

    The first step of a run already moves (0 would waste it): warm-up starts at a hundredth.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return 0.01 + 0.99 * progress / warmup
    return curve((progress - warmup) / (1 - warmup))


def progress_of(step: int, num_steps: int, elapsed_s: float, time_budget_s: float | None) -> float:
    """Share of the run that is done: by steps or by the clock, whichever is further.

    Without a time budget this depends on the step alone, and a resumed run repeats an uninterrupted one exactly. With
    one, the learning rate anneals to its end within the budget; such a run depends on the machine's speed.
    """
    by_steps = step / num_steps
    return by_steps if time_budget_s is None else max(by_steps, elapsed_s / time_budget_s)
