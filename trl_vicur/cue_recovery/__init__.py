from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    # `register_peft_method` (PEFT#2282) needs a member of the enum `PeftType`, and PEFT has no way for another package
    # to add one (PEFT#2273 asks for it)
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)


_add_peft_type("CUE_RECOVERY")

from .attention import SinkCrossAttention  # noqa: E402
from .config import CueRecoveryConfig  # noqa: E402  (the config names the new PeftType)
from .inspection import record_update_ratios, sink_attention  # noqa: E402
from .layer import CueRecoveryContext, CueRecoveryLayer  # noqa: E402
from .model import CueRecoveryModel  # noqa: E402


__all__ = [
    "CueRecoveryConfig",
    "CueRecoveryContext",
    "CueRecoveryLayer",
    "CueRecoveryModel",
    "SinkCrossAttention",
    "record_update_ratios",
    "sink_attention",
]
register_peft_method(name="cue_recovery", config_cls=CueRecoveryConfig, model_cls=CueRecoveryModel)
