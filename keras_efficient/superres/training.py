"""Training of super-resolution models: many steps a call, data in memory, resumable, on TensorFlow and on JAX."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.superres.data import PatchPlan, PatchSet
from keras_efficient.superres.evaluation import Pair, evaluate
from keras_efficient.superres.soap import SOAP

__all__ = ["Schedule", "Trainer"]


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    The rate rises linearly over `warmup` steps to `peak_rate` and falls by a cosine to `last_rate`. The loss is the
    mean
    absolute error, and for the last `squared_share` of the steps the mean squared one, which is what PSNR measures.
    """

    steps: int
    batch: int = 16
    peak_rate: float = 1e-3
    last_rate: float = 1e-6
    warmup: int = 500
    clip_norm: float = 0.3
    squared_share: float = 0.2
    average: float = 0.999
    seed: int = 0


@keras.saving.register_keras_serializable(package="keras_efficient")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """`peak · step / warmup`, then `last + (peak − last) · (1 + cos π·t) / 2` with t from 0 to 1 over the steps
    left."""

    def __init__(self, peak, last, warmup, steps):
        self.peak, self.last, self.warmup, self.steps = peak, last, warmup, steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        progress = ops.clip((step - self.warmup) / max(self.steps - self.warmup, 1), 0.0, 1.0)
        cosine = self.last + (self.peak - self.last) * 0.5 * (1.0 + ops.cos(np.pi * progress))
        return ops.where(step < self.warmup, self.peak * (step + 1.0) / max(self.warmup, 1), cosine)

    def get_config(self):
        return {"peak": self.peak, "last": self.last, "warmup": self.warmup, "steps": self.steps}


