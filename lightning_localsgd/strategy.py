"""WHERE in Lightning: the strategy, whose hooks count steps and let the workers agree at the right places."""

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module, SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_localsgd import _lightning
from lightning_localsgd.checkpoint import Keeper
from lightning_localsgd.clock import Clock
from lightning_localsgd.collectives import MetricSync, StepWarning
from lightning_localsgd.header import Header, Want
from lightning_localsgd.landing import Landing
from lightning_localsgd.links import AllLinks, Links, links_of, nodes_of
from lightning_localsgd.mean import Mean
from lightning_localsgd.moments import AverageState
from lightning_localsgd.optimizers import Optimizers, is_schedule_free
from lightning_localsgd.outer import OuterStep
from lightning_localsgd.pace import Pace, Proportional
from lightning_localsgd.progress import Measured
from lightning_localsgd.replica import Replica
from lightning_localsgd.rest import Rest
from lightning_localsgd.resume import Fit
from lightning_localsgd.rounds import Listener, Round, Rounds
from lightning_localsgd.saving import Keeps
from lightning_localsgd.schedule import Every, Schedule
from lightning_localsgd.sequences import require_step_by_step
from lightning_localsgd.settings import require_settings, warn_of_one_worker
from lightning_localsgd.signals import REQUEUE, Signals
from lightning_localsgd.spread import Spread
from lightning_localsgd.start import joining
from lightning_localsgd.states import States
from lightning_localsgd.worker import Worker


