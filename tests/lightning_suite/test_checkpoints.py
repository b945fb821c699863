"""Which checkpoint files there are, what is in them, and how a run goes on from them."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from tests.lightning_suite.compare import catch, loader, same_as_ddp
from tests.lightning_suite.recorder import WithData, recorded
from tests.models import Regression, rank, state_of, trainer
from tests.versions import since

KEY = "lightning_localsgd"  # what ours adds to a checkpoint


class Scored(WithData):
    """Logs scores known on paper: the validation score falls, then rises."""

    def training_step(self, batch, batch_idx):
        self.log("train_score", float(batch_idx % 3 + rank()), sync_dist=True, on_step=False, on_epoch=True)
        self.log("step", float(self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.log("score", float(abs(self.trainer.global_step - 8)), sync_dist=True)


def files(setting):
    return sorted(str(file.relative_to(setting.path)) for file in setting.path.rglob("*") if not file.is_dir())


def contents(setting):
    """Return what is in each file, but for our own entry, which only ours has."""
    seen = {}
    for name in files(setting):
        if name.endswith(".ckpt"):
            checkpoint = torch.load(setting.path / name, weights_only=True)
            assert (KEY in checkpoint) == (setting.period is not None)
            checkpoint.pop(KEY, None)
            seen[name] = {key: _without_paths(value, setting) for key, value in checkpoint.items()}
    return seen


def _without_paths(value, setting):
    if isinstance(value, dict):
        return {_without_paths(key, setting): _without_paths(item, setting) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item, setting) for item in value]
    return value.replace(str(setting.path), "PATH") if isinstance(value, str) else value


def chosen(callback, setting):
    return [
        callback.best_model_path.replace(str(setting.path), ""),
        callback.last_model_path.replace(str(setting.path), ""),
        {path.replace(str(setting.path), ""): str(score) for path, score in callback.best_k_models.items()},
    ]


@same_as_ddp
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ({}, {}),
        ({"monitor": "score", "save_top_k": 2, "mode": "min"}, {"max_epochs": 4}),
        ({"monitor": "score", "save_top_k": 2, "mode": "max"}, {"val_check_interval": 2}),
        ({"monitor": "train_score", "save_on_train_epoch_end": True}, {}),
        ({"monitor": "step", "every_n_train_steps": 2, "mode": "max", "save_top_k": 2}, {}),
        ({"every_n_train_steps": 3, "save_top_k": -1}, {}),
        ({"every_n_epochs": 2, "save_top_k": -1, "filename": "{epoch}-{step}-{score:.0f}"}, {"max_epochs": 4}),
        ({"save_last": True, "every_n_train_steps": 3}, {"max_steps": 5}),
        ({"save_last": "link", "save_top_k": -1}, {}),
        ({"save_last": True, "save_top_k": 0}, {}),
        ({"save_weights_only": True}, {}),
        ({"monitor": "score", "save_top_k": 1, "enable_version_counter": False, "filename": "best"}, {"max_epochs": 3}),
        ({}, {"max_steps": 3, "accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_files(setting, checkpoint, options):
    callback = ModelCheckpoint(setting.path / "checkpoints", **checkpoint)
    trainer = setting.trainer(callbacks=[callback], enable_checkpointing=True, **options)
    model = Scored("momentum")
    trainer.fit(model)
    trainer.strategy.barrier()
    seen = {"files": files(setting), "contents": contents(setting), "chosen": chosen(callback, setting)}
    trainer.strategy.barrier()
    return seen | {"step": trainer.global_step, "model": state_of(model)}


@same_as_ddp
@pytest.mark.filterwarnings("ignore:.*makes the workers wait for each other at every training step")  # as it does
def test_train_time_interval(setting):
    callback = ModelCheckpoint(setting.path, train_time_interval=timedelta(seconds=0), save_top_k=-1)
    setting.trainer(callbacks=[callback], enable_checkpointing=True).fit(Scored())
    return files(setting)


@same_as_ddp
def test_monitor_that_is_never_logged(setting):
    callback = ModelCheckpoint(setting.path, monitor="nowhere")
    return catch(setting.trainer(callbacks=[callback], enable_checkpointing=True).fit, Scored())


@same_as_ddp
@pytest.mark.parametrize(("name", "steps"), [("sgd", 3), ("adamw", 2), ("adamw", 3), ("adamw", 4), ("adamw", 6)])
def test_resume(setting, name, steps):
    before = recorded(optimizer=name)[0]
    trainer = setting.trainer(max_steps=steps)
    trainer.fit(before)
    path = setting.path / "here.ckpt"
    trainer.save_checkpoint(path)

    model, callback, calls = recorded(optimizer=name)
    trainer = setting.trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(model, ckpt_path=path)
    straight = recorded(optimizer=name)[0]
    setting.trainer(max_epochs=3).fit(straight)
    seen = {"calls": calls, "step": trainer.global_step, "epoch": trainer.current_epoch, "model": state_of(model)}
    return seen | {"straight": state_of(straight), "contents": contents(setting)}


@same_as_ddp
def test_checkpoint_of_one_strategy_goes_on_with_another(setting):
    path = setting.path / "here.ckpt"
    first = setting.trainer(max_steps=4)
    first.fit(Regression("momentum"), loader(), loader(1))
    first.save_checkpoint(path)
    model = Regression("momentum")
    second = trainer(2, DDPStrategy(), max_epochs=2, use_distributed_sampler=True)
    second.fit(model, loader(), loader(1), ckpt_path=path)
    return {"step": second.global_step, "model": state_of(model)}


@same_as_ddp
def test_module_is_loaded_without_a_strategy(setting):
    callback = ModelCheckpoint(setting.path, every_n_train_steps=3, filename="{step}", save_top_k=-1)
    model = WithData("adamw")
    model.save_hyperparameters({"optimizer": "adamw"})
    run = setting.trainer(callbacks=[callback], enable_checkpointing=True)
    run.fit(model)
    run.strategy.barrier()
    loaded = WithData.load_from_checkpoint(setting.path / "step=6.ckpt", weights_only=True)
    with torch.no_grad():
        outputs = loaded.net(torch.ones(1, 6))
    return {"name": loaded.name, "model": state_of(loaded), "outputs": outputs}


@same_as_ddp
def test_evaluation_of_a_checkpoint(setting):
    callback = ModelCheckpoint(setting.path, monitor="score", filename="{step}", save_last=True)
    model = Scored()
    run = setting.trainer(callbacks=[callback], enable_checkpointing=True, max_epochs=4)
    run.fit(model)
    seen = [run.validate(model, ckpt_path=path, verbose=False) for path in ("best", "last")]
    seen += [run.test(model, ckpt_path=path, verbose=False) for path in ("best", "last")]
    seen.append(run.predict(model, ckpt_path="best"))
    fresh = setting.trainer(callbacks=[ModelCheckpoint(setting.path, monitor="score")], enable_checkpointing=True)
    seen.append(fresh.validate(Scored(), ckpt_path=callback.best_model_path, verbose=False))
    return {"seen": seen, "best": callback.best_model_path.replace(str(setting.path), ""), "model": state_of(model)}


@same_as_ddp
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the second run adds to it
def test_early_stopping_and_checkpoint_resume_together(setting):
    callbacks = [EarlyStopping("score", patience=1), ModelCheckpoint(setting.path, monitor="score", save_last=True)]
    run = setting.trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
    run.fit(Scored())
    again = [EarlyStopping("score", patience=1), ModelCheckpoint(setting.path, monitor="score", save_last=True)]
    model = Scored()
    run = setting.trainer(callbacks=again, enable_checkpointing=True, max_epochs=8)
    run.fit(model, ckpt_path="last")
    seen = {"stopped": again[0].stopped_epoch, "waited": again[0].wait_count, "best": float(again[0].best_score) == 0}
    return seen | {"files": files(setting), "step": run.global_step, "model": state_of(model)}


class Fails(WithData):
    """Fails on all ranks at the same step."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise ArithmeticError("on purpose")
        return super().training_step(batch, batch_idx)


