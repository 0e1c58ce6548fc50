"""What of a directory goes up to a hub, its card, and the way there; nothing that is not a model's, and one commit.

Whether a directory may go up at all is asked in ``api``, where its certificate can be.
"""

from tunesmith.export.push.address import address_of, check_names, is_plain
from tunesmith.export.push.card import CardFacts, Say, a_tool_wrote, plain, problems_of, settings_of, write_card
from tunesmith.export.push.failures import explained
from tunesmith.export.push.files import (
    CARD_FILE,
    CERTIFICATE_FILE,
    Candidate,
    Survey,
    adapter_config_for_others,
    own_paths,
    survey,
)
from tunesmith.export.push.hub import push_to_hub
from tunesmith.export.push.licence import Licence, licence_of
from tunesmith.export.push.modelscope import push_to_modelscope
from tunesmith.export.push.records import LeftOut, Pushed, PushFile, PushPlan

__all__ = [
    "CARD_FILE",
    "CERTIFICATE_FILE",
    "Candidate",
    "CardFacts",
    "LeftOut",
    "Licence",
    "PushFile",
    "PushPlan",
    "Pushed",
    "Say",
    "Survey",
    "a_tool_wrote",
    "address_of",
    "check_names",
    "is_plain",
    "adapter_config_for_others",
    "explained",
    "licence_of",
    "own_paths",
    "plain",
    "problems_of",
    "push_to_hub",
    "push_to_modelscope",
    "settings_of",
    "survey",
    "write_card",
]
