"""``Run``: what happens around the loop of every stage.

A stage script reads as arguments → run → model → data → optimizer → loop → save, and the loop itself stands in the
script. Code that must not be duplicated is here: counting targets, averaging over ranks, clipping, stepping, logging,
validating, saving and resuming.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from minillm import hardware, precision
from minillm.checkpoints import checkpoint, resume
from minillm.checkpoints.directory import RunDirectory
from minillm.checkpoints.interrupt import Interrupted, StopSignals
from minillm.checkpoints.outputs import WholeModel
from minillm.checkpoints.saving import Saver
from minillm.data import ReplayRows, StepBatches
from minillm.distributed.engine import Engine
from minillm.distributed.engines import engine_class
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.kernels import compiled
from minillm.model import RouterStats
from minillm.model.sizes import size_of
from minillm.objectives.objective import Objective
from minillm.reports.announce import check_rows
from minillm.reports.divergence import LossAlarm, advice_of
from minillm.reports.dry_run import dry_run
from minillm.reports.summary import write_run_file, write_summary
from minillm.reports.tracking import NoWatch, Tracker
from minillm.reports.train_log import TrainLog
from minillm.training import describe, endings, state
from minillm.training.balance import Balance
from minillm.training.optim import adamw
from minillm.training.schedule import Schedule, schedule_factor
from minillm.training.step import Progress, Step
from minillm.training.validation import LossAlone, evaluate_answers, evaluate_loss

MAX_SKIPPED_IN_A_ROW = 50  # float16: each overflow halves the loss scale; after 50 the scale is not the cause


class Run:
    """One training run, used as a context manager.

    Args:
        engine: another one than ``--parallel`` names.
        output: what of the model is written and where (default: all of it).

    Attributes:
        engine: device, dtype, ranks, and how gradients become an update.
        model: the plain model, not wrapped for the ranks.
        progress: the counters of the run, which a checkpoint holds.
        objective: the loss and what belongs to it.
        balance: the load of experts; does nothing for a dense model.
        log: the rows of metrics, messages and warnings.
        saver: writes and restores checkpoints.
    """

    def __init__(self, args, *, stage: str, engine: type[Engine] | None = None, output: WholeModel | None = None):
        self.args, self.stage, self.output = args, stage, output or WholeModel()
        ranks = Ranks()
        self.rows_per_step = args.rows_per_step(ranks.world_size)  # over all ranks; raises where flags contradict
        device = precision.choose_device(args.device, local_rank=ranks.local_rank)
        dtype = precision.choose_dtype(args.dtype, device)
        self.engine = (engine or engine_class(args.parallel))(ranks, device, dtype, args)
        self.progress = Progress()
        self.signals = StopSignals()
        self.saver: Saver | None = None
        self.log: TrainLog | None = None
        self.run_directory: RunDirectory | None = None
        self._unread: list[Step] = []  # steps whose numbers the host has not looked at yet
        self._skipped_in_a_row = 0
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        if device.type == "cpu":
            hardware.keep_freed_memory()
        checkpoint.seed_everything(args.seed)

    def __enter__(self) -> "Run":
        timeout = self.args.timeout_minutes
        self.ranks.start(self.device, timeout_minutes=timeout, alone=self.engine.needs_group)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.signals.__exit__()
        if self.saver is not None:
            self.saver.close()  # whatever else has happened, the checkpoint that is being written is finished
        if self.log is not None:
            self.log.tracker.close()
        if self.run_directory is not None:
            self.run_directory.close()
        if kind is None or issubclass(kind, Interrupted):
            self.ranks.stop()
        else:
            is_saved = self.saver is not None and self.saver.last_step >= 0
            endings.explain(error, self.ranks, step=self.step, is_saved=is_saved)

    @property
    def ranks(self) -> Ranks:
        """Return this process among all."""
        return self.engine.ranks

    @property
    def device(self) -> torch.device:
        """Return the device of this rank."""
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the forward pass."""
        return self.engine.dtype

    @property
    def step(self) -> int:
        """Return the number of updates made."""
        return self.progress.step

    @property
    def directory(self) -> Path:
        """Return the run's directory."""
        return self.run_directory.path

    @property
    def router_stats(self) -> RouterStats | None:
        """Return what the loss of a mixture of experts needs (None for a dense model); there after ``wrap``."""
        return self.balance.stats

    # ---- before the loop -------------------------------------------------------------------------------------

    def batching(self, batch_size: int = 0) -> dict:
        """Return the keyword arguments of ``StepBatches`` that follow from the arguments and the ranks.

        Args:
            batch_size: another one than of training; a step is then as close to as many rows as it allows.
        """
        n_at_once = (batch_size or self.args.batch_size) * self.ranks.world_size
        return {
            "batch_size": batch_size or self.args.batch_size,
            "global_batch_size": max(1, self.rows_per_step // n_at_once) * n_at_once,
            "rank": self.ranks.rank,
            "world_size": self.ranks.world_size,
            "seed": self.args.seed,
        }

    def loaders(
        self,
        rows: Callable,
        *,
        valid_rows: Callable | None = None,
        replay_rows: Callable | None = None,
        add_columns: Callable | None = None,
    ) -> tuple[StepBatches, StepBatches | None]:
        """Return the steps of the training data, and of the validation data (None without any).

        Args:
            rows: makes the rows of some files; the main rank calls it first, so that the others find its caches ready.
            valid_rows: the same for validation, where it differs. replay_rows: for --replay_path, mixed into training.
            add_columns: called with rows and ``training=``; returns them with the columns that a reference (DPO) or a
                teacher (distillation) has computed.
        """
        args = self.args

        def rows_of(make: Callable, files, training: bool):
            new_rows = self.ranks.main_rank_first(lambda: make(files))
            return new_rows if add_columns is None else add_columns(new_rows, training=training)

        train_rows = rows_of(rows, args.train_data, True)
        if replay_rows is not None and args.replay_path:
            replayed = rows_of(replay_rows, args.replay_data, True)
            train_rows = ReplayRows(train_rows, replayed, share=args.replay_ratio)
        loader, valid_loader = StepBatches(train_rows, **self.batching()), None
        if args.valid_data:
            held_out = rows_of(valid_rows or rows, args.valid_data, False)
            valid_loader = StepBatches(held_out, **self.batching(args.eval_batch_size), shuffle=False)
        return loader, valid_loader

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move ``model`` to the device, compile it if asked, wrap it for the ranks; return what to optimise."""
        args = self.args
        self.model = model if self.engine.places_model else model.to(self.device)
        self.model.gradient_checkpointing = args.gradient_checkpointing
        self.run_directory = RunDirectory(self.output.directory(args, self.stage, model.config))
        self.balance = Balance(self.model, args, self.ranks)
        self.size = size_of(model, args.max_seq_len)
        self.saver = Saver(
            self.model,
            self.engine,
            self.output,
            self.run_directory.checkpoints,
            is_async=args.async_save,
            keep_last=args.keep_last,
            minutes=args.save_minutes,
            may_resume=resume.may_resume(args, self.ranks),
        )
        if compiled.is_wanted(args.compile, self.device, parallel=args.parallel):
            compiled.compile_blocks(self.model)
        return self.engine.wrap(self.model)

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

    def dry_run(self, loader: StepBatches, tokenizer, loss: Callable) -> None:
        """Print what the run would see and cost (``--dry_run``); nothing is written."""
        dry_run(
            self.model,
            loader,
            tokenizer,
            Objective.of(loss),
            self.engine,
            router_stats=self.router_stats,
            total_steps=self._n_steps(loader),
        )

    def start(
        self,
        optimizer: torch.optim.Optimizer,
        loader: StepBatches,
        valid_loader: StepBatches | None = None,
        *,
        tokenizer,
        loss: Callable,
        from_scratch: bool = False,
        watch=None,
        metrics=None,
    ) -> nn.Module:
        """Lock the run directory, restore the newest checkpoint if asked, and return the module to call.

        Nothing else is written to the directory before the first update has worked (``_take_directory``).

        Args:
            loss: the stage's: an ``Objective``, or a function of the form ``causal_lm_loss``.
            from_scratch: the weights are random, so the first loss is compared with ln V.
            metrics: what a validation measures besides the loss (``minillm.evaluation.ValidationMetrics``).
            watch: watches an adapter while it is trained (``minillm.reports.watch.Watch``): the main rank's, or that of
                all ranks if these hold parts of the gradients.

        Raises:
            UserError: before anything is written: more than a tenth of the data was rejected; the directory holds
                another run; there is no checkpoint to resume from, or it belongs to another run.
        """
        args, ranks = self.args, self.ranks
        check_rows(loader.rows, allow=args.allow_rejected, flag="--data_path")
        if valid_loader is not None:
            check_rows(valid_loader.rows, allow=args.allow_rejected, flag="--valid_path")
        self.loader, self.valid_loader, self.tokenizer = loader, valid_loader, tokenizer
        self.objective = Objective.of(loss)
        self.metrics = metrics or LossAlone()
        self.eval_interval = args.eval_interval
        if args.eval_epochs:
            self.eval_interval = max(1, round(args.eval_epochs * loader.steps_per_epoch))
        self.total_steps = self._n_steps(loader)
        sees_gradients = ranks.is_main or not self.engine.has_whole_gradients
        self.watch = watch if watch is not None and sees_gradients else NoWatch()
        module = self.engine.attach(optimizer)
        self.progress.n_warmup_steps = args.warmup_steps or math.ceil(args.warmup_ratio * self.total_steps)
        self.schedule = Schedule(optimizer, self.learning_rate_factor(self.total_steps))

        checkpoints = self.run_directory.checkpoints
        is_there = bool(checkpoint.list_checkpoints(checkpoints))
        resume.check_something_to_resume(checkpoints, args, ranks, is_there=is_there)
        ranks.on_main_rank(self.run_directory.lock)
        path = resume.find_checkpoint(checkpoints, args, ranks)
        if path is None:
            may_overwrite = args.overwrite or resume.may_resume(args, ranks)
            rename_flag = "--lora_name" if hasattr(args, "lora_name") else "--run_name"
            ranks.on_main_rank(lambda: self.run_directory.check_free(overwrite=may_overwrite, rename_flag=rename_flag))
        saved = None if path is None else checkpoint.load_state(path)
        if saved is not None:
            state.check_same_run(self, path, saved)
        self.log = self._open_log(from_scratch, first_step=saved["counters"]["step"] if saved else 0)
        if saved is not None:
            state.resume_from(self, path, saved)
        elif ranks.rank:  # all ranks have drawn the same weights; dropout is every rank's own
            checkpoint.seed_everything(args.seed + ranks.rank)
        if args.trackers:
            start, config = self.log.tracker.start_trackers, dataclasses.asdict(args)
            ranks.on_main_rank(lambda: start(args.trackers, project=args.project_name, config=config))
        self.log.print(describe.header_of(self).text())
        if self.step >= self.total_steps:
            self.log.print("this run has made all its steps: nothing is trained; --extend makes a run longer")
        elif self.stops_early:
            self.log.print(f"{describe.early_stop(self)}: nothing is trained; a larger --patience continues")
        module.train()
        return module

    def _n_steps(self, loader: StepBatches) -> int:
        """Return the updates of the whole run."""
        n_steps = round(self.args.epochs * loader.steps_per_epoch, 6)  # 0.1 * 30 is 3.0000000000000004
        return self.args.max_steps or math.ceil(n_steps)

    def learning_rate_factor(self, total_steps: int) -> Callable[[int], float]:
        """Return the schedule of a run of ``total_steps``: the share of the peak learning rate, by step."""
        args = self.args
        return schedule_factor(
            args.lr_scheduler,
            total_steps=total_steps,
            warmup_steps=self.progress.n_warmup_steps,
            min_ratio=args.min_lr_ratio,
            decay_ratio=args.decay_ratio,
        )

    # ---- the loop's calls -------------------------------------------------------------------------------

    def steps(self, loader: StepBatches) -> Iterator[Step]:
        """Yield a ``Step`` for each optimizer update; start where a checkpoint ended."""
        progress = self.progress
        self.signals.__enter__()
        if progress.validation_due and self.valid_loader is not None:  # a checkpoint made before its validation
            self._take_directory()
            self.validate()
        while progress.step < self.total_steps and not self.stops_early:
            if self.args.num_workers:
                self.saver.wait()  # workers are forked now: not while a thread writes and holds locks
            batches = loader.iterate(progress.epoch, progress.step_in_epoch, num_workers=self.args.num_workers)
            began = time.perf_counter()
            for _, micro_batches in batches:
                yield self._make_step(micro_batches, began)
                if progress.step >= self.total_steps or self.stops_early:
                    break
                began = time.perf_counter()

    def _make_step(self, micro_batches: list[dict], began: float) -> Step:
        """Prepare and count the micro-batches of an update; the counts of all ranks are summed once, on the CPU."""
        micro_batches = self.objective.prepare(micro_batches, training=True, step=self.step)
        n_targets = sum(self.objective.count(batch) for batch in micro_batches)
        n_tokens = sum((batch["document_ids"] >= 0).sum() for batch in micro_batches)
        n_targets, n_tokens = self.ranks.sum(torch.stack([n_targets, n_tokens.double()])).tolist()
        return Step(
            micro_batches,
            number=self.step + 1,
            n_targets=n_targets,
            n_tokens=int(n_tokens),
            began=began,
            engine=self.engine,
        )

    def autocast(self):
        """Return the context of a forward pass in the run's dtype."""
        return self.engine.autocast()

    def update(self, step: Step) -> None:
        """Make one optimizer update; then log, save and validate when due."""
        args, number = self.args, step.number
        lr = self.schedule.set_step(self.step)
        self._apply(step)
        self._take_directory()  # before anything is written there
        if step.is_applied:
            self.balance.apply()
            self.watch.after_update(number, self.engine.optimizer)
        is_last = number == self.total_steps
        log_due = number % args.log_interval == 0 or is_last
        interval = self.eval_interval
        eval_due = bool(interval) and number % interval == 0 and self.valid_loader is not None
        stop, minutes_over = self._requests()
        save_due = stop or minutes_over or bool(args.save_interval and number % args.save_interval == 0)
        self._read_steps(all_of_them=log_due or eval_due or save_due)
        self._advance(step)
        if log_due:
            self._log(lr, step.grad_norm)
        if is_last:
            return  # ``finish`` saves and validates
        # A checkpoint comes before the validation, which may be long, or too much for the memory.
        self.progress.validation_due = eval_due
        if save_due:
            self.save()
        self.saver.check()
        if stop:
            self._stop()
        if eval_due:
            self.validate()

    @property
    def stops_early(self) -> bool:
        """Return whether --patience ends the run before its last step; the same on all ranks."""
        progress, patience = self.progress, self.args.patience
        return 0 < patience <= progress.n_without_gain and progress.step < self.total_steps

    def _apply(self, step: Step) -> None:
        """Clip, check that loss and norm are finite, and apply the update.

        On a CPU, in float16 and with FSDP2 or DeepSpeed the check comes before the update. On a GPU nobody waits for
        it: the optimizer itself leaves out an update that is not finite, and the check comes one step later, while the
        next step computes (``_read_steps``).
        """
        if self.engine.clips_in_update:
            self.watch.before_update(step.number)
        grad_norm = self.engine.clip(self.args.grad_clip)
        is_finite = step.close(grad_norm, added=self.balance.collect())
        if not self.engine.clips_in_update:
            self.watch.before_update(step.number)
        if self.engine.reads_late:
            step.is_applied = self.engine.step(is_finite)
        else:
            self._check(step)
            step.is_applied = self.engine.step()
        self._unread.append(step)

    def _check(self, step: Step) -> None:
        """Read a step's numbers; stop the run if they are not finite (under a loss scale, one overflow is normal)."""
        step.read()
        is_finite = math.isfinite(step.loss_sum) and math.isfinite(step.grad_norm)
        self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1
        if not is_finite and (self.engine.loss_scale is None or self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW):
            endings.stop_for_nonfinite(
                self.directory,
                step.micro_batches,
                step=step.number,
                rank=self.ranks.rank,
                loss=step.loss_sum / max(step.n_targets, 1e-12),
                grad_norm=step.grad_norm,
            )

    def _advance(self, step: Step) -> None:
        seconds = time.perf_counter() - step.began
        self.progress.advance(step.n_tokens, seconds, steps_per_epoch=self.loader.steps_per_epoch)
        self.progress.skipped_steps += not step.is_applied
        self.log.add_time(step.n_tokens, seconds)

    def _read_steps(self, *, all_of_them: bool) -> None:
        """Look at the numbers of past steps: of all, or of all but the newest where the engine reads late.

        ``update`` calls it before it takes the time of the step: at a log step the GPU has then finished its work.
        """
        n_left = 1 if self.engine.reads_late and not all_of_them else 0
        while len(self._unread) > n_left:
            step = self._unread.pop(0)
            if self.engine.reads_late:
                self._check(step)
            if step.is_applied:
                self.log.add_loss(step.number, step.loss_sum, step.n_targets)

    def _requests(self) -> tuple[bool, bool]:
        """Return whether a signal asks any rank to stop, and whether --save_minutes are over on the main rank."""
        requests = torch.tensor([float(self.signals.caught), float(self.ranks.is_main and self.saver.is_due())])
        stop, minutes_over = self.ranks.sum(requests).tolist()
        return bool(stop), bool(minutes_over)

    # ---- after the loop --------------------------------------------------------------------------------------

    def finish(self, *, samples: Callable[[], list[tuple[str, str]]] | None = None) -> dict:
        """Save the last checkpoint, validate, export the model, draw the summary; return the last validation.

        ``samples()`` returns pairs (prompt, text) for the summary page; it is called on the main rank.
        """
        self._take_directory()
        progress = self.progress
        progress.validation_due = self.valid_loader is not None and progress.eval_step != progress.step
        self.save()
        if self._requests()[0]:
            self._stop()
        if progress.validation_due:
            self.validate()
        model = self.saver.whole_model()
        self.saver.wait()
        self.ranks.on_main_rank(lambda: self._finish_alone(model, samples))
        return progress.last_eval

    def _finish_alone(self, model: nn.Module, samples: Callable[[], list[tuple[str, str]]] | None) -> None:
        # A resumed run that had nothing left to do has saved nothing, and so removed nothing.
        checkpoint.tidy(self.run_directory.checkpoints, step=self.step, keep_last=self.args.keep_last)
        self.export(self.directory, model)
        # A model that is sharded while it is trained may be too large for one device.
        device = torch.device("cpu") if self.engine.is_sharded else self.device
        self.model = model.to(device).eval()
        self.watch.finish()
        with self.engine.autocast(device):  # a frozen model may have a shorter dtype than what is trained
            texts = samples() if samples is not None else []
        write_summary(
            self.directory,
            describe.facts_of(self),
            texts,
            unit=self.objective.unit,
            stage=self.stage,
            tags=self.output.tags,
            usage=self.output.usage,
            report=self.log.print,
            metrics=self.metrics.names,
            sections=self.watch.sections(),
        )
        self.log.tracker.log_samples(texts, self.step)
        self.log.print(describe.footer_of(self).text())

    def export(self, directory: Path, model: nn.Module) -> None:
        """Write the model as a Hugging Face directory in ``--save_dtype``, or the adapter."""
        try:
            dtype = getattr(torch, self.args.save_dtype)
            self.output.export(model, directory, tokenizer=self.tokenizer, dtype=dtype)
        except OSError as error:
            raise UserError(
                f"cannot write the model to {directory}: {error.strerror or error}; free some space there and resume "
                f"from the newest checkpoint with --from_resume"
            ) from error

    def validate(self) -> None:
        """Measure the validation loss and the other metrics, log them, and keep the best weights under ``best/``.

        If a signal arrives meanwhile, the run is saved without the validation and stops; it validates when it resumes.
        """
        progress, metrics = self.progress, self.metrics
        result = evaluate_loss(
            self.engine,
            self.valid_loader,
            self.objective,
            with_accuracy="accuracy" in metrics.names,
            should_stop=lambda: self.signals.caught,
        )
        if result is None:
            self.save()
            self._stop()
        values, samples = evaluate_answers(metrics, self.engine, self.saver)
        is_better = progress.add_validation(result | values, criterion=metrics.names[0])
        measures = self.objective.measures
        shown = {name: progress.last_eval[name] for name in metrics.names if name not in ("loss", *measures.shown)}
        figures = measures.text(result) + describe.metrics_text(shown)
        self.log.valid_row(progress, progress.last_eval, unit=self.objective.unit, figures=figures)
        self.log.tracker.log_answers([{"step": progress.step} | sample for sample in samples])
        if is_better:
            model = self.saver.whole_model()
            self.ranks.on_main_rank(lambda: self.export(self.directory / "best", model))

    def save(self) -> None:
        """Write a checkpoint, once per step; it may still be written when this returns (``--async_save``)."""
        if self.saver.last_step != self.step:
            per_rank = self.ranks.gather((checkpoint.rng_state(), self.objective.measures.state()))
            training_state = state.training_state(self, per_rank) if self.ranks.is_main else None
            self.saver.save(self.step, training_state, tokenizer=self.tokenizer)

    # ---- inside ----------------------------------------------------------------------------------------------

    def _open_log(self, from_scratch: bool, *, first_step: int) -> TrainLog:
        """Return the log; it writes nothing before ``_take_directory``."""
        is_main, total_steps = self.ranks.is_main, self.total_steps
        tracker = Tracker(
            self.directory, enabled=is_main, total_steps=total_steps, first_step=first_step, name=self.stage
        )
        alarm = LossAlarm(
            vocab_size=self.model.config.vocab_size,
            from_scratch=from_scratch,
            unit=self.objective.unit,
            is_cross_entropy=self.objective.is_cross_entropy,
            advice=advice_of(self.args),
        )
        peak_flops = hardware.peak_flops(self.device, self.dtype)
        share = self.size.flops_per_token / self.ranks.world_size / peak_flops if peak_flops else None
        return TrainLog(
            tracker,
            alarm,
            mfu=lambda tokens_per_s: tokens_per_s * share if share else None,
            hardware=hardware.HardwareUse(self.device),
        )

    def _take_directory(self) -> None:
        """After the first update: move an earlier run out of the way, or cut the metrics to where this one resumes."""
        if not self.run_directory.is_taken:
            self.ranks.on_main_rank(self._take_directory_alone)
            self.run_directory.is_taken = True

    def _take_directory_alone(self) -> None:
        earlier = self.run_directory.take(is_resumed=self.saver.last_step >= 0)
        if earlier is not None:
            self.log.print(f"the run that was in {self.directory} is now in {earlier}")
        write_run_file(self.directory, describe.run_file_of(self))
        self.log.tracker.begin(after_step=self.step, without_validation=self.progress.validation_due)

    def _log(self, lr: float, grad_norm: float) -> None:
        progress, measures = self.progress, self.objective.measures
        measured = measures.row(self.ranks)
        for note in measures.notes(measured):
            self.log.print(f"step {progress.step}: {note}")
        scaling = {}
        if self.engine.loss_scale is not None:
            scaling = {"loss_scale": self.engine.loss_scale, "skipped_steps": progress.skipped_steps}
        self.log.train_row(
            progress,
            epochs=progress.epoch + progress.step_in_epoch / self.loader.steps_per_epoch,
            memory_bytes=hardware.memory_bytes(self.device),
            lr=lr,
            grad_norm=grad_norm,
            **scaling,
            **self.balance.row(),
            **measured,
        )

    def _stop(self) -> NoReturn:
        self.saver.wait()
        endings.stop(
            self.ranks,
            int(self.signals.caught or signal.SIGTERM),
            tracker=self.log.tracker,
            step=self.step,
            total_steps=self.total_steps,
        )
