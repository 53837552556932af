"""Writes the model card and prepares a model for upload to the Hub."""

from pathlib import Path

from trl.trainer.utils import get_config_model_id

from ..cue_recovery import CueRecoveryConfig
from ..hub.local_traces import ignore_training_files, remove_local_base_model
from ..hub.model_card import complete_model_card, measured_metrics
from ..hub.names import hub_dataset_name, hub_model_name
from .checkpoints import active_adapter_config, adapter_type, forget_best_checkpoint
from .training_settings import training_settings
from .trl_trainer import TRLTrainer


class PublishingMixin(TRLTrainer):
    """Writes a card that shows how to load the model and how it was trained, and keeps local paths off the Hub."""

    @property
    def _output_dir(self) -> str:
        assert self.args.output_dir is not None  # the configuration fills in a default
        return self.args.output_dir

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        dataset_name = hub_dataset_name(self.train_dataset, dataset_name)
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        peft_config = active_adapter_config(self.model)
        is_recovery = isinstance(peft_config, CueRecoveryConfig)
        if is_recovery:
            names = ("layer_interval", "sink_token", "r", "train_base")
            what_trains: dict[str, object] = {f"`{name}`": getattr(peft_config, name) for name in names}
        else:
            what_trains = {"trained": "all weights" if peft_config is None else adapter_type(peft_config)}
        complete_model_card(
            str(Path(self._output_dir, "README.md")),
            model_name=model_name,
            model_id=self.hub_model_id or self.args.hub_model_id,
            base_model=hub_model_name(get_config_model_id(self.model.config)),
            dataset_name=dataset_name,
            settings=training_settings(self.args, self.teacher.description, what_trains),
            measured=measured_metrics(self.state.log_history),
            max_model_len=min(16384, self.model.config.get_text_config().max_position_embeddings),
            is_adapter=peft_config is not None,
            is_recovery=is_recovery,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        output_dir = self._output_dir if output_dir is None else output_dir
        if self.is_world_process_zero():
            ignore_training_files(output_dir)
            self.complete_model(output_dir, self.hub_model_id)

    def complete_model(self, directory: str, model_id: str | None = None, tags: list[str] | None = None) -> None:
        """
        Prepare a saved model for upload: remove local paths, and replace the empty card written by PEFT or
        transformers with the trainer's.

        Args:
            directory (`str`):
                Where the model is saved.
            model_id (`str`, *optional*):
                Its id on the Hub.
            tags (`list[str]`, *optional*):
                Further tags for the card.
        """
        remove_local_base_model(directory)
        hub_model_id, self.hub_model_id = self.hub_model_id, model_id
        try:
            name = Path(model_id or self.args.hub_model_id or self._output_dir).name
            self.create_model_card(model_name=name, tags=tags)
        finally:
            self.hub_model_id = hub_model_id
        card = Path(self._output_dir, "README.md").read_bytes()
        Path(directory, "README.md").write_bytes(card)

    def init_hf_repo(self, *args, **kwargs) -> None:  # transformers 5.16 has no `private` yet
        super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            ignore_training_files(self._output_dir)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero():
            forget_best_checkpoint(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)