class Trainer:
    """Trains `model` on patches; the weights that it evaluates and leaves behind are the moving average.

    The model's last steps, clip and pixel shuffle, are left out of the loss: it compares the scale² channels of the
    layer before them, so that no gradient is lost where the output leaves [0, 1]. A layer that answers at the output's
    resolution is folded to that form.

    Args:
        model: an upscaler with the layer `image_residual` (or the one named by `unclipped`) before its clip.
        patches: what to train on.
        schedule: how.
        folder: where the checkpoint and the log lie. A checkpoint found there is gone on from.
        unclipped: name of the layer whose output the loss compares.
    """

    def __init__(
        self,
        model: keras.Model,
        patches: PatchSet,
        schedule: Schedule,
        folder: str | Path,
        *,
        unclipped: str = "image_residual",
    ):
        self.model, self.patches, self.schedule = model, patches, schedule
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        output = model.get_layer(unclipped).output
        if output.shape[-1] == 1:
            output = ops.space_to_depth(output, patches.scale)
        self._trained = keras.Model(model.inputs, output)
        rate = WarmupCosine(schedule.peak_rate, schedule.last_rate, schedule.warmup, schedule.steps)
        self.optimizer = SOAP(
            rate,
            global_clipnorm=schedule.clip_norm,
            use_ema=True,
            ema_momentum=schedule.average,
            ema_overwrite_frequency=None,
        )
        self.optimizer.build(self._trained.trainable_variables)
        self.step = 0
        self._restore()

    def run(
        self,
        validation: Sequence[Pair],
        *,
        chunk: int = 500,
        evaluate_every: int = 5000,
        until: int | None = None,
        on_progress: Callable[[int, int, float], None] | None = None,
    ) -> float:
        """Trains to the schedule's end (or to step `until`) and returns the last validation PSNR in dB.

        Each `chunk` of steps is one call into compiled code. After each `evaluate_every` steps the averaged weights are
        measured on `validation`, a line is added to `log.csv` and a checkpoint is written. Ctrl-C waits for the end of
        the chunk, leaves a checkpoint behind and raises `KeyboardInterrupt`; a second one does not wait.
        """
        last = min(until or self.schedule.steps, self.schedule.steps)
        run_chunk = _compiled_chunk(self)
        psnr = float("nan")
        started, first = time.time(), self.step
        while self.step < last:
            # A chunk never crosses the change of the loss.
            stop = min(self.step + chunk, last)
            change = self._squared_from()
            if self.step < change < stop:
                stop = change
            plan = self.patches.plan(stop - self.step, self.schedule.batch, self.schedule.seed * 1_000_003 + self.step)
            with _interrupts_afterwards(self._checkpoint):
                loss = run_chunk(plan, squared=self.step >= change)
                if not np.isfinite(loss):
                    raise WrongArgument(
                        f"The loss is {loss} at step {stop}.", hint="Lower peak_rate or clip_norm and train again."
                    )
                before, self.step = self.step, stop
            if on_progress is not None:
                on_progress(self.step, last, loss)
            if self.step // evaluate_every != before // evaluate_every or self.step == last:
                psnr = self.evaluate_average(validation)
                seconds = (time.time() - started) / max(self.step - first, 1)
                self._log(loss, psnr, seconds)
                self._checkpoint()
        if self.step >= self.schedule.steps:
            self.optimizer.finalize_variable_values(self._trained.trainable_variables)
        return psnr

    def evaluate_average(self, validation: Sequence[Pair]) -> float:
        """PSNR in dB of the averaged weights, by the protocol of `superres.evaluate`."""
        variables = self._trained.trainable_variables
        kept = [ops.convert_to_numpy(v) for v in variables]
        for variable, average in zip(variables, self.optimizer._model_variables_moving_average, strict=True):
            variable.assign(average)
        try:
            return evaluate(
                lambda y: ops.convert_to_numpy(self.model(y, training=False)), validation, self.patches.scale
            ).psnr
        finally:
            for variable, value in zip(variables, kept, strict=True):
                variable.assign(value)

    def _squared_from(self) -> int:
        return round(self.schedule.steps * (1 - self.schedule.squared_share))

    def _schedule(self) -> str:
        return json.dumps(asdict(self.schedule))

    def _state(self) -> list:
        return [*self.model.variables, *self.optimizer.variables]

    def _checkpoint(self) -> None:
        values = {f"v{i}": ops.convert_to_numpy(v) for i, v in enumerate(self._state())}
        path, temporary = self.folder / "checkpoint.npz", self.folder / "checkpoint.tmp.npz"
        np.savez(temporary, step=self.step, schedule=self._schedule(), **values)
        os.replace(temporary, path)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.npz"
        if not path.exists():
            return
        with np.load(path, allow_pickle=False) as stored:
            state = self._state()
            shapes = [stored[f"v{i}"].shape for i in range(len(state)) if f"v{i}" in stored]
            if shapes != [tuple(v.shape) for v in state] or len(stored.files) != len(state) + 2:
                raise FileProblem(path, "a checkpoint of another model.", hint="Give another folder, or remove it.")
            if str(stored["schedule"]) != self._schedule():
                raise FileProblem(
                    path,
                    f"a checkpoint of another schedule: {stored['schedule']}.",
                    hint="Give another folder, or remove it.",
                )
            for i, variable in enumerate(state):
                variable.assign(stored[f"v{i}"])
            self.step = int(stored["step"])

    def _log(self, loss: float, psnr: float, seconds: float) -> None:
        path = self.folder / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "loss", "validation_psnr_db", "seconds_per_step"])
            writer.writerow([self.step, f"{loss:.6f}", f"{psnr:.4f}", f"{seconds:.5f}"])


