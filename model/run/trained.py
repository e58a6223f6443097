"""A trained model on disk."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrec.distributed import DistributedModelParallel

from model.bert4rec import BERT4Rec
from model.checkpoints.checkpoints import PORTABLE, Checkpoints
from model.checkpoints.export import Trained
from model.checkpoints.exported import WEIGHTS, check_catalog, check_exported, load_exported
from model.checkpoints.manifest import read_manifest
from model.distributed import ALONE, Ranks, raise_on_all
from model.run.build import (
    WHOLE_TABLE_BYTES,
    build_model,
    build_plain_model,
    item_attributes,
    num_attributes,
    weightless_model,
)
from model.run.config_file import (
    lasting_flags,
    read_config,
    read_num_attributes,
    read_span,
)
from model.run.execution import plan_execution
from model.run.resumed import recorded_config
from model.settings.config import EvalFlags, RunConfig
from model.settings.flags import build, current_flags
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.times import ItemTimes
from pipeline.errors import UserError
from pipeline.preparation.catalog import FILES, Catalog
from pipeline.preparation.parts import LEAVE_ONE_OUT
from pipeline.preparation.store import SequenceStore
from pipeline.remote import is_url
from pipeline.sources.config import expanded

USERS = FILES[1]
_MOST_LAYERS = 1000  # more would take minutes to build, also without weights


class TrainedRun:
    """A run folder with checkpoints, or an exported model."""

    def __init__(self, flags: EvalFlags) -> None:
        self.folder, self._given = Path(flags.checkpoint), flags
        self._recorded = read_config(self.folder)
        folders = (self.folder, self.folder / PORTABLE)
        self._exported = next((each for each in folders if (each / WEIGHTS).exists()), None)
        self._num_items = self._recorded["num_items"]
        self._step: int | None = None  # of the best checkpoint, once :meth:`_best` chose it
        self.span = read_span(self._recorded)  # None: the model reads no times
        # An exported model has none: its items' rows are sums.
        self._num_attributes = 0 if self._exported else read_num_attributes(self._recorded)
        settings = dict(self._recorded["flags"])
        given = ("dataset_path", "items_path", "cache_dir", "metrics_at")
        settings |= {name: value for name in given if (value := getattr(flags, name))}
        if settings.get("split_path") and flags.dataset_path:  # the same ratings elsewhere
            settings |= {"split_path": flags.dataset_path, "dataset_path": ""}
        if flags.seen != "trained":
            settings["seen"] = flags.seen
        if flags.batch_size:
            settings |= dict.fromkeys(("val_batch_size", "test_batch_size"), flags.batch_size)
        try:
            self.config = build(RunConfig, current_flags(RunConfig, settings))
        except UserError as error:
            raise UserError(f"{self.folder / 'config.json'}: {error}") from error
        if flags.targets != "trained":
            self.config = self._with_targets(flags.targets)
        if flags.split == "validation" and self.config.windows.train_on_validation:
            raise UserError(
                f"{self.folder} was trained on the validation items (--train_on_validation): only "
                "--split test can evaluate it"
            )

    def _with_targets(self, choice: str) -> RunConfig:
        if choice == "all" and self.config.data.split_by == LEAVE_ONE_OUT:
            raise UserError(
                f"--targets all: {self.folder} was trained with --split {LEAVE_ONE_OUT}, which "
                "holds out one item of a user for each split: leave it out"
            )
        return replace(self.config, holdout=replace(self.config.holdout, targets=choice))

    def trained_to(self, ranks: Ranks) -> dict[str, int]:
        """Step and epoch of the weights, as far as they are known; called on all ranks."""
        if self._exported is None:
            checkpoints = Checkpoints(self.folder, ranks)
            step = self._best(checkpoints)
            return {"step": step, "epoch": checkpoints.epoch(step)}
        recorded = read_config(self._exported)
        known = {name: recorded.get(name) for name in ("step", "epoch")}
        return {name: value for name, value in known.items() if type(value) is int}

    def check_places(self) -> None:
        """UserError unless the local files of ratings and items are where training read them."""
        flags = {"dataset_path": "dataset_path", "split_path": "dataset_path"}
        for name, flag in (flags | {"items_path": "items_path"}).items():
            path = getattr(self.config.data, name)
            if path and not is_url(path) and not os.path.lexists(expanded(name, path)):
                if getattr(self._given, flag):
                    raise UserError(f"no such file: {path} (--{flag}); check the path")
                raise UserError(
                    f"no such file: {path}, which {self.folder} was trained on: give it by --{flag}"
                )

    def check_catalog(
        self, store: SequenceStore, remedy: str = "give the ratings of training by --dataset_path"
    ) -> None:
        """Check that the data has the items that the model was trained on.

        Args:
            remedy: what the user should do where it has others.
        """
        if store.catalog_fingerprint != self._recorded["catalog"]:
            raise UserError(
                f"{self.folder} was trained on {self._num_items} items that are not the "
                f"{store.num_items} of this data: {remedy}"
            )

    def catalog(self) -> Catalog:
        """The items that the model was trained on."""
        check_catalog(self.folder)
        return Catalog.read(self.folder, self._recorded["catalog"])

    def other_protocol(self, config: RunConfig) -> dict[str, str]:
        """Keys of a result that ranks by another ``--seen`` or ``--targets`` than training did.

        Args:
            config: with a decided ``--seen``.
        """
        recorded, holdout = self._recorded["flags"], config.holdout
        found = {}
        if recorded.get("seen", holdout.seen) != holdout.seen:
            found["other_seen"] = holdout.seen
        if recorded.get("targets", "next") != holdout.targets:  # not in earlier versions
            found["other_targets"] = holdout.targets
        return found

    def other_ratings(self, store: SequenceStore) -> str | None:
        """Fingerprint of the data's ratings if they are not those of training, None if they are.

        Of their times, if the model reads these and only they differ.
        """
        ratings = store.ratings_fingerprint
        if self._differs(ratings=ratings, num_ratings=len(store.items)):
            return ratings
        if self.span is None:
            return None
        times = ItemTimes(store).fingerprint()
        return times if self._differs(rating_times=times) else None

    def _differs(self, **found: object) -> bool:
        """Whether config.json says otherwise; an earlier version may have recorded nothing."""
        return any(self._recorded.get(name, value) != value for name, value in found.items())

    def model(self, ranks: Ranks) -> DistributedModelParallel:
        """The trained model, sharded over the ranks; called on all of them."""
        config = self.config
        # Before the model is built: config.json may describe one of any size.
        weightless = self._weightless_model()
        if self._exported:
            self._check_exported(self._exported, weightless, ranks)
            if ranks.device.type != "cuda":  # a CPU has no UVM
                config = replace(config, sharding=replace(config.sharding, compute_kernel="fused"))
        else:
            checkpoints = Checkpoints(self.folder, ranks)
            step = self._best(checkpoints)
            checkpoints.check_fit(weightless, step)
            self._check_recorded(checkpoints.path(step))
        attributes = self._attributes()
        plan = plan_execution(config, self._num_items, ranks, num_attributes(attributes))
        sizes = config, self._num_items, ranks, plan
        model = build_model(*sizes, span=self.span, attributes=attributes)
        if not self._exported:
            checkpoints.load_weights(model, step)
            return model
        unusable = None
        try:
            is_first_of_host = ranks.rank % ranks.local_world_size == 0
            load_exported(self._exported, model, is_first_of_host)
        except UserError as error:
            unusable = error
        raise_on_all(ranks, unusable)
        return model

    def _best(self, checkpoints: Checkpoints, checks_bytes: bool = True) -> int:
        """Step of the best checkpoint, chosen once: a training that runs may write a better one."""
        if self._step is None:
            self._step = checkpoints.best_step(checks_bytes)
        return self._step

    def trained(self, ranks: Ranks) -> Trained:
        """The model to export: the exported one, else that of the best checkpoint; one rank."""
        if self._exported:
            recorded = read_config(self._exported)
            step, metrics = recorded.get("step", 0), recorded.get("metrics", {})
            self._check_exported(self._exported, self._weightless_model(), ranks)
            return Trained(
                self._tableless_model(),
                self._exported,
                step,
                metrics,
                folder=self._exported,
                users=self.folder,
                epoch=recorded.get("epoch", 0),
            )
        checkpoints = Checkpoints(self.folder, ranks)
        step = self._best(checkpoints, checks_bytes=False)  # the export does
        checkpoints.check_fit(self._weightless_model(), step)
        self._check_recorded(checkpoints.path(step))
        return Trained(
            self._tableless_model(),
            checkpoints.path(step),
            step,
            metrics={},
            folder=self.folder,
            users=self.folder,
            epoch=checkpoints.epoch(step),
            attributes=self._attributes(),
        )

    def check_users(self) -> None:
        """UserError unless the folder has the users' original ids."""
        if not (self.folder / USERS).exists():
            raise UserError(
                f"--with_users: {self.folder} has no {USERS}: give the run folder by --checkpoint"
            )

    def plain_model(self) -> BERT4Rec:
        """The exported model, unsharded on CPU."""
        if self._exported is None:
            raise UserError(f"{self.folder} has no exported model: training writes it when it ends")
        self._check_exported(self._exported, self._weightless_model(), ALONE)
        model = build_plain_model(self.config, self._num_items, ALONE, span=self.span)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(
                f"{self.folder} has a table of more than {WHOLE_TABLE_BYTES >> 30} GiB: too large "
                "to be held whole by a rank"
            )
        load_exported(self._exported, model)
        return model

    def _attributes(self) -> ItemAttributes | None:
        """The attributes of a checkpoint's items: those of the run's catalog."""
        if not self._num_attributes:
            return None
        attributes = item_attributes(self.config, self.catalog)
        if attributes is None or attributes.fingerprint() != self._recorded.get("attributes"):
            raise UserError(
                f"{self.folder} has other attributes of the items than the model was trained on: "
                f"restore {FILES[0]} and config.json, or train again"
            )
        return attributes

    def _tableless_model(self) -> BERT4Rec:
        sizes = self.config, self._num_items
        return build_plain_model(*sizes, ALONE, table_device="meta", span=self.span)

    def _weightless_model(self) -> BERT4Rec:
        try:
            if self.config.encoder.num_layers > _MOST_LAYERS:
                raise OverflowError(f"more than {_MOST_LAYERS:,} layers")
            sizes = self._num_items, self.span, self._num_attributes
            return weightless_model(self.config, *sizes)
        except (RuntimeError, TypeError, OverflowError) as error:  # more bytes than 2^63
            reason = str(error).splitlines()[0]
            path = self.folder / "config.json"
            raise UserError(
                f"{path} describes an impossible model ({reason}): restore it"
            ) from error

    def _check_exported(self, folder: Path, weightless: BERT4Rec, ranks: Ranks) -> None:
        """UserError unless ``folder`` has the weights of the run in ``self.folder``."""
        recorded = self._recorded if folder == self.folder else read_config(folder)
        if check_exported(folder, recorded, weightless) is None:
            ranks.warn(
                f"{folder} was exported by an earlier version: nothing proves that its weights "
                "belong to its config.json"
            )
        ended = f"delete {folder}, and --resume auto exports it again"
        self._check_lasting_flags(folder, recorded["flags"], ended)
        for name in ("catalog", "ratings"):
            mine, its = self._recorded.get(name), recorded.get(name)
            if None not in (mine, its) and mine != its:  # None: of an earlier version
                raise UserError(f"{folder} was trained on other data than {self.folder}: {ended}")

    def _check_recorded(self, checkpoint: Path) -> None:
        """UserError if config.json describes another model than its checkpoint was written with."""
        before = recorded_config(read_manifest(checkpoint))
        if before is not None:
            restore = f"restore {self.folder / 'config.json'}"
            self._check_lasting_flags(checkpoint, lasting_flags(before), restore)

    def _check_lasting_flags(self, path: Path, flags: Mapping[str, Any], remedy: str) -> None:
        """UserError unless the flags, recorded in ``path``, describe the run's model and data."""
        for name, value in lasting_flags(self.config).items():
            if flags.get(name, value) != value:
                raise UserError(
                    f"{path} was trained with --{name} {flags[name]}, {self.folder} with {value}: "
                    f"{remedy}"
                )
