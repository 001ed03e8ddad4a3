"""The training loop: any peft method, any condition, any supported base, one code path."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, patch_environment
from rich.progress import Progress
from torch import Tensor, nn
from torch.profiler import record_function

from loco_diffusion.adapters.calibration import NUM_BATCHES
from loco_diffusion.adapters.loco.together import chains_together
from loco_diffusion.attention_backend import quickest_attention
from loco_diffusion.bases import load_base
from loco_diffusion.control import Controller, family_of
from loco_diffusion.data.sources import Source
from loco_diffusion.errors import NotFiniteError, UserError
from loco_diffusion.quantization import check_quantization
from loco_diffusion.training.build import build_controller, build_schedule, build_source
from loco_diffusion.training.card import documents
from loco_diffusion.training.checkpoints import load_checkpoint, load_state, save_checkpoint
from loco_diffusion.training.compilation import compile_blocks, explained, uncompiled
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.examples import Batch, Examples
from loco_diffusion.training.held_out import split
from loco_diffusion.training.hub import check_push, push
from loco_diffusion.training.interruption import Interruption
from loco_diffusion.training.journal import read_log
from loco_diffusion.training.launch import FSDP, impossible_split, split_asked
from loco_diffusion.training.objective import Objective
from loco_diffusion.training.optimizer import Optimizer, check_optimizer
from loco_diffusion.training.output import OutputFolder
from loco_diffusion.training.preparation import prepare
from loco_diffusion.training.progress import progress_bar
from loco_diffusion.training.sharding import split_over_processes
from loco_diffusion.training.trackers import check_trackers
from loco_diffusion.training.trainable import Trainable
from loco_diffusion.training.validation import StopRequested, Validation
from loco_diffusion.training.watch import Watch

_AGREE_EVERY = 10  # steps between the processes' agreements on a stop request


def train(config: TrainingConfig, resume: str | Path | None = None, push_to: str | None = None) -> Path:
    """Train an adapter; `accelerate launch` makes it several processes.

    On the CPU a run that was stopped at any moment and resumed ends bit for bit like an uninterrupted one:
    everything random in a step comes from the seed and the step's number.

    Args:
        config: of the run.
        resume: "latest" to continue from the newest checkpoint of `config.output`, if there is one, or the folder
            of a checkpoint.
        push_to: repository of the Hugging Face Hub, OWNER/NAME, that gets the adapter at the end.

    Returns:
        The adapter's folder, `<output>/adapter`.

    Raises:
        UserError: the configuration asks for something that does not exist or does not fit, the output holds
            another run, nobody is logged in to push, something cannot be written or compiled, the memory does
            not suffice, or the loss became NaN or infinite (the last checkpoint is intact then).
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when a checkpoint is written.
    """
    try:
        with explained(), ExitStack() as held:
            return _train(config, resume, push_to, held)
    except torch.OutOfMemoryError as error:
        raise UserError(f"The memory does not suffice; {_memory_savers(config)}.") from error


def _train(config: TrainingConfig, resume: str | Path | None, push_to: str | None, held: ExitStack) -> Path:
    split_base = split_asked(config)
    check_trackers(config.log_with)
    output = OutputFolder(Path(config.output))
    accelerator = _accelerator(config, output)
    check_optimizer(config.optimizer)
    if config.quantization:
        check_quantization(config.quantization)
    source, held_out = split(config, build_source(config.data))
    identity = {
        "config": config.model_dump(mode="json"),
        "pictures": len(source) if isinstance(source, Sized) else None,  # None for a stream
        "processes": accelerator.num_processes,
    }
    checkpoint = output.check(identity, resume)
    if push_to is not None and accelerator.is_main_process:
        check_push(push_to)
    accelerator.wait_for_everyone()  # all have looked before the first writes
    if accelerator.is_main_process:
        held.enter_context(output.locked())
    pipe: Any = load_base(config.base, getattr(torch, config.dtype), config.quantization)
    torch.manual_seed(config.seed)  # of the adapter's initial weights
    controller = build_controller(config, pipe)
    objective = Objective(config, pipe)
    family = family_of(pipe)
    denoiser: Any = family.denoiser(pipe)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    frozen = [part for part in modules if part is not denoiser]
    _move(frozen, accelerator.device)
    process = (accelerator.process_index, accelerator.num_processes)
    examples = Examples(config, source, config.make_condition(), family, pipe, accelerator.device, process)
    finished = checkpoint is not None and load_state(checkpoint).get("step") == config.steps
    with progress_bar(accelerator.is_main_process) as progress:
        if not finished:
            prepare(examples, progress)
        accelerator.wait_for_everyone()  # a cache on disk is of all processes' making
        _move([part for part in frozen if part not in examples.models], torch.device("cpu"))
        training = _Training(config, accelerator, controller, objective, examples, output, identity)
        if split_base and accelerator.num_processes > 1:
            training.split_base()
        _move([denoiser], accelerator.device)
        denoiser.train()
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if config.torch_compile:
            compile_blocks(denoiser)
        if checkpoint is not None:
            training.load(checkpoint)
        training.run(progress, held_out)
    denoiser.eval()
    if accelerator.is_main_process:
        parameters = sum(training.trainable.sizes.values())
        papers = documents(config, output, read_log(output.log), controller.base, parameters, push_to)
        with training.trainable.averaged():
            controller.save_adapter(output.adapter, config.condition, papers)
        if push_to is not None:
            push(output.adapter, push_to)
    accelerator.wait_for_everyone()
    return output.adapter


def _memory_savers(config: TrainingConfig) -> str:
    """What a run could still do to need less memory."""
    savers = [
        ("lower batch_size (more accumulation makes up for it)", config.batch_size > 1),
        ("set gradient_checkpointing", not config.gradient_checkpointing),
        ("set quantization to int8 or nf4", config.quantization is None),
        ("set validation.pictures to 0, as drawing them takes the text encoders", config.validation.pictures),
        ("lower data.size", True),
    ]
    return ", or ".join(saver for saver, is_left in savers if is_left)


def _accelerator(config: TrainingConfig, output: OutputFolder) -> Accelerator:
    AcceleratorState._reset_state()  # a second run in this process may want another precision
    try:
        # Accelerate's own FSDP would split what is trained, too.
        with patch_environment(**{FSDP: "false"}):
            return Accelerator(
                mixed_precision=config.mixed_precision,
                log_with=list(config.log_with) or None,
                project_config=ProjectConfiguration(
                    str(output.root), logging_dir=str(output.root / "trackers")
                ),
            )
    except ValueError as error:
        raise UserError(f"mixed_precision {config.mixed_precision} is impossible here ({error}).") from error


def _move(modules: list[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)


class _Training:
    """The state of a run between two steps, and how a step changes it."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        controller: Controller,
        objective: Objective,
        examples: Examples,
        output: OutputFolder,
        identity: dict[str, Any],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.controller = controller
        self.objective = objective
        self.examples = examples
        self.output = output
        self.identity = identity
        self.trainable = Trainable(
            controller, config.condition, objective.denoiser, accelerator.device, config.ema_decay
        )
        self.optimizer = Optimizer(config, accelerator, self.trainable.groups)
        self.schedule = build_schedule(config, objective.denoiser)
        self.step = 0
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.losses = 0
        self.saved_step = -1

    def split_base(self) -> None:
        """Split the frozen base over the processes.

        Raises:
            UserError: the adapter has to see gradients of the base's weights first.
        """
        if self.trainable.needs_fit:
            raise impossible_split(
                "whose gradients the adapter's start needs", "choose another init or support"
            )
        split_over_processes(self.objective.denoiser, self.trainable.parameters, self.accelerator.device)

    def run(self, progress: Progress, held_out: Source | None) -> None:
        """Take all steps that are left, with checkpoints, and save the last one.

        Args:
            progress: on the terminal.
            held_out: the pictures that the run is watched by, if there are any.
        """
        if self.accelerator.is_main_process:
            self.output.remove_leftovers()
            self.output.write_config(self.config)
        with Interruption() as interruption:
            watch = self._watch(progress, held_out, interruption)
            try:
                with self.trainable.averaged():
                    watch.begin(self.step, self._sizes())
                self._take_steps(watch, interruption)
                watch.finish()
            except StopRequested:
                self._stop(interruption)
            finally:
                watch.close()

    def _take_steps(self, watch: Watch, interruption: Interruption) -> None:
        config = self.config
        for batches in self._steps():
            # At 0, too: until then some methods cannot run at all.
            if self.step in (0, config.adapter.fit_after) and self.trainable.needs_fit:
                self._fit()
            self.loss_sum += self._take_step(batches)
            self.losses += 1
            self.step += 1
            watch.advance(self.step)
            if self.step % config.log_every == 0 or self.step == config.steps:
                watch.report(self._report())
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save()
            if self.step % _AGREE_EVERY == 0 or self.accelerator.num_processes == 1:
                self._check_stop(interruption)
            if watch.is_due(self.step):
                with self.trainable.averaged():
                    watch.validate(self.step)

    def _fit(self) -> None:
        """Choose from gradients where the adapter turns."""

        def batches() -> Generator[Batch, None, None]:
            for number in range(NUM_BATCHES):
                batch = self.examples.encode(self.examples.load(number))
                # Until the next one is asked for: the backward pass may compute layers again.
                with self.controller({self.config.condition: batch.maps}, keep=batch.keep):
                    yield batch

        with closing(batches()) as seen, uncompiled(self.config):
            self.trainable.fit(self._loss, seen)

    def _watch(self, progress: Progress, held_out: Source | None, interruption: Interruption) -> Watch:
        validation = Validation(
            self.config,
            self.accelerator,
            self.controller,
            self.examples.pipe,
            held_out,
            self.output.samples,
            lambda: self._check_stop(interruption),
        )
        denoiser = self.objective.denoiser
        return Watch(self.config, self.accelerator, self.output, validation, denoiser, self.step, progress)

    def _steps(self) -> Iterator[Iterator[Batch]]:
        """The batches of each step that is left; one is read ahead in another thread."""
        accumulation = self.config.accumulation
        last = self.config.steps * accumulation
        first = self.step * accumulation
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self.examples.load, first) if first < last else None

            def batches(numbers: range) -> Iterator[Batch]:
                nonlocal pending
                for number in numbers:
                    assert pending is not None
                    with record_function("training.input"):  # for benchmarks/training_step.py
                        loaded = pending.result()
                        pending = ahead.submit(self.examples.load, number + 1) if number + 1 < last else None
                        batch = self.examples.encode(loaded)
                    yield batch

            for start in range(first, last, accumulation):
                yield batches(range(start, start + accumulation))

    def _take_step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step; returns its loss, a tensor that was not waited for."""
        config, accelerator = self.config, self.accelerator
        # Of dropout inside adapters, which draws from the global generator.
        draw = self.step * accelerator.num_processes + accelerator.process_index
        torch.manual_seed((config.seed << 32) + draw)
        total = torch.zeros((), device=accelerator.device)
        for batch in batches:
            total += self._backward(batch) / config.accumulation
        with record_function("training.optimizer"):
            self.optimizer.step(self.step)
            self.trainable.average()
        if self.schedule is not None:
            self.schedule.step()
        return total

    def _backward(self, batch: Batch) -> Tensor:
        """The loss of a batch, and its gradient."""
        config, dtype = self.config, self.config.compute_dtype
        device, tokens = self.accelerator.device.type, batch.latents[0, 0].numel()
        # The backward pass belongs into the contexts, in which recomputed layers do what they did before.
        with (
            self.controller({config.condition: batch.maps}, keep=batch.keep),
            chains_together(self.objective.denoiser, dtype),
            quickest_attention(device, dtype, tokens),
        ):
            with record_function("training.forward"):
                loss = self._loss(batch)
            with record_function("training.backward"):
                self.accelerator.backward(loss / config.accumulation)
        return loss.detach()

    def _loss(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            return self.objective.loss(batch)

    def _report(self) -> dict[str, Any]:
        """What the log says about the steps since the last report; here the device is waited for.

        Raises:
            UserError: the loss is not finite.
        """
        loss = float(self.accelerator.reduce(self.loss_sum / self.losses, "mean"))
        self.loss_sum, self.losses = torch.zeros_like(self.loss_sum), 0
        if not torch.isfinite(torch.tensor(loss)):
            raise self._diverged()
        changed = {f"{name}_changed": change for name, change in self.trainable.changes().items()}
        norm = {"grad_norm": float(self.optimizer.grad_norm)}
        return {"step": self.step, "loss": loss, **self.optimizer.rates, **norm, **changed}

    def _sizes(self) -> dict[str, Any]:
        own = sum(parameter.numel() for parameter in self.objective.denoiser.parameters())
        return {
            "trainable": self.trainable.sizes,
            "norms": self.trainable.norms(),
            "base": own - self.trainable.sizes["adapter"],
            "pictures": self.identity["pictures"],
            "cached": self.examples.cached,
            "processes": self.accelerator.num_processes,
        }

    def _check_stop(self, interruption: Interruption) -> None:
        """Raise StopRequested if a signal came to any process; all must ask at the same point."""
        asked = interruption.signal is not None
        if self.accelerator.num_processes > 1:
            anywhere = torch.tensor(float(asked), device=self.accelerator.device)
            asked = bool(self.accelerator.reduce(anywhere) > 0)
        if asked:
            raise StopRequested

    def _stop(self, interruption: Interruption) -> None:
        """Save, and do what the signal does."""
        self.save()
        self.accelerator.wait_for_everyone()  # or the launcher ends the one that still writes
        interruption.raise_signal()

    def save(self) -> None:
        """Write a checkpoint, unless this step has one.

        Raises:
            UserError: the weights are not finite, or the disk is full; older checkpoints are intact.
        """
        if self.saved_step == self.step:
            return
        if not self.trainable.are_finite():
            raise self._diverged()
        if self.accelerator.is_main_process:
            tensors = {"loss_sum": self.loss_sum, **self.trainable.tensors(), **self.optimizer.tensors()}
            state = {**self.identity, "losses": self.losses, **self.optimizer.state()}
            save_checkpoint(self.output.checkpoints, self.step, tensors, state, self.config.keep_checkpoints)
        self.saved_step = self.step

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it is damaged.
        """
        tensors, state = load_checkpoint(checkpoint)
        try:
            self.losses, self.step = int(state["losses"]), int(state["step"])
            self.trainable.load(tensors, self.step)
            self.optimizer.load(tensors, state)
            self.loss_sum = tensors["loss_sum"].to(self.accelerator.device)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"Checkpoint {checkpoint} does not fit this run ({error}); delete it.") from error
        if self.schedule is not None:
            self.schedule.load_state_dict({"steps_done": self.step})
        self.saved_step = self.step

    def _diverged(self) -> NotFiniteError:
        newest = self.output.newest_checkpoint()
        intact = f"; {newest} is intact" if newest else ""
        return NotFiniteError(
            f"Training diverged before step {self.step} (NaN or infinity){intact}; lower lr "
            f"(now {self.config.lr:g}) or encoder_lr (now {self.config.encoder_lr:g})."
        )
