"""``Run``: everything around the loop that is dangerous to write twice.

A stage script reads as arguments → run → model → data → optimizer → loop → save. The loop itself stands in the
script; counting targets, scaling, averaging over ranks, clipping, stepping, logging, validating, saving and
resuming happen here, once for every stage.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from minillm import hardware, precision
from minillm.checkpoints import checkpoint, resume
from minillm.checkpoints.interrupt import Interrupted, StopSignals
from minillm.checkpoints.lock import lock_directory, writable
from minillm.checkpoints.nonfinite import stop_for_nonfinite
from minillm.checkpoints.outputs import WholeModel
from minillm.checkpoints.saving import Saver
from minillm.data import ReplayRows, StepBatches
from minillm.distributed import engines
from minillm.distributed.engine import Engine
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.kernels import compiled
from minillm.losses import count_targets
from minillm.model import RouterStats
from minillm.model.sizes import active_parameters, describe_parameters, flops_per_token
from minillm.reports import announce
from minillm.reports.divergence import LossAlarm, advice_of
from minillm.reports.measures import NO_MEASURES, Measures
from minillm.reports.summary import write_run_file, write_summary
from minillm.reports.tracking import NotWatched, Tracker, rate
from minillm.training import endings
from minillm.training.balance import Balance
from minillm.training.optim import adamw
from minillm.training.schedule import Schedule, schedule_factor
from minillm.training.step import Step
from minillm.training.validation import evaluate_loss

MAX_SKIPPED_IN_A_ROW = 50  # float16: the loss scale halves at each; after 50 it is not the scale that is wrong


def count_token_targets(batch: dict[str, Tensor]) -> Tensor:
    """Return the denominator of a token loss for one batch (float64 scalar)."""
    return count_targets(batch["targets"], batch.get("weights"))


class Run:
    """One training run: its ranks, device, precision, directory and counters. Use it as a context manager.

    Args:
        engine: another body than ``--parallel`` names.
        output: what of the model is written, where, and read back (default: all of it).
    """

    def __init__(
        self,
        args,
        *,
        stage: str,
        engine: type[Engine] | None = None,
        output: WholeModel | None = None,
    ):
        self.args, self.stage, self.output = args, stage, output or WholeModel()
        self.ranks = Ranks()
        self.device = precision.choose_device(args.device, local_rank=self.ranks.local_rank)
        self.dtype = precision.choose_dtype(args.dtype, self.device)
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64  # of sums of losses
        self.compiles = compiled.is_wanted(args.compile, self.device, parallel=args.parallel)
        _ = self.rows_per_step  # raises for flags that contradict each other, before any work
        engine = engine or engines.find(args.parallel)
        self.engine = engine(self.ranks, precision.grad_scaler(self.device, self.dtype), args, self.dtype)
        self.step = self.epoch = self.step_in_epoch = 0
        self.tokens = 0  # non-padding tokens seen, over all ranks
        self.seconds = 0.0  # spent in steps, without validation and saving
        self.skipped_steps = self._skipped_in_a_row = 0
        self.best_loss = math.inf
        self.last_train_loss: float | None = None  # of the last row of metrics
        self.last_eval: dict = {}
        self.is_resumed = False
        self._eval_step = self._save_step = -1
        self._has_begun = False  # nothing in the directory is touched before the first update has worked
        self._validation_due = False  # what a checkpoint made before this step's validation says
        self.tracker: Tracker | None = None
        self.saver: Saver | None = None
        self.signals = StopSignals()
        self._lock = None
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        if self.device.type == "cpu":
            hardware.keep_freed_memory()
        checkpoint.seed_everything(args.seed)

    def __enter__(self) -> "Run":
        self.ranks.start(self.device, timeout_minutes=self.args.timeout_minutes, alone=self.engine.needs_group)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.signals.__exit__()
        if self.saver is not None:
            self.saver.close()  # what is being written becomes whole, whatever else has happened
        if self.tracker is not None:
            self.tracker.close()
        if self._lock is not None:
            self._lock.close()
        if kind is None or issubclass(kind, Interrupted):
            self.ranks.stop()
        elif kind is not None:
            endings.explain(error, self)

    # ---- before the loop -------------------------------------------------------------------------------------

    @property
    def rows_per_step(self) -> int:
        """Return the rows of one update over all ranks."""
        return self.args.rows_per_step(self.ranks.world_size)

    @property
    def router_stats(self) -> RouterStats | None:
        """Return what the loss of a mixture of experts needs (None for a dense model); there after ``wrap``."""
        return self.balance.stats

    def batching(self) -> dict:
        """Return the keyword arguments of ``StepBatches`` that follow from the arguments and the ranks."""
        return {
            "batch_size": self.args.batch_size,
            "global_batch_size": self.rows_per_step,
            "rank": self.ranks.rank,
            "world_size": self.ranks.world_size,
            "seed": self.args.seed,
        }

    def loaders(
        self,
        rows: Callable,
        *,
        valid_rows: Callable | None = None,
        old_rows: Callable | None = None,
        add_columns: Callable | None = None,
    ) -> tuple[StepBatches, StepBatches | None]:
        """Return the steps of the training data, and of the validation data (None without any).

        Args:
            rows: makes the rows of some files; the main rank calls it first, so that the others find its caches ready.
            valid_rows: the same for validation, where it differs. old_rows: for --replay_path, mixed into training.
            add_columns: called with rows and ``training=``; returns them with what a frozen model says of each.
        """
        args, ranks = self.args, self.ranks

        def made(make: Callable, files, training: bool):
            new = ranks.main_first(lambda: make(files))
            return new if add_columns is None else add_columns(new, training=training)

        train_rows = made(rows, args.train_data, True)
        if old_rows is not None and args.replay_path:
            train_rows = ReplayRows(train_rows, made(old_rows, args.replay_data, True), share=args.replay_ratio)
        loader, valid_loader = StepBatches(train_rows, **self.batching()), None
        if args.valid_data:
            held_out = made(valid_rows or rows, args.valid_data, False)
            valid_loader = StepBatches(held_out, **self.batching(), shuffle=False)
        return loader, valid_loader

    def adamw(self, module: nn.Module) -> torch.optim.AdamW:
        """Return AdamW over what of ``module`` is trained, with the settings of the flags."""
        args = self.args
        return adamw(
            module,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            loraplus_ratio=getattr(args, "loraplus_ratio", 1.0),
        )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move ``model`` to the device, compile it if asked, wrap it for the ranks; return what to optimise."""
        self.model = model if self.engine.places_model else model.to(self.device)
        self.model.gradient_checkpointing = self.args.gradient_checkpointing
        self.directory = self.output.directory(self.args, self.stage, model.config)
        self.balance = Balance(self.model, self.args, self.ranks)
        self.n_parameters, self.parameters_text = active_parameters(model), describe_parameters(model)
        self._flops_per_token = flops_per_token(model, self.args.max_seq_len)
        self.saver = Saver(self)
        if self.compiles:
            compiled.compile_blocks(self.model)
        return self.engine.wrap(self.model, self.device)

    def start(
        self,
        optimizer: torch.optim.Optimizer,
        loader,
        *,
        tokenizer,
        valid_loader=None,
        loss: Callable,
        count: Callable = count_token_targets,
        from_scratch: bool = False,
        watch=None,
        prepare: Callable | None = None,
        measures: Measures = NO_MEASURES,
        unit: str = "token",
        settings: dict | None = None,
        is_cross_entropy: bool = True,
    ) -> nn.Module:
        """Open the run directory, restore the newest checkpoint if asked, and return the module to call.

        Args:
            loader, valid_loader: ``StepBatches``. loss: the stage's loss, for validation.
            count: the loss's denominator, computable from a batch alone.
            from_scratch: weights are random, so the first loss is compared with ln V.
            watch: watches an adapter while it is trained (``minillm.reports.watch.Watch``); the main rank's is used.
            prepare: called with the micro-batches of a step and whether they are trained on, before their targets are
                counted; returns those to use, with columns that depend on models.
            measures: what the loss records besides its value, for the rows of metrics.
            unit: what the loss counts, for people.
            settings: of the loss; a checkpoint made with others is not resumed.
            is_cross_entropy: False where the loop's loss of tokens is another one, which ln V says nothing about.

        Raises:
            UserError: before anything is written, more than a tenth of the data was rejected; no checkpoint to resume.
        """
        args = self.args
        announce.check_rows(loader.rows, args, flag="--data_path")
        if valid_loader is not None:
            announce.check_rows(valid_loader.rows, args, flag="--valid_path")
        self.optimizer, self.loader, self.valid_loader = optimizer, loader, valid_loader
        self.tokenizer, self.loss, self.count = tokenizer, loss, count
        self.prepare = prepare or (lambda micro_batches, training: micro_batches)
        self.measures, self.unit, self.settings = measures, unit, settings or {}
        if watch is not None and not self.engine.shows_gradients:
            raise UserError(f"--monitor with --parallel {args.parallel}: no rank has the gradients whole; use ddp")
        self.watch = watch if watch is not None and self.ranks.is_main else NotWatched()
        self.total_steps = args.max_steps or args.epochs * loader.steps_per_epoch
        self.n_warmup_steps = math.ceil(args.warmup_ratio * self.total_steps)
        self.alarm = LossAlarm(
            vocab_size=self.model.config.vocab_size,
            from_scratch=from_scratch,
            unit=unit,
            is_cross_entropy=is_cross_entropy,
            advice=advice_of(args),
        )
        module = self.engine.attach(optimizer)
        self.schedule = Schedule(optimizer, self.learning_rate_factor(self.total_steps))
        resume.refuse_nothing(self, is_there=bool(checkpoint.list_checkpoints(self.directory / "checkpoints")))
        self._lock = self.ranks.main_alone(lambda: lock_directory(self.directory))
        run_id = self._resume()
        self.tracker = Tracker(
            self.directory,
            enabled=self.ranks.is_main,
            total_steps=self.total_steps,
            first_step=self.step,
            name=self.stage,
        )
        self.tracker.run_id = run_id  # kept for later runs, whether this one tells anyone or not
        if args.use_wandb:
            config = dataclasses.asdict(args)
            self.ranks.main_alone(
                lambda: self.tracker.start_wandb(project=args.wandb_project, config=config, run_id=run_id)
            )
        self._window = {"loss_sum": 0.0, "n_targets": 0.0, "tokens": 0, "seconds": 0.0} | getattr(self, "_restored", {})
        self._peak_flops = hardware.peak_flops(self.device, self.dtype)
        self.tracker.print(announce.header_of(self).text())
        if self.step >= self.total_steps:
            self.tracker.print("this run has made all its steps: nothing is trained; --extend makes a run longer")
        module.train()
        return module

    def learning_rate_factor(self, total_steps: int) -> Callable[[int], float]:
        """Return the schedule of a run of ``total_steps``: the share of the peak learning rate, by step."""
        args = self.args
        return schedule_factor(
            args.lr_scheduler,
            total_steps=total_steps,
            warmup_steps=self.n_warmup_steps,
            min_ratio=args.min_lr_ratio,
            decay_ratio=args.decay_ratio,
        )

    # ---- the loop's calls -------------------------------------------------------------------------------

    def steps(self, loader) -> Iterator[Step]:
        """Yield a ``Step`` for each optimizer update; start where a checkpoint ended."""
        self.signals.__enter__()
        if self._validation_due and self.valid_loader is not None:  # the checkpoint was made before it
            self._begin()
            self.validate()
        while self.step < self.total_steps:
            if self.args.num_workers:
                self.saver.wait()  # workers are forked now: not while a thread writes and holds locks
            batches = loader.iterate(self.epoch, self.step_in_epoch, num_workers=self.args.num_workers)
            began = time.perf_counter()
            for _, micro_batches in batches:
                micro_batches = self.prepare(micro_batches, True)
                counts = [self.count(batch) for batch in micro_batches]
                n_tokens = sum((batch["document_ids"] >= 0).sum() for batch in micro_batches)
                n_targets, n_tokens = self.ranks.sum(torch.stack([sum(counts), n_tokens.double()])).tolist()
                yield Step(
                    micro_batches,
                    n_targets=n_targets,
                    n_tokens=n_tokens,
                    began=began,
                    engine=self.engine,
                    device=self.device,
                    sum_dtype=self.sum_dtype,
                )
                if self.step >= self.total_steps:
                    break
                began = time.perf_counter()

    def autocast(self):
        """Return the context of a forward pass in the run's dtype."""
        return self.engine.autocast(self.device)

    def update(self, step: Step) -> None:
        """Clip, apply the update, advance the schedule and the counters; log, validate and save when due."""
        lr = self.schedule.set_step(self.step)
        grad_norm = self.engine.clip(self.args.grad_clip)
        # What one rank notices, all do at the same step: a signal, or that --save_minutes are over on the main one.
        notices = [0.0, 0.0, self.signals.caught, self.ranks.is_main and self.saver.is_due()]
        notices = torch.tensor(notices, dtype=self.sum_dtype, device=self.device)
        notices[:2] = torch.stack([step.loss_sum, step.n_counted])
        loss_sum, n_counted, caught, is_due = self.ranks.sum(notices)
        loss_sum = loss_sum - self.balance.collect()  # rows of metrics compare with validation: tokens' loss alone
        numbers = torch.stack([loss_sum, grad_norm.to(loss_sum), n_counted, caught, is_due])
        loss_sum, grad_norm, n_counted, caught, is_due = numbers.tolist()
        step.check_count(n_counted)
        if self.engine.loss_scale is None and not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            stop_for_nonfinite(self, step, loss_sum, grad_norm)
        self.watch.before_update(self.step + 1)
        applied = self.engine.step()
        self._begin()
        self._count_skips(applied, step, loss_sum, grad_norm)
        if applied:
            self.balance.apply()
            self.watch.after_update(self.step + 1, self.optimizer)
        self._advance(step, loss_sum if applied else 0.0, applied)
        if applied and step.n_targets:
            self._warn(self.alarm.train(self.step, loss_sum / step.n_targets))
        if self.step % self.args.log_interval == 0 or self.step == self.total_steps:
            self._log(lr, grad_norm)
        # A checkpoint comes before the validation, which may be long, or too much for the memory.
        if self.step < self.total_steps:
            by_interval = self.args.eval_interval and self.step % self.args.eval_interval == 0
            self._validation_due = bool(by_interval) and self.valid_loader is not None
            if (self.args.save_interval and self.step % self.args.save_interval == 0) or is_due or caught:
                self.save()
            self.saver.check()
            if caught:
                self._stop()
            if self._validation_due:
                self.validate()

    # ---- after the loop --------------------------------------------------------------------------------------

    def finish(self, *, samples: Callable[[], list[tuple[str, str]]] | None = None) -> dict:
        """Save the last checkpoint, validate, export the model, draw the summary; return the last validation.

        ``samples()`` returns pairs (prompt, text) for the summary page; it is called on the main rank.
        """
        self._begin()
        self._validation_due = self.valid_loader is not None and self._eval_step != self.step
        self.save()
        if self._is_asked_to_stop():
            self._stop()
        if self._validation_due:
            self.validate()
        model = self.saver.whole_model()
        self.saver.wait()
        self.ranks.main_alone(lambda: self._finish_alone(model, samples))
        return self.last_eval

    def _finish_alone(self, model: nn.Module, samples: Callable[[], list[tuple[str, str]]] | None) -> None:
        # A resumed run that had nothing left to do has saved nothing, and so removed nothing.
        checkpoint.tidy(self.directory / "checkpoints", step=self.step, keep_last=self.args.keep_last)
        self.export(self.directory, model)
        # A model that is sharded while it is trained may be too large for one device.
        device = torch.device("cpu") if self.engine.is_sharded else self.device
        self.model = model.to(device).eval()
        self.watch.finish()
        with self.engine.autocast(device):  # a frozen model may have a shorter dtype than what is trained
            texts = samples() if samples is not None else []
        write_summary(self, texts)
        self.tracker.print(announce.footer_of(self).text())

    def export(self, directory: Path, model: nn.Module) -> None:
        """Write what is to be used: the model as a Hugging Face directory in ``--save_dtype``, or the adapter."""
        try:
            dtype = getattr(torch, self.args.save_dtype)
            self.output.export(model, directory, tokenizer=self.tokenizer, dtype=dtype)
        except OSError as error:
            raise UserError(
                f"cannot write the model to {directory}: {error.strerror or error}; make room there and go on with "
                f"--from_resume from the newest checkpoint"
            ) from error

    def validate(self) -> None:
        """Measure the validation loss, log it, and keep the best weights under ``best/``.

        A signal that comes meanwhile ends the run: it is saved as it was before, and validates when it resumes.
        """
        result = evaluate_loss(self.engine.module, self.valid_loader, self)
        if result is None:
            self.save()
            self._stop()
        self._eval_step, self._validation_due = self.step, False
        self.last_eval = result
        self.tracker.log(self._row("valid", result["loss"]) | result)
        text = f"step {self.step}: validation loss {result['loss']:.4f} nats/{self.unit}"
        if "bits_per_byte" in result:
            text += f", {result['bits_per_byte']:.4f} bits/byte"
        if "floor" in result:
            text += f", {result['loss'] - result['floor']:.4f} above the floor"
        self.tracker.print(text + self.measures.text(result))
        self._warn(self.alarm.valid(self.step, result["loss"]))
        if result["loss"] < self.best_loss:
            self.best_loss = result["loss"]
            model = self.saver.whole_model()
            self.ranks.main_alone(lambda: self.export(self.directory / "best", model))

    def save(self) -> None:
        """Write a checkpoint, once per step; it may still be written when this returns (``--async_save``)."""
        if self._save_step != self.step:
            self._save_step = self.step
            self.saver.save()

    # ---- inside ----------------------------------------------------------------------------------------------

    def _resume(self) -> str | None:
        path = resume.find(self)
        if path is not None:
            run_id = resume.restore(self, path)
            self.schedule.factor = self.learning_rate_factor(self.total_steps)  # the warm-up is the checkpoint's
            return run_id
        self.ranks.main_alone(lambda: resume.refuse_to_overwrite(self))
        if self.ranks.rank:  # all have drawn the same weights; what is dropped out is every rank's own
            checkpoint.seed_everything(self.args.seed + self.ranks.rank)
        return None

    def _begin(self) -> None:
        """Take the directory: move an earlier run out of the way, or cut the metrics to where this one resumes."""
        if not self._has_begun:
            self._has_begun = True
            self.ranks.main_alone(self._take_directory)

    def _take_directory(self) -> None:
        with writable(self.directory):
            if not self.is_resumed and checkpoint.holds_a_run(self.directory):
                earlier = checkpoint.move_to_earlier(self.directory)
                self.tracker.print(f"the run that was in {self.directory} is now in {earlier}")
            write_run_file(self)
            self.tracker.begin(after_step=self.step, without_validation=self._validation_due)

    def _is_asked_to_stop(self) -> bool:
        """Return whether a signal has come to any rank. All ranks call it together."""
        return bool(self.ranks.sum(torch.tensor(float(self.signals.caught), device=self.device)))

    def _stop(self) -> NoReturn:
        endings.stop(self, int(self.signals.caught or signal.SIGTERM))

    def _advance(self, step: Step, loss_sum: float, applied: bool) -> None:
        elapsed = time.perf_counter() - step.began
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch >= self.loader.steps_per_epoch:
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.tokens += int(step.n_tokens)
        self.seconds += elapsed
        self._window["loss_sum"] += loss_sum
        self._window["n_targets"] += step.n_targets if applied else 0.0
        self._window["tokens"] += int(step.n_tokens)
        self._window["seconds"] += elapsed
        self.tracker.advance()

    def _warn(self, message: str | None) -> None:
        if message is not None:
            self.tracker.print(message if message.startswith("note: ") else f"warning: {message}")

    def _row(self, split: str, loss: float | None) -> dict:
        place = {"step": self.step, "epoch": self.epoch, "tokens": self.tokens, "split": split}
        return place | {"loss": loss, "seconds": round(self.seconds, 3)}

    def _log(self, lr: float, grad_norm: float) -> None:
        window = self._window
        loss = window["loss_sum"] / window["n_targets"] if window["n_targets"] else None  # every step was skipped
        tokens_per_s = window["tokens"] / max(window["seconds"], 1e-9)
        row = self._row("train", loss) | {"lr": lr, "grad_norm": grad_norm, "tokens_per_s": round(tokens_per_s, 1)}
        if self._peak_flops:
            row["mfu"] = round(tokens_per_s * self._flops_per_token / self._peak_flops / self.ranks.world_size, 4)
        if self.engine.loss_scale is not None:
            row |= {"loss_scale": self.engine.loss_scale, "skipped_steps": self.skipped_steps}
        measured = self.measures.row(self.ranks)
        for note in self.measures.notes(measured):
            self.tracker.print(f"step {self.step}: {note}")
        self.tracker.log(row | self.balance.row() | measured)
        memory = hardware.memory_bytes(self.device) / 2**30
        self.last_train_loss = loss
        shown = {"loss": "skipped" if loss is None else f"{loss:.4f}", "lr": rate(lr)}
        shown |= {"tok/s": f"{tokens_per_s:,.0f}", "mem": f"{memory:.2f}G"}
        shown |= {"mfu": f"{row['mfu']:.0%}"} if "mfu" in row else {}
        self.tracker.show(self.step, epoch=self.epoch + self.step_in_epoch / self.loader.steps_per_epoch, **shown)
        self._window = {"loss_sum": 0.0, "n_targets": 0.0, "tokens": 0, "seconds": 0.0}

    def _count_skips(self, applied: bool, step: Step, loss_sum: float, grad_norm: float) -> None:
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.skipped_steps += not applied
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            stop_for_nonfinite(self, step, loss_sum, grad_norm)
