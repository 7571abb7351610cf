"""Training steps and predictions that take turns in one process: shared by the benchmarks without a peer."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax
from race import timed

from medseg_jax import Stage
from medseg_jax.methods.objective import Task
from medseg_jax.training.optim import make_optimizer
from medseg_jax.training.step import StepParts, init_state, make_step


class Step:
    """A stage's compiled step and its state; `step()` goes on by one and returns (wall, CPU) seconds."""

    def __init__(self, stage: Stage, task: Task, batch: dict[str, Any], size: tuple[int, ...], ema: float = 0.0):
        self.objective: Any = stage.objective.bind(task)
        params, _ = jax.eval_shape(lambda: self.objective.init(jax.random.key(0), batch))
        optimizer = make_optimizer(stage.optim, 200, params)
        parts = StepParts(self.objective, optimizer, stage, ema, (1.0,) * len(size), size)
        self.parameters = sum(p.size for p in jax.tree.leaves(params))
        self.batch = batch
        self.state = jax.jit(lambda: init_state(parts, batch))()
        self.compiled: Any = jax.jit(make_step(parts), donate_argnums=0).lower(self.state, {}, batch).compile()

    def __call__(self) -> tuple[float, float]:
        def work() -> None:
            self.state, _ = jax.block_until_ready(self.compiled(self.state, {}, self.batch))

        return timed(work)

    def prediction(self) -> Callable[[], tuple[float, float]]:
        """A function that predicts the first image with the weights of now and returns (wall, CPU) seconds."""
        image, params, aux = self.batch["image"][:1], self.state["params"], self.state["aux"]
        predict = jax.jit(self.objective.predict).lower(params, aux, {}, image).compile()
        return lambda: timed(lambda: jax.block_until_ready(predict(params, aux, {}, image)))


def in_turns(steps: Mapping[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Smallest and median wall seconds and smallest CPU seconds of each, after a round to warm up."""
    taken = [{name: step() for name, step in steps.items()} for _ in range(rounds + 1)][1:]
    found = {}
    for name in steps:
        wall, cpu = zip(*(one[name] for one in taken), strict=True)
        found[name] = {"seconds": min(wall), "seconds_median": median(wall), "cpu_seconds": min(cpu)}
    return found
