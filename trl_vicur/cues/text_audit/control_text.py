"""Does a cue contain text that steers a model instead of describing an image?"""

import re


# Names of special tokens in chat and vision formats that have no bars (|). An explicit list, because other text in
# angle brackets may be a visible label (<OK>), markup (<div>) or mathematics (⟨u, v⟩).
TOKEN_NAMES = (
    r"s|bos|eos|pad|unk|mask|image|images|img|video|audio|think|thinking|answer|tool_call|tool_response|tools|boi|eoi"
    r"|image_pad|video_pad|image_start|image_end|vision_start|vision_end|start_of_turn|end_of_turn|start_of_image"
    r"|end_of_image|image_soft_token|audio_soft_token|img_context|image_placeholder|im_start|im_end|im_patch"
    r"|image_token|image_newline|end_of_utterance|fake_token_around_image|row_\d+_col_\d+|global-img|sep|cls"
    r"|begin_of_text|end_of_text|endoftext|eod|eot|fim_prefix|fim_middle|fim_suffix|box|ref|quad|grounding|seg\d+"
    r"|loc\d+|patch_index_\d+|extra_id_\d+|unused\d+|reserved_special_token_\d+|system|user|assistant|human|bot"
    r"|instruction"
)
CONTROL_TOKEN = re.compile(
    # <|im_end|>, <|begin▁of▁sentence|>; absolute values (<|x|>) are shorter
    r"<\|\s?/?[a-z][\w▁:./-]{2,40}\s?\|>|<\|\s?[a-z][\w▁]{2,40}\s?>|<[a-z][\w▁]{2,40}\s?\|>"
    rf"|</?(?:{TOKEN_NAMES})(?:_?\d{{1,4}})?\s?/?>"
    r"|\[/?(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG|IMG_BREAK|IMG_END|THINK|PAD|CLS|SEP"
    r"|MASK|UNK|BOS|EOS|gMASK)\]|<</?SYS>>|\bim_(?:start|end)\b"
    # A role header at the start of a line, plain, bold or as a heading
    r"|^[ \t#*>_-]{0,6}(?:system|user|assistant|human|chatgpt|gpt|ai assistant)[*_]{0,2}\s?:"
    r"|^#{2,4} ?(?:system|user|assistant|human|instructions?|response|input|output)\b[ \t]*:?[ \t]*$"
    r"|^(?:system|user|assistant)[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)

# Nouns of instructions that address the model. A sign ("Do not enter") addresses people and is not matched.
INSTRUCTION_NOUN = (
    r"(?:above|previous|prior|preceding|earlier|foregoing|instructions?|prompts?|directions?|context|guidelines|rules"
    r"|everything|anything|all (?:of )?(?:this|that|the)|question|image|picture|hints?|constraints|training)"
)
INSTRUCTION = re.compile(
    rf"(?<!\w)(?:(?:ignore|disregard|forget|override|overrule|bypass|discard|skip|do not (?:follow|obey)"
    rf"|don't (?:follow|obey)|stop following|pay no attention to)\b[^.!?\n]{{0,40}}?\b{INSTRUCTION_NOUN}\b"
    r"|you are (?:now|no longer|an? (?:\w+\s){0,3}(?:assistant|ai|model|chatbot|bot))\b"
    r"|you(?:r| must| should| will)(?: \w+)? (?:answer|respond|reply|output|say|obey|pretend|ignore"
    r"|task is|role is|instructions are|reveal)\b"
    r"|(?:system|hidden|developer|initial) prompt\b|(?:reveal|print|repeat|leak|show|output|tell me) your "
    r"(?:\w+ )?(?:prompt|instructions|rules|guidelines|secrets?)\b|pretend (?:to be|that you|you)\b|roleplay\b"
    r"|as an ai\b|jailbreak|(?:developer|god|debug|admin|dan) mode\b|from now on\b"
    r"|new (?:instructions?|task|rules)\s?:|end of (?:prompt|hint)"
    r"|(?:reply|respond|answer) (?:only|just|exactly|nothing but)\b|(?:only|just|simply|always) (?:reply|respond)\b"
    r"|(?:dear|to the|hey|attention,?) (?:model|ai|llm|language model)\b|the model (?:should|must|has to)\b)",
    re.IGNORECASE,
)
# At the start of a sentence or clause
ORDER = re.compile(
    r"(?:^|[.!?:;,\n]\s?|\b(?:and|then|please|now|must|should|only|just|simply|always) )(?:"
    r"(?:reply|respond|answer|output|say|write down|print out) (?:with|in|as|that|only|['\"]|\d|yes\b|no\b)"
    r"|(?:act|behave) as (?:if you|an?\b))"
    r"|(?:^|[.!?:;\n]\s?|\bplease )(?:do not|don't|never) (?:describe|mention|answer|use|look|tell|reveal|explain"
    r"|respond)\b",
    re.IGNORECASE,
)


# Tag characters can spell whole invisible prompts, and text-direction overrides can disguise text. Folding removes
# both, so search for them before folding.
HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\U000e0020-\U000e007e]")


def find_hidden_text(cue: str) -> list[str]:
    """One sentence if the cue, before folding, contains characters that hide text; otherwise an empty list."""
    if match := HIDDEN.search(cue):
        return [f"the cue holds the hidden character U+{ord(match[0]):04X}"]
    return []


def find_control_text(cue: str) -> list[str]:
    """
    Find control tokens in a cue, and text that addresses the model.

    Args:
        cue (`str`):
            The cue, folded by [`fold_text`], so that tokens disguised with invisible or full-width characters are
            found, too.

    Returns:
        `list[str]`: One sentence for each kind, which quotes its first match; empty if there is none.
    """
    reasons = []
    if match := CONTROL_TOKEN.search(cue):
        reasons.append(f"the cue holds the control token or role header {match[0].strip()!r}")
    if match := INSTRUCTION.search(cue) or ORDER.search(cue):
        reasons.append(f"the cue speaks to the model: {match[0].strip()!r}")
    return reasons