@contextmanager
def _interrupts_afterwards(keep: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C inside the block takes effect behind it, after `keep()`: weights, optimizer and step belong together.

    A second Ctrl-C takes effect at once. Outside of the main thread, and where Ctrl-C is ignored, nothing is changed.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    pending = False

    def note(number, frame):
        nonlocal pending
        if pending:
            signal.signal(signal.SIGINT, usual)
            usual(number, frame)
        pending = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pending:
        keep()
        usual(signal.SIGINT, None)


def _gather(patches, low, high, turns, origin, down, right, turn):
    """One batch from the flat arrays: (batch, patch, patch, 1) and (batch, patch, patch, scale²), float32 in [0, 1]."""
    place = ops.arange(patches.patch, dtype="int32")
    index = (
        origin[:, None, None] + place[None, :, None] * down[:, None, None] + place[None, None, :] * right[:, None, None]
    )
    order = ops.take(turns, turn, axis=0)[:, None, None, :]
    y = ops.cast(ops.take(low, index, axis=0), "float32")[..., None] / 65535.0
    target = ops.cast(ops.take(high, index, axis=0), "float32") / 65535.0
    shape = (*target.shape[:3], order.shape[-1]) if None not in target.shape else ops.shape(target)
    return y, ops.take_along_axis(target, ops.broadcast_to(order, shape), axis=-1)


def _loss(prediction, target, squared):
    difference = prediction - target
    # Both scaled to be near 1, so that the clipped gradient norm means the same in both phases.
    return ops.mean(ops.square(difference)) * 40.0 if squared else ops.mean(ops.abs(difference))


def _compiled_chunk(trainer: Trainer):
    chunks = {"tensorflow": _tensorflow_chunk, "jax": _jax_chunk}
    backend = keras.backend.backend()
    if backend not in chunks:
        raise WrongArgument(f"Training runs on TensorFlow and JAX, not on {backend!r}.")
    return chunks[backend](trainer)


def _tensorflow_chunk(trainer: Trainer):
    import tensorflow as tf

    model, optimizer, patches = trainer._trained, trainer.optimizer, trainer.patches
    variables = model.trainable_variables
    low, high = tf.constant(patches.low), tf.constant(patches.high)
    turns = tf.constant(patches.turns)

    def compiled(squared: bool):
        @tf.function
        def run(origin, down, right, turn):
            total = tf.constant(0.0)
            for i in tf.range(tf.shape(origin)[0]):
                y, target = _gather(patches, low, high, turns, origin[i], down[i], right[i], turn[i])
                with tf.GradientTape() as tape:
                    loss = _loss(model(y, training=True), target, squared)
                optimizer.apply(tape.gradient(loss, variables), variables)
                total += loss
            return total / tf.cast(tf.shape(origin)[0], tf.float32)

        return run

    programs = {squared: compiled(squared) for squared in (False, True)}

    def run_chunk(plan: PatchPlan, squared: bool) -> float:
        arrays = (tf.constant(a) for a in (plan.origin, plan.down, plan.right, plan.turn))
        return float(programs[squared](*arrays))

    return run_chunk


def _jax_chunk(trainer: Trainer):
    import jax
    import jax.numpy as jnp

    model, optimizer, patches = trainer._trained, trainer.optimizer, trainer.patches
    low, high, turns = jnp.asarray(patches.low), jnp.asarray(patches.high), jnp.asarray(patches.turns)

    def step(state, indices, low, high, squared):
        trainable, fixed, optimizer_state = state
        y, target = _gather(patches, low, high, turns, *indices)

        def loss_of(trainable):
            prediction, updated = model.stateless_call(trainable, fixed, y, training=True)
            return _loss(prediction, target, squared), updated

        (loss, fixed), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer_state = optimizer.stateless_apply(optimizer_state, gradients, trainable)
        return (trainable, fixed, optimizer_state), loss

    def run(state, plan, low, high, squared):
        def body(state, indices):
            return step(state, indices, low, high, squared)

        state, losses = jax.lax.scan(body, state, plan)
        return state, jnp.mean(losses)

    program = jax.jit(run, static_argnums=4, donate_argnums=0)

    def run_chunk(plan: PatchPlan, squared: bool) -> float:
        groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
        # Copies, since the buffers are given away (donated) to the compiled program.
        state = tuple([jnp.array(v.value, copy=True) for v in group] for group in groups)
        indices = tuple(jnp.asarray(a) for a in (plan.origin, plan.down, plan.right, plan.turn))
        state, loss = program(state, indices, low, high, squared)
        for group, values in zip(groups, state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return float(loss)

    return run_chunk