class LocalSGD(Keeps):
    r"""Train by parallel restarted SGD: workers train alone for a round, then restart from the mean of their models.

    .. math::

        x_i^t = \begin{cases}
            \frac{1}{N} \sum_j \left(x_j^{t-1} - \gamma G_j^t\right) & t \bmod I = 0 \\
            x_i^{t-1} - \gamma G_i^t & \text{otherwise}
        \end{cases}

    Args:
        period: the interval :math:`I`, an int of at least 1, or a :class:`Schedule`. Between averages no rank
            communicates. While every round has had length 1, *gradients* are averaged, exactly as ``DDPStrategy`` does.
        mean: how the models are averaged.
        outer: what is done with the mean: None starts the next round there; an :class:`Outer`, :class:`DiLoCo` or
            :class:`SlowMo` takes a step from the anchor. The last average of ``fit`` and ``synchronize()`` apply it;
            validation and checkpoints see the mean without it.
        optimizer_state: what becomes of the local optimizers' state at the end of a round: ``"keep"``, ``"average"``
            (or an :class:`AverageState`) or ``"reset"``.
        replica: who holds one. With ``"device"`` each device is a worker. With ``"node"`` the devices of a node are one
            worker together, as many in each node: inside it *gradients* are averaged in each step, as
            ``DDPStrategy`` does, and each device sends its share of the model to the other nodes. N is then the number
            of nodes.
        pace: with ``"equal"`` all workers take the same number of steps in a round, with ``"proportional"`` (or a
            :class:`Proportional`) faster workers take more, and get more of the data.
        checkpoint: what a checkpoint keeps. With ``"consensus"`` it is one ordinary file, of the mean of all replicas
            and of their optimizers' moments; a run that resumes from it starts a new round there. With ``"exact"``
            each worker also writes its own part beside it, and a run that resumes from it with as many workers goes
            on bit for bit as if it had not stopped.
        accelerator: as in ``DDPStrategy``, and so are all that follow.
        parallel_devices: the devices of this node.
        cluster_environment: tells rank and world size.
        checkpoint_io: reads and writes checkpoints.
        precision_plugin: the precision.
        process_group_backend: for example ``"gloo"`` or ``"nccl"``.
        timeout: how long a worker waits for the others in an average before it gives up; longer than a round.
        start_method: how processes are started.

    Raises:
        ValueError: if ``period`` is not an int of at least 1 or a schedule, with options that have no effect, with
            ``Trainer(sync_batchnorm=True)`` or a ``SyncBatchNorm`` in the module, with LBFGS while gradients are
            averaged, and with ``ZeroRedundancyOptimizer`` in longer rounds.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=LocalSGDStrategy(period=8), accelerator="cpu", devices=1, logger=False)

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629).
    """

    strategy_name = "localsgd"
    _made_for: str

    def __init__(
        self,
        period: int | Schedule = 8,
        *,
        mean: Mean = Mean(),
        outer: OuterStep | None = None,
        optimizer_state: Literal["keep", "average", "reset"] | AverageState = "keep",
        replica: Literal["device", "node"] = "device",
        pace: Literal["equal", "proportional"] | Proportional = "equal",
        checkpoint: Literal["consensus", "exact"] = "consensus",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **_ddp_options(),
        )
        self.schedule = period if isinstance(period, Schedule) else Every(period)
        require_settings(
            self.schedule,
            mean=mean,
            outer=outer,
            optimizer_state=optimizer_state,
            replica=replica,
            pace=pace,
            checkpoint=checkpoint,
        )
        self.outer = outer
        self._replica_rule = replica
        self._state_rule = AverageState() if optimizer_state == "average" else optimizer_state
        self._pace_rule = {"equal": None, "proportional": Proportional()}[pace] if isinstance(pace, str) else pace
        self.mean = mean
        self._exact = checkpoint == "exact"
        self._header: Header | None = None
        self._links: AllLinks | None = None
        self._worker: Worker | None = None  # of the fit in progress
        self._rest: Rest | None = None  # follows what is had of its data
        self._fit: Fit | None = None  # follows it, where checkpoints are exact
        self._pace: Pace | None = None  # of this worker, where the paces differ
        self._pacing: _lightning.Pacing | None = None  # leads Lightning's loops by it
        self._is_set_up = False  # for a fit
        self._running = False  # between `on_train_start` and `on_train_end`, where every collective has a header
        self._resumed: dict[str, Any] = {}  # our entry in the checkpoint that a fit goes on from
        self._part: dict[str, Any] | None = None  # this worker's part of it, if it goes on exactly
        self._signals = Signals()  # received from now on
        self._last: Worker | None = None  # of the last fit, for a checkpoint that is saved after it
        self._averages: list[_lightning.Average] = []  # of the callbacks of the fit in progress
        self._listeners: list[Listener] = []  # to the rounds of the fit in progress
        self._undo = ExitStack()  # puts back what a fit has wrapped

    def __repr__(self) -> str:
        # A Trainer of the other package refuses this strategy as an invalid name and shows its `repr`: our only word.
        return f"<{type(self).__name__} for {self._made_for}>"

    @property
    def _layer_sync(self) -> LayerSync | None:
        return None

    @_layer_sync.setter
    def _layer_sync(self, layer_sync: LayerSync | None) -> None:
        if layer_sync is not None:
            raise ValueError(
                "`sync_batchnorm` must be False with `LocalSGDStrategy`, got True: it communicates in every forward "
                "pass, and the statistics of ordinary BatchNorm layers are averaged with the model."
            )

    # ------------------------------------------------------------------------------------------------ set up, tear down

    def setup_environment(self) -> None:
        with joining(self, self._timeout):
            super().setup_environment()
        self._signals.listens = self._trainer.state.fn == TrainerFn.FITTING
        if self._trainer.state.fn == TrainerFn.FITTING and self.world_size > 1:
            self._averages = _lightning.attach_callbacks(self._trainer, self._undo)
        if self._trainer.state.fn == TrainerFn.FITTING and self._pace_rule is not None:
            pace = Pace(self._pace_rule, self.global_rank, self.world_size)
            self._pace = pace if self.world_size > 1 else None

    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self._pace is not None and self._trainer.training:
            if not self._running and self._part is None:
                clock = Clock(self.schedule, self.world_size, self._resumed.get("clock"))
                averages_models = clock.will_average_models(self.worker.measured if self._worker else None)
                self._pace.share_out(averages_models, clock.length)
            self._pace.deal(dataloader, self._talk(), self._undo)
        return dataloader

    def setup(self, trainer: Trainer) -> None:
        self._require_alike()
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.lightning_module is not None
        for name, module in self.lightning_module.named_modules():
            if isinstance(module, SyncBatchNorm):
                raise ValueError(
                    f"The module must not contain SyncBatchNorm with `LocalSGDStrategy`, got one as {name!r}."
                )
        Replica(self.lightning_module).lines()  # raises if there is a tensor that has no mean
        # Before the optimizers are made: whoever asks `estimated_stepping_batches` there makes the loaders, too.
        self._undo.enter_context(_lightning.attach(trainer, self))
        stepped = self._part.get("rest", 0) if self._part else None
        self._rest = Rest(trainer, self.global_rank, self.world_size, self._resumed.get("rest"), stepped)
        self._undo.callback(self._rest.leave)
        if self._exact:
            self._fit = Fit(trainer, self.root_device, self._part["fit"] if self._part else None)
            self._undo.callback(self._fit.leave)
        _lightning.tell_of_loaders(trainer, self)
        super().setup(trainer)  # calls `configure_ddp`, then makes the optimizers
        for average in self._averages:
            average.copy(self.lightning_module)
        may_reset = self.mean.nonfinite == "exclude" or self._state_rule == "reset"
        self.worker.optimizers.attach(lambda: self.optimizers, may_reset)
        require_step_by_step(self.lr_scheduler_configs, self.schedule, self.workers)
        if self.outer is not None and any(map(is_schedule_free, self.optimizers)):
            raise ValueError(
                "An outer step needs optimizers that keep no second model of their own, and schedule-free ones do: "
                f"leave `outer` at None, got {self.outer!r}."
            )
        if not self.schedule.averages_only_gradients and any(
            hasattr(optimizer, "consolidate_state_dict") for optimizer in self.optimizers
        ):
            raise ValueError(
                "An optimizer that shards its state over the ranks, such as ZeroRedundancyOptimizer, communicates in "
                f"every step and needs a `period` of 1, got {self.schedule!r}."
            )
        if self.schedule.averages_only_gradients:
            self._require_no_lbfgs()
        if self.worker.has_devices and any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise ValueError(
                "LBFGS needs workers of one device, got `replica='node'`: with gradients averaged in the node its own "
                "stopping rule can end on one device while the others wait."
            )
        if self._pace is not None:
            self._pacing = _lightning.Pacing(trainer, self._pace, self.worker, self._undo)
            if self._part is not None:
                self._pacing.load_state(self._part["pace"])
        self._is_set_up = True
        self._undo.callback(MetricSync(self._gather_metric).attach(self.lightning_module))
        for optimizer in self.optimizers:  # so that also a step past Lightning's optimizers counts
            self._undo.callback(optimizer.register_step_post_hook(self._note_step).remove)

    def _require_no_lbfgs(self) -> None:
        if any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise ValueError(
                "LBFGS needs rounds of at least 2 steps, got a `period` of 1: with averaged gradients its own stopping "
                "rule can end on one worker while the others wait."
            )

    def configure_ddp(self) -> None:
        """Start a run: a new worker, from rank 0's model."""
        module = self.lightning_module
        assert module is not None
        header = self._talk()
        header.open_board(self._signals)
        self._keeper = Keeper(header, self.local_rank == 0, self._own_part, lambda: self.rest.state())
        optimizers = Optimizers(module, getattr(self.precision_plugin, "scaler", None))
        if self.outer is not None and self.outer.offload and self.root_device.type == "cpu":
            raise ValueError("`offload` must be False where the model is in main memory, got True.")
        needs, scales = self.schedule.needs, False
        if self._pace is not None and self._pace_rule is not None:
            needs, scales = needs | self._pace_rule.needs, self._pace_rule.needs_anchor
            if "paces" in self._resumed:
                self._pace.load_state_dict(self._resumed["paces"])
        rounds, links = Rounds(self._listeners, self.workers), self._link(header)
        if self.mean.delay and any(listener.moves for listener in self._listeners):
            raise ValueError(
                "How far the replicas move from the start of a round is not measured where averages land with a delay: "
                f"listen without `moves` (`LocalSGDMonitor(anchor=False)`), got {self.mean!r}."
            )
        if self.workers == 1:
            warn_of_one_worker(self.mean, self.outer)
        landing = Landing(self.outer, measures="drift" in needs, starts=scales or self.mean.needs_anchor)
        landing.load_state_dict(self._resumed.get("landing", {}))
        self._expected_steps = math.nan
        self._worker = Worker(
            header,
            links=links.between,
            background=links.background,
            inside=links.inside,
            clock=Clock(self.schedule, self.workers, self._resumed.get("clock")),
            replica=Replica(
                module,
                skip_frozen=self.mean.frozen == "skip",
                iterates=optimizers.iterates,
                has_anchor=landing.is_needed or self.mean.delay > 0,
            ),
            optimizers=optimizers,
            mean=self.mean,
            landing=landing,
            seed=self._seed,
            states=States(self._state_rule, optimizers, self.mean, header, links.between, self.root_device),
            measured=Measured(
                needs, self._resumed.get("measured"), fastest=self._pace is not None, watched=rounds.watched
            ),
            pace=self._pace,
            rounds=rounds,
            device=self.root_device,
            epoch=lambda: self._trainer.current_epoch,
            expected_steps=lambda: self._expected_steps,
            signals=self._signals,
            act=self._act_on_signals,
            files=self._serve_files,
        )
        self._automatic = module.automatic_optimization
        self._optimizer_stepped = False  # since the last step was counted
        self._accumulating = False  # is this batch's gradient only added to the next one's?
        self._step_is_open = False  # has this step, which averages gradients, sent its header?
        self._reduces_all = True  # in the gradient phase a reducer averages over all ranks
        self._warn_of_step = StepWarning()
        self._worker.at_consensus = self._at_consensus
        self._worker.start(self._part["worker"] if self._part else None)
        self._drop_reducer()

    @property
    def workers(self) -> int:
        """Their number: of devices, or of nodes."""
        return self.num_nodes if self._replica_rule == "node" else self.world_size

    def _link(self, header: Header) -> AllLinks:
        """Return the links between workers, which are made once; averages in the background have their own.

        Raises:
            ValueError: on all ranks, if nodes are workers and have different numbers of devices.
        """
        if self._links is not None:
            return self._links
        rank = self.global_rank
        if self._replica_rule == "node" and self.world_size > 1:
            nodes = nodes_of(header, self.node_rank, self.local_rank)
            if len(nodes) != self.num_nodes:
                raise ValueError(
                    f"`Trainer(num_nodes=...)` must be the number of nodes, {len(nodes)}, got {self.num_nodes}."
                )
            if len(nodes) < self.world_size:
                between = links_of(nodes, rank, self._new_group)
                background = links_of(nodes, rank, self._new_group) if self.mean.delay else between
                header.divide(between.mates(rank))
                inside = Links(between.device, between.devices, between.inside, rank)
                self._links = AllLinks(between, background, inside)
                return self._links
        group = self._new_group() if self.mean.delay and self.world_size > 1 else None
        everyone = Links(rank, self.world_size)
        self._links = AllLinks(everyone, Links(rank, self.world_size, group), Links(0, 1, rank=rank))
        return self._links

    def _new_group(self, ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
        """Return a group of these ranks, which alone make it, or one that all ranks make of all."""
        group: dist.ProcessGroup = dist.new_group(
            list(ranks) if ranks is not None else None,
            backend=self._process_group_backend,
            timeout=self._timeout,
            use_local_synchronization=ranks is not None,
        )
        dist.all_reduce(torch.zeros(1, device=self.root_device), group=group)  # NCCL joins it only here
        return group

    def teardown(self) -> None:
        self._undo.close()
        self._signals.listens = False
        if self._header is not None:
            self._header.close_board()
        if self._worker is not None:
            self._worker.landing.rest()
            self._worker.averages.rest()
            self._last = self._worker
        self._worker, self._rest, self._fit, self._running, self._is_set_up = None, None, None, False, False
        self._pace, self._pacing = None, None
        self._resumed, self._part, self._averages, self._listeners = {}, None, [], []
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.lightning_module
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self._header is not None:
            self._header.leave()
            self._header = None
        self._links = None
        _lightning.end_with(self.launcher)

    # -------------------------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        if self._running:
            raise ValueError(
                "A fit cannot run inside another one with `LocalSGDStrategy`; call `lr_find` before the training: "
                "`Tuner(trainer).lr_find(model)`, or `LearningRateFinder()` as it is."
            )
        super().on_train_start()
        self._running = True
        self.worker.rounds.begin()
        for average in self._averages:
            average.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.worker.clock.averages_models and self.worker.has_devices:
            self.worker.start_step()  # before a reducer asks for anything
        self._leave_reducer()
        if self.worker.averages_gradients and not self._step_is_open:
            self._reduce_gradients()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        worker = self.worker
        if worker.clock.averages_models:
            worker.start_step()
        if worker.averages_gradients:
            if not self._step_is_open:
                worker.ask(Want.STEP, detail=len(self._unreduced))
            self._step_is_open = self._accumulating
        if self._leave_reducer() and worker.averages_gradients:
            self._reduce_gradients()
        worker.touched = True
        output = super().training_step(*args, **kwargs)
        loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
        if isinstance(loss, Tensor):
            worker.measured.note_loss(loss)
        if not self._automatic:
            self._average_buffers()
            if self._optimizer_stepped:
                self._end_step()
        return output

    def _restart(self) -> None:
        """Set the clock back to a checkpoint's, and with it whether gradients are averaged."""
        assert self.lightning_module is not None
        resumed = self._resumed
        clock = Clock(self.schedule, self.workers, resumed.get("clock"))
        old = self.worker.measured
        measured = Measured(old.needs, resumed.get("measured"), fastest=self._pace is not None, watched=old.watched)
        self.worker.restart(clock, measured, resumed.get("landing", {}))
        if self._pacing is not None:
            self._pacing.restart()
        self.rest.restart()
        self._drop_reducer()
        self._reduces_all = True

    def _leave_reducer(self) -> bool:
        """From the first round on that averages models the reducer of all ranks goes; return whether it has just gone.

        It does not come back.
        """
        goes = self.worker.clock.averages_models and self._reduces_all
        if goes:
            self._drop_reducer()
            self._reduces_all = False
        return goes

    def _drop_reducer(self) -> None:
        assert self.lightning_module is not None
        self.model = self.lightning_module
        self._unreduced = list(self.model.parameters())  # parameters whose gradients no reducer averages yet

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._worker is not None:
            self._worker.heed()
        return super().validation_step(*args, **kwargs)

    def _reduce_gradients(self) -> None:
        """See that the gradients of all parameters are averaged: at the first step, and when some were unfrozen."""
        if any(parameter.requires_grad for parameter in self._unreduced):
            self._unreduced = [parameter for parameter in self._unreduced if not parameter.requires_grad]
            if not self.worker.alone:
                assert self.lightning_module is not None
                if "init_sync" not in self._ddp_kwargs:  # an older torch: the reducer's constructor communicates
                    self.worker.ask(Want.STEP, detail=len(self._unreduced))
                self._ddp_kwargs["process_group"] = None if self._reduces_all else self.worker.group_inside
                self.model = self._setup_model(self.lightning_module)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        self._accumulating = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulating = False

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._automatic:
            self._average_buffers()
        return loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._optimizer_stepped = True  # also where a GradScaler has skipped the step: ranks must agree
        if self._automatic:
            self._end_step()
        return output

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._optimizer_stepped = True
        self.worker.optimizers.note_step(optimizer, rates=self.worker.landing.needs_rates)

    def _average_buffers(self) -> None:
        # In step with the gradients, where all ranks are: an optimizer step could be skipped by one of them.
        if self.worker.averages_gradients and not self._accumulating:
            self.worker.average_buffers()

    def _end_step(self) -> None:
        self._optimizer_stepped = False
        self.rest.note_step()
        self.worker.end_step()
        self._leave_reducer()
        if _lightning.is_last_batch(self._trainer):
            self.worker.end_last_step()

    def _at_consensus(self) -> None:
        for average in self._averages:
            average.follow()

    # What `_lightning.attach` calls at places that a strategy has no hook for.

    def has_loaders(self) -> None:
        if self._pace is not None:
            _lightning.require_one_loader(self._trainer)
        if self._fit is not None:
            self._fit.leave()  # whose hold on the loader is the outer one
        self.rest.follow()
        if self._fit is not None:
            self._fit.follow()

    def starts_epoch(self) -> bool:
        goes_on = self._fit is not None and self._fit.goes_on_in_epoch
        taken_up = self._fit is not None and self._fit.is_taken_up and not goes_on
        if self._fit is not None:
            self._fit.starts_epoch()
        if not self.rest.starts_epoch():
            return False
        if "steps_left" in self.schedule.needs:
            self._expected_steps = self.worker.clock.step + _lightning.steps_left(self._trainer, self.rest.ahead)
        decision = self.worker.ask(Want.EPOCH)
        if not self.worker.clock.averages_models:
            self._require_no_lbfgs()
        if self._pacing is not None:
            self._pacing.starts_epoch(decision.step, goes_on, taken_up)
            if "steps_left" in self.schedule.needs:  # which depend on the shares of this epoch
                self._expected_steps = decision.step + _lightning.steps_left(self._trainer)
        if decision.want is Want.OVER:
            rank_zero_warn(
                f"Some ranks have ended their fit at step {decision.step} while rank {decision.askers[0]} would go on "
                "with another epoch: all end their fit here."
            )
        return decision.want is Want.EPOCH

    def finds_its_place(self) -> bool:
        return self.rest.goes_on or (self._fit is not None and self._fit.finds_its_place)

    def starts_batches(self) -> None:
        if self._fit is not None:
            self._fit.starts_batches()
        if self._pacing is not None:
            self._pacing.starts_batches()

    def before_batch(self) -> bool:
        worker = self.worker
        self.rest.before_batch()
        if self._fit is not None and not self._fit.before_batch():
            self._end_due_round()
            return False
        worker.heed()
        if worker.hears_of_signals and not self._step_is_open:  # else another rank may be waiting for its gradients
            worker.ask(Want.SIGNAL)
        if self._pacing is not None:
            self._pacing.before_batch()
        self.rest.begins_batch()
        return True

    def after_batch(self) -> None:
        if not self.worker.round_is_due:
            return
        if self._fit is not None:
            self._fit.ends_batch = True
        self.worker.ask(Want.SIGNAL)
        self._end_due_round()
        if self._fit is not None:
            self._fit.ends_batch = False

    def _end_due_round(self) -> None:
        if self.worker.round_is_due:
            self.worker.end_round()
            if self._pacing is not None:
                self._pacing.follow()

    def ends_epoch(self) -> None:
        self.rest.ends_epoch()
        if self._fit is not None:
            self._fit.ends_epoch()
        step = self.worker.end_pass()
        if self._pacing is not None:
            self._pacing.ends_epoch(step)
        self._step_is_open = False
        if self.worker.validation_is_due:
            self.worker.validation_is_due = False
            _lightning.validate_now(self._trainer)
        if self._fit is not None:
            self._fit.waits = False

    def validates(self, run: Callable[[], Any]) -> Any:
        if not self._running:  # the sanity check
            return run()
        if self.worker.validation_is_due:
            return []
        decision = self.worker.ask(Want.VALIDATE)
        if not decision.unanimous:
            return []
        with self.worker.holding_consensus(decision.weights):
            if self._fit is None:
                return run()
            self._fit.validates = True
            try:
                return run()
            finally:
                self._fit.validates = False

    def checks_validation(self, check: Callable[[], bool]) -> bool:
        return check() if self._pacing is None else self._pacing.checks_validation()

    def steps_schedulers(self, step: Callable[[], None], interval: str, plateau: bool) -> None:
        if self._pacing is None:
            step()
        else:
            self._pacing.steps_schedulers(step, interval, plateau)

    def ends_fit(self) -> None:
        self.worker.ask(Want.OVER)
        if self._pacing is not None:
            self._pacing.follow()

    def ends_untrained(self) -> None:
        if self._part is not None and self._is_set_up and not self._running:  # own replicas, which no round will end
            self.ends_fit()
            self.worker.leave()

    def has_data_somewhere(self, here: bool) -> bool:
        return self.reduce_boolean_decision(here, all=False)

    def receives(self, signals: int) -> None:
        self._signals.receive(signals)

    def _act_on_signals(self, signals: int) -> None:
        is_saved = self._signals.has_acted_on(REQUEUE)
        self._signals.acted_on(signals)
        _lightning.act_on(self._trainer, signals, is_saved)

    def on_train_end(self) -> None:
        super().on_train_end()
        # A callback that keeps an average of this worker's own weights writes it into the module in its `on_train_end`,
        # after the last average.
        self.worker.leave()
        self._running = False

    # ------------------------------------------------------------------------------------------ consensus, checkpoints

    @contextmanager
    def consensus(self) -> Generator[None, None, None]:
        """Within it the module holds the mean of all replicas; after it, its own weights again, bit for bit.

        What is written into a buffer inside stays; what is written into a parameter does not. It may be nested. All
        ranks enter it together. Outside of ``fit`` all replicas are equal and nothing happens.

        Example:
            In a callback: ``with trainer.strategy.consensus(): torch.save(pl_module.state_dict(), path)``
        """
        if not self._communicates:
            yield
            return
        with self.worker.consensus():
            yield

    def synchronize(self) -> None:
        """End the round now: all workers average their models and start the next round.

        Call it on all ranks, between steps (not inside ``training_step``). Outside of ``fit`` nothing happens.

        Raises:
            RuntimeError: inside :meth:`consensus` or validation.
        """
        if not self._communicates:
            return
        if self.worker.inside_consensus:
            raise RuntimeError("`synchronize` cannot be called inside `consensus()` or validation.")
        self.worker.synchronize()

    def listen(
        self,
        on_round: Callable[[Round], None],
        on_spread: Callable[[Spread], None] | None = None,
        *,
        moves: bool = False,
        every: int = 1,
    ) -> None:
        """Call ``on_round`` with each round of the fit that is being set up, when it has ended, on this worker.

        Call it on all ranks alike, in a callback's ``setup``; it lasts until the fit is torn down. What is called may
        keep what it hears and must not communicate.

        Args:
            on_round: hears of the round.
            on_spread: hears how far the replicas had moved apart, one round late, or at the end of the fit; measuring
                it takes a look at each element in an average. Not called for one worker, or while gradients are
                averaged.
            moves: whether that includes how far they moved from the anchor, which is a copy of the model.
            every: in how many steps that is measured once, at least 1: in the first round that begins in each such
                stretch. The least that any listener wants counts.

        Raises:
            ValueError: if ``every`` is not an int of at least 1, or nobody hears what it and ``moves`` are for.
            RuntimeError: where the model is set up already.

        Example:
            ``trainer.strategy.listen(lambda round: print(round.number, round.share))``
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an int of at least 1, got {every!r}.")
        if on_spread is None and (moves or every != 1):
            raise ValueError(f"`moves` and `every` have no effect without `on_spread`, got {moves!r} and {every!r}.")
        if self._is_set_up or self._worker is not None:
            raise RuntimeError("`listen` must be called before the model is set up, as in a callback's `setup`.")
        self._listeners.append(Listener(on_round, on_spread, moves, every))

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="Parallel restarted SGD")


class LocalSGDStrategy(LocalSGD, DDPStrategy):  # noqa: D101
    __doc__ = LocalSGD.__doc__  # LightningCLI looks for it here
    _made_for = "`lightning`; for `pytorch_lightning` take `lightning_localsgd.pytorch_lightning.LocalSGDStrategy`"


def _ddp_options() -> dict[str, Any]:
    """Return how gradients are averaged: whatever a module uses of itself; buffers and the first model are ours."""
    known = inspect.signature(DistributedDataParallel).parameters
    options = {"find_unused_parameters": True}
    options |= {"init_sync": False} if "init_sync" in known else {}  # of newer torch: send no model
    since_2_13 = "forward_sync_buffers" in known
    return options | {"forward_sync_buffers" if since_2_13 else "broadcast_buffers": False}
