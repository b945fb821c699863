"""The few places where we must touch what Lightning keeps private.

A strategy has no hook at the end of an epoch, before validation, or at the end of the fit before the callbacks; and
Lightning sends a broadcast before every batch. So methods of one trainer's loops and callbacks are wrapped while it
fits: never a class, always undone. Without one of them a Lightning is refused, or what is lost is warned about; and
`tests/test_lightning.py` fails when one is no longer called.
"""

from lightning_localsgd._lightning.callbacks import Average as Average
from lightning_localsgd._lightning.callbacks import attach_callbacks as attach_callbacks
from lightning_localsgd._lightning.loops import act_on as act_on
from lightning_localsgd._lightning.loops import after_saves as after_saves
from lightning_localsgd._lightning.loops import attach as attach
from lightning_localsgd._lightning.loops import end_with as end_with
from lightning_localsgd._lightning.loops import tell_of_loaders as tell_of_loaders
from lightning_localsgd._lightning.loops import validate_now as validate_now
from lightning_localsgd._lightning.loops import with_default_io as with_default_io
from lightning_localsgd._lightning.pacing import Pacing as Pacing
from lightning_localsgd._lightning.pacing import require_one_loader as require_one_loader
from lightning_localsgd._lightning.stages import Stage as Stage
from lightning_localsgd._lightning.stages import accumulates as accumulates
from lightning_localsgd._lightning.stages import batches as batches
from lightning_localsgd._lightning.stages import begins_next_epoch as begins_next_epoch
from lightning_localsgd._lightning.stages import epoch as epoch
from lightning_localsgd._lightning.stages import fetched as fetched
from lightning_localsgd._lightning.stages import forget_resuming as forget_resuming
from lightning_localsgd._lightning.stages import forgotten as forgotten
from lightning_localsgd._lightning.stages import in_epoch as in_epoch
from lightning_localsgd._lightning.stages import is_last_batch as is_last_batch
from lightning_localsgd._lightning.stages import is_validated as is_validated
from lightning_localsgd._lightning.stages import iterators as iterators
from lightning_localsgd._lightning.stages import limit_is_reached as limit_is_reached
from lightning_localsgd._lightning.stages import loaders as loaders
from lightning_localsgd._lightning.stages import logged_step as logged_step
from lightning_localsgd._lightning.stages import own_state as own_state
from lightning_localsgd._lightning.stages import put_between_batches as put_between_batches
from lightning_localsgd._lightning.stages import set_batches as set_batches
from lightning_localsgd._lightning.stages import set_sampler_epochs as set_sampler_epochs
from lightning_localsgd._lightning.stages import stage as stage
from lightning_localsgd._lightning.stages import steps_ahead as steps_ahead
from lightning_localsgd._lightning.stages import steps_left as steps_left
from lightning_localsgd._lightning.stages import take_up_batch as take_up_batch
from lightning_localsgd._lightning.stages import take_up_batches as take_up_batches
from lightning_localsgd._lightning.stages import take_up_epoch_end as take_up_epoch_end
from lightning_localsgd._lightning.stages import train_on as train_on