@same_as_ddp
@pytest.mark.filterwarnings("ignore:.*ckpt_path=None")  # Lightning looks for a last checkpoint,
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")  # and finds none
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", pytest.param("save_on_exception", marks=since("2.5.3"))])
def test_checkpoint_on_exception(setting, kind):
    if kind == "OnExceptionCheckpoint":
        callback = OnExceptionCheckpoint(setting.path)
    else:
        callback = ModelCheckpoint(setting.path, save_on_exception=True)
    run = setting.trainer(callbacks=[callback], enable_checkpointing=True)
    error = catch(run.fit, Fails())
    torch.distributed.barrier()  # ours makes no collective on the way out with an exception
    # Where rank 0 alone saves with DDP, with ours each rank does that raises, under a name of its own.
    mine = f"-rank{rank()}"
    names = sorted({name.replace(mine, "") for name in files(setting) if mine in name or "-rank" not in name})
    return {"error": error, "files": names, "initialized": torch.distributed.is_initialized()}


@same_as_ddp
def test_save_checkpoint_by_hand(setting):
    model = WithData("momentum")
    run = setting.trainer()
    path = setting.path / "early.ckpt"
    early = catch(run.save_checkpoint, path)
    model.on_train_batch_end = lambda *_: run.save_checkpoint(
        setting.path / f"{run.global_step}.ckpt", weights_only=True
    )
    run.fit(model)
    run.save_checkpoint(setting.path / "late.ckpt")
    return {"early": early, "files": files(setting), "contents": contents(setting), "model": state_of(model)}
